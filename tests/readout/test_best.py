"""The k best rows, added piece by piece, against one stable sort of everything; many scores are equal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from leaveout.readout.rollup import BestGroups
from leaveout.readout.search import Best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 5, 40])
def test_pieces_and_ties_do_not_matter(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 4, (60, 3)).astype(np.float32)
    ends = [0, *sorted(rng.choice(np.arange(1, 60), 4, replace=False)), 60]
    best, groups = Best(3, k), BestGroups(3, k, lambda numbers: [int(n) % 7 for n in numbers])
    for start, end in itertools.pairwise(ends):
        for kept in (best, groups):
            kept.add(100 + np.arange(start, end), scores[start:end])
    for query in range(3):
        order = np.argsort(-scores[:, query], kind="stable")
        assert best.numbers[query].tolist() == (100 + order[:k]).tolist()
        firsts = {}
        for row in order:
            firsts.setdefault((100 + row) % 7, 100 + row)
        assert groups.numbers[query].tolist() == list(firsts.values())[:k]
