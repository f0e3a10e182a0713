"""First-order effects with a cheap curvature: one training with the gradient of every row, then products of vectors.

The state (parameters, moments) goes back over the optimizer's own transition as in `metagradient`. In place of a step's
Hessian stands the sum over its examples of weight * g g^T, with g the gradient of an example's loss and weight its
part of the batch's loss: |B| * sum s s^T for the shares s of a batch of |B| that count alike. So a second pass needs
the stored shares only, and all queries go back in one sweep.

Source: arXiv 2605.18814 (AdamW-influence); docs/explanation/methods.md.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.errors import StabilityError, UnsupportedError
from leaveout.models import find_device, free_memory
from leaveout.quantities import amount
from leaveout.training.loop import Checkpoint, RunOptions
from leaveout.training.memory import COPIES
from leaveout.training.queries import Queries
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.adjoints import clip_adjoint
from leaveout.training.reverse.flat_run import FlatRun, passes
from leaveout.training.reverse.metagradient import Reverse
from leaveout.training.reverse.states import Kept, walk_back
from leaveout.training.reverse.updates import ROUND, example_shares


@dataclass(frozen=True)
class StoredPlan:
    """Bytes of the stored shares of all steps, of memory beyond the model's, and how many states and queries are held."""

    stored: int
    memory: int
    on_disk: bool
    checkpoints: int
    together: int

    def __str__(self) -> str:
        where = "on disk" if self.on_disk else "in memory"
        return (
            f"{amount(self.stored)} of gradients {where}, {amount(self.memory)} for {self.together} queries and states"
        )


@dataclass
class Influence:
    """Effects [queries, units] and base [queries] as in `Effects`, float64, nats."""

    effects: np.ndarray
    base: np.ndarray
    cpu_seconds: float
    plan: StoredPlan


def adamw_influence(
    recipe: Recipe, queries: Queries, options: RunOptions | None = None, *, curvature: float = 1.0
) -> Influence:
    """What the first order would be if each step's Hessian were the gradients' own products, for all queries at once.

    curvature: a factor of that Hessian; 0 leaves it out
    Gradients stand in files of options.directory (examples * epochs * trained parameters numbers), in memory without
    one; with one, a call that was killed goes on when it is repeated.
    Guarantee: equals `metagradient` where each example's Hessian is g g^T, and for one step whatever it is.
    Cost: about 1.3 plain trainings of a language model, for any number of queries.
    Raises: UnsupportedError where gradients find no place; StabilityError if an effect overflows.
    """
    options = options or RunOptions()
    began, place = time.process_time(), find_device(options.device)
    with passes(place):
        run = FlatRun(recipe, place)
        if run.running:
            raise UnsupportedError(
                "Stored gradients of rows know nothing of batch norm in training form, where a row moves the others: ask for "
                "the exact first order (`--gradient`), or leave batch_statistics out."
            )
        n_queries = run.count(queries)
        work = None if options.directory is None else Path(options.directory) / "adamw-influence"
        plan = plan_stored(run, n_queries, options.memory, work)
        if options.progress:
            tqdm.write(f"memory: {plan}", file=sys.stderr)
        stored = Stored(run, work)
        start = run.state.clone()
        hidden = not options.progress
        for step in tqdm(range(run.steps), "gradients", unit="step", disable=hidden, file=sys.stderr):
            stored.advance(step)
        run.state.copy_(start)
        effects = run.state.new_zeros(n_queries, len(recipe.unit_names), dtype=torch.float64)
        base = run.state.new_zeros(n_queries, dtype=torch.float64)
        rounds = range(0, n_queries, plan.together)
        with tqdm(total=len(rounds) * run.steps, desc="back", unit="step", disable=hidden, file=sys.stderr) as bar:
            for first in rounds:
                part = slice(first, first + plan.together)
                back = _Back(run, queries, part, effects[part], base[part], bar, stored=stored, curvature=curvature)
                walk_back(stored, Kept(plan.checkpoints), back.visit)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    if not bool(effects.isfinite().all()):
        raise StabilityError("The influence overflowed: the run is not stable; use a lower lr, or curvature=0.")
    return Influence(effects.cpu().numpy(), base.cpu().numpy(), time.process_time() - began, plan)


def plan_stored(run: FlatRun, queries: int, limit: int | None, directory: Path | None) -> StoredPlan:
    """What has to be stored, and how many queries go back together. Raises: UnsupportedError where it finds no place."""
    limit = limit if limit is not None else free_memory(run.device) // 2
    vector = sum(run.sizes) * run.recipe.real_dtype.itemsize
    sizes = [len(batch) for batch in run.trained_on.batches]
    stored, step, state = sum(sizes) * vector, 2 * max(sizes) * vector, len(run.state) * vector
    place = None if directory is None else next(p for p in directory.absolute().parents if p.exists())
    if place is not None and stored > (free := shutil.disk_usage(place).free):
        raise UnsupportedError(
            f"The gradients of all steps take {amount(stored)} of disk and {amount(free)} are free: train fewer parameters "
            "(LoRA, named modules) or fewer epochs, or give another directory."
        )
    room = limit - (0 if directory is not None else stored) - step - 3 * state
    per_query = (COPIES[run.kind] + 3) * vector
    if room < per_query:
        raise UnsupportedError(
            f"The gradients of all steps take {amount(stored)}, one query {amount(step + 3 * state + per_query)} beside, and "
            f"{amount(limit)} of memory are allowed: give a directory for the gradients, or train fewer parameters."
        )
    together = max(1, min(queries, room // per_query))
    checkpoints = min(2 + (room - together * per_query) // state, run.steps + 1)
    memory = step + (checkpoints + 1) * state + together * per_query
    return StoredPlan(
        stored, memory + (0 if directory is not None else stored), directory is not None, checkpoints, together
    )


class Stored:
    """A run whose steps are taken by the stored shares of their examples, each of which is computed once."""

    def __init__(self, run: FlatRun, directory: Path | None) -> None:
        self.run, self.directory, self.state, self.steps = run, directory, run.state, run.steps
        self._held: dict[int, Tensor] = {}
        self._key = run.recipe.hash()

    def advance(self, step: int) -> None:
        """Takes a step."""
        self.run.advance(step, self.shares(step).sum(0))

    def shares(self, step: int) -> Tensor:
        """What each example adds to the gradient of a step [examples, parameters], in the order of its parts."""
        if self.directory is None:
            if step not in self._held:
                self._held[step] = self._computed(step)
            return self._held[step]
        file = Checkpoint(self.directory / f"gradients-{step:07d}.safetensors", self._key)
        if (found := file.load()) is not None:
            return found[1]["shares"].to(self.run.device)
        shares = self._computed(step)
        file.save(step, {"shares": shares})
        return shares

    def _computed(self, step: int) -> Tensor:
        parts = self.run.trained_on.parts(step)
        return torch.cat([rows for part in parts for _, rows in example_shares(self.run, part, ROUND)])


@dataclass
class _Back(Reverse):
    """Goes back by stored shares."""

    stored: Any = None
    curvature: float = 1.0

    def _back(self, step: int) -> None:
        shares, parts = self.stored.shares(step), self.run.trained_on.parts(step)
        clipped, unclip = clip_adjoint(shares.sum(0), self.run.recipe.clip_norm)
        b = unclip(self._update_adjoint(step, clipped))
        slopes = b @ shares.T
        weights = torch.cat([part.weights for part in parts]).to(shares)
        self.cotangents[0].addmm_(slopes / weights, shares, alpha=self.curvature)
        numbers = [i for part in parts for i in part.numbers]
        self.effects.index_add_(1, self.run.units_of(numbers), slopes.double(), alpha=-1)
