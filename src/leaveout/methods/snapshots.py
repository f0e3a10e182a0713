"""Parameters along a training run: what TracIn and Z0-Inf look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from leaveout.training.loop import Loop, RunOptions
from leaveout.training.recipe import Recipe
from leaveout.training.steps import Steps
from leaveout.training.tasks import Parameters, task_of


@dataclass(frozen=True)
class Snapshot:
    """Trained parameters after `step` steps; rate: mean learning rate of the steps since the snapshot before."""

    step: int
    rate: float
    parameters: Parameters


def take_snapshots(recipe: Recipe, steps: Sequence[int], progress: bool = False) -> list[Snapshot]:
    """Train a recipe on everything and keep the parameters after these numbers of steps; 0 is the start.

    A snapshot at step 0 has the rate of the first step.

    Guarantee: a snapshot after the last step equals `train_plain`, bit for bit.
    Memory: one copy of the trained parameters for each snapshot. Cost: one training.
    Raises: ValueError unless the steps ascend within 0 ... the steps of the recipe.
    """
    n_steps = len(recipe.batches())
    if not steps or steps[0] < 0 or steps[-1] > n_steps or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"snapshots need ascending steps within 0 ... {n_steps}, not {list(steps)}.")
    at_steps = Steps(recipe, task_of(recipe))
    params = at_steps.task.parameters()
    kept: list[Parameters] = []

    def keep(step: int) -> None:
        if step in steps:
            kept.append({name: p.detach().clone() for name, p in params.items()})

    keep(0)
    loop = Loop(at_steps, params, lambda part: at_steps.loss(part).backward(), after=keep)
    loop.run(None, "snapshots", RunOptions(progress=progress))
    rates = [recipe.rate(i, n_steps) for i in range(n_steps)]
    befores = [0, *steps[:-1]]
    return [
        Snapshot(at, sum(rates[before : max(at, 1)]) / (max(at, 1) - before), parameters)
        for before, at, parameters in zip(befores, steps, kept, strict=True)
    ]
