"""BM25 over words, of texts that come one after another: what a text search finds, with no model and no corpus in memory.

Words are lower-case runs of letters, digits and underscores; no stop words are removed and nothing is stemmed.
Source: Robertson and Zaragoza 2009, in the form of Lucene, as `bm25s` (arXiv 2407.03618) computes it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

K1, B = 1.5, 0.75
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return WORD.findall(text.lower())


class Bm25:
    """BM25 of a few queries: `count` every text first, then `score` any of them. A word that a query repeats counts each time.

    Memory: one number for each different word of the queries.
    """

    def __init__(self, queries: Sequence[str]) -> None:
        self.asked = [Counter(words(query)) for query in queries]
        self.having = Counter[str](dict.fromkeys((word for query in self.asked for word in query), 0))
        self.texts = self.words = 0

    def count(self, texts: Iterable[str]) -> None:
        """Takes notice of texts."""
        for text in texts:
            found = words(text)
            self.texts += 1
            self.words += len(found)
            self.having.update(self.having.keys() & set(found))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Scores [texts, queries] float32 of texts that were counted."""
        scores = np.zeros((len(texts), len(self.asked)), np.float32)
        for row, text in zip(scores, texts, strict=True):
            found = words(text)
            there, longer = Counter(found), K1 * (1 - B + B * len(found) * self.texts / max(self.words, 1))
            for query, asked in enumerate(self.asked):
                row[query] = sum(
                    times * self._weight(word) * there[word] / (there[word] + longer)
                    for word, times in asked.items()
                    if word in there
                )
        return scores

    def _weight(self, word: str) -> float:
        return math.log(1 + (self.texts - self.having[word] + 0.5) / (self.having[word] + 0.5))
