"""Stored forms of rows, against loops in float64 that share nothing with them but the random tables."""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from leaveout.projection import random_signs
from leaveout.readout import codec as codec_module
from leaveout.readout.codec import (
    BITS,
    LARGEST,
    LOSS,
    NOISE,
    Filled,
    Planes,
    Rounded,
    Whole,
    chosen_codec,
    kept_sides,
    levels,
    packed,
    read_codec,
    short_codec,
    unpacked,
)
from leaveout.readout.forms import Triples, Vectors
from leaveout.readout.settings import Channel, SignatureSettings

from .conftest import assert_close
from .test_projection import dense_rotation

SIGMAS = 5
SIZES = ((40, 24), (13, 56), (1, 9))  # none of the sides but one is a whole number of bytes, one has one number


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def triples(n_rows, rank=6, sizes=SIZES, seed=0, decay=0.5):
    """Rows of triples whose energies fall, and the parts do not weigh alike."""
    factors = []
    for part, (left, right) in enumerate(sizes):
        spread = (2.0 - part / 2) * decay ** torch.arange(rank)[:, None]
        factors.append(
            tuple(normal(n_rows, rank, side, seed=10 * seed + part) * spread.sqrt() for side in (left, right))
        )
    return Triples(sizes).joined(factors)


def dense(rows, sizes, kept=None):
    """The outer products [rows, numbers] of rows of triples, in float64; numbers that are not kept are zero."""
    rank, rows = rows.shape[1] // sum(map(sum, sizes)), rows.double().numpy()
    found = []
    for row in rows:
        start, parts = 0, []
        for (left, right), (own, other) in zip(sizes, kept or sizes, strict=True):
            total = np.zeros((left, right))
            for n in range(rank):
                u, v = (row[start + n * left :][:left].copy(), row[start + rank * left + n * right :][:right].copy())
                u[own:], v[other:] = 0, 0
                total += np.outer(u, v)
            start += rank * (left + right)
            parts.append(total.ravel())
        found.append(np.concatenate(parts))
    return np.array(found)


def signs_of(seed, stream, size):
    """The signs of both rounds of a rotation."""
    return [random_signs(seed, f"{stream}/{name}", size).numpy() for name in ("signs", "second")]


def filled(n_bytes, kept=SIZES, sizes=SIZES, query_triples=8, seed=3):
    return Filled(sizes, kept, n_bytes, seed, query_triples)


def share(error, whole):
    return float((error**2).sum() / (whole**2).sum())


# Bits.


def edges(bits):
    """Bounds between the levels of the evenly spaced quantiser of a normal number, by the step written in `STEP`."""
    return [codec_module.STEP[bits] * (k - 2 ** (bits - 1)) for k in range(1, 2**bits)]


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_those_of_the_best_evenly_spaced_quantiser(bits):
    """Read number by number; the error of normal numbers is the known one, and no other step has a smaller one."""
    x = normal(3, 20_000, seed=bits).double()
    found, factor = levels(x, bits)
    for row, codes, f in zip(x.numpy(), found.numpy(), factor.tolist(), strict=True):
        unit = np.sqrt((row**2).mean())
        wanted = np.array([sum(number / unit >= edge for edge in edges(bits)) for number in row[:500]])
        assert np.array_equal(codes[:500], wanted)
        code = 2 * codes.astype(float) - (2**bits - 1)
        assert f == pytest.approx((row**2).sum() / (row * code).sum(), rel=1e-6)
        assert (row * f * code).sum() == pytest.approx((row**2).sum(), rel=1e-6)

    def loss(step):
        grid = np.arange(-(2**bits) + 1, 2**bits, 2) / 2 * step
        y = x.numpy().ravel()
        return np.mean(np.min((y[:, None] - grid) ** 2, 1)) / np.mean(y**2)

    best = loss(codec_module.STEP[bits])
    assert best == pytest.approx(LOSS[bits], rel=0.03)
    assert best <= min(loss(codec_module.STEP[bits] * by) for by in (0.9, 1.1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 61, 64, 203])
def test_bits_come_back_whatever_the_size(size, bits):
    found = torch.from_numpy(np.random.default_rng(size).integers(0, 2**bits, (5, size)).astype(np.uint8))
    codes = packed(found, bits).numpy()
    n_bytes = -(-size // 8)
    assert codes.shape == (5, bits * n_bytes) and codes.dtype == np.uint8
    again = unpacked(torch.from_numpy(codes), bits).numpy()
    assert np.array_equal(again[:, :size], found.numpy()) and not again[:, size:].any()
    for row, plane, at in itertools.product(range(5), range(bits), range(size)):  # as the module describes the bytes
        bit = codes[row, plane * n_bytes + at // 8] >> (7 - at % 8) & 1
        assert bit == found[row, at] >> (bits - 1 - plane) & 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [5, 64, 1000, 13824])
def test_products_of_codes_are_whole_numbers(size, bits):
    """Equal to sums of 64-bit integers, of the largest numbers too; pairs of bytes fit into 16 bits."""
    rng = np.random.default_rng(size)
    found = rng.integers(0, 2**bits, (19, size)).astype(np.uint8)
    found[0] = 2**bits - 1
    vectors = normal(7, size, seed=1)
    vectors[0] = 1.0
    rounded = Rounded.of(vectors)
    numbers = rounded.numbers.numpy()[:size].astype(np.int64)
    assert np.abs(numbers).max() == LARGEST == numbers[:, 0].min() and not rounded.numbers[size:].any()
    wanted = (2 * found.astype(np.int64) - (2**bits - 1)) @ numbers
    assert np.abs(wanted).max() < 2**24  # so that float32 holds them
    assert np.array_equal(2 * rounded.products(packed(torch.from_numpy(found), bits), bits).numpy(), wanted)
    assert 2 * 255 * LARGEST < 2**15  # two products of an unsigned and a signed byte, which some processors add
    back = numbers.T * rounded.scale.numpy()[:, None]
    assert (np.abs(back - vectors.numpy()) <= 0.50001 * rounded.scale.numpy()[:, None]).all()


@pytest.mark.parametrize("bits", BITS)
def test_products_are_unbiased_over_rotations(bits):
    """f <a, s> is <a, y> on the mean over seeds, for vectors that have a fifth of their length in common."""
    size, n_seeds = 96, 1500
    y, noise = normal(2, size, seed=bits)
    a = y / y.norm() + 5 * noise / noise.norm()
    found = np.empty(n_seeds)
    for seed in range(n_seeds):
        codec = Planes(size, size, bits, seed)
        found[seed] = float(codec.decode(codec.encode(y[None]))[0] @ a)
    wanted = float(y @ a)
    assert abs(found.mean() - wanted) < SIGMAS * found.std() / math.sqrt(n_seeds)
    theory = math.sqrt(LOSS[bits] / (1 - LOSS[bits]) * float(y @ y) * float(a @ a - (a @ y) ** 2 / (y @ y)) / size)
    assert found.std() == pytest.approx(theory, rel=0.2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [64, 97])
def test_products_are_unbiased_for_vectors_of_two_coordinates(size, bits):
    """One round of signs and transform gives four different numbers only, and .38 in the place of .5 at one bit."""
    found = np.empty(800)
    for seed in range(len(found)):
        codec = Planes(size, size, bits, seed)
        y = torch.zeros(1, size)
        y[0, :2] = torch.tensor([1.0, 0.5])
        found[seed] = float(codec.decode(codec.encode(y))[0, 1])
    assert abs(found.mean() - 0.5) < SIGMAS * found.std() / math.sqrt(len(found)) + 0.005


# Whole vectors, and planes.


@pytest.mark.parametrize(
    ("storage", "relative", "absolute"), [("float32", 0, 0), ("float16", 2**-11, 2**-25), ("int8", 0, 1 / 254)]
)
def test_stored_numbers_are_rounded_to_the_nearest(storage, relative, absolute):
    """Relative to a number, and absolute in units of the largest of its row; rows of any size, zero included."""
    x = normal(6, 500) ** 3 * torch.tensor([1e-30, 1e-3, 1.0, 70_000.0, 1e30, 0.0])[:, None]
    codec = Whole(500, storage)
    arrays = codec.encode(x)
    assert arrays["signature"].dtype.name == storage and arrays["scale"].dtype == np.float32
    assert codec.row_bytes == sum(array[0].nbytes for array in arrays.values())
    bound = relative * x.abs() + absolute * x.abs().amax(1, keepdim=True)
    assert ((codec.decode(arrays) - x).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize(("width", "kept", "bits"), [(60, 60, 4), (97, 97, 2), (97, 40, 1), (256, 256, 1), (5, 3, 4)])
def test_planes_are_what_their_definition_says(width, kept, bits):
    """Rows [5, width] by the dense matrix of the rotation, the levels of its outputs, and the factor of each row."""
    codec, x, queries = Planes(width, kept, bits, 3), normal(5, width), normal(4, width, seed=1)
    x[3] = 0
    arrays = codec.encode(x)
    assert codec.row_bytes == sum(array[0].nbytes for array in arrays.values()) == bits * -(-kept // 8) + 4
    outputs = None if codec.rotation.outputs is None else codec.rotation.outputs.tolist()
    turn = dense_rotation(width, *signs_of(3, "code", width), outputs)
    wanted = np.zeros((5, kept))
    for n, turned in enumerate(x.double().numpy() @ turn):
        unit = np.sqrt((turned**2).mean())
        if unit > 0:
            code = np.array([2 * sum(v / unit >= edge for edge in edges(bits)) - (2**bits - 1) for v in turned])
            wanted[n] = code * (turned**2).sum() / (turned * code).sum()
    assert_close(codec.decode(arrays), wanted @ turn.T, "float32")
    scores = codec.scorer(queries)(arrays, slice(None))
    exact = wanted @ (queries.double().numpy() @ turn).T
    step = np.abs(queries.double().numpy() @ turn).max(1) / LARGEST
    assert (np.abs(scores - exact) <= 0.51 * step * np.abs(wanted).sum(1)[:, None] + 1e-5).all()
    assert not scores[3].any() and scores.dtype == np.float32


# Triples.


def greedy(energy, planes, room):
    """Bits [parts, rank] of one row's triples, one step after the other, the best for its bytes of those that fit."""
    lost = {0: 1.0} | {b: NOISE * ((1 - LOSS[b]) ** -2 - 1) for b in BITS}
    bits, closed = np.zeros(energy.shape, int), set()
    while True:
        steps = []
        for part, n in itertools.product(*map(range, energy.shape)):
            now = bits[part, n]
            if now < 4 and energy[part, n] > 0 and (part, n) not in closed:
                then = {0: 1, 1: 2, 2: 4}[now]
                gain = energy[part, n] * (lost[now] - lost[then]) / (planes[part] * (then - now))
                steps.append((gain, -now, -part, -n, then))
        if not steps:
            return bits
        _, _, part, n, then = max(steps)
        part, n = -part, -n
        cost = planes[part] * (then - bits[part, n])
        if cost > room:
            closed.add((part, n))
            continue
        room -= cost
        bits[part, n] = then


@pytest.mark.parametrize("n_bytes", [40, 97, 200, 500, 3000])
@pytest.mark.parametrize("kept", [SIZES, ((16, 24), (13, 8), (1, 9))], ids=["whole sides", "cut sides"])
def test_bytes_go_where_they_gain_most(n_bytes, kept):
    codec, rows = filled(n_bytes, kept), triples(7, decay=0.6)
    planes = [-(-left // 8) - (-right // 8) for left, right in kept]
    arrays = codec.encode(rows)
    assert codec.row_bytes == n_bytes == sum(array[0].nbytes for array in arrays.values())
    factors = [
        (u[..., :a].double(), v[..., :b].double())
        for (u, v), (a, b) in zip(codec.form.factors(rows), kept, strict=True)
    ]
    energy = np.stack([((u**2).sum(2) * (v**2).sum(2)).numpy() for u, v in factors], 1)
    for row in range(7):
        bits = greedy(energy[row], planes, arrays["codes"].shape[1])
        counts = [[int((part >= b).sum()) for b in BITS] for part in bits]
        assert arrays["counts"][row].tolist() == counts
        assert (arrays["weights"][row] > 0).sum() == (bits > 0).sum() <= codec.n_triples
        used = sum(int(part.sum()) * plane for part, plane in zip(bits, planes, strict=True))
        assert not arrays["codes"][row, used:].any() and used <= codec.code_bytes
    if n_bytes == 3000:
        assert (arrays["counts"] == 6).all()  # all there is, in four bits


def stored_triples(codec, arrays):
    """Per row and part, the triples that its bytes stand for, read byte by byte as the page on the format says: bits,
    both sides turned back, in units of their codes, and the weight.
    """
    turns = [
        [
            dense_rotation(size, *signs_of(codec.seed, f"code/{part}/{side}", size))
            for side, size in zip(("left", "right"), sizes, strict=True)
        ]
        for part, sizes in enumerate(codec.kept)
    ]
    for row in range(len(arrays["codes"])):
        data, at, weight, parts = arrays["codes"][row], 0, 0, []
        for sizes, turn, counts in zip(codec.kept, turns, arrays["counts"][row].tolist(), strict=True):
            found = []
            for n in range(counts[0]):
                bits, sides = max(b for b, count in zip(BITS, counts, strict=True) if n < count), []
                for size, matrix in zip(sizes, turn, strict=True):
                    level = np.zeros(size, int)
                    for _plane in range(bits):
                        for i in range(size):
                            level[i] = 2 * level[i] + (data[at + i // 8] >> (7 - i % 8) & 1)
                        at += -(-size // 8)
                    sides.append(matrix @ (2 * level - (2**bits - 1)))
                scale = float(arrays["weights"][row, weight]) * float(arrays["scale"][row])
                found.append((bits, *sides, scale))
                weight += 1
            parts.append(found)
        assert not data[at:].any() and not arrays["weights"][row, weight:].any()
        yield parts


@pytest.mark.parametrize("n_bytes", [60, 200, 500, 3000])
@pytest.mark.parametrize("kept", [SIZES, ((16, 24), (13, 8), (1, 9))], ids=["whole sides", "cut sides"])
def test_bytes_of_triples_are_what_the_format_says(n_bytes, kept):
    """Codes of the row's own triples, largest first, with weights that make each of them as long along itself as it is."""
    codec, rows = filled(n_bytes, kept), triples(4, seed=7, decay=0.7)
    arrays = codec.encode(rows)
    back, several = dense(codec.decode(arrays), SIZES), 0
    factors = [(u.double().numpy(), v.double().numpy()) for u, v in codec.form.factors(rows)]
    for row, parts in enumerate(stored_triples(codec, arrays)):
        wanted = []
        for (u, v), (own, other), (left, right), found in zip(factors, kept, SIZES, parts, strict=True):
            u, v, total = u[row, :, :own], v[row, :, :other], np.zeros((left, right))
            energy = (u**2).sum(1) * (v**2).sum(1)
            for n, (_, a, b, weight) in zip(np.argsort(-energy), found, strict=False):
                assert weight * (a @ u[n]) * (b @ v[n]) == pytest.approx(energy[n], rel=2e-3)
                total[:own, :other] += weight * np.outer(a, b)
            several += len({bits for bits, *_ in found}) > 1
            wanted.append(total.ravel())
        assert_close(back[row], np.concatenate(wanted), "float32")
    assert several > 2 or n_bytes != 200


@pytest.mark.parametrize("kept", [SIZES, ((16, 24), (13, 8), (1, 9))], ids=["whole sides", "cut sides"])
def test_decoded_rows_come_nearer_with_more_bytes(kept):
    """And are the rows but for the rounding of 4 bits where all fits; sides that are cut are those of the rows."""
    rows = triples(12, seed=1)
    wanted = dense(rows, SIZES, kept)
    errors = []
    for n_bytes in (60, 120, 240, 480, 3000):
        codec = filled(n_bytes, kept)
        back = dense(codec.decode(codec.encode(rows)), SIZES)
        errors.append(share(back - wanted, wanted))
        along = (back * wanted).sum(1) / (wanted**2).sum(1)  # what fits is unbiased, so that nothing is counted twice
        assert (along < 1.1).all()
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 2.5 * LOSS[4]


def test_triples_in_any_order_are_the_same_row():
    """A part of a side has other lengths than the whole, so that triples need not come in falling order."""
    rows, codec = triples(6, seed=2), filled(150, ((16, 8), (13, 8), (1, 9)))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    mixed = codec.form.joined([(u[:, order], v[:, order]) for u, v in codec.form.factors(rows)])
    arrays, others = codec.encode(rows), codec.encode(mixed)
    assert all(np.array_equal(arrays[name], others[name]) for name in ("codes", "counts"))
    assert_close(dense(codec.decode(others), SIZES), dense(codec.decode(arrays), SIZES), "float32")


def odd_rows():
    """Rows of one triple, of none, of one part, and of numbers that are very small and very large."""
    rows = triples(8, seed=3)
    factors = [(u.clone(), v.clone()) for u, v in Triples(SIZES).factors(rows)]
    for part, (u, v) in enumerate(factors):
        u[0, 1:], v[0, 1:] = 0, 0
        u[1], v[1] = 0, 0
        if part != 1:
            u[2], v[2] = 0, 0
        u[3] = 0  # without energy, though not without numbers
        u[4], v[4] = u[4] * 1e-4, v[4] * 1e-4
        u[5], v[5] = u[5] * 1e4, v[5] * 1e4
    return Triples(SIZES).joined(factors)


@pytest.mark.parametrize("n_bytes", [60, 400, 3000])
def test_scores_of_triples_are_products_of_what_is_decoded(n_bytes):
    """Up to the rounding of queries, 1/63 of the largest number of each side, whose errors point anywhere."""
    rows, queries, codec = odd_rows(), triples(5, rank=9, seed=4), filled(n_bytes, query_triples=12)
    arrays = codec.encode(rows)
    back, asked = dense(codec.decode(arrays), SIZES), dense(queries, SIZES)
    scores = codec.scorer(queries)(arrays, slice(None))
    lengths = np.linalg.norm(back, axis=1)[:, None] * np.linalg.norm(asked, axis=1)
    assert scores.dtype == np.float32 and (np.abs(scores - back @ asked.T) <= 0.02 * lengths).all()
    assert not scores[[1, 3]].any() and scores[[0, 2, 4, 5]].all()
    assert np.array_equal(scores, codec.scorer(queries)(codec.encode(rows), np.arange(8)))


def test_queries_of_more_triples_are_asked_by_the_heaviest():
    rows, queries = triples(6, seed=5), triples(3, rank=20, seed=6, decay=0.8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    codec = filled(3000, query_triples=7)
    mixed = codec.form.joined([(u[:, order], v[:, order]) for u, v in codec.form.factors(queries)])
    heaviest = []
    for u, v in codec.form.factors(mixed):
        n = torch.argsort(-(u.norm(dim=2) * v.norm(dim=2)), 1)[:, :7, None]
        heaviest.append((u.gather(1, n.expand(-1, -1, u.shape[2])), v.gather(1, n.expand(-1, -1, v.shape[2]))))
    arrays = codec.encode(rows)
    found = codec.scorer(mixed)(arrays, slice(None))
    assert np.array_equal(found, codec.scorer(codec.form.joined(heaviest))(arrays, slice(None)))
    more = filled(3000, query_triples=20).scorer(mixed)(arrays, slice(None))
    wanted = dense(codec.decode(arrays), SIZES) @ dense(queries, SIZES).T
    assert np.abs(more - wanted).max() < np.abs(found - wanted).max()


CODECS = {
    "whole": (Whole(200, "int8"), lambda n, seed: normal(n, 200, seed=seed)),
    "planes": (Planes(200, 150, 2, 3), lambda n, seed: normal(n, 200, seed=seed)),
    "filled": (filled(300), lambda n, seed: triples(n, seed=seed)),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_score_is_the_same_whatever_is_scored_beside_it(name, monkeypatch):
    """Bit for bit: in blocks of any size, rows by number, read-only, by several threads, beside other queries."""
    codec, make = CODECS[name]
    rows, queries = make(70, 1), make(5, 2)
    arrays = codec.encode(rows)
    for array in arrays.values():
        array.flags.writeable = False
    score = codec.scorer(queries)
    whole = score(arrays, slice(None))
    for step in (1, 7, 16, 33):
        pieces = [score(arrays, slice(at, at + step)) for at in range(0, 70, step)]
        if name != "whole" or step == 16:  # float sums: blocks are multiples of 16 rows
            assert np.array_equal(np.concatenate(pieces), whole)
    some = np.array([69, 3, 3, 41])
    assert np.array_equal(score(arrays, some), whole[some])
    monkeypatch.setattr(codec_module, "PACKED", 1)
    assert [at.stop - at.start for at in codec.blocks(35)] == [16, 16, 3]
    with ThreadPoolExecutor(3) as pool:  # threads that share the scorer, each at rows of its own
        pieces = [slice(16 * at, 16 * at + 16) for at in range(5)] * 40
        assert all(
            np.array_equal(one, whole[at])
            for one, at in zip(pool.map(lambda at: score(arrays, at), pieces), pieces, strict=True)
        )
    for chosen in ([0], [4, 1], [2, 2, 0]) if name != "whole" else ():
        assert np.array_equal(codec.scorer(queries[chosen])(arrays, slice(None)), whole[:, chosen])
    decoded = codec.decode(arrays)
    assert torch.equal(codec.decode(arrays, slice(5, 9))[:, : decoded.shape[1]], decoded[5:9]) or name == "filled"
    for at in (slice(5, 9), np.array([8, 0, 3])):
        assert_close(
            codec.form.products(codec.decode(arrays, at), queries), codec.form.products(decoded[at], queries), "float32"
        )


@pytest.mark.parametrize("name", CODECS)
def test_codes_do_not_depend_on_the_rows_beside(name):
    """But for a number in a thousand, which rounding takes to another level."""
    codec, make = CODECS[name]
    rows = make(33, 4)
    whole, single = codec.encode(rows), [codec.encode(row[None]) for row in rows]
    for key, array in whole.items():
        again = np.concatenate([one[key] for one in single])
        assert array.dtype == again.dtype and (array == again).mean() > 0.99


@pytest.mark.parametrize("name", CODECS)
def test_rows_of_double_numbers_have_the_same_codes(name):
    codec, make = CODECS[name]
    rows = make(20, 5)
    single, double = codec.encode(rows), codec.encode(rows.double())
    for key, array in single.items():
        assert array.dtype == double[key].dtype
        assert_close(array, double[key], "model float32") if array.dtype.kind == "f" else None
        assert (array == double[key]).mean() > 0.99 or array.dtype.kind == "f"


def test_codec_comes_back_from_what_is_written():
    for codec, _ in CODECS.values():
        again = read_codec(json.loads(json.dumps(codec.to_dict())))
        assert again == codec and again.form == codec.form


@pytest.mark.parametrize("n_bytes", [1, 10, 20, 29])
def test_bytes_that_hold_no_triple_are_refused_with_a_number_that_does(n_bytes):
    with pytest.raises(
        ValueError, match=rf"{n_bytes} bytes a row hold not one triple of this model: give at least"
    ) as caught:
        filled(n_bytes)
    enough = int(str(caught.value).rstrip(".").rsplit(" ", 1)[1])
    assert filled(enough).code_bytes >= max(filled(enough).plane_bytes) and enough < 40
    with pytest.raises(ValueError, match="hold not one triple"):
        filled(enough - 1)


# Which form is chosen.

CHANNEL = (Channel(),)


def both(sizes, **changes):
    settings = SignatureSettings(CHANNEL, **changes)
    ordered = ((True, True),) * len(sizes)
    long = chosen_codec(sizes, ordered, settings)
    return long, short_codec(sizes, ordered, settings, long)


@pytest.mark.parametrize(
    ("sizes", "changes", "long", "short"),
    [
        (((3, 5),), {}, Whole(15, "int8"), None),
        (((16, 16),), {}, Whole(256, "int8"), Planes(256, 256, 1, 0)),
        (((100, 100),), {}, Whole(10_000, "int8"), Planes(10_000, 10_000, 1, 0)),
        (((100, 200),), {}, Planes(20_000, 20_000, 4, 0), Planes(20_000, 16_352, 1, 0)),
        (((100, 200),), {"bytes_per_row": None}, Whole(20_000, "int8"), Planes(20_000, 16_352, 1, 0)),
        (((100, 200),), {"bytes_per_row": None, "short_bytes": None}, Whole(20_000, "int8"), None),
        (((100, 200),), {"bytes_per_row": 8000}, Filled(((100, 200),), ((100, 200),), 8000, 0, 64), None),
        (((16, 16),), {"long": "none"}, Whole(256, "int8"), Planes(256, 256, 1, 0)),
        (((100, 200),), {"long": "none", "bytes_per_row": 1024}, None, None),
    ],
)
def test_form_follows_from_the_bytes_of_a_row(sizes, changes, long, short):
    found = both(sizes, **changes)
    if long is not None:
        assert found == (long, short)
    budget = changes.get("bytes_per_row", 16384)
    stored = [found[1]] if changes.get("long") == "none" else found
    assert budget is None or sum(codec.row_bytes for codec in stored if codec) <= budget


@pytest.mark.parametrize("hidden", [576, 2048, 5120])
@pytest.mark.parametrize("n_bytes", [2048, 4096, 16384, 32768])
def test_wide_rows_take_their_bytes_and_no_more(hidden, n_bytes):
    """Rows of `default`: a head of 1,024 and three MLPs of four times the hidden size."""
    sizes = ((1024, hidden), *(((hidden, 4 * hidden),) * 3))
    long, short = both(sizes, bytes_per_row=n_bytes)
    assert isinstance(long, Filled) and (short is None) == (n_bytes < 8192)
    assert long.n_bytes + (0 if short is None else short.row_bytes) == n_bytes
    for codec in (long, short):
        if codec is not None:
            assert isinstance(codec, Filled) and codec.form == Triples(sizes)
            assert all(
                0 < own <= size
                for side, whole in zip(codec.kept, sizes, strict=True)
                for own, size in zip(side, whole, strict=True)
            )
            fit = codec.code_bytes / max(codec.plane_bytes)
            assert fit > 24 or codec.kept == sizes  # the widest triples have room for most of TRIPLES
    whole = (
        chosen_codec(sizes, ((False, False),) * 4, SignatureSettings(CHANNEL, bytes_per_row=n_bytes))
        if n_bytes > 4096
        else None
    )
    assert whole is None or whole.kept == sizes  # sides without an order are kept whole


def test_sides_are_cut_in_the_ratio_of_their_roots():
    assert kept_sides((576, 1536), (True, True), 2048) == (192, 320)  # 512 bits a triple, roots as 24 to 39.2
    assert kept_sides((576, 1536), (True, True), 10**6) == (576, 1536)
    assert kept_sides((576, 1536), (False, True), 2048)[0] == 576
    assert kept_sides((64, 100_000), (True, True), 2048) == (32, 512)
    assert Vectors(3).products(torch.eye(3), torch.eye(3)).equal(torch.eye(3))


def test_sides_too_wide_for_the_short_form_leave_it_out():
    """As those of a model of hidden size 8192 that are not whitened, of which one triple has more than 2,048 bytes."""
    sizes, unordered = ((8192, 8192),), ((False, False),)
    for long, there in (("stored", False), ("none", True)):
        settings = SignatureSettings(CHANNEL, long=long)
        stored = chosen_codec(sizes, unordered, settings)
        assert isinstance(stored, Filled)
        if there:
            with pytest.raises(ValueError, match="2048 bytes a row hold not one triple"):
                short_codec(sizes, unordered, settings, stored)
        else:
            assert short_codec(sizes, unordered, settings, stored) is None
