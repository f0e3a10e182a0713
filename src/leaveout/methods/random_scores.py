"""Random scores: what chance alone gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def score(queries: Sequence[str], corpus: Sequence[str], seed: int = 0) -> np.ndarray:
    """Independent normal scores [query, train] float32, a function of the seed and the two lengths."""
    return np.random.default_rng(seed).standard_normal((len(queries), len(corpus)), dtype=np.float32)
