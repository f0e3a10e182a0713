"""The exact first-order effect of every unit on every query, by reverse mode through the recorded training run.

With A the gradient of a query with respect to the optimizer's state after a step, one step back is: the update's own
adjoint turns A into b, the cotangent of the batch gradient; a second backward pass through that gradient turns b into
the Hessian-vector product H b, which is added to A, and into b . grad l_i / divisor, the share of each example in
the step. All queries go back together. States of the forward run are kept as far as memory allows and recomputed
from the nearest kept one where it does not (the binomial schedule of Griewank and Walther, Algorithm 799).

Source: arXiv 2503.13751 (metagradient), 2504.16430 (the effect of a weight on the trained model); docs/explanation/methods.md.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.errors import StabilityError, UnsupportedError
from leaveout.models import find_device, free_memory
from leaveout.training.loop import RunOptions
from leaveout.training.memory import COPIES, kept_bytes
from leaveout.training.queries import Queries
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.adjoints import AdamForm, clip_adjoint, sgd_adjoint
from leaveout.training.reverse.flat_run import FlatRun, passes


@dataclass(frozen=True)
class ReversePlan:
    """Bytes of going back with `together` queries at a time and `checkpoints` kept states."""

    state: int  # one kept state: parameters and the optimizer's moments
    per_query: int  # cotangents and what the second backward pass holds
    queries: int
    together: int
    checkpoints: int
    limit: int

    @property
    def peak(self) -> int:
        """Together with the present state."""
        return self.state * (self.checkpoints + 1) + self.per_query * self.together

    @property
    def rounds(self) -> int:
        """How often the run is repeated."""
        return -(-self.queries // self.together)


@dataclass
class Effects:
    """First-order effects of units on queries.

    effects  d loss_q / d x_u at x = 0, where unit u has weight 1 - x_u: float64 [queries, units], nats
    base     losses of the model trained on everything: float64 [queries], nats
    checkpoints  states kept at the same time; fewer than steps + 1 means that steps were recomputed
    """

    effects: np.ndarray
    base: np.ndarray
    cpu_seconds: float
    checkpoints: int
    memory: ReversePlan


def metagradient(
    recipe: Recipe, queries: Queries, options: RunOptions | None = None, *, memory: int | None = None
) -> Effects:
    """The derivative of each query's loss with respect to the removal of each unit, positive = removing raises it.

    `memory`: bytes of kept states and cotangents, default options.memory, else half of what is free; beyond it only
    the model, its batches and the result (8 bytes a query and unit). Nothing is written to options.directory.
    Guarantee: the coefficients of `train_jets` at degree 1 are psi @ effects.T, up to rounding. Where a gradient has
    always been exactly zero, the root in Adam has no derivative and counts as constant.
    Cost: on microgpt about 4, 5 and 10 plain trainings for 1, 20 and 100 queries; each round repeats the forward run.
    Raises: UnsupportedError if not even one query and two states fit; StabilityError if an effect overflows.
    """
    options = options or RunOptions()
    began, place = time.process_time(), find_device(options.device)
    with passes(place):
        run = FlatRun(recipe, place)
        n_queries = run.count(queries)
        run.require_second_pass()
        plan = plan_reverse(run, n_queries, memory if memory is not None else options.memory)
        effects = run.state.new_zeros(n_queries, len(recipe.unit_names), dtype=torch.float64)
        base = run.state.new_zeros(n_queries, dtype=torch.float64)
        total, hidden = plan.rounds * run.steps, not options.progress
        with tqdm(total=total, desc="metagradient", unit="step", disable=hidden, file=sys.stderr) as bar:
            for first in range(0, n_queries, plan.together):
                part = slice(first, first + plan.together)
                reverse = Reverse(run, queries, part, effects[part], base[part], bar)
                walk_back(run, plan.checkpoints, reverse.visit)
    if not bool(effects.isfinite().all()):
        raise StabilityError("The metagradient overflowed: the run is not stable; use a lower lr or a larger eps.")
    return Effects(effects.cpu().numpy(), base.cpu().numpy(), time.process_time() - began, plan.checkpoints, plan)


# --- memory, and the order in which steps are visited ------------------------------------------------------------


def plan_reverse(run: FlatRun, queries: int, limit: int | None = None) -> ReversePlan:
    """How many queries go back together and how many states are kept, for `limit` bytes.

    Raises: UnsupportedError if not even one query and two states fit.
    """
    limit = limit if limit is not None else free_memory(run.device) // 2
    bytes_each = run.recipe.real_dtype.itemsize
    vector = sum(run.sizes) * bytes_each
    state = len(run.state) * vector
    # Cotangents, b, the products twice, and two temporaries; the second pass goes through both halves of the first one.
    # Measured on perceptrons of 4e4 to 4e5 parameters, batches of 8 to 256: the process grew by 0.7 to 1.2 of the plan.
    per_query = (COPIES[run.kind] + 4) * vector + 4 * kept_bytes(run.recipe, run.task)
    together = max(1, min(queries, limit // 2 // per_query))
    checkpoints = min((limit - together * per_query) // state - 1, run.steps + 1)
    if checkpoints < 2:
        raise UnsupportedError(
            f"Going back needs {(3 * state + per_query) / 1e9:.2f} GB at least and {limit / 1e9:.2f} GB are allowed: "
            "train fewer parameters (LoRA, named modules), or use a smaller batch (accumulate)."
        )
    return ReversePlan(state, per_query, queries, together, checkpoints, limit)


def walk_back(run: FlatRun, checkpoints: int, visit: Callable[[int], None]) -> None:
    """Call visit(step) for step = last + 1 .. 0 with the state before it in `run`, which begins and ends at its start."""
    kept = [(0, run.state.clone())]
    for step in range(run.steps, -1, -1):
        at = kept[-1][0]
        run.state.copy_(kept[-1][1])
        while at < step:
            free = checkpoints - len(kept)
            until = at + next_kept(step + 1 - at, free)
            for number in range(at, until):
                run.advance(number)
            at = until
            if free:
                kept.append((at, run.state.clone()))
        if kept[-1][0] == step:
            kept.pop()
        visit(step)


def next_kept(length: int, free: int) -> int:
    """How far to run before the next state is kept, with `length` states to visit and `free` places left.

    Source: Griewank and Walther, Algorithm 799 (ACM TOMS 26, 2000): s places and r repetitions reach C(s + r, s) states.
    """
    if free == 0:
        return length - 1
    repeats = 1
    while math.comb(free + 1 + repeats, repeats) < length:
        repeats += 1
    late = length - math.comb(free + repeats - 1, repeats - 1)
    return min(math.comb(free + repeats, repeats - 1), max(1, late))


# --- one step back -----------------------------------------------------------------------------------------------


@dataclass
class Reverse:
    """Goes back over the steps for some of the queries, adding to effects [queries, units]; fills base [queries]."""

    run: FlatRun
    queries: Queries
    part: slice
    effects: Tensor
    base: Tensor
    bar: Any

    def visit(self, step: int) -> None:
        """Takes the cotangents from after a step to before it; at the end of the run it makes them."""
        if step == self.run.steps:
            self.base[:], gradients = self.run.query_gradients(self.queries, self.part)
            # One cotangent [queries, parameters] for each row of the state.
            self.cotangents = [gradients, *(torch.zeros_like(gradients) for _ in self.run.state[1:])]
            return
        self._back(step)
        self.bar.update()

    def _back(self, step: int) -> None:
        run, recipe = self.run, self.run.recipe
        parts = run.parts(step)
        # One part at a time holds its graph: with several, the whole gradient is needed before going back through any.
        passes = [run.second_pass(parts[0], step)] if len(parts) == 1 else []
        gradient = passes[0][0] if passes else run.gradient(step)
        clipped, unclip = clip_adjoint(gradient, recipe.clip_norm)
        b = unclip(self._update_adjoint(step, clipped))
        for i, part in enumerate(parts):
            _, back = passes[i] if passes else run.second_pass(part, step)
            products, slopes = back(b)
            self.cotangents[0] += products
            self.effects.index_add_(1, run.units_of(part.numbers), slopes.double(), alpha=-1)

    def _update_adjoint(self, step: int, gradient: Tensor) -> Tensor:
        """Take the cotangents of the state back over the optimizer's update; gives that of its gradient."""
        group = self.run.group
        rate = self.run.recipe.rate(step, self.run.steps)
        if self.run.kind in ("sgd", "momentum"):
            return sgd_adjoint(self.cotangents, rate, group)
        form = AdamForm(self.run.kind, rate, step, group)
        return form.adjoint(self.cotangents, gradient, self.run.state)
