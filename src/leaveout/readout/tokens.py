"""The tokens of rows, cut into windows with the positions that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from leaveout.corpus import Row
from leaveout.corpus.tokens import NoTargetError, tokens_of
from leaveout.errors import MismatchError
from leaveout.readout.settings import SignatureSettings


@dataclass(frozen=True)
class Window:
    """A piece of a row: token ids, and which of its positions predict a target.

    `positions[i]` predicts token `positions[i] + 1`; `start` is the index of the first token within the row; `prompt`: the
    positions of the row's other side, where it has two (`targets="both"`).
    """

    row: int
    start: int
    ids: list[int]
    positions: list[int]
    prompt: list[int] | None = None

    @property
    def sides(self) -> list[list[int]]:
        """Positions of each side."""
        return [self.positions] if self.prompt is None else [self.positions, self.prompt]


@dataclass(frozen=True)
class TokenisedRow:
    """A row's text and responses (rendered, if it was a chat), token ids and character offsets [tokens, 2], and the
    windows that cover its targets; `rendered`: whether a chat template wrote the text.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    ids: list[int]
    offsets: list[tuple[int, int]]
    windows: list[Window]
    rendered: bool = False

    @property
    def n_targets(self) -> int:
        """Learned positions; one that several windows predict counts as often."""
        return sum(len(window.positions) for window in self.windows)

    def of_side(self, side: int) -> TokenisedRow:
        """The row with this side alone; without windows if it has no such side."""
        windows = [replace(w, positions=w.sides[side], prompt=None) for w in self.windows if w.sides[side]]
        return replace(self, windows=windows)


def tokenise(row: Row, number: int, tokenizer: Any, settings: SignatureSettings, context: int) -> TokenisedRow:
    """The windows of a row, whose `row` field is `number`; nothing is cut off but what a recipe did (`kept`).

    Raises: NoTargetError if no token of the row is a target.
    """
    try:
        tokens = tokens_of(row, tokenizer, settings.template, row.kept, everything=settings.targets == "all")
    except NoTargetError as error:
        raise NoTargetError(f"{str(error).removesuffix('.')} with skip_bad.") from None
    prompt = None
    if settings.targets == "both":  # tokens without characters, which a tokenizer adds, are on no side
        answer = set(tokens.learned)
        prompt = [n for n, (start, end) in enumerate(tokens.offsets) if n and start < end and n not in answer]
    windows = cut_windows(number, tokens.ids, tokens.learned, settings, context, prompt)
    return TokenisedRow(tokens.row.text, tokens.row.responses, tokens.ids, tokens.offsets, windows, tokens.row.rendered)


def cut_windows(
    row: int,
    ids: list[int],
    learned: list[int],
    settings: SignatureSettings,
    context: int,
    prompt: list[int] | None = None,
) -> list[Window]:
    """Windows of at most `settings.window` tokens (and the model's context) that start every `stride` tokens.

    No window only repeats the end of the one before. With unit-length windows, each votes with all its targets; else
    a target counts once, in the first window that predicts it. Windows without targets are left out. `prompt`: the
    tokens of the other side, where a row has two.
    """
    length = min(settings.window, context)
    stride = length - max(1, length * settings.overlap // settings.window)
    windows, counted = [], 0
    sides = [learned] if prompt is None else [learned, prompt]
    for start in range(0, max(len(ids) - (length - stride), 1), stride):
        end = min(start + length, len(ids))
        first = start + 1 if settings.unit_length else max(start + 1, counted)
        positions = [[token - 1 - start for token in side if first <= token < end] for side in sides]
        counted = end
        if any(positions):
            windows.append(Window(row, start, ids[start:end], *positions))
    return windows


def check_ids(rows: Sequence[TokenisedRow], vocabulary: int) -> None:
    """Raises: MismatchError if a token id is not one that the model embeds."""
    largest = max((max(row.ids) for row in rows if row.ids), default=0)
    if largest >= vocabulary:
        raise MismatchError(
            f"The tokenizer gave token {largest}, the model embeds only {vocabulary}: "
            "use the tokenizer that the model came with."
        )
