"""The k best rows, added piece by piece, against one sort of everything; many scores are equal, or nearly so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaveout.readout.scan import Best, BestGroups, at_resolution, ranking

from .conftest import ranked

ROUNDING = 3e-6  # relative: what rows of one text in other batches differ by, at most


@pytest.mark.parametrize("noise", [0.0, ROUNDING], ids=["equal", "rounded"])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 5, 40])
def test_pieces_and_ties_do_not_matter(k, seed, noise):
    rng = np.random.default_rng(seed)
    whole = rng.integers(-3, 4, (60, 3)) / 3  # thirds, which are no middle between two steps
    scores = (whole * (1 + noise * rng.integers(-100, 101, (60, 3)) / 100)).astype(np.float32)
    ends = [0, *sorted(rng.choice(np.arange(1, 60), 4, replace=False)), 60]
    best, groups = Best(3, k), BestGroups(3, k, lambda numbers: [int(n) % 7 for n in numbers])
    for start, end in itertools.pairwise(ends):
        for kept in (best, groups):
            kept.add(100 + np.arange(start, end), scores[start:end])
    for query in range(3):
        order = np.argsort(-whole[:, query], kind="stable")
        assert ranking(scores[:, query]).tolist() == ranked(scores[:, query]).tolist() == order.tolist()
        assert best.numbers[query].tolist() == (100 + order[:k]).tolist()
        assert np.array_equal(best.scores[query], scores[order[:k], query])  # as they are, not rounded
        firsts = {}
        for row in order:
            firsts.setdefault((100 + row) % 7, row)
        assert groups.numbers[query].tolist() == [100 + row for row in firsts.values()][:k]
        assert np.array_equal(groups.scores[query], scores[list(firsts.values())[:k], query])


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(floats, floats)
def test_the_resolution_is_a_grid_of_scores(a, b):
    """Monotone, so that rounded scores order rows; symmetric; half a step at most; and apart what is a step apart."""
    (x, y), (fine_x, fine_y) = (
        at_resolution(np.array([a, b], np.float32)).tolist(),
        np.array([a, b], np.float32).tolist(),
    )
    assert (x <= y) if fine_x <= fine_y else (x >= y)
    assert at_resolution(np.array([-a, x], np.float32)).tolist() == [-x, x]
    assert abs(x - fine_x) <= abs(fine_x) / 2**13 or np.isinf(x)  # the largest numbers round up to infinity
    if abs(fine_x - fine_y) > max(abs(fine_x), abs(fine_y)) / 2**12:
        assert x != y
    if 0 < fine_x < fine_y < fine_x * (1 + 2**-13) and x != y:
        assert x * (1 + 2**-14) < fine_y  # they lie on both sides of the middle between two steps


def test_cosines_around_one_are_equal():
    """What a row has with itself: 1 is a step, not the middle between two."""
    cosines = np.float32(1) + np.arange(-64, 65, dtype=np.float32) / 2**22
    assert (at_resolution(cosines) == 1).all() and ranking(cosines).tolist() == list(range(129))
