"""Rows to windows of token ids with the positions that are learned.

One tokenisation of the whole text decides: a token is a target when its characters touch a response, so that a
token across the seam of prompt and response counts, and nothing shifts as it does when the prompt is tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leaveout.corpus import Row, render
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.readout.settings import SignatureSettings


class NoTargetError(FormatError):
    """A row or query without a token to learn."""


@dataclass(frozen=True)
class Window:
    """A piece of a row: token ids, and which of its positions predict a target.

    `positions[i]` predicts token `positions[i] + 1`; `start` is the index of the first token within the row.
    """

    row: int
    start: int
    ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class TokenisedRow:
    """A row's text and responses (rendered, if it was a chat), token ids and character offsets [tokens, 2], and the
    windows that cover its targets.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    ids: list[int]
    offsets: list[tuple[int, int]]
    windows: list[Window]

    @property
    def n_targets(self) -> int:
        return sum(len(window.positions) for window in self.windows)


def tokenise(row: Row, number: int, tokenizer: Any, settings: SignatureSettings, context: int) -> TokenisedRow:
    """The windows of a row, whose `row` field is `number`.

    The beginning-of-sequence token is added as the tokenizer does by itself, but not to a text that has it already,
    nor to a chat, whose template writes all special tokens.

    Raises: NoTargetError if no token of the row is a target.
    """
    if row.messages:  # a chat that an index gives back has its text, and no messages
        row = render(row, tokenizer)
    start_token = getattr(tokenizer, "bos_token", None)
    complete = row.messages is not None or bool(start_token and row.text.startswith(start_token))
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} gives no character offsets: load the fast tokenizer of this model."
        )
    encoded = tokenizer(row.text, return_offsets_mapping=True, add_special_tokens=not complete, verbose=False)
    ids, offsets = list(encoded["input_ids"]), [(a, b) for a, b in encoded["offset_mapping"]]
    learned = list(range(1, len(ids))) if settings.targets == "all" else _touching(offsets, row.responses)
    if not learned:
        raise NoTargetError(
            f"Row {row.number + 1} ({row.id!r}) has no token to learn (its response is empty or a single first token): "
            "give it a response, or leave it out with skip_bad."
        )
    return TokenisedRow(row.text, row.responses, ids, offsets, cut_windows(number, ids, learned, settings, context))


def _touching(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if index > 0 and start < end and any(start < stop and end > first for first, stop in spans)
    ]


def cut_windows(
    row: int, ids: list[int], learned: list[int], settings: SignatureSettings, context: int
) -> list[Window]:
    """Windows of at most `settings.window` tokens (and the model's context) that start every `stride` tokens.

    No window only repeats the end of the one before. With unit-length windows, each votes with all its targets; else
    a target counts once, in the first window that predicts it. Windows without targets are left out.
    """
    length = min(settings.window, context)
    stride = length - max(1, length * settings.overlap // settings.window)
    windows, counted = [], 0
    for start in range(0, max(len(ids) - (length - stride), 1), stride):
        end = min(start + length, len(ids))
        first = start + 1 if settings.unit_length else max(start + 1, counted)
        positions = [token - 1 - start for token in learned if first <= token < end]
        counted = end
        if positions:
            windows.append(Window(row, start, ids[start:end], positions))
    return windows


def check_ids(rows: Sequence[TokenisedRow], vocabulary: int) -> None:
    """Raises: MismatchError if a token id is not one that the model embeds."""
    largest = max((max(row.ids) for row in rows if row.ids), default=0)
    if largest >= vocabulary:
        raise MismatchError(
            f"The tokenizer gave token {largest}, the model embeds only {vocabulary}: "
            "use the tokenizer that the model came with."
        )
