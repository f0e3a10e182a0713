"""Run a recipe: plainly, for many weightings at once, or in jets.

All three run the same loop on the same task and the same parts of steps (`loop`). A weight is one number per unit
(plain), one per run and unit (batch), or the series 1 - z psi per direction and unit (jets).
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from leaveout.errors import StabilityError
from leaveout.jets import Jet, Series, Space, install, restore
from leaveout.models import full_precision
from leaveout.training.batching import batching_problem, of_runs
from leaveout.training.below import Below, below_of
from leaveout.training.formulas import plain_formulas
from leaveout.training.loop import Loop, Part, RunOptions, Steps, clip_each
from leaveout.training.memory import MemoryPlan, flushed_denormals, kept_memory, plan_memory
from leaveout.training.queries import Queries, query_series
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Parameters, rows_are_separate, task_of, weighted_losses

CHECK_EVERY = 20
"""Steps between two looks at whether all coefficients are finite."""


# --- plain -------------------------------------------------------------------------------------------------------


def train_plain(recipe: Recipe, weights: Tensor | None = None, options: RunOptions | None = None) -> Parameters:
    """The trained parameters [*shape] by name, with one weight per unit (default: all one).

    Guarantee: the numbers of an ordinary PyTorch loop over the same batches, bit for bit, when no weight is given and
    the loss is per example; up to rounding per token.
    """
    options = options or RunOptions()
    steps = Steps(recipe, task_of(recipe, options.device))
    device = steps.task.device
    by_example = None if weights is None else weights.to(recipe.real_dtype)[recipe.unit_of].to(device)

    def backward(part: Part) -> None:
        steps.loss(part, None if by_example is None else by_example.__getitem__).backward()

    params = steps.task.parameters()
    loop = Loop(steps, params, backward, fused=device.type != "cpu")
    loop.run(options.checkpoint("plain", recipe.hash(), weights), "train", options)
    return {name: p.detach().cpu() for name, p in params.items()}


# --- many weightings at once -------------------------------------------------------------------------------------


def train_batch(recipe: Recipe, weights: Tensor, options: RunOptions | None = None, together: int = 250) -> Parameters:
    """Trained parameters [runs, *shape] by name, for weights [runs, units]; `together` runs share each step.

    See `Retrainer`.
    """
    retrainer = Retrainer(recipe, options)
    found = retrainer.train(weights, options, together)
    retrainer.drop_files()
    return found


class Retrainer:
    """What retrainings of a recipe share: the model at its start, and what blocks below the lowest trained one make of
    each example (`below`), which is computed once. directory: where that goes if it is large.

    Where runs cannot be batched (`batching_problem`), each goes by itself.
    Guarantee: each run equals `train_plain` with its weights, up to the rounding of batched products.
    Cost: examples of weight 0 in all runs that share a step are not computed, where they are separate (`rows_are_separate`).
    """

    def __init__(self, recipe: Recipe, options: RunOptions | None = None) -> None:
        options = options or RunOptions()
        self.recipe, self.task = recipe, task_of(recipe, options.device)
        self.steps, self.options = Steps(recipe, self.task), options

    @functools.cached_property
    def below(self) -> Below | None:
        """What lies below the lowest trained block, None where that can't be shared."""
        with full_precision():
            return below_of(self.steps, self.options.memory, self.options.directory)

    @functools.cached_property
    def separate(self) -> bool:
        """Whether examples can be left out of a batch."""
        return rows_are_separate(self.recipe, self.task)

    @functools.cached_property
    def batched(self) -> bool:
        """Whether runs can share their steps."""
        return batching_problem(self.recipe, self.task) is None

    def in_order_of(self, recipe: Recipe) -> Retrainer | None:
        """The same for a recipe that only takes the same examples in another order, None where it would share nothing."""
        if self.below is None or self.below.draws:
            return None
        other = copy.copy(self)  # with what is below
        other.recipe, other.steps = recipe, Steps(recipe, self.task)
        return other

    def train(self, weights: Tensor, options: RunOptions | None = None, together: int = 250) -> Parameters:
        """Trained parameters [runs, *shape] by name, for weights [runs, units]; `together` runs share each step."""
        options, task = options or RunOptions(), self.task
        with full_precision(), kept_memory(task.device):
            if min(together, len(weights)) > 1:
                together = together if (self.batched if options.batched is None else options.batched) else 1
            parts = weights.split(together)
            rounds = [self._stack(part, replace(options, round=(i, len(parts))), i) for i, part in enumerate(parts)]
        return {name: torch.cat([r[name] for r in rounds]) for name in rounds[0]}

    def _stack(self, weights: Tensor, options: RunOptions, number: int) -> Parameters:
        runs, steps, recipe, task = weights.shape[0], self.steps, self.recipe, self.task
        params = {n: nn.Parameter(p.detach().expand(runs, *p.shape).clone()) for n, p in task.parameters().items()}
        by_example = weights.to(recipe.real_dtype)[:, recipe.unit_of]
        used = (by_example != 0).any(0).tolist()
        leave_out = not all(used) and self.separate
        by_example = by_example.to(task.device)

        def backward(part: Part) -> None:
            if leave_out:  # one is always kept, so that every parameter has a gradient, if only 0
                part = part.only([i for i in part.numbers if used[i]] or part.numbers[:1])
            batch, places = steps.fed(part)
            weights = by_example[:, places]
            with nullcontext() if self.below is None else self.below.passing(part), steps.passing(part):
                losses = of_runs(*weighted_losses(task, batch, params, weights))
            part.loss(losses, weights).backward()

        loop = Loop(steps, params, backward, fused=True, clip=clip_each)
        loop.run(options.checkpoint(f"batch-{number}", recipe.hash(), weights), f"{runs} runs", options)
        return {name: p.detach().cpu() for name, p in params.items()}

    def drop_files(self) -> None:
        """Removes what is kept in files; what is in memory stays."""
        if self.below is not None:
            self.below.drop_files()


# --- jets --------------------------------------------------------------------------------------------------------


@dataclass
class JetRun:
    """What a training run in jets gives.

    losses        series of the queries: c [queries], h [degree, directions, queries], nats; None without queries
    constants, coefficients   parameters by name, [*shape] and [degree, directions, *shape]; empty if not kept
    nonsmooth     calls of operations with a kink; with degree >= 2 `warnings` says what that means
    """

    losses: Series | None
    constants: Parameters
    coefficients: Parameters
    memory: MemoryPlan
    nonsmooth: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class JetSettings:
    """Degree, number type of the coefficients (default: complex of the recipe's precision), what to keep."""

    degree: int = 1
    dtype: torch.dtype | None = None
    keep_parameters: bool = True


def train_jets(
    recipe: Recipe,
    psi: Tensor,
    settings: JetSettings,
    queries: Queries | None = None,
    options: RunOptions | None = None,
) -> JetRun:
    """Train with weights 1 - z psi for directions psi [directions, units], and push the queries through.

    Real directions (settings.dtype float32 or float64) cost half. Raises: StabilityError if a coefficient overflows.
    """
    options = options or RunOptions()
    task = task_of(recipe, options.device)
    steps, dtype = Steps(recipe, task, mixed=False), settings.dtype or recipe.real_dtype.to_complex()
    plan = plan_memory(recipe, task, settings.degree, psi.shape[0], dtype, options.memory)
    if options.progress:
        tqdm.write(f"memory: {plan}", file=sys.stderr)
    began, seen, parts = time.process_time(), {}, []
    rounds = psi.split(plan.together)
    for number, part in enumerate(rounds):
        space, own = Space(settings.degree, part.shape[0], dtype), replace(options, round=(number, len(rounds)))
        parts.append(_jet_round(steps, (part, space), settings, queries, own, number))
        for name, count in space.nonsmooth.items():
            seen[name] = seen.get(name, 0) + count
    run = _joined(parts, plan)
    run.nonsmooth, run.cpu_seconds = seen, time.process_time() - began
    if seen and settings.degree >= 2:
        run.warnings.append(
            f"Operations with a kink ({', '.join(sorted(seen))}) were followed on the branch of the unperturbed run: "
            "coefficients of degree 2 and above do not see the kink. Use degree 1, or a smooth activation."
        )
    return run


Round = tuple[Series | None, Parameters, Parameters]


def _jet_round(
    steps: Steps, directions: tuple[Tensor, Space], settings: JetSettings, queries: Queries | None,
    options: RunOptions, number: int,
) -> Round:  # fmt: skip
    (psi, space), recipe, task = directions, steps.recipe, steps.task
    device = task.device
    replaced = install(task.model, {n: space.constant(p) for n, p in task.parameters().items()})
    try:
        params = task.parameters()
        entries = psi.to(space.dtype)[:, recipe.unit_of].to(device)

        def backward(part: Part) -> None:
            steps.loss(part, lambda places: _weights(space, entries[:, places])).backward()

        loop = Loop(steps, params, backward, True, after=lambda step: _check_finite(params, step, len(steps)))
        checkpoint = options.checkpoint(f"jets-{number}", recipe.hash(), psi, space.degree, space.dtype)
        with full_precision(), plain_formulas(device), flushed_denormals(device), kept_memory(device):
            if queries is not None and number == 0:  # what they use without a rule for it is refused before the steps
                query_series(task, space, queries)
                space.nonsmooth.clear()
            loop.run(checkpoint, f"degree {space.degree}, {space.directions} directions", options)
            losses = None if queries is None else query_series(task, space, queries)
        kept = params if settings.keep_parameters else {}
        found = None if losses is None else losses.map(Tensor.cpu)
        return found, {n: p.c.clone().cpu() for n, p in kept.items()}, {n: p.h.cpu() for n, p in kept.items()}
    finally:
        restore(task.model, replaced)


def _weights(space: Space, psi: Tensor) -> Jet:
    """1 - z psi, for the entries psi [directions, examples]."""
    h = psi.new_zeros(space.degree, *psi.shape)
    h[0] = -psi
    return space.jet(psi.new_ones(psi.shape[1], dtype=space.real_dtype), h)


def _check_finite(params: dict[str, Any], step: int, n_steps: int) -> None:
    if step % CHECK_EVERY and step < n_steps:
        return
    for name, p in params.items():
        finite = p.h.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            degree = int((~finite).nonzero()[0]) + 1
            raise StabilityError(
                f"The series of {name} overflowed at step {step}, degree {degree}: the run is not stable in jets. "
                + ("Use a lower degree, or ask" if degree > 1 else "Measure it with retrainings, or ask")
                + " `leaveout doctor RECIPE --growth` what to change."
            )


def _joined(parts: list[Round], plan: MemoryPlan) -> JetRun:
    first = parts[0]
    losses = None if first[0] is None else Series(first[0].c, torch.cat([p[0].h for p in parts if p[0] is not None], 1))
    coefficients = {name: torch.cat([p[2][name] for p in parts], 1) for name in first[2]}
    return JetRun(losses, first[1], coefficients, plan)
