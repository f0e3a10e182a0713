"""A task's trained parameters in one vector, for what `leaveout.influence` does with them: rows' losses and the optimizer's
metric of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.influence import Batch, Predictions, Run, WholeModel, adam_metric, second_moments
from leaveout.training.examples import IGNORED
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Parameters, Task

TOGETHER = 16  # rows of a batch


class _Outputs(nn.Module):
    """Logits and targets of a task as a module, so that parameters can be given by name."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.outputs = task.model, task.outputs

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        assert self.outputs is not None
        return self.outputs(self.model, batch)


def whole_model(task: Task, parameters: Parameters) -> WholeModel:
    """The trained parameters of a task; the loss of a row is the mean over its learned tokens, times the row's weight."""
    outputs, running = _Outputs(task), {name: parameters[name] for name in task.running}

    def predictions(named: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Predictions:
        logits, targets = torch.func.functional_call(
            outputs, {f"model.{name}": value for name, value in {**running, **named}.items()}, inputs
        )
        learned = targets != IGNORED
        counts = learned.view(len(learned), -1).sum(1)
        row = torch.arange(len(targets), device=targets.device).repeat_interleave(counts)
        weights = 1 / counts[row].double()
        if task.weighted and len(inputs) > inputs[0].dim():  # queries are asked without
            weights = weights * inputs[-1][row]
        return Predictions(logits[learned], targets[learned], row, weights)

    return WholeModel({name: parameters[name] for name in task.trained}, predictions)


def batches_of(task: Task, rows: Sequence[Any], together: int = TOGETHER) -> list[Batch]:
    """Rows, in order, some at a time."""
    parts = (rows[start : start + together] for start in range(0, len(rows), together))
    return [Batch(task.encode(part), len(part)) for part in parts]


def run_of(recipe: Recipe, model: WholeModel, task: Task, sample: Sequence[Any], seed: int) -> Run:
    """What the optimizer of a recipe does, with second moments from random batches of a sample."""
    about, n_steps = recipe.optimizer, len(recipe.batches())
    rates = sum(recipe.rate(step, n_steps) for step in range(n_steps))
    if about.name == "sgd":
        return Run(rates / (1 - about.momentum))
    moments = second_moments(model, lambda numbers: batches_of(task, [sample[i] for i in numbers]), len(sample), seed)
    if about.name == "paper-adam":  # its epsilon stands inside the root
        return Run(rates, (moments + (about.eps or 1e-3)).rsqrt())
    return Run(rates, adam_metric(moments, about.eps or 1e-8))
