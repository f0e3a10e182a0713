"""Preference rows in an index: the gradient of DPO's loss, and the reference model that the loss holds a pair against.

    loss      -log sigmoid(beta * (margin - reference)),   margin = log p(chosen) - log p(rejected), reference likewise
    gradient  factor * (that of chosen's loss - that of rejected's),   factor = beta * sigmoid(-beta * (margin - reference))

The loss is no sum over positions: the factor of a pair, one number, multiplies the difference of two such sums. Without a
reference model the index's own is one, so that every factor is beta / 2, as in the first step of training.
Source: arXiv 2305.18290, eq. 7 and the gradient below it.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models import ModelOptions
from leaveout.readout.limits import Limits
from leaveout.readout.logits import Head
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.tokens import Window, batches, positions_in

ADAPTERS_OFF = "base"
"""The reference that is the index's own model without its adapters."""


@dataclass(frozen=True)
class Preferences:
    """How preference rows count: `beta` of DPO, and its reference model; None: the index's own model."""

    beta: float = 0.1
    reference: Reference | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not number or not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta!r}: give a positive number, the beta of DPO's loss.")

    def factor(self, margin: float) -> float:
        """What a pair's difference of gradients is multiplied by in DPO's loss, given its margin over that of the reference."""
        return self.beta / (1 + math.exp(min(self.beta * margin, 700.0)))

    def facts(self) -> dict[str, Any]:
        """What an index says of it."""
        return {"beta": self.beta, "reference": None if self.reference is None else self.reference.facts()}


@dataclass(frozen=True)
class Reference:
    """A reference model. `given`: how a worker gets it; `off`: whether it is the index's own model without its adapters."""

    given: Any
    readout: Readout
    off: bool = False

    def facts(self) -> Any:
        """Equal only for the same model."""
        return ADAPTERS_OFF if self.off else self.readout.identity()

    def margins(self, windows: Sequence[Window], limits: Limits) -> dict[int, float]:
        """Margins of preference rows by their number."""
        with adapters_off(self.readout.lm) if self.off else contextlib.nullcontext():
            return margins(self.readout, windows, limits)


def load_reference(given: Any, readout: Readout, options: ModelOptions) -> Reference:
    """The reference model of an index, which is given as models are, or as `base`.

    Raises: MismatchError for one that reads other tokens; UnsupportedError for `base` of a model without adapters.
    """
    if isinstance(given, str) and given == ADAPTERS_OFF:
        if not any(hasattr(module, "_disable_adapters") for module in readout.lm.modules()):
            raise UnsupportedError(
                "The reference is `base`, the model without its adapters, and it has none: give a reference model, or none."
            )
        return Reference(given, readout, off=True)
    found = load_readout(given, options=options)
    if found.identity()["tokenizer"] != readout.identity()["tokenizer"]:
        raise MismatchError(
            "The reference model has another tokenizer than the model: give the model that training began with."
        )
    return Reference(given if isinstance(given, str) else found, found)


@contextlib.contextmanager
def adapters_off(lm: nn.Module) -> Generator[None]:
    """Within it the layers of a model compute without their adapters."""
    layers: list[Any] = [module for module in lm.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@torch.no_grad()
def margins(readout: Readout, windows: Sequence[Window], limits: Limits, head: Head | None = None) -> dict[int, float]:
    """log p(chosen) - log p(rejected), in nats, of the preference rows among these windows, by their number.

    head: of the readout, where there is one
    Cost: a forward pass of their windows.
    """
    found: dict[int, float] = defaultdict(float)
    groups = list(batches([w for w in windows if w.share is not None and w.share.pair], readout.batch_class, limits))
    if not groups:
        return {}
    head = head or Head(
        readout, None, torch.float64 if readout.weight.dtype == torch.float64 else torch.float32, limits
    )
    placed = [positions_in(group) for group in groups]
    inputs = [ids.to(readout.device) for ids, _, _ in placed]
    states = map(readout.hidden, inputs) if readout.stream is None else readout.hidden_of(inputs)
    for group, (ids, row, token), hidden in zip(groups, placed, states, strict=True):
        target = ids[row, token + 1].to(readout.device)
        hidden = hidden[row.to(hidden.device), token.to(hidden.device)].to(head.buffer.dtype)
        for piece, logits in head.blocks(hidden):
            own = logits.gather(1, target[piece, None]).squeeze(1) - logits.logsumexp(1)
            for place, value in zip(row[piece].tolist(), own.tolist(), strict=True):
                found[group[place].row] += group[place].toward * value
    return dict(found)


def with_references(windows: Sequence[Window], found: dict[int, float]) -> list[Window]:
    """The windows, those of preference rows with the margins of a reference model."""
    return [
        replace(window, share=replace(window.share, reference=found[window.row]))
        if window.share is not None and window.row in found
        else window
        for window in windows
    ]
