"""Random scores: what chance alone gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leaveout.methods.scorer import Scorer, method


def score(queries: Sequence[str], corpus: Sequence[str], seed: int = 0) -> np.ndarray:
    """Independent normal scores [query, train] float32, a function of the seed and the two lengths."""
    return np.random.default_rng(seed).standard_normal((len(queries), len(corpus)), dtype=np.float32)


@method(any_query=True)
def random(scorer: Scorer, at: str) -> np.ndarray:
    """A function of the scorer's seed."""
    return score([""] * len(scorer.queries), [""] * len(scorer.rows), scorer.seed)
