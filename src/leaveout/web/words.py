"""Tokens as words, the passage of a row that matters, and lists of scores as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leaveout.readout.explain import Explanation

PASSAGE = 40  # words that are shown of a row
PAIRS = 2_000  # of words of an answer and a row, the strongest, that are sent to the page
GAP = 0.6
"""Rows above a gap stand out: the next scores less than this part of the one before."""
NOISE = 2
"""Rows stand out only if they score more than so many times what any row scores the other way: chance favours neither."""


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


def verdict(scores: Sequence[float], opposite: float = 0.0) -> str:
    """One sentence about the scores of the best rows, best first: how many stand out.

    opposite  the largest that a row scores the other way; 0 where that says nothing of chance, as of a contrast
    """
    above = [score for score in scores if score > NOISE * opposite]
    if not above:
        chance = ": rows push it down about as much as any pushes it up" if any(score > 0 for score in scores) else ""
        return f"No row stands out{chance}."
    gap = next((n for n in range(1, min(len(above) + 1, len(scores))) if scores[n] < GAP * scores[n - 1]), None)
    if gap is not None:
        rest = max(scores[gap], 0.0) / scores[gap - 1]
        before = "the one before it" if gap == 1 else "the last of them"
        return f"{_counted(gap)}: the next scores {100 * rest:.0f} % of {before}."
    if len(above) < len(scores):
        return f"{_counted(len(above))}: each scores more than {NOISE} times what any row scores against the answer."
    if len(above) == 1:
        return "One row pushes this answer up."
    last = above[-1] / above[0]
    return f"No row stands out from the others: the last of the best {len(above)} still scores {100 * last:.0f} % of the first."


def _counted(rows: int) -> str:
    return "One row stands out" if rows == 1 else f"{rows} rows stand out"
