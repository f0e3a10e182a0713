"""The tokens of rows, cut into windows with the positions that are learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leaveout.corpus import Row
from leaveout.corpus.rows import SEAM
from leaveout.corpus.tokens import NoTargetError, pair_tokens
from leaveout.errors import MismatchError
from leaveout.readout.limits import Limits
from leaveout.readout.settings import SignatureSettings


@dataclass(frozen=True)
class Share:
    """How a row counts whose loss is not that of its tokens alone.

    weight     of its loss
    pair       whether it is a preference row; then `reference` is its margin by a reference model, None: that of the model
    """

    weight: float = 1.0
    pair: bool = False
    reference: float | None = None


@dataclass(frozen=True)
class Window:
    """A piece of a row: token ids, and which of its positions predict a target.

    `positions[i]` predicts token `positions[i] + 1`; `start` is the index of the first token within the row; `prompt`: the
    positions of the row's other side, where it has two (`targets="both"`); `toward`: -1 for the rejected answer of a
    preference row; `share`: how its row counts, None for a plain row.
    """

    row: int
    start: int
    ids: list[int]
    positions: list[int]
    prompt: list[int] | None = None
    toward: int = 1
    share: Share | None = None

    @property
    def sides(self) -> list[list[int]]:
        """Positions of each side."""
        return [self.positions] if self.prompt is None else [self.positions, self.prompt]

    @property
    def sign(self) -> float:
        """Of its gradient in that of its row."""
        return self.toward if self.share is None else math.copysign(self.toward, self.toward * self.share.weight)


@dataclass(frozen=True)
class TokenisedRow:
    """A row's text and responses (rendered, if it was a chat), token ids and character offsets [tokens, 2], and the
    windows that cover its targets; `rendered`: whether a chat template wrote the text. Of a preference row the rejected side
    follows the chosen one, whose text has `chosen` characters.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    ids: list[int]
    offsets: list[tuple[int, int]]
    windows: list[Window]
    rendered: bool = False
    chosen: int | None = None

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
        answers = pair_tokens(row, tokenizer, settings.template, row.kept, everything=settings.targets == "all")
    except NoTargetError as error:
        raise NoTargetError(f"{str(error).removesuffix('.')} with skip_bad.") from None
    both = settings.targets == "both"
    first = answers[0]
    if row.pair is None:
        prompt = None
        if both:  # tokens without characters, which a tokenizer adds, are on no side
            answer = set(first.learned)
            prompt = [n for n, (start, end) in enumerate(first.offsets) if n and start < end and n not in answer]
        windows = cut_windows(number, first.ids, first.learned, settings, context, prompt)
        if row.weight != 1:
            windows = [replace(window, share=Share(row.weight)) for window in windows]
        return TokenisedRow(first.row.text, first.row.responses, first.ids, first.offsets, windows, first.row.rendered)
    share, shift = Share(row.weight, True, row.reference), len(first.row.text) + len(SEAM)
    windows = []
    for toward, answer, behind in zip((1, -1), answers, (0, len(first.ids)), strict=True):
        # A prompt that both answers have is as likely with either: its side of the row is empty.
        for window in cut_windows(number, answer.ids, answer.learned, settings, context, [] if both else None):
            windows.append(replace(window, start=window.start + behind, toward=toward, share=share))
    second = answers[1]
    return TokenisedRow(
        first.row.text + SEAM + second.row.text,
        (*first.row.responses, *((start + shift, end + shift) for start, end in second.row.responses)),
        [*first.ids, *second.ids],
        [*first.offsets, *((start + shift, end + shift) for start, end in second.offsets)],
        windows,
        first.row.rendered,
        len(first.row.text),
    )


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
            windows.append(Window(row, start, ids[start:end], positions[0], None if prompt is None else positions[1]))
    return windows


def check_ids(rows: Sequence[TokenisedRow], vocabulary: int) -> None:
    """Raises: MismatchError if a token id is not one that the model embeds."""
    largest = max((max(row.ids) for row in rows if row.ids), default=0)
    if largest >= vocabulary:
        raise MismatchError(
            f"The tokenizer gave token {largest}, the model embeds only {vocabulary}: "
            "use the tokenizer that the model came with."
        )


# ---------------------------------------------------------------- batches


def padded_tokens(batch: Sequence[Window]) -> int:
    """Tokens of a batch, padding included."""
    return len(batch) * max(len(window.ids) for window in batch)


def batches(
    windows: Sequence[Window], kind: Callable[[int], int], limits: Limits | None = None
) -> Iterator[list[Window]]:
    """Groups of windows of similar length, as many as the limits allow, and of one kind of length."""
    limits = limits or Limits()
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        full = batch and ((len(batch) + 1) * len(batch[0].ids) > limits.batch_tokens or len(batch) == limits.batch_rows)
        if full or (batch and kind(len(window.ids)) != kind(len(batch[0].ids))):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def positions_in(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids [windows, tokens], and the window and token of every position that predicts a target."""
    ids = torch.zeros(len(windows), max(len(window.ids) for window in windows), dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
    predicting = [list(itertools.chain(*window.sides)) for window in windows]
    batch = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(list(map(len, predicting))))
    return ids, batch, torch.tensor(list(itertools.chain(*predicting)))
