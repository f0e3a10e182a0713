"""Tail-patch: what one more training step on a unit, after the last one, does to the answers of queries.

The step is the recipe's own: its optimizer with the state that training left behind, its clipping, and its full learning
rate (a schedule's last rate is close to 0). Adam from an empty state would move every parameter equally far, and plain
gradient descent by a small rate would only repeat the gradient dot product. What the step does to a unit of weight 0
(momentum, weight decay) is no merit of the unit: as everywhere here, a unit is compared with itself at weight 0.
Source: arXiv 2410.17413, the tail-patch score; the choice of the step is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.evaluation.truth import answer_loss, of_answers
from leaveout.methods.registry import Scored
from leaveout.metrics import tail_patch, top_rows
from leaveout.models import full_precision
from leaveout.training.loop import Loop, Part, RunOptions, Steps, restore_state, state_of
from leaveout.training.queries import Query, query_function
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Task, task_of


def tail_patches(
    run: TrainingRun, queries: Sequence[Query], scored: Mapping[str, Scored], k: int, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """For each method: `tail_patch`, the mean rise of the answer's probability [query] by the k best units, and
    `tail_patch_nats`, that of its logarithm [query].

    Cost and memory: see `patched_losses`; units that several methods or queries choose are stepped on once.
    """
    best = {name: top_rows(found.scores, k) for name, found in scored.items()}
    before, after = patched_losses(run, queries, np.any(list(best.values()), axis=0), progress)
    chosen = {name: after[places].reshape(len(queries), k) for name, places in best.items()}
    return {
        name: {"tail_patch": tail_patch(before, found), "tail_patch_nats": before - found.mean(1)}
        for name, found in chosen.items()
    }


def patched_losses(
    run: TrainingRun, queries: Sequence[Query], wanted: np.ndarray, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of whole answers after a step on nothing [query], and after one on each unit alone [query, unit], nats.

    wanted  [query, unit] true where the second is asked; it is nan elsewhere
    Cost:   one training, for the optimizer's state; a step for each unit that a query asks; a forward pass a pair.
    Memory: parameters, gradients and optimizer state twice, the activations of one row, 16 bytes for each pair.
    """
    recipe, task = run.recipe, task_of(run.recipe, run.device)
    if task.running:
        raise UnsupportedError(
            "A tail patch is a step on one unit, and batch norm in training form needs a batch: judge by retraining alone."
        )
    asks = [query_function(task, [query]) for query in of_answers(recipe, queries, answer_loss)]
    step = _last_step(recipe, task, progress)
    unit_of, after = recipe.unit_of.numpy(), np.full(wanted.shape, np.nan)
    step([0], 0.0)
    before = np.array([_value(ask, task) for ask in asks])
    for unit in tqdm(
        np.flatnonzero(wanted.any(0)), desc="tail-patch", unit="step", disable=not progress, file=sys.stderr
    ):
        step(np.flatnonzero(unit_of == unit).tolist(), 1.0)
        for query in np.flatnonzero(wanted[:, unit]):
            after[query, unit] = _value(asks[query], task)
    return before, after


def _value(ask: Callable[[torch.nn.Module], Tensor], task: Task) -> float:
    with torch.no_grad():
        return float(ask(task.model)[0])


def _last_step(recipe: Recipe, task: Task, progress: bool) -> Callable[[Sequence[int], float], None]:
    """Trains the task's model; then a function that puts it where it is one step later, on the weighted mean of some rows."""
    params, steps, scale = task.parameters(), Steps(recipe, task), 1.0

    def backward(part: Part) -> None:
        (steps.loss(part) * scale).backward()

    loop = Loop(steps, params, backward, fused=task.device.type != "cpu")
    loop.run(None, "train", RunOptions(progress=progress))
    trained = {name: value.detach().clone() for name, value in state_of(params, loop.optimizer).items()}
    for group in loop.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr

    def step(rows: Sequence[int], weight: float) -> None:
        nonlocal scale
        restore_state(params, loop.optimizer, trained)
        scale = weight
        with full_precision():
            loop.step(steps.parts_of(rows, len(rows)))  # one at a time: a unit may hold any number of them

    return step
