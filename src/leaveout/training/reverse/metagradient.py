"""The exact first-order effect of every unit on every query, by reverse mode through the recorded training run.

With A the gradient of a query with respect to the optimizer's state after a step, one step back is: the update's own
adjoint turns A into b, the cotangent of the batch gradient; a second backward pass through that gradient turns b into
the Hessian-vector product H b, which is added to A, and into b . grad l_i / divisor, the share of each example in
the step. All queries go back together. States of the forward run are kept, in memory or on disk, and recomputed from
the nearest kept one where not all find a place (the binomial schedule of Griewank and Walther, Algorithm 799).

Source: arXiv 2503.13751 (metagradient), 2504.16430 (the effect of a weight on the trained model); docs/explanation/methods.md.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.errors import StabilityError, UnsupportedError, choices
from leaveout.models import find_device, free_memory
from leaveout.quantities import amount
from leaveout.training.digest import digest_of
from leaveout.training.loop import Checkpoint, RunOptions
from leaveout.training.memory import COPIES, LiveBytes, give_back, kept_bytes, largest_part
from leaveout.training.queries import Queries, Query
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.adjoints import AdamForm, clip_adjoint, sgd_adjoint
from leaveout.training.reverse.flat_run import FlatRun, passes, refused
from leaveout.training.reverse.states import Kept, walk_back
from leaveout.training.tasks import Task, text_length

STATES = ("auto", "memory", "disk")
GRAPH = 5
"""Bytes of a second pass over those that a first one keeps, about: what is worth a try."""


SHARED, BUSY, MANY = 2**21, 2**23, 4
"""On a CPU: bytes that a first pass keeps, up to which queries go through a second one as one batch; and above which, for so
many queries, a micro-batch goes in pieces (benchmarks/LOG.md)."""


LARGE_GRAPH = 2**28
"""Bytes of a second pass above which each step gives memory back, which is far less time than the step takes."""

SMALL, LARGE = (4.6, 0.06), (3.0, 1.5)
"""Plain trainings of reverse mode, and those of each query: of models whose queries share passes, and of others."""


@dataclass(frozen=True)
class ReverseSettings:
    """How a run is gone through backwards; none of it changes the numbers but for rounding.

    micro_batch  examples that a second pass takes together (None: as many as the recipe trains together if they fit, and
                 on a CPU fewer where these are large, which is faster there)
    blocks       whether a second pass holds the graph of one block of the model at a time, which is computed again and
                 takes half as long again (None: where the whole graph does not fit)
    states       where states are kept: memory, disk (which needs a directory), or auto: memory if all fit there
    """

    micro_batch: int | None = None
    blocks: bool | None = None
    states: str = "auto"

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if self.states not in STATES:
            raise ValueError(f"there is no place {self.states!r} for states: {choices(self.states, STATES)}")


@dataclass(frozen=True)
class PassPlan:
    """How a second pass goes, and its bytes: of its graphs, and of each query more."""

    micro_batch: int
    blocks: bool
    vectorised: bool
    graphs: int
    each: int


@dataclass(frozen=True)
class ReversePlan:
    """Bytes of going back with `together` queries at a time and `checkpoints` kept states, beyond the model's own."""

    state: int  # one kept state: parameters and the optimizer's moments
    graphs: int  # what a second pass keeps, whatever the queries
    per_query: int  # cotangents and what a second pass holds for each
    queries: int
    together: int
    checkpoints: int
    limit: int
    on_disk: bool
    second_pass: PassPlan

    @property
    def peak(self) -> int:
        """Bytes of memory, with the present state."""
        kept = 1 if self.on_disk else self.checkpoints + 1
        return self.state * kept + self.graphs + self.per_query * self.together

    @property
    def disk(self) -> int:
        """Bytes of files, with the saved cotangents of one round."""
        return self.state * (self.checkpoints + self.together) if self.on_disk else 0

    @property
    def rounds(self) -> int:
        """How often the run is gone through."""
        return -(-self.queries // self.together)

    def __str__(self) -> str:
        second, n = self.second_pass, self.second_pass.micro_batch
        by = ", block by block" if second.blocks else ""
        return (
            f"{amount(self.peak)} = {amount(self.graphs)} for a second pass of {n} example{'s'[: n > 1]}{by}, "
            f"{self.together} of {self.queries} queries with {amount(self.per_query)} each, and states of "
            f"{amount(self.state)}: {self.checkpoints} {'on disk, ' + amount(self.disk) if self.on_disk else 'in memory'}"
        )


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
    recipe: Recipe,
    queries: Queries,
    options: RunOptions | None = None,
    *,
    memory: int | None = None,
    settings: ReverseSettings | None = None,
) -> Effects:
    """The derivative of each query's loss with respect to the removal of each unit, positive = removing raises it.

    `memory`: bytes of kept states, cotangents and the second pass, default options.memory, else half of what is free;
    beyond it only the model, its batches and the result (8 bytes a query and unit). With options.directory, a call that
    was killed goes on when it is repeated.
    Guarantee: the coefficients of `train_jets` at degree 1 are psi @ effects.T, up to rounding. Where a gradient has
    always been exactly zero, the root in Adam has no derivative and counts as constant.
    Cost: on microgpt about 4, 5 and 10 plain trainings for 1, 20 and 100 queries; of a language model about 1.2 a query,
    1.8 block by block, and 3 for all; each round repeats that.
    Raises: UnsupportedError if not even one query and two states fit; StabilityError if an effect overflows.
    """
    options, settings = options or RunOptions(), settings or ReverseSettings()
    began, place = time.process_time(), find_device(options.device)
    with passes(place):
        run = FlatRun(recipe, place)
        n_queries = len(run.values(queries))
        limit = memory if memory is not None else options.memory
        plan = plan_reverse(run, n_queries, limit, settings, options.directory)
        run.require_second_pass()
        give_back(place)
        if options.progress:
            tqdm.write(f"memory: {plan}", file=sys.stderr)
        effects = run.state.new_zeros(n_queries, len(recipe.unit_names), dtype=torch.float64)
        base = run.state.new_zeros(n_queries, dtype=torch.float64)
        work = None if options.directory is None else Path(options.directory) / "reverse"
        named = "" if work is None else _name_of(queries)
        kept = Kept(plan.checkpoints, work if plan.on_disk else None, recipe.hash())
        total, hidden = plan.rounds * run.steps, not options.progress
        with tqdm(total=total, desc="metagradient", unit="step", disable=hidden, file=sys.stderr) as bar:
            for first in range(0, n_queries, plan.together):
                part = slice(first, first + plan.together)
                key = hashlib.sha256(f"{recipe.hash()} {named} {part}".encode()).hexdigest()
                file = None if work is None else work / f"cotangents-{key[:16]}.safetensors"
                saved = None if file is None else Checkpoint(file, key, options.save_every)
                large = plan.graphs > LARGE_GRAPH
                reverse = Reverse(run, queries, part, effects[part], base[part], bar, saved, gives_back=large)
                walk_back(run, kept, reverse.visit, reverse.resume())
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    if not bool(effects.isfinite().all()):
        raise StabilityError("The metagradient overflowed: the run is not stable; use a lower lr or a larger eps.")
    return Effects(effects.cpu().numpy(), base.cpu().numpy(), time.process_time() - began, plan.checkpoints, plan)


def _name_of(queries: Queries) -> str:
    """Names the content of queries; a function that cannot be read has another name each time, so that it is begun anew."""
    if not callable(queries):
        return " ".join((query if isinstance(query, Query) else Query(query)).digest for query in queries)
    try:
        return digest_of(queries, "The queries")
    except UnsupportedError:
        return uuid.uuid4().hex


def reverse_trainings(recipe: Recipe, task: Task, queries: int) -> float:
    """Plain trainings that the exact first order of so many queries takes, about, on a CPU (benchmarks/LOG.md)."""
    first, each = LARGE if kept_bytes(recipe, task) > SHARED else SMALL
    return first + each * queries


# --- memory ------------------------------------------------------------------------------------------------------


def plan_reverse(
    run: FlatRun,
    queries: int,
    limit: int | None = None,
    settings: ReverseSettings | None = None,
    directory: Path | None = None,
) -> ReversePlan:
    """How the second pass goes, how many queries go back together and how many states are kept, for `limit` bytes.

    What a second pass needs is measured: the largest micro-batch is gone through for a few queries.
    Raises: UnsupportedError if not even one query and two states fit.
    """
    settings = settings or ReverseSettings()
    limit = limit if limit is not None else free_memory(run.device) // 2
    vector = sum(run.sizes) * run.recipe.real_dtype.itemsize
    state = run.state.nbytes
    if settings.states == "disk" and directory is None:
        raise ValueError("states on disk need a directory: give one in the RunOptions")
    # Cotangents of the state, b, and two temporaries of clipping and of the optimizer, which are gone when products are made.
    fixed = (COPIES[run.kind] + 2) * vector
    second = plan_pass(run, queries, limit - 3 * state - fixed, settings)
    per_query = fixed + second.each
    room = limit - second.graphs
    together = max(1, min(queries, room // 2 // per_query))
    checkpoints = min((room - together * per_query) // state - 1, run.steps + 1)
    on_disk = settings.states == "disk"
    if settings.states != "memory" and directory is not None:
        places = _places_on_disk(run, state, directory)
        more = max(1, min(queries, (room - 2 * state) // per_query))
        on_disk = on_disk or (places >= 2 and (places > checkpoints < run.steps + 1 or more > together))
        if on_disk:
            together, checkpoints = more, min(places, run.steps + 1) if room >= 2 * state + per_query else 0
    if checkpoints < 2:
        raise UnsupportedError(
            f"Going back needs {amount(3 * state + second.graphs + per_query)} at least and {amount(limit)} are allowed: "
            "train fewer parameters (LoRA, named modules), or use a smaller batch (accumulate)."
        )
    return ReversePlan(state, second.graphs, per_query, queries, together, checkpoints, limit, on_disk, second)


def _places_on_disk(run: FlatRun, state: int, directory: Path) -> int:
    """All states if they take at most half of the free disk, else twice the square root of the steps, else what fits there."""
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    fits = shutil.disk_usage(place).free // 2 // state
    return run.steps + 1 if fits > run.steps else min(fits, 2 * math.isqrt(run.steps) + 2)


def plan_pass(run: FlatRun, queries: int, limit: int, settings: ReverseSettings) -> PassPlan:
    """The first way of a second pass that fits: whole graphs of a whole micro-batch, of smaller ones, then by blocks.

    Where none does, the last. Raises: UnsupportedError for blocks that are asked for and are not there.
    """
    own = max(len(part) for step in run.recipe.micro_batches() for part in step)
    kept = kept_bytes(run.recipe, run.task)
    most, sizes = min(own, settings.micro_batch or own), []
    alone = settings.micro_batch is not None or own == 1 or not run.divisible
    while run.device.type == "cpu" and not alone and queries >= MANY and most > 1 and kept * most // own > BUSY:
        most //= 2
    while most >= 1:
        sizes.append(most)
        most //= 2
    sizes = sizes[:1] if alone else sizes
    ways = [(size, by) for by in (False, True) for size in sizes if settings.blocks in (None, by)]
    found = None
    for number, (size, by) in enumerate(ways):
        if not by and number + 1 < len(ways) and GRAPH * kept * size // own > limit and kept > SHARED:
            continue
        try:
            plan = _measured(run, size if size < own else None, by, own, kept)
        except UnsupportedError:
            if found is None or settings.blocks:
                raise
            break
        found = plan if found is None or plan.graphs + plan.each < found.graphs + found.each else found
        if plan.graphs + plan.each <= limit:
            found = plan
            break
    assert found is not None
    whole = None if found.micro_batch == own else found.micro_batch
    run.go(whole, found.blocks, None if found.vectorised else False)
    return found


def _measured(run: FlatRun, micro_batch: int | None, by_blocks: bool, own: int, kept: int) -> PassPlan:
    """The bytes of the largest piece of the largest micro-batch, gone through for a few queries.

    Where queries go through the same graph one by one, each has its products and nothing more.
    """
    vectorised = not by_blocks and (kept * (micro_batch or own) // own <= SHARED or run.device.type != "cpu")
    run.go(micro_batch, by_blocks, None if vectorised else False)
    step, numbers = largest_part(run.recipe)
    pieces = [part for part in run.parts(step) if set(part.numbers) <= set(numbers)]
    part = max(pieces, key=lambda part: sum(text_length(run.recipe.examples[i]) for i in part.numbers))
    counts = [3, 5] if vectorised else [2, 3] if by_blocks else [2]  # one alone would free the graph
    peaks = list[int]()
    for n in counts:
        cotangents = run.state.new_ones(n, run.state.shape[1])
        with refused(), LiveBytes() as live:
            _, back = run.second_pass(part, step)
            back(cotangents)
            del back
        peaks.append(live.peak)
    each = run.state[0].nbytes
    if len(peaks) > 1:
        each = max(0, (peaks[1] - peaks[0]) // (counts[1] - counts[0]))
    return PassPlan(micro_batch or own, by_blocks, vectorised, max(0, peaks[0] - counts[0] * each), each)


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
    saved: Checkpoint | None = None
    gives_back: bool = False  # before each step, what the allocator has kept of the one before
    cotangents: list[Tensor] = field(default_factory=list)
    aside: Any = None  # the cotangents of running statistics [queries, statistics]

    def resume(self) -> int | None:
        """Takes what a killed call has saved; gives the next step to go back through, None for the end of the run."""
        found = None if self.saved is None else self.saved.load()
        if found is None:
            return None
        tensors = {name: t.to(self.run.device) for name, t in found[1].items()}
        self.effects.copy_(tensors["effects"])
        self.base.copy_(tensors["base"])
        self.cotangents = [tensors[f"cotangents/{i}"] for i in range(len(self.run.state))]
        self.aside = tensors["aside"]
        self.bar.update(self.run.steps - found[0])
        return found[0] - 1

    def visit(self, step: int) -> None:
        """Takes the cotangents from after a step to before it; at the end of the run it makes them."""
        if self.gives_back:
            give_back(self.run.device)
        if step == self.run.steps:
            self.base[:], gradients = self.run.query_gradients(self.queries, self.part, aside=True)
            size = sum(self.run.sizes)
            gradients, self.aside = gradients[:, :size], gradients[:, size:]
            # One cotangent [queries, parameters] for each row of the state.
            self.cotangents = [gradients, *(torch.zeros_like(gradients) for _ in self.run.state[1:])]
            return
        self._back(step)
        self.bar.update()
        if self.saved is not None and (self.saved.due or step == 0):
            cotangents = {f"cotangents/{i}": t for i, t in enumerate(self.cotangents)}
            own = {"aside": self.aside, "effects": self.effects, "base": self.base}
            self.saved.save(step, {**cotangents, **own})

    def _back(self, step: int) -> None:
        run, recipe = self.run, self.run.recipe
        parts = run.parts(step)
        # One part at a time holds its graph: with several, the whole gradient is needed before going back through any.
        passes = [run.second_pass(parts[0], step)] if len(parts) == 1 else []
        gradient = passes[0][0] if passes else run.gradient(step)
        clipped, unclip = clip_adjoint(gradient, recipe.clip_norm)
        b = unclip(self._update_adjoint(step, clipped))
        for i in reversed(range(len(parts))) if run.running else range(len(parts)):
            part = parts[i]
            _, back = passes[i] if passes else run.second_pass(part, step, i)
            products, slopes = back(torch.cat([b, self.aside], 1) if run.running else b)
            self.cotangents[0] += products
            for cotangent, left in zip(run.aside(self.aside), run.left, strict=True):
                cotangent *= left
            self.effects.index_add_(1, run.units_of(part.numbers), slopes.double(), alpha=-1)

    def _update_adjoint(self, step: int, gradient: Tensor) -> Tensor:
        """Take the cotangents of the state back over the optimizer's update; gives that of its gradient."""
        group = self.run.group
        rate = self.run.recipe.rate(step, self.run.steps)
        if self.run.kind in ("sgd", "momentum"):
            return sgd_adjoint(self.cotangents, rate, group)
        form = AdamForm(self.run.kind, rate, step, group)
        return form.adjoint(self.cotangents, gradient, self.run.core)
