"""BM25 over words, of all rows at once, by the package bm25s; see `leaveout.bm25`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from leaveout.bm25 import K1, B, words
from leaveout.errors import needs
from leaveout.methods.scorer import Scorer, method


def score(queries: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    """BM25 scores [query, train] float32; a word that a query repeats counts each time.

    Raises: UnsupportedError without the package bm25s; ValueError if no text of the corpus has a word.
    """
    bm25s = package()
    documents = [words(text) for text in corpus]
    if not any(documents):
        raise ValueError("no text of the corpus has a word: give texts to rank.")
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(documents, show_progress=False)
    known = {word for document in documents for word in document}
    scores = np.zeros((len(queries), len(corpus)), np.float32)
    for row, query in zip(scores, queries, strict=True):
        if asked := [word for word in words(query) if word in known]:
            row[:] = index.get_scores(asked)
    return scores


def package() -> Any:
    """The package bm25s. Raises: UnsupportedError without it."""
    return needs("bm25s", "BM25", extra="methods")


@method(package=package, text=True)
def bm25(scorer: Scorer, at: str) -> np.ndarray:
    """On responses only; the same at every checkpoint."""
    return score(scorer.texts(scorer.query_rows), scorer.texts(scorer.rows))
