"""Tokens as words, the passage of a row that matters, scores and facts as sentences: for terminal, pages and agents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PASSAGE = 40  # words that are shown of a row
PAIRS = 2_000  # of words of an answer and a row, the strongest, that are sent to the page
LABEL = re.compile(r"\n\n### \w+:\n")  # with which the first piece of a preference row's answer begins
GAP = 0.6
"""Rows above a gap stand out: the next scores less than this part of the one before."""
NOISE = 2
"""Rows stand out only if they score more than so many times what chance gives: what the best row scores for other texts, or,
where that is unknown, what any row scores the other way."""
USUAL = "× usual: how many times as much as the best other row scores for rows of this index that are asked themselves (median)."
"""What the unit of scores is, where they have none of their own."""


def words_of(pieces: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Words of a text and the word of each token [tokens], given the pieces of the text behind the tokens.

    A token goes on with the word before it where both meet in letters or digits, and spaces go with what follows them;
    scripts without spaces stay as tokens. The label above an answer of a preference row is a word, of no token.
    """
    words: list[str] = []
    place = np.empty(len(pieces), np.int64)
    for at, piece in enumerate(pieces):
        if label := LABEL.match(piece):
            words.append(label[0] if words else label[0].lstrip())
            piece = piece[label.end() :]
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


def pairs_of_words(
    query: Sequence[str], row: Sequence[str], pairs: np.ndarray, sides: Sequence[int] = ()
) -> tuple[list[list[str]], list[str], np.ndarray]:
    """Words of each text of the query, words of the row, and what their pairs add to the score [words of all texts, row words].

    query, row  pieces of the texts behind the tokens; pairs [query tokens, row tokens]
    sides       the query's tokens at which its second, third, ... text begins
    """
    texts: list[list[str]] = []
    places: list[np.ndarray] = []
    for start, end in zip([0, *sides], [*sides, len(query)], strict=True):
        words, place = words_of(query[start:end])
        places.append(sum(map(len, texts)) + place)
        texts.append(words)
    words, of_row = words_of(row)
    found = np.zeros((sum(map(len, texts)), len(words)))
    np.add.at(found, (np.concatenate(places)[:, None], of_row[None, :]), pairs)
    return texts, words, found


def strongest(pairs: np.ndarray, most: int = PAIRS) -> list[tuple[int, int, float]]:
    """The strongest pairs (query word, row word, what it adds), by size."""
    order = np.argsort(-np.abs(pairs), axis=None)[:most]
    return [
        (int(q), int(r), float(f"{pairs[q, r]:.4g}"))
        for q, r in zip(*np.unravel_index(order, pairs.shape), strict=True)
        if pairs[q, r]
    ]


def pairs_told(
    query: Sequence[str], row: Sequence[str], pairs: np.ndarray, most: int
) -> tuple[str, list[tuple[str, str, str]]]:
    """A sentence about the strongest pair of words, and the strongest pairs (query word, row word, its part of all that pairs add
    or take away), without those of less than a hundredth of the strongest."""
    best, whole = strongest(pairs, most), float(np.abs(pairs).sum()) or 1.0
    if not best:
        return "No word of the row answers any of the query.", []
    lines = [
        (query[q].strip(), row[r].strip(), f"{100 * value / whole:+.1f} %")
        for q, r, value in best
        if abs(value) >= 0.01 * abs(best[0][2])
    ]
    does = "answers" if best[0][2] > 0 else "speaks against"
    return f"“{lines[0][1]}” of the row {does} “{lines[0][0]}” of the query most.", lines


def passage(weights: np.ndarray, width: int = PASSAGE) -> tuple[int, int]:
    """First word and end of the stretch of a row [words] that adds most to its score, in either direction; a row that is hardly
    longer stays whole."""
    if len(weights) <= 1.2 * width:
        return 0, len(weights)
    sums = np.concatenate([[0.0], np.cumsum(np.abs(weights))])
    start = int(np.argmax(sums[width:] - sums[:-width]))
    return start, start + width


def standing_out(scores: Sequence[float], chance: float = 0.0) -> int:
    """How many of the best rows, best first, stand out: above what chance gives, and above the first gap."""
    above = sum(score > NOISE * chance for score in scores)
    gap = next((n for n in range(1, min(above + 1, len(scores))) if scores[n] < GAP * scores[n - 1]), None)
    if gap is None:
        return above if 0 < above < len(scores) or above == 1 else 0
    return gap


def verdict(scores: Sequence[float], opposite: float = 0.0, usual: float = 0.0, shared: Sequence[str] = ()) -> str:
    """One sentence about the scores of the best rows, best first: how many stand out.

    opposite  the largest that a row scores the other way; 0 where that says nothing of chance, as of a contrast
    usual     what the best row would score for another text (`search.usual_scores`), 0 where that is unknown
    shared    words that all rows that stand out have, and few others
    """
    positive, chance = [score for score in scores if score > 0], usual or opposite
    if not positive or positive[0] <= NOISE * chance:
        by = ": rows push it down about as much as any pushes it up" if positive else ""
        if positive and usual:
            by = f": the best scores {times(scores[0], usual)} what the best row usually scores for another text"
        return f"No row stands out{by}."
    count = standing_out(scores, chance)
    named = _counted(count) + (f", {'all ' if count > 1 else ''}with {_listed(shared)}" if shared else "")
    high = f" The best scores {times(scores[0], usual)} the usual." if usual else ""
    if count and count < len(scores) and scores[count] < GAP * scores[count - 1]:
        rest = max(scores[count], 0.0) / scores[count - 1]
        before = "the one before it" if count == 1 else "the last of them"
        return f"{named}: the next scores {100 * rest:.0f} % of {before}.{high}"
    if count and count < len(scores):
        most = (
            "what the best row usually scores for another text" if usual else "what any row scores against the answer"
        )
        return f"{named}: each scores more than {NOISE} times {most}.{high}"
    if count == 1:
        return f"One row pushes this answer up.{high}"
    if usual and len(positive) == len(scores):
        return f"The best {len(scores)} rows all score more than {NOISE} times the usual, and none stands out from them.{high}"
    rest = positive[-1] / positive[0]
    most = f"the last of the best {len(positive)} still scores {100 * rest:.0f} % of the first"
    return f"No row stands out from the others: {most}.{high}"


def times(score: float, usual: float) -> str:
    """A score beside what is usual: "30 times", "1.4 times"."""
    ratio = score / usual
    return f"{ratio:.2g} times" if abs(ratio) < 10 else f"{ratio:,.0f} times"


def shared_words(texts: Sequence[str], others: Sequence[str], most: int = 3) -> list[str]:
    """Words that all the texts have and hardly any of the others (one in twenty), as the first text writes them; neighbours are
    one. None of less than two texts."""
    if len(texts) < 2:
        return []
    texts, others = ([_SPECIAL.sub(" ", text) for text in some] for some in (texts, others))
    found = [set(_plain(text)) for text in texts]
    rare = set.intersection(*found) - {word for word in set.union(*found) if len(word) < 4}
    often = [set(_plain(text)) for text in others]
    rare = {word for word in rare if sum(word in other for other in often) <= 0.05 * len(often)}
    joined = [" ".join(_plain(text)) for text in texts]
    names: list[str] = []
    last = -1
    for at, raw in enumerate(texts[0].split()):
        word = raw.strip(_MARKS)
        if word.casefold() not in rare:
            continue
        rare.discard(word.casefold())
        both = f"{names[-1]} {word}" if names and at == last + 1 else ""
        if both and all(both.casefold() in text for text in joined):
            names[-1] = both
        else:
            names.append(word)
        last = at
    return names[:most]


def retrained_told(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many retrained values lie where they were predicted (`Verification.lines`), of those that prove something."""
    fresh = [line for line in lines if not line["already_measured"]]
    known = [line for line in fresh if line["inside"] is not None]
    if not fresh:
        return (
            f"{'This set' if len(lines) == 1 else 'All of this'} had been measured before, so that it proves nothing."
        )
    if not known:
        return "Retrained; the errors of the predictions are unknown, so that nothing says how far off they may be."
    good = sum(line["inside"] for line in known)
    if len(known) == 1:
        return f"Retrained: it lies {'inside' if good else 'outside'} the interval."
    return f"Of {len(known)} retrained values {good} lie inside their intervals."


def agreement_told(facts: Mapping[str, Any]) -> list[str]:
    """How near predicted effects are to retrained ones (`Verification.summary`), in sentences; none where nothing was proved."""
    found, sets, queries = [], facts["sets"], facts["queries"]
    if (error := facts["relative_error"]) is not None:
        much = f"{100 * error:.2g} % of" if error < 1 else f"{error:.3g} times"
        one = sets * queries == 1
        found.append(
            f"The prediction misses the retrained effect by {much} its size."
            if one
            else f"In the median of {sets * queries} predictions the retrained effect is missed by {much} its size."
        )
    if facts["pearson"] is not None:
        ranks = "" if facts["spearman"] is None else f" (ranks: {facts['spearman']:.2g})"
        mean = f", in the mean of {queries} queries" if queries > 1 else ""
        found.append(
            f"Over {sets} sets predicted and retrained effects correlate by {facts['pearson']:.2g}{ranks}{mean}."
        )
    if sets and (old := facts["already_measured"]):
        more = "set had been measured before, and is" if old == 1 else "sets had been measured before, and are"
        found.append(f"{old} more {more} not counted.")
    return found


def index_sentences(facts: Mapping[str, Any]) -> list[str]:
    """What an index is (`Index.info`), for people."""
    rows, model, signature = facts["rows"], facts["model"], facts["signature"]
    source = (facts["source"] or {}).get("name", "a model in memory")
    each = facts["bytes"] / max(1, rows) / 1e3
    forms = ", ".join(f"{count:,} as {name}" for name, count in facts["forms"].items())
    found = [
        f"{rows:,} rows, from {facts['corpus'] or 'memory'} ({forms}).",
        f"Indexed with {source} (a {model['family']} in {model['dtype']}); {signature['targets']} tokens were learned.",
        f"{facts['bytes'] / 1e6:,.1f} MB on disk, {each:,.1f} kB a row; written {facts['created']}.",
        f"Fields to filter and group by: {', '.join(facts['fields']) or 'none'}.",
    ]
    if facts["units"]:
        found.append(f"Rows of one {facts['units']} belong together.")
    if facts["deleted"]:
        found.append(f"{facts['deleted']:,} rows are deleted and wait for `leaveout purge`.")
    return found


def run_sentences(facts: Mapping[str, Any]) -> list[str]:
    """What a run is (its recipe's kind, sizes, measurements), for people."""
    found = [
        f"{facts['examples']:,} examples in {facts['units']:,} units, {facts['steps']:,} steps of {facts['optimizer']} "
        f"({facts['kind']}).",
    ]
    if facts["measurements"]:
        measured = "; ".join(f"{count:,} x {name}" for name, count in facts["measurements"].items())
        found.append(f"Measured in {facts['cpu_seconds']:,.0f} CPU seconds: {measured}.")
    else:
        found.append("Nothing is measured yet (`leaveout measure`), so nothing can be predicted.")
    if never := facts.get("never_trained_on"):
        found.append(
            f"{len(never):,} units are in no step of the training: {', '.join(never[:4])}{' ...' * (len(never) > 4)}."
        )
    return found


_SPECIAL = re.compile(r"<\|[^<>|]*\|>")  # marks of chat templates, which are no words
_MARKS = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum()) + "“”„‘’«»…–—"


def _plain(text: str) -> list[str]:
    return [word for raw in text.split() if (word := raw.strip(_MARKS).casefold())]


def _listed(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _counted(rows: int) -> str:
    return "One row stands out" if rows == 1 else f"{rows} rows stand out"
