"""Tokens as words, the passage of a row that matters, and lists of scores as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leaveout.readout.explain import Explanation

PASSAGE = 40  # words that are shown of a row
PAIRS = 2_000  # of words of an answer and a row, the strongest, that are sent to the page
STANDS_OUT = 0.6
"""A list ends where the next score is below this part of the one before."""


def words_of(pieces: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Words of a text and the word of each token [tokens], given the pieces of the text behind the tokens.

    A token goes on with the word before it where both meet in letters or digits, and spaces go with what follows them;
    scripts without spaces stay as tokens.
    """
    words: list[str] = []
    place = np.empty(len(pieces), np.int64)
    for at, piece in enumerate(pieces):
        if words and _goes_on(words[-1], piece):
            words[-1] += piece
        else:
            words.append(piece)
        place[at] = len(words) - 1
    return words, place


def _goes_on(word: str, piece: str) -> bool:
    if not word or not piece:
        return True
    return (_inner(word[-1]) and _inner(piece[0])) or (word.isspace() and not piece[0].isspace())


def _inner(letter: str) -> bool:
    """Whether a letter may stand inside of a word that is several tokens."""
    return letter.isalnum() and ord(letter) < 0x2E80


def pairs_of_words(found: Explanation, second: int) -> tuple[list[str], int, list[str], np.ndarray]:
    """Words of the query, how many of them its first side has, words of the row, and what their pairs add to the score
    [query words, row words].

    second  the query's token at which the other side of a contrast begins
    """
    sides = [words_of(found.query_tokens[:second]), words_of(found.query_tokens[second:])]
    first = len(sides[0][0])
    asked, of_asked = sides[0][0] + sides[1][0], np.concatenate([sides[0][1], first + sides[1][1]])
    row, of_row = words_of(found.row_tokens)
    pairs = np.zeros((len(asked), len(row)))
    np.add.at(pairs, (of_asked[:, None], of_row[None, :]), found.pairs)
    return asked, first, row, pairs


def strongest(pairs: np.ndarray, most: int = PAIRS) -> list[tuple[int, int, float]]:
    """The strongest pairs (query word, row word, what it adds), by size."""
    order = np.argsort(-np.abs(pairs), axis=None)[:most]
    return [
        (int(q), int(r), float(f"{pairs[q, r]:.4g}"))
        for q, r in zip(*np.unravel_index(order, pairs.shape), strict=True)
        if pairs[q, r]
    ]


def passage(weights: np.ndarray, width: int = PASSAGE) -> tuple[int, int]:
    """First word and end of the stretch of a row [words] that adds most to its score, in either direction."""
    if len(weights) <= width:
        return 0, len(weights)
    sums = np.concatenate([[0.0], np.cumsum(np.abs(weights))])
    start = int(np.argmax(sums[width:] - sums[:-width]))
    return start, start + width


def verdict(scores: Sequence[float]) -> str:
    """One sentence about a list of scores, best first: how many stand out of it, by the first gap."""
    positive = [score for score in scores if score > 0]
    if not positive:
        return "No row of the index pushes this answer up."
    gap = next((n for n in range(1, len(positive)) if positive[n] < STANDS_OUT * positive[n - 1]), None)
    if gap is None:
        if len(positive) == 1:
            return "One row pushes this answer up."
        last = positive[-1] / positive[0]
        return f"No row stands out: the last of these {len(positive)} still scores {100 * last:.0f} % of the first."
    rest = positive[gap] / positive[gap - 1]
    before = "one before it" if gap == 1 else "last of them"
    rows = "One row stands out" if gap == 1 else f"{gap} rows stand out"
    return f"{rows}: the next scores {100 * rest:.0f} % of the {before}."
