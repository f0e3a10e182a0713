"""The best rows of a search scored once more through the whole model: each row's gradient over all trained parameters along the
query's, or along what the run's optimizer and curvature would make of it. See `leaveout.influence`.
"""

# What optimizers and trainers keep has no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leaveout.corpus import Probe
from leaveout.corpus.behaviour import Measure, measured, measures_of, summed, texts_of
from leaveout.errors import FormatError, MismatchError, UnsupportedError, require_whole
from leaveout.influence import (
    Along,
    Batch,
    Predictions,
    Run,
    WholeModel,
    adam_metric,
    refined,
    row_scores,
    second_moments,
)
from leaveout.models import adapter_places, evaluating
from leaveout.models.checks import first_line
from leaveout.readout.families import block_of
from leaveout.readout.model import Readout
from leaveout.readout.opened import OpenIndex, QueryRow, row_of
from leaveout.readout.scan import Length, counted
from leaveout.readout.signature import SIDES
from leaveout.readout.tokens import TokenisedRow, Window, batches, positions_in

RERANKED = 100  # rows, where it is not said how many
BEYOND = 1e30  # length of a query that steps along it, of about its inverse, would take out of float32


@dataclass(frozen=True)
class Refinement:
    """What is known of the run that trained the model, by which queries are refined.

        index.search([query], refine=Refinement(rates=0.05))
        index.search([query], refine=Refinement(optimizer="out/checkpoint-500"))

    rates       the sum of its learning rates over all steps (steps x mean rate); None: as the checkpoint says. Half or twice
                as much changes little
    optimizer   a checkpoint of transformers.Trainer, for Adam's second moments and the rates; `sgd` for plain gradient
                descent; None: Adam, its second moments estimated from gradients of rows of the index
    sample      rows of the index whose curvature counts
    steps       products with it, of each query
    seed        of the sample
    """

    rates: float | None = None
    optimizer: str | Path | None = None
    sample: int = 200
    steps: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("sample", self.sample, 1)
        require_whole("steps", self.steps, 1)
        if self.optimizer is not None and not isinstance(self.optimizer, (str, Path)):
            raise TypeError(f"optimizer is {self.optimizer!r}: give sgd, or the directory of a checkpoint.")
        number = isinstance(self.rates, (int, float)) and not isinstance(self.rates, bool)
        if self.rates is not None and not (number and 0 < self.rates < math.inf):
            raise ValueError(f"rates is {self.rates!r}: give the sum of the run's learning rates, steps x mean rate.")
        if self.rates is None and (self.optimizer is None or self.optimizer == "sgd"):
            raise ValueError(
                "A refined query needs the sum of the run's learning rates: give rates, steps x mean rate, or a checkpoint."
            )


class Reranking:
    """Scores rows of an index along the gradients of queries over all trained parameters, each side by itself.

    vectors, scales     of the queries, as `Index.encode` and `OpenIndex.scales` gave them. Where rows have two sides, the scores
                        of each are brought to the size of those of the index, by what the query has with itself
    Memory: the trained parameters in float32 once more, and 2 such vectors a query; while queries are refined, `steps` + 3.
    Raises: UnsupportedError for a model whose weights are not all in memory.
    """

    def __init__(
        self, index: OpenIndex, queries: Sequence[QueryRow], refine: Refinement | None, vectors: Tensor, scales: Tensor
    ) -> None:
        self.index = index
        readout = self.readout = in_float32(index.unchanged())
        self.model = whole_model(readout)
        answers = [index.tokenised(texts_of([query])) for query in queries]
        halves = vectors.chunk(len(scales), 1)
        counts = [(scale > 0) & (len(scales) == 1 or half.any(1)) for scale, half in zip(scales, halves, strict=True)]
        places = [(query, side) for query in range(len(queries)) for side in range(len(scales)) if counts[side][query]]
        asked = [[self._batches([one.of_side(side)], mean=True) for one in answers[query]] for query, side in places]
        gradients = directions = [
            summed([queries[query]], map(self._gradient, some, measures_of([queries[query]])))[0]
            for (query, _), some in zip(places, asked, strict=True)
        ]
        if refine is not None:
            live = index.live_numbers()
            chosen = np.random.default_rng(refine.seed).permutation(len(live))[: refine.sample]
            sample = [row for row in self._tokens(live[np.sort(chosen)], 0) if row.windows]
            if any(window.share is not None for row in sample for window in row.windows):
                raise UnsupportedError(
                    "Queries are refined by the curvature of rows that count by the mean loss of their tokens, and this index "
                    "has preference or weighted rows: rerank without refine."
                )
            run = self._run(refine, readout, sample)
            directions = refined(self.model, self._batches(sample, mean=True), gradients, run, len(sample))
            for gradient, x in zip(gradients, directions, strict=True):
                size = float(torch.linalg.vector_norm(x, dtype=torch.float64))
                if not size < BEYOND or (size < 1 / BEYOND and bool(gradient.any())):
                    raise ValueError(
                        f"rates is {run.rates:g}, by which a query grows or shrinks beyond all numbers: give the sum of the "
                        "run's learning rates, steps x mean rate."
                    )
        self.along: dict[
            tuple[int, int], tuple[Along, float]
        ] = {}  # by query and side, with what scores are multiplied by
        for (query, side), gradient, x, some in zip(places, gradients, directions, asked, strict=True):
            by = 1.0
            if len(scales) > 1:
                length = float(index.side_form.lengths(halves[side][query : query + 1]))
                count = np.mean([max(one.of_side(side).n_targets, 1) for one in answers[query]])
                # Of the query as a row, along itself.
                there = float(torch.dot(gradient.double(), x.double())) * count ** (1 - index.settings.length_power)
                by = float(scales[side, query]) * length**2 / there
            first = next(batch for batches in some for batch in batches)
            self.along[query, side] = Along.of(self.model, x, first), by

    def error(self, query: int) -> float:
        """By how much scores of a query change, relative to their size, when the step they are found with doubles (of its side
        with the larger error)."""
        return max((along.error for (own, _), (along, _) in self.along.items() if own == query), default=0.0)

    def _gradient(self, text: list[Batch], measure: Measure | None) -> Tensor:
        """Gradient of the mean loss of a text, or of a measure of it."""
        if measure is None:
            return self.model.gradient(text)
        if isinstance(measure, Probe):
            module = _Probed(self.readout, measure)
            total, count = torch.zeros_like(self.model.theta), sum(len(w.positions) for b in text for w in b.inputs[0])
            for batch in text:
                total += self.model.slope(lambda named, batch=batch: module.total(named, batch.inputs[0]) / count)
            return total
        if len(text) > 1 or text[0].n_rows > 1:
            raise UnsupportedError("A function of logits takes those of a whole text: give one that fits in a window.")
        return self.model.slope(lambda named: self._asked(named, text[0], measure))

    def _asked(self, named: dict[str, Tensor], text: Batch, measure: Measure) -> Tensor:
        assert not isinstance(measure, Probe)
        found = self.model.predictions(named, text.inputs)
        return measured(measure, found.logits, found.target)

    def scores(self, query: int, numbers: np.ndarray, length: Length) -> np.ndarray:
        """Scores [rows] float32 of rows by number with one query, their lengths as stored.

        Cost: two forward passes a row for each side that counts.
        """
        scores = np.zeros(len(numbers), np.float32)
        for side, name in enumerate(SIDES):
            if (query, side) not in self.along:
                continue
            along, by = self.along[query, side]
            total, some = np.zeros(len(numbers)), self._batches(self._tokens(numbers, side))
            for batch, found in zip(some, row_scores(self.model, some, [along]), strict=True):
                np.add.at(total, [window.row for window in batch.inputs[0]], found[0].cpu().numpy())
            scores += counted((total * by).astype(np.float32), self.index.lengths_of(numbers, name), length)
        return scores

    def _tokens(self, numbers: np.ndarray, side: int) -> list[TokenisedRow]:
        rows = self.index.tokenised([row_of(record) for record in self.index.store.rows(numbers)])
        return [row.of_side(side) for row in rows]

    def _batches(self, rows: Sequence[TokenisedRow], mean: bool = False) -> list[Batch]:
        """Windows of rows in batches, each window for itself; of a row the mean loss of its learned tokens counts, or what
        counts in the index."""
        readout = self.index.readout
        windows = [window for at, row in enumerate(rows) for window in _numbered(row, at)]
        counts = {at: max(row.n_targets, 1.0) for at, row in enumerate(rows)}
        by = counts if mean else self.index.signer.divisors(windows)
        return [
            Batch((some, [window.sign / by[window.row] for window in some]), len(some))
            for some in batches(windows, readout.batch_class)
        ]

    def _run(self, refine: Refinement, readout: Readout, sample: list[TokenisedRow]) -> Run:
        if refine.optimizer == "sgd":
            assert refine.rates is not None
            return Run(refine.rates, None, refine.steps)
        if refine.optimizer is not None:
            place = Path(refine.optimizer)
            moments = read_moments(place, readout.lm, list(self.model.shapes))
            flat = torch.cat([moments[name].flatten() for name in self.model.shapes]).to(self.model.theta)
            return Run(refine.rates or read_rates(place), adam_metric(flat), refine.steps)
        assert refine.rates is not None
        moments = second_moments(
            self.model, lambda some: self._batches([sample[i] for i in some], mean=True), len(sample), refine.seed
        )
        return Run(refine.rates, adam_metric(moments), refine.steps)


def _numbered(row: TokenisedRow, at: int) -> list[Window]:
    return [replace(window, row=at) for window in row.windows]


# ---------------------------------------------------------------- the model


class _Predicting(nn.Module):
    """Logits at positions, as a module, so that parameters can be given by name."""

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.lm: Any = readout.lm
        self.scale, self.cap = readout.scale, readout.cap

    def forward(self, ids: Tensor, batch: Tensor, token: Tensor) -> Tensor:
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[batch, token]
        logits = self.lm.get_output_embeddings()(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class _Probed(nn.Module):
    """What a probe finds at positions, summed, as a module."""

    def __init__(self, readout: Readout, probe: Probe) -> None:
        super().__init__()
        self.lm: Any = readout.lm
        self.direction = torch.from_numpy(probe.direction)
        self.blocks = () if probe.block is None else (block_of(readout, probe.block),)  # no modules of this one, too

    def forward(self, ids: Tensor, batch: Tensor, token: Tensor) -> Tensor:
        kept: list[Any] = []
        hooks = [block.register_forward_hook(lambda module, args, out: kept.append(out)) for block in self.blocks]
        try:
            last = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        states: Any = kept[0] if kept else last
        states = states[0] if isinstance(states, tuple) else states
        return (states[batch, token] @ self.direction.to(states)).sum()

    def total(self, named: dict[str, Tensor], windows: list[Window]) -> Tensor:
        """The sum over all learned positions of windows, under parameters by name."""
        device = next(iter(named.values())).device
        where = [x.to(device) for x in positions_in(windows)]
        with evaluating(self.lm):
            return torch.func.functional_call(self, {f"lm.{name}": p for name, p in named.items()}, tuple(where))


def in_float32(readout: Readout) -> Readout:
    """The model, in a float32 copy where it is narrower: steps of a central difference would be rounded away."""
    if readout.stream is not None or readout.dtype not in (torch.bfloat16, torch.float16):
        return readout
    return replace(readout, lm=copy.deepcopy(readout.lm).float())


def whole_model(readout: Readout) -> WholeModel:
    """The parameters of the adapters at work, or of the whole model where there are none; rows are their windows."""
    if readout.stream is not None:
        raise UnsupportedError(
            "Rows are scored backwards through the whole model, and its layers are streamed here: give offload none, where it "
            "fits, or leave rerank and refine out."
        )
    lm = readout.lm
    places = adapter_places(lm)
    chosen = {
        name: p
        for name, p in lm.named_parameters()
        if not places or any(name.startswith(f"{place}.") or name == place for place in places)
    }
    if any(p.device.type == "meta" for p in chosen.values()):
        raise UnsupportedError(
            "The weights of this model are not all in memory: rerank with offload='none', or not at all."
        )
    module = _Predicting(readout)

    def predictions(named: dict[str, Tensor], inputs: tuple[list[Window], list[float]]) -> Predictions:
        windows, sizes = inputs
        ids, batch, token = positions_in(windows)
        device = next(iter(named.values())).device
        with evaluating(lm):
            logits = torch.func.functional_call(
                module,
                {f"lm.{name}": p for name, p in named.items()},
                (ids.to(device), batch.to(device), token.to(device)),
            )
        weight = torch.tensor(sizes, dtype=torch.float64)[batch]
        return Predictions(logits, ids[batch, token + 1].to(device), batch.to(device), weight.to(device))

    return WholeModel(chosen, predictions)


# ---------------------------------------------------------------- a trainer's checkpoint


def _no_checkpoint(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path} is no checkpoint of a Trainer ({why}): give a directory with optimizer.pt and trainer_state.json."
    )


def read_moments(path: Path, lm: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Adam's second moments by parameter, of a checkpoint of transformers.Trainer.

    Nothing is unpickled but tensors and numbers.
    Raises: FormatError for what is no such checkpoint; MismatchError if it is of other parameters.
    """
    try:
        state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise _no_checkpoint(path, first_line(error)) from None
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise _no_checkpoint(path, "its optimizer.pt holds no state of an optimizer")
    if len(state["param_groups"]) > 2:
        raise MismatchError(
            f"The optimizer of {path} has {len(state['param_groups'])} groups of parameters where Trainer makes 2, so that it "
            "is not known which is which: give rates alone."
        )
    found: dict[str, Tensor] = {}
    own = dict(lm.named_parameters())
    for group, keys in zip(state["param_groups"], _groups(lm, names, len(state["param_groups"])), strict=True):
        if len(group["params"]) != len(keys):
            raise MismatchError(
                f"The optimizer of {path} has {len(group['params'])} parameters where the model has {len(keys)}: give the "
                "checkpoint of the run that trained this model, with the same adapters."
            )
        for number, name in zip(group["params"], keys, strict=True):
            kept = state["state"].get(number, {})
            if "exp_avg_sq" not in kept or kept["exp_avg_sq"].shape != own[name].shape:
                raise MismatchError(
                    f"The optimizer of {path} has no second moments of the shape of {name}: give a checkpoint of Adam or AdamW "
                    "of this model, or rates alone."
                )
            steps = float(kept["step"])
            found[name] = kept["exp_avg_sq"].float() / (1 - group["betas"][1] ** steps)
    return found


def _groups(lm: nn.Module, names: Sequence[str], count: int) -> list[list[str]]:
    """Names of parameters in the order of an optimizer's groups: those that decay first, as Trainer sorts them."""
    if count == 1:
        return [list(names)]
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, lm))  # type: ignore[arg-type]
    return [[name for name in names if name in decaying], [name for name in names if name not in decaying]]


def read_rates(path: Path) -> float:
    """The sum of the learning rates of all steps that a trainer's checkpoint logged, between logs by their mean.

    Raises: FormatError where it logged none, and for what is no such checkpoint.
    """
    try:
        told = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_checkpoint(path, first_line(error)) from None
    if not isinstance(told, dict):
        raise _no_checkpoint(path, "its trainer_state.json is no object")
    return summed_rates(told, path)


def summed_rates(told: dict[str, Any], path: Path) -> float:
    """As `read_rates`, of what a trainer told."""
    logged = [
        (0, None),
        *((x["step"], x["learning_rate"]) for x in told.get("log_history", []) if "learning_rate" in x),
    ]
    if not any(rate for _, rate in logged):
        raise FormatError(
            f"{path} has logged no learning rates above 0: give the sum of the run's rates, steps x mean rate."
        )
    total, before = 0.0, logged[1][1]
    for (first, _), (last, rate) in itertools.pairwise(logged):
        total += (last - first) * (before + rate) / 2
        before = rate
    return total + (told.get("global_step", logged[-1][0]) - logged[-1][0]) * before
