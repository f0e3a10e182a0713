"""Baselines against slow forms of themselves."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter

import numpy as np
import pytest

from leaveout.bm25 import Bm25
from leaveout.errors import UnsupportedError
from leaveout.methods import bm25, random_scores

CORPUS = [
    "The cat sat, the cat ate.",
    "A dog sat on 7 mats",
    "",
    "cat-dog; DOG dog dog",
    "Füße und Schuhe",
    "the the a",
]
QUERIES = ["the cat", "dog dog", "füße", "nothing of this", "", "THE cat sat on the mats, a 7"]


def slow_bm25(queries, corpus, k1=1.5, b=0.75):
    documents = [re.sub(r"[^\w]+", " ", text.lower()).split() for text in corpus]
    mean = sum(map(len, documents)) / len(documents)
    result = np.zeros((len(queries), len(corpus)))
    for i, query in enumerate(queries):
        for word in re.sub(r"[^\w]+", " ", query.lower()).split():
            having = sum(word in document for document in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            for j, document in enumerate(documents):
                count = Counter(document)[word]
                result[i, j] += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
    return result


def test_bm25_equals_the_slow_form():
    scores = bm25.score(QUERIES, CORPUS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, slow_bm25(QUERIES, CORPUS), rtol=1e-5, atol=1e-7)
    assert scores[0, 0] > 0 and not scores[3:5].any()


def test_bm25_of_a_larger_corpus_equals_the_slow_form():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.zipf(1.5, size=rng.integers(1, 40)) if n < 500) or "w1" for _ in range(80)]
    np.testing.assert_allclose(bm25.score(texts[:9], texts), slow_bm25(texts[:9], texts), rtol=1e-4, atol=1e-6)


def test_bm25_of_no_queries_and_of_no_words():
    assert bm25.score([], CORPUS).shape == (0, len(CORPUS))
    with pytest.raises(ValueError, match="no text of the corpus has a word"):
        bm25.score(["a"], ["", "..."])


def test_bm25_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'leaveout\[methods\]'"):
        bm25.score(["a"], ["a"])


def test_random_scores_are_seeded_and_normal():
    scores = random_scores.score(["q"] * 50, ["t"] * 400, seed=1)
    assert scores.shape == (50, 400) and scores.dtype == np.float32
    np.testing.assert_array_equal(scores, random_scores.score(["other"] * 50, ["texts"] * 400, seed=1))
    assert not np.array_equal(scores, random_scores.score(["q"] * 50, ["t"] * 400, seed=2))
    assert abs(scores.mean()) < 5 / math.sqrt(scores.size)


def test_bm25_of_texts_that_come_one_by_one_equals_the_slow_form():
    search = Bm25(QUERIES)
    search.count(CORPUS[:2])
    search.count(CORPUS[2:])
    parts = [search.score(CORPUS[:4]), search.score(CORPUS[4:])]
    np.testing.assert_allclose(np.concatenate(parts).T, slow_bm25(QUERIES, CORPUS), rtol=1e-5, atol=1e-7)
    assert Bm25([]).score(["a"]).shape == (1, 0)
