"""Random projections: laws, statistics to five standard deviations, and frozen numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaveout.projection import (
    CountSketch,
    Rotation,
    hadamard_transform,
    orthogonal,
    random_bits,
    random_signs,
    sylvester,
)

from .conftest import assert_close

SIGMAS = 5


def vectors(size, seed=0):
    """Two vectors with a large inner product, some large entries and a common mean, which constant signs would show."""
    x, y = np.random.default_rng(seed).standard_t(4, (2, size)) + 1
    return x, x / 2 + y


def chi_square_is_uniform(counts):
    """Whether counts look uniform: the statistic has mean k - 1 and variance about 2 (k - 1)."""
    counts, k = np.asarray(counts, float), len(counts)
    expected = counts.sum() / k
    return abs(((counts - expected) ** 2 / expected).sum() - (k - 1)) < SIGMAS * math.sqrt(2 * (k - 1))


def uncorrelated(a, b):
    """Whether two +-1 sequences agree about half of the time."""
    return abs(float((a * b).sum())) < SIGMAS * math.sqrt(len(a))


def uniform_problems(sketch):
    """What is wrong with the tables of a CountSketch."""
    buckets, signs = sketch.buckets.numpy(), sketch.signs.numpy()
    pairs = buckets[:-1] * sketch.width + buckets[1:]
    checks = {
        "signs are +-1": set(np.unique(signs)) == {-1.0, 1.0},
        "signs balance": uncorrelated(signs, np.ones_like(signs)),
        "neighbours' signs": all(uncorrelated(signs[:-lag], signs[lag:]) for lag in (1, 2, 3, 64)),
        "buckets": chi_square_is_uniform(np.bincount(buckets, minlength=sketch.width)),
        "signs within buckets": chi_square_is_uniform(
            np.bincount(2 * buckets + (signs > 0), minlength=2 * sketch.width)
        ),
        "neighbours' buckets": chi_square_is_uniform(np.bincount(pairs, minlength=sketch.width**2)),
    }
    return [name for name, passed in checks.items() if not passed]


@pytest.mark.parametrize("width", [2, 24, 64, 100])
def test_countsketch_tables_are_uniform_and_independent(width):
    sketches = [CountSketch.make(60_000, width, seed, stream) for seed, stream in itertools.product((0, 1), ("h", "g"))]
    for sketch in sketches:
        assert uniform_problems(sketch) == []
    for a, b in itertools.combinations(sketches, 2):
        assert uncorrelated(a.signs.numpy(), b.signs.numpy())
        both = (a.buckets * width + b.buckets).numpy()
        assert chi_square_is_uniform(np.bincount(both, minlength=width**2))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda buckets, signs: (buckets, torch.ones_like(signs)), "signs balance"),
        (lambda buckets, signs: (buckets, 1.0 - 2.0 * (buckets % 2)), "signs within buckets"),
        (lambda buckets, signs: (torch.arange(len(buckets)) % 64, signs), "neighbours' buckets"),
        (
            lambda buckets, signs: (buckets, signs[0].repeat(len(signs)) * (-1) ** torch.arange(len(signs))),
            "neighbours",
        ),
    ],
)
def test_uniformity_checks_notice_bad_tables(damage, problem):
    good = CountSketch.make(60_000, 64, 0, "h")
    assert problem in " ".join(uniform_problems(CountSketch(*damage(good.buckets, good.signs), 64)))


def test_countsketch_is_linear_and_equals_its_definition():
    sketch = CountSketch.make(50, 7, 3, "any")
    x = np.random.default_rng(0).normal(size=(4, 50))
    wanted = np.zeros((4, 7))
    for i in range(50):
        wanted[:, sketch.buckets[i]] += float(sketch.signs[i]) * x[:, i]
    assert_close(torch.tensor(x) @ sketch.matrix().double(), wanted, "float64")
    rows = torch.tensor(x).reshape(-1, x.shape[-1]).repeat(20, 1)
    assert_close(sketch.to(rows.device, rows.dtype)(rows), rows @ sketch.matrix().double(), "float64")
    assert torch.equal(CountSketch.identity(5).matrix(), torch.eye(5))


def countsketch_products(size, width, x, y, n):
    matrices = (CountSketch.make(size, width, seed, "law").matrix().double().numpy() for seed in range(n))
    return np.array([(x @ m) @ (y @ m) for m in matrices])


def orthogonal_products(size, width, x, y, n):
    matrices = (orthogonal(size, width, seed, "law").double().numpy() for seed in range(n))
    return np.array([(x @ m) @ (y @ m) for m in matrices])


def rotation_products(size, width, x, y, n):
    both = torch.tensor(np.stack([x, y])).float()
    return np.array([float(torch.dot(*Rotation.make(size, seed, "law", width)(both))) for seed in range(n)])


def countsketch_variance(x, y, width):
    """Of <Sx, Sy> (Charikar, Chen, Farach-Colton 2002): pairs of coordinates in one bucket."""
    return ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x * x * y * y).sum()) / width


@pytest.mark.parametrize(
    ("products", "size", "width", "variance"),
    [
        (countsketch_products, 48, 16, countsketch_variance),
        (countsketch_products, 48, 10, countsketch_variance),
        (orthogonal_products, 24, 8, None),
        (rotation_products, 64, 16, None),
        (rotation_products, 60, 16, None),
        (rotation_products, 60, 48, None),
        (rotation_products, 53, 20, None),
    ],
)
def test_projections_keep_inner_products_in_expectation(products, size, width, variance):
    x, y = vectors(size)
    found = products(size, width, x, y, 800)
    bound = 2 / width * (x @ x) * (y @ y)
    wanted = bound if variance is None else variance(x, y, width)
    assert abs(found.mean() - x @ y) < SIGMAS * math.sqrt(wanted / len(found))
    spread = ((found - found.mean()) ** 2).mean()
    error = SIGMAS * math.sqrt(np.var((found - found.mean()) ** 2) / len(found))
    assert spread < wanted + error
    if variance is not None:
        assert spread > wanted - error


def dense_rotation(size, signs, second, outputs=None):
    """The matrix [size, outputs] that x is multiplied with, by the definition: entry by entry, in float64."""
    matrix = dense_round(size, signs) @ dense_round(size, second)
    return matrix if outputs is None else matrix[:, outputs] * math.sqrt(size / len(outputs))


def dense_round(size, signs):
    power = 1
    while size % (2 * power) == 0:
        power *= 2
    odd = size // power
    matrix = np.empty((size, size))
    for place, output in itertools.product(range(size), range(size)):
        (i, j), (k, m) = divmod(place, power), divmod(output, power)
        cosine = math.sqrt((2 if k else 1) / odd) * math.cos(math.pi * (i + 0.5) * k / odd)
        matrix[place, output] = signs[place] * cosine * (-1) ** (j & m).bit_count() / math.sqrt(power)
    return matrix


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12, 13, 31, 36, 64, 97, 172, 300])
@pytest.mark.parametrize("share", [0.3, None])
def test_rotation_equals_its_definition(size, share):
    """Powers of two, their multiples, odd and prime sizes; at full width nothing is lost, and `back` is the transpose."""
    width = None if share is None else max(1, int(share * size))
    rotation = Rotation.make(size, 5, "law", width).to(torch.device("cpu"), torch.float64)
    outputs = None if rotation.outputs is None else rotation.outputs.tolist()
    assert rotation.width == (width or size) and set(rotation.signs.tolist()) <= {-1.0, 1.0}
    assert outputs is None or (outputs == sorted(set(outputs)) and outputs[0] >= 0 and outputs[-1] < size)
    dense = dense_rotation(size, rotation.signs.numpy(), rotation.second.numpy(), outputs)
    x, y = (np.random.default_rng(n).normal(size=(4, n)) for n in (size, rotation.width))
    assert_close(rotation(torch.tensor(x)), x @ dense, "float32")  # its table of cosines is in float32
    assert_close(rotation.back(torch.tensor(y)), y @ dense.T, "float32")
    whole = Rotation.make(size, 5, "law", size)
    assert whole.outputs is None and whole(torch.zeros(0, size)).shape == (0, size)
    if share is None:
        assert_close(dense @ dense.T, np.eye(size), "float64")
        assert_close(rotation.back(rotation(torch.tensor(x))), x, "float32")
        assert_close((rotation(torch.tensor(x)) ** 2).sum(1), (x**2).sum(1), "float32")


@pytest.mark.parametrize("bits", [0, 1, 6, 7, 8, 15])
def test_hadamard_transform_is_its_own_inverse(bits):
    x = torch.randn(2, 2**bits, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(hadamard_transform(hadamard_transform(x)) / 2**bits, x, "float64")


def test_outputs_and_signs_of_rotations_are_uniform():
    outputs = np.concatenate([Rotation.make(60, seed, "law", 16).outputs.numpy() for seed in range(800)])
    assert chi_square_is_uniform(np.bincount(outputs, minlength=60))
    signs = Rotation.make(60_000, 0, "law").signs.numpy()
    assert uncorrelated(signs[1:], signs[:-1]) and uncorrelated(signs, np.ones_like(signs))
    others = [Rotation.make(60_000, 0, "other"), Rotation.make(60_000, 1, "law")]
    assert all(uncorrelated(signs, other.signs.numpy()) for other in others)
    assert uncorrelated(signs, Rotation.make(60_000, 0, "law").second.numpy())
    assert uncorrelated(signs, random_signs(0, "law", 60_000).numpy())


def test_rotation_spreads_every_vector():
    """What comes out of one coordinate, or of some, is about as large everywhere; a constant is no exception."""
    size = 576
    for seed, x in enumerate((torch.eye(size)[7:8], torch.ones(1, size), torch.arange(size)[None] < 9)):
        y = Rotation.make(size, seed, "law")(x.float())[0] / x.float().norm()
        assert y.abs().max() < SIGMAS / math.sqrt(size)  # of nearly normal numbers one in 1.7 million is beyond


@given(st.integers(1, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_orthogonal_has_orthogonal_columns(size, data):
    width = data.draw(st.integers(1, size))
    matrix = orthogonal(size, width, 1, "law")
    assert torch.allclose(matrix.t() @ matrix, torch.eye(width) * size / width, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: orthogonal(4, 5, 0, "h"), "An orthogonal projection of 4 numbers cannot be 5 wide: use at most 4"),
        (lambda: Rotation.make(5, 0, "h", 9), "A rotation of 5 numbers cannot be 9 wide: use at most 5"),
    ],
)
def test_projections_wider_than_their_input_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_sylvester_counts_common_bits():
    assert [[(-1) ** (i & j).bit_count() for j in range(8)] for i in range(8)] == sylvester(8).tolist()


GOLDEN = {
    "bits": [
        [16294208416658607535, 7960286522194355700],
        [3315611280519901787, 14598298768245997],
        [16946495146345448201, 9389955533501740809],
    ],
    "far": 641205543686307853,
    "buckets": [70, 38, 51, 40],
    "signs": [1.0, 1.0, -1.0, 1.0],
    "outputs": [25, 38, 41, 42],
    "rotation signs": [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0],
}
# What comes out of 1, 2, 3, ...: of an even size that is no power of two, an odd, a prime, and a cut one.
ROTATED = {
    (12, None): [-4.7205, 4.042, 4.9531, -5.6029, -2.6681, 1.6825, -15.2127, -2.2018, 7.0544, -5.8021, -10.354, -10.89],
    (9, None): [-0.3336, -1.5801, -1.3545, -4.7024, 1.3112, -2.5705, -12.9764, -8.6924, -2.4849],
    (7, None): [-1.5744, -4.2201, 4.3007, 3.7348, -7.5638, -5.4426, -0.6592],
    (16, 5): [-10.7331, 16.0997, -1.7889, -12.522, 21.4663],
}


def test_random_numbers_are_frozen():
    """An index holds no tables, so these must never change; seed 0 without a name is splitmix64 from state 0."""
    sketch, transform = CountSketch.make(4, 128, 0, "h"), Rotation.make(60, 0, "gh0", 4)
    found = {
        "bits": [random_bits(seed, stream, 2).tolist() for seed, stream in ((0, ""), (0, "h"), (2**63, "rh/0//left"))],
        "far": int(random_bits(1, "h", 100_000)[-1]),
        "buckets": sketch.buckets.tolist(),
        "signs": sketch.signs.tolist(),
        "outputs": transform.outputs.tolist(),
        "rotation signs": transform.signs[:6].tolist(),
    }
    assert found == GOLDEN
    assert orthogonal(3, 2, 0, "h").flatten().tolist() == pytest.approx(
        [0.934079, -0.747585, -0.227438, 0.134834, -0.758794, -0.960696], abs=1e-5
    )
    for (size, width), wanted in ROTATED.items():
        turned = Rotation.make(size, 3, "code/0/left", width)(torch.arange(1.0, size + 1)[None])[0]
        assert turned.tolist() == pytest.approx(wanted, abs=1e-4)
