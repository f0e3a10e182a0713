"""A row to token ids and the tokens that are learned: the one place where both engines tokenise.

One tokenisation of the whole text decides: a token is learned when its characters touch a response, so that a token
across the seam of prompt and response counts, and nothing shifts as it does when the prompt is tokenised alone.
"""

from __future__ import annotations

import itertools
import json
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from leaveout.corpus.chat import Template, render
from leaveout.corpus.rows import Row, shared_length
from leaveout.errors import FormatError, UnsupportedError

Offsets = list[tuple[int, int]]


class NoTargetError(FormatError):
    """A row or query without a token to learn."""


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row.

    row      the row with the text that was tokenised: rendered, if it is a chat or an instruction
    ids      token ids
    offsets  the characters [start, end) of the text behind each token; (0, 0) for those that the tokenizer adds itself
    learned  which tokens are learned, ascending; never the first, which nothing predicts
    cut      how many tokens of the row lie beyond the limit, and are not in `ids`
    """

    row: Row
    ids: list[int]
    offsets: Offsets
    learned: list[int]
    cut: int = 0


def tokens_of(
    row: Row, tokenizer: Any, template: Template | None = None, limit: int | None = None, everything: bool = False
) -> RowTokens:
    """The tokens of a row, at most `limit` of them.

    Special tokens are added as the tokenizer does by itself, but not where the text has them already, nor to a chat,
    whose template writes all of them. `everything`: prompts are learned too.
    Raises: NoTargetError if no token of the row is learned.
    """
    if row.pair is not None:
        raise UnsupportedError(
            f"Row {row.id!r} is a preference row, which is learned as two answers: see `pair_tokens`."
        )
    row = render(row, tokenizer, template)
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} gives no character offsets: load the fast tokenizer of this model."
        )
    encoded = tokenizer(
        row.text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        add_special_tokens=not row.rendered,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    first, end = _own(ids, encoded["special_tokens_mask"])
    inside = offsets[first:end]
    untrimmed = _untrimmed(tokenizer, row.text, ids[first:end]) or inside
    offsets[first:end] = in_order(untrimmed, len(row.text))
    before, behind = ids[:first], ids[end:]
    if before and ids[first:end][: len(before)] == before:
        before = []
    if behind and ids[first:end][-len(behind) :] == behind:
        behind = []
    ids = [*before, *ids[first:end], *behind]
    offsets = [*((0, 0) for _ in before), *offsets[first:end], *((0, 0) for _ in behind)]
    kept = ids if limit is None else ids[:limit]
    learned = range(len(ids)) if everything else touching(offsets, row.responses)
    found = [index for index in learned if 0 < index < len(kept)]
    if not found:
        why, advice = "its response is empty or a single first token", "give it a response"
        if len(kept) < len(ids):
            why, advice = f"it is cut after {len(kept)} of {len(ids)} tokens", "raise that limit"
        raise NoTargetError(
            f"Row {row.number + 1} ({row.id!r}) has no token to learn ({why}): {advice}, or leave it out."
        )
    return RowTokens(row, kept, offsets[: len(kept)], found, len(ids) - len(kept))


def pair_tokens(
    row: Row, tokenizer: Any, template: Template | None = None, limit: int | None = None, everything: bool = False
) -> list[RowTokens]:
    """The tokens of a row, or of both sides of a preference row, each as `tokens_of` gives them.

    A token that both sides have after the same beginning is as likely in both, so that it is learned on neither.
    Raises: NoTargetError as `tokens_of`, or where both sides have the same tokens.
    """
    if row.pair is None:
        return [tokens_of(row, tokenizer, template, limit, everything)]
    found = [
        tokens_of(replace(side, id=row.id, number=row.number), tokenizer, template, limit, everything)
        for side in row.pair
    ]
    shared = shared_length(*(side.ids for side in found))
    found = [replace(side, learned=[place for place in side.learned if place >= shared]) for side in found]
    if not any(side.learned for side in found):  # cut, or texts that the tokenizer makes one
        where = "are" if limit is None else f"within {limit} are"
        raise NoTargetError(
            f"Row {row.number + 1} ({row.id!r}) prefers nothing, as all tokens of both answers {where} the same: "
            "raise that limit, or leave it out."
        )
    return found


def touching(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens whose characters touch a span."""
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if start < end and any(start < stop and end > first for first, stop in spans)
    ]


def _own(ids: Sequence[int], added: Sequence[int]) -> tuple[int, int]:
    """Where the text's own tokens begin and end between those that the tokenizer adds."""
    first, end = 0, len(ids)
    while first < end and added[first]:
        first += 1
    while end > first and added[end - 1]:
        end -= 1
    return first, end


# ---------------------------------------------------------------- characters behind tokens


def in_order(offsets: Sequence[tuple[int, int]], length: int) -> Offsets:
    """Offsets of which none is empty or out of order: such a token has the gap between its neighbours.

    Where there is no gap, it is a piece of the next token's first character (or of the last one's, at the end).
    """
    sound = set(_longest_in_order(offsets))
    found, reached = list(offsets), 0
    following = (0, length)
    after: Offsets = []
    for index in range(len(offsets) - 1, -1, -1):
        after.append(following)
        following = offsets[index] if index in sound else following
    after.reverse()
    last = max(sound, default=-1)
    for index in range(len(offsets)):
        if index in sound:
            reached = max(reached, offsets[index][1])
            continue
        start = after[index][0] if index < last else length
        if reached < start:
            found[index] = (reached, start)
        elif index < last:
            found[index] = after[index]
        else:
            found[index] = offsets[last] if sound else (0, length)
    return found


def _longest_in_order(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers of the longest run of offsets that are not empty and do not begin before earlier ones."""
    filled = [index for index, (start, end) in enumerate(offsets) if start < end]
    if all(offsets[a] <= offsets[b] for a, b in itertools.pairwise(filled)):
        return filled
    tails: Offsets = []  # the smallest end of a run of each length, its numbers, and what came before each
    numbers: list[int] = []
    previous: dict[int, int] = {}
    for index in filled:
        at = bisect_right(tails, offsets[index])
        tails[at : at + 1], numbers[at : at + 1] = [offsets[index]], [index]
        previous[index] = numbers[at - 1] if at else -1
    run: list[int] = []
    index = numbers[-1]
    while index >= 0:
        run.append(index)
        index = previous[index]
    return run[::-1]


_untrimming: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _untrimmed(tokenizer: Any, text: str, ids: list[int]) -> Offsets | None:
    """Offsets with the white space that a tokenizer trims off them, or None if this one trims nothing.

    Trimmed, a token of spaces has no characters, and one that reaches across a seam by its spaces seems not to.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = getattr(backend, "post_processor", None)
    if backend is None or processor is None or b'"trim_offsets":true' not in processor.__getstate__():
        return None
    for attempt in range(2):
        if attempt or tokenizer not in _untrimming:  # anew, if the tokenizer was changed since
            _untrimming[tokenizer] = _copy_that_keeps_spaces(backend)
        encoded = _untrimming[tokenizer].encode(text, add_special_tokens=False)
        if encoded.ids == ids:
            return encoded.offsets
    return None


def _copy_that_keeps_spaces(backend: Any) -> Any:
    from tokenizers import Tokenizer

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(item) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {name: False if name == "trim_offsets" else kept(item) for name, item in items}
        return value

    described = json.loads(backend.to_str())
    described["post_processor"] = kept(described["post_processor"])
    copy = Tokenizer.from_str(json.dumps(described))
    copy.no_truncation()
    copy.no_padding()
    return copy
