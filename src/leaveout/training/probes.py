"""What a recipe allows, found by a few of its steps: seconds, randomness, kinks, batches of runs, reverse mode.

All of it costs less than two trainings (a few steps, where a training has fewer); whether power series grow is asked of
`check_stability`, which costs far more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from leaveout.errors import LeaveoutError
from leaveout.training.batching import batching_problem
from leaveout.training.flat_run import FlatRun
from leaveout.training.recipe import Recipe
from leaveout.training.stability import DIRECTIONS, random_directions
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_jets, train_plain

STEPS = 4  # of the plain run that is timed


@dataclass(frozen=True)
class Probe:
    """One thing that was tried: passed is None for what is only worth knowing."""

    name: str
    passed: bool | None
    detail: str


def first_steps(recipe: Recipe, n: int) -> Recipe:
    """The recipe with its first n steps only."""
    n = min(n, len(recipe.batches()))
    return recipe.with_(steps=n) if isinstance(recipe.order, str) else recipe.with_(order=recipe.order[:n])


def probe_recipe(recipe: Recipe) -> list[Probe]:
    """What was found, one thing after another."""
    steps, task = len(recipe.batches()), task_of(recipe)
    few = min(STEPS, steps)
    began = time.monotonic()
    first = train_plain(first_steps(recipe, few))
    seconds = (time.monotonic() - began) / few * steps
    found = [Probe("training", None, f"about {seconds:.1f} s for {steps} steps")]
    again = train_plain(first_steps(recipe, 1)) if few > 1 else first
    same = train_plain(first_steps(recipe, 1))
    equal = all(torch.equal(again[name], same[name]) for name in again)
    what = "the first step gives the same numbers twice" if equal else "the first step gives other numbers each time"
    found.append(Probe("randomness", equal, what))
    problem = batching_problem(recipe, task)
    found.append(
        Probe("batches of runs", None, "several runs share a step" if problem is None else f"one by one: {problem}")
    )
    found.append(_jets(recipe))
    found.append(_reverse(recipe))
    return found


def _jets(recipe: Recipe) -> Probe:
    try:
        psi = random_directions(1, len(recipe.unit_names), recipe.seed)
        run = train_jets(first_steps(recipe, 1), psi, JetSettings(1, recipe.real_dtype))
    except LeaveoutError as error:
        return Probe("jets", None, f"not of this model: {error}")
    if run.nonsmooth:
        names = ", ".join(sorted(run.nonsmooth))
        return Probe("jets", None, f"degree 1; {names} has a kink, which higher degrees do not see")
    return Probe("jets", True, "no kink; whether series grow at higher degrees: --growth")


def _reverse(recipe: Recipe) -> Probe:
    try:
        FlatRun(first_steps(recipe, 1)).require_second_pass()
    except LeaveoutError as error:
        return Probe("exact first order", None, str(error))
    return Probe("exact first order", True, "reverse mode agrees with differences of gradients")


def growth_seconds(recipe: Recipe, degree: int) -> float:
    """About how long `check_stability` takes at a degree, from one step."""
    psi = random_directions(DIRECTIONS, len(recipe.unit_names), recipe.seed)
    settings: Any = JetSettings(degree, recipe.real_dtype)
    began = time.monotonic()
    train_jets(first_steps(recipe, 1), psi, settings)
    return (time.monotonic() - began) * len(recipe.batches())
