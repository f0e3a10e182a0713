"""Which measurements to buy for a budget: what they cost, then the error that the posterior expects of each choice.

What they cost is known from two real retrainings, which count, and from short probes for at most a tenth of the budget.

The expected error of a choice needs no measured value: it is the posterior's own standard deviation on the user's
deletion sets, over that of the effects themselves before anything is measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from leaveout.deletion import directions
from leaveout.deletion.heldout import PATTERN, HeldOut, kinds_of
from leaveout.deletion.kernels import Kernel
from leaveout.deletion.measurements import JETS_TOGETHER, RUNS_TOGETHER, MeasureSettings, task_size
from leaveout.deletion.noise import LEAST_REPEATS
from leaveout.deletion.posterior import LARGEST, MOST_SETS, NUGGET, default_kernel, expected_error, telling
from leaveout.deletion.sets import DeletionSets
from leaveout.errors import LeaveoutError, UnsupportedError
from leaveout.models import find_device
from leaveout.quantities import SECONDS, amount, quantity
from leaveout.tables import Table, Tabular
from leaveout.training.batching import batching_problem
from leaveout.training.below import below_of
from leaveout.training.doctor import Stability, check_stability
from leaveout.training.loop import RunOptions, Steps
from leaveout.training.memory import runs_together
from leaveout.training.queries import Query, query_function, query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.repacking import new_run
from leaveout.training.reverse.metagradient import metagradient, reverse_trainings
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain

DEGREES = (1, 2)
"""Of the jets that a plan may buy."""
PROBE_STEPS, PROBE_RUNS, PROBE_REPEATS = (1, 9), (8, 128), 3
GROWTH = 8
"""Of a batch of retrainings that is tried over the one tried before it; the root of it is what its time is taken to grow."""
FIRST, PROBE_SHARE = 2, 0.1
"""Real retrainings that a plan begins with, and the part of the budget that all it does may take beside them."""
LEAST_PROBE = 1.0
"""CPU seconds that trying may take, up to a quarter of the budget: a tenth of a few seconds tells nothing of shared steps."""
LEAST_SLOPE = 0.5
"""Of what one of 128 retrainings takes that share their steps, the least part that grows with their number."""
NO_JETS = "No jets: they win where retraining is noisy; `--jets` (in Python jets=True, or noise=) has them weighed."
ERRORS = (
    "Expected errors are of effects in the same run, over their size: 0 is exact, at 1 nothing is known. Choices that differ by "
    "less than a tenth go by their time."
)
ALONE = "exact first order"
ONE_ORDER = 0.5
"""What an effect in one order gets wrong of its mean over orders, as a part of it; less in several, by their root (the median
over kinds of sets on digits and names, see benchmarks/LOG.md)."""
HELDOUT = 48
"""Retrainings kept for calibration, at most, and at most a quarter of all that a budget can buy."""
RUNS_A_REPEAT, NOISE_SHARE = 3, 0.25
"""New runs for each with all data: two are of held-out sets; and the part of the budget that all of them may take."""
DESIGN_LIMIT = 3000
"""Planned numbers in one Gram matrix: beyond it the expected error is that of the first so many."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds of n runs of one kind: so much for each batch of `together`, and so much for each run."""

    batch: float
    each: float
    together: int

    def of(self, n: int) -> float:
        return -(-n // self.together) * self.batch + n * self.each

    def affordable(self, seconds: float) -> int:
        """The largest n whose runs cost no more."""
        full = self.of(self.together)
        batches = int(seconds // full)
        left = seconds - batches * full - self.batch
        return batches * self.together + max(0, min(self.together - 1, int(left / max(self.each, 1e-12))))


@dataclass(frozen=True)
class Costs:
    """CPU seconds of retrainings, of jet directions by degree, of the exact first order of all queries, of the probe.

    shared: bytes on disk, while retrainings are made, of what they share and does not stay in memory
    notes: what the recipe does not allow, and why
    """

    retraining: Cost
    jets: dict[int, Cost]
    gradient: float | None
    probe: float
    notes: tuple[str, ...] = ()
    shared: int = 0


@dataclass(frozen=True)
class Choice:
    """One way to spend a budget: arguments of `TrainingRun.measure`, and what it costs and promises.

    seconds of wall time with the workers given, bytes of disk and memory; error: expected standard deviation of a
    prediction over that of an effect, mean over the deletion sets (0: exact, 1: nothing is known)
    """

    name: str
    arguments: dict[str, Any]
    seconds: float
    disk: int
    memory: int
    error: float


@dataclass(frozen=True)
class Plan(Tabular):
    """Choices from best to worst, what they rest on, and what is not among them and why; `print` shows them as a table."""

    choices: tuple[Choice, ...]
    costs: Costs
    stability: Stability | None
    budget: float
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Choice:
        return self.choices[0]

    def table(self) -> Table:
        rows = [
            (number, c.name, round(c.seconds, 1), amount(c.disk), amount(c.memory), c.error)
            for number, c in enumerate(self.choices, 1)
        ]
        return Table(["", "choice", "seconds", "disk", "memory", "expected error"], rows, notes=self.notes)


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    seconds of wall time; disk and memory in bytes (None: not limited); workers
    noise     deviation of a retraining's value between repetitions, over one unit's typical effect (0: deterministic)
    jets      jets are weighed, too, as they are with noise: their probes take many trainings
    repeats   new runs with all data that every choice buys, so that the noise of runs is known; 0: none
    examples  the deletion sets stand for others like them, so that retraining just these would not help
    """

    seconds: float
    disk: int | None = None
    memory: int | None = None
    workers: int = 1
    noise: float = 0.0
    examples: bool = False
    jets: bool = False
    repeats: int = 4

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"the budget must be positive, got {self.seconds} seconds")
        if 0 < self.repeats < LEAST_REPEATS:
            raise ValueError(f"repeats is {self.repeats}: a deviation takes {LEAST_REPEATS} runs or more; 0 buys none")

    @classmethod
    def of(cls, given: Budget | float | str) -> Budget:
        """A budget as it is, one of seconds, or one of a text such as 10min."""
        if isinstance(given, Budget):
            return given
        return cls(quantity(given, SECONDS, "budget") if isinstance(given, str) else given)


def make_plan(
    recipe: Recipe,
    features: np.ndarray | None,
    asked: Sequence[Query],
    sets: DeletionSets,
    budget: Budget,
    known: tuple[float, float],
    device: str | torch.device = "cpu",
    told: float | None = None,
) -> Plan:
    """The plan for predicting some queries without some deletion sets within a budget.

    features [units, k]: the units' update vectors; designs for more than FEW units need them
    known    CPU seconds of one of the first retrainings, and those that were spent before
    told     what the exact first order alone gets wrong of these effects, where the run tells it
    Cost: at most a tenth of the budget, of a few seconds a quarter; more with jets, which need a check of their series and
        probes of their own.
    Raises: UnsupportedError if not one choice fits the budget.
    """
    options = RunOptions(device=find_device(device))
    wanted = budget.jets or budget.noise > 0
    stability, degrees, notes = _stability(recipe, options) if wanted else (None, (), (NO_JETS,))
    (first, spent), allowed = known, max(PROBE_SHARE * budget.seconds, min(LEAST_PROBE, budget.seconds / 4))
    costs = probe(recipe, asked, (first, allowed), degrees, options)
    began = time.process_time()
    alone = _alone(recipe, first, allowed, options)
    # Jets that were asked for are tried beyond all that, and on top of the budget.
    spent += (0.0 if wanted else costs.probe) + time.process_time() - began
    repeats, why = _repeats(recipe, budget, alone)
    noise = RUNS_A_REPEAT * repeats * alone / budget.workers
    choices: list[Choice] = []
    if (left := budget.seconds - spent - noise) > 0:
        orders = costs if costs.gradient is None else replace(costs, gradient=costs.gradient * (1 + repeats))
        spend = _Spending(recipe, features, asked, sets, orders, replace(budget, seconds=left, repeats=repeats))
        choices = [c for c in _choices(spend) if _fits(c, spend.budget)]
    if repeats:
        choices = [replace(c, arguments=c.arguments | {"repeats": repeats}, seconds=c.seconds + noise) for c in choices]
    if not choices:
        raise UnsupportedError(
            f"Nothing useful fits into {budget.seconds:g} s (eight retrainings take {costs.retraining.of(8):.3g} CPU s here)"
            f"{' and the disk and memory allowed' if budget.disk or budget.memory else ''}: give a larger budget."
        )
    if told is not None:
        choices = [replace(c, error=told) if c.name == ALONE else c for c in choices]
        if any(c.arguments.get("gradient") for c in choices):
            notes = (
                *notes,
                f"The exact first order alone gets about {told:.2g} of these effects wrong, as the run tells.",
            )
    if repeats:
        choices = [replace(c, error=float(np.hypot(c.error, _of_orders(c, repeats)))) for c in choices]
    # Errors within a tenth of each other are equal for what a plan knows; then the cheaper choice is the better one.
    choices.sort(key=lambda c: (round(10 * np.log(max(c.error, 1e-3))), c.seconds))
    return Plan(tuple(choices), costs, stability, budget.seconds, (*notes, *costs.notes, *why, ERRORS))


def _of_orders(choice: Choice, repeats: int) -> float:
    """What the effects of a choice get wrong of those of new runs, as the orders that they are measured in are few."""
    several = choice.arguments.get("gradient") or choice.arguments.get("each_order")
    return ONE_ORDER / (1 + repeats if several else 1) ** 0.5


def _alone(recipe: Recipe, first: float, allowed: float, options: RunOptions) -> float:
    """CPU seconds of a run by itself: those of one of the first two retrainings, less what these took to begin."""
    tried = PROBE_REPEATS * first * sum(PROBE_STEPS) / len(recipe.batches())
    if tried > allowed / 4:
        return first
    return min(first, _whole(recipe, lambda short: train_plain(short, options=options)))


def _repeats(recipe: Recipe, budget: Budget, first: float) -> tuple[int, tuple[str, ...]]:
    """New runs with all data that every choice buys, and why there are none; each takes a training by itself."""
    if not budget.repeats:
        return 0, ()
    try:
        new_run(recipe, np.zeros(len(recipe.unit_names)), 0)
    except LeaveoutError as error:
        return 0, (f"No new runs: {error}",)
    for repeats in (budget.repeats, LEAST_REPEATS):
        if RUNS_A_REPEAT * repeats * first <= NOISE_SHARE * budget.seconds * budget.workers:
            some = min(repeats, budget.repeats)
            why = f"{some} with all data, and at most {(RUNS_A_REPEAT - 1) * some} of held-out sets, for the noise of runs"
            return some, (f"Each choice buys new runs, too: {why} ({RUNS_A_REPEAT * some * first:.3g} CPU s); an exact "
                          "first order is that of each of those with all data.",)  # fmt: skip
    why = "the noise of runs would take more than a quarter of the budget, so that answers are of the same run"
    return 0, (f"No new runs: {why} (`measure --repeats {LEAST_REPEATS}` measures it later).",)


def _stability(recipe: Recipe, options: RunOptions) -> tuple[Stability | None, tuple[int, ...], tuple[str, ...]]:
    """The check of the highest degree that may be bought, the degrees that can be, and why others can not."""
    try:
        found = check_stability(recipe, options, advise=False, degree=max(DEGREES))
    except LeaveoutError as error:
        return None, (), (f"No jets: {error}",)
    if found.verdict == "unstable":
        why = (
            f"No jets above degree 1: the power series of this run grow {found.ratio:.2g} times from degree to degree."
        )
        return found, (1,), (why,)
    return found, DEGREES, ()


def probe(
    recipe: Recipe,
    asked: Sequence[Query],
    known: tuple[float, float],
    degrees: tuple[int, ...] = (),
    options: RunOptions | None = None,
) -> Costs:
    """Costs of each kind of run, from what one retraining took and from the first steps of others.

    known: CPU seconds of a retraining, and those that may be spent on trying more
    """
    began, options = time.process_time(), options or RunOptions()
    (first, allowed), total = known, len(recipe.batches())
    tried = first * sum(PROBE_STEPS) / total  # CPU seconds of a probe, of what its kind of run takes in trainings
    units, task = len(recipe.unit_names), task_of(recipe, options.device)
    many = {most: task_size(most, task.device, 1) for most in (JETS_TOGETHER, RUNS_TOGETHER)}
    alone = batching_problem(recipe, task) is not None  # tried once, so that no short run pays for it
    notes: tuple[str, ...] = ()
    try:
        ask = query_function(task, asked)
    except LeaveoutError as error:
        ask, notes = None, (f"No exact first order: {error}",)

    def retrain(n: int) -> float:
        weights = torch.from_numpy(1 - directions.random_sets(0, n, units))
        batched = replace(options, batched=not alone)

        def values(short: Recipe) -> None:
            runs = train_batch(short, weights, batched, together=n)
            if ask is not None:
                query_losses(short, runs, ask, options.device)

        return _whole(recipe, values, 1)

    def measure(n: int, degree: int) -> float:
        psi, settings = torch.from_numpy(directions.complex_uniform(0, n, units)), JetSettings(degree)
        return _whole(recipe, lambda short: train_jets(short, psi, settings, options=options))

    together = 1 if alone else runs_together(recipe, task, many[RUNS_TOGETHER])
    gradient = None if ask is None else first * reverse_trainings(recipe, task, len(asked))
    if ask is not None and gradient is not None:
        try:
            if gradient / first * tried <= allowed / 4:
                gradient = _whole(recipe, lambda short: metagradient(short, ask, options), 1)
            else:
                notes = (*notes, "The exact first order was not tried: its cost is that of other models.")
        except LeaveoutError as error:
            gradient, notes = None, (*notes, f"No exact first order: {error}")
    # A quarter is left for the run by itself.
    retraining = _retraining(retrain, first, together, (0.75 * allowed + began - time.process_time(), tried))
    found: dict[int, Cost] = {}
    for degree in degrees:
        try:
            found[degree] = _line(lambda n, d=degree: measure(n, d), many[JETS_TOGETHER])
        except LeaveoutError as error:
            notes = (*notes, f"No jets of degree {degree}: {error}")
    shared, said = _shared(Steps(recipe, task))
    return Costs(retraining, found, gradient, time.process_time() - began, (*notes, *said), shared)


def _shared(steps: Steps) -> tuple[int, tuple[str, ...]]:
    """Bytes on disk of the states below the lowest trained block, which all retrainings share, and what is said of them."""
    if (below := below_of(steps)) is None:
        return 0, ()
    total = below.total()
    disk = max(0, total - below.room)
    where = f", of which {amount(disk)} are in files" if disk else ""
    return disk, (f"Retrainings share what {len(below.lower)} frozen blocks make of the rows: {amount(total)}{where}.",)


def _retraining(seconds: Callable[[int], float], first: float, together: int, allowed: tuple[float, float]) -> Cost:
    """What retrainings cost, where one of the first two took so long.

    Larger and larger batches are tried, up to those that will be bought. allowed: CPU seconds for all of that, and those
    of trying one run
    """
    (left, one), n, factor = allowed, FIRST, GROWTH**0.5
    found: dict[int, list[float]] = {}
    guess, last = n * one, 0.0
    while together > 1 and guess <= left and len(found.get(together, ())) < PROBE_REPEATS:
        began = time.process_time()
        found.setdefault(n, []).append(seconds(n))
        left -= (spent := time.process_time() - began)
        if last:
            factor = max(factor, spent / last)
        guess, last = (spent, 0.0) if n == together else (spent * factor, spent)
        n = min(together, GROWTH * n)
    if not found or (many := max(found)) == FIRST:
        return Cost(0.0, first, together)
    a, b = (float(np.median(found[n])) for n in (FIRST, many))
    # Of fewer than 128 the part is smaller, and of how much is not known: half way there.
    floor = LEAST_SLOPE * b / (many * PROBE_RUNS[1]) ** 0.5
    each = min(first, b / many, max((b - a) / (many - FIRST), 0.0 if many == together else floor))
    return Cost(b - many * each, each, together)


def _line(seconds: Callable[[int], float], together: int) -> Cost:
    """What a batch and what each of its runs cost, from a small batch and a larger one."""
    few, many = PROBE_RUNS
    few, many = min(few, max(1, together // 2)), min(many, max(2, together))
    a, b = seconds(few), seconds(many)
    each = max(b - a, 0.05 * b) / (many - few)
    return Cost(max(a - few * each, 0.0), each, together)


def _whole(recipe: Recipe, task: Callable[[Recipe], Any], repeats: int = PROBE_REPEATS) -> float:
    """CPU seconds of a task on the whole recipe, from what some of its steps take beyond a start of their own."""
    total = len(recipe.batches())
    few, more = (min(total, steps) for steps in PROBE_STEPS)
    # In turn, as the clock of a busy machine drifts.
    times = [[_seconds(lambda n=n: task(recipe.some_steps(n))) for n in (few, more)] for _ in range(repeats)]
    start, end = (float(t) for t in np.median(times, axis=0))
    return end if more == few else end + max(end - start, 0.0) / (more - few) * (total - more)


def _seconds(task: Callable[[], Any]) -> float:
    """CPU seconds of a task."""
    began = time.process_time()
    task()
    return time.process_time() - began


class _Prior:
    """The kernels before anything is measured, with and without the exact first order."""

    def __init__(self, sizes: np.ndarray, features: np.ndarray | None) -> None:
        self.full, self.curved = default_kernel(sizes, features), default_kernel(sizes, features, exact=True)

    def of(self, exact: bool) -> Kernel:
        """The kernel; `exact`: the first order is known."""
        return self.curved if exact else self.full

    def bent(self, sets: DeletionSets) -> float:
        """What is no first order of an effect, as a part of it, mean over sets."""
        return float(np.sqrt(self.curved.diagonal(sets.x) / self.full.diagonal(sets.x)).mean())

    def error(
        self, sets: DeletionSets, x: np.ndarray, jets: list[tuple[np.ndarray, int]], exact: bool, noise: float
    ) -> float:
        """Expected relative error, mean over sets; `exact`: the first order is known."""
        kernel = self.of(exact)
        share = np.sqrt(kernel.diagonal(sets.x) / self.full.diagonal(sets.x))
        left = expected_error(kernel, jets, x, sets.x, max(NUGGET, noise**2))
        return float((left * share).mean())


def _choices(spend: _Spending) -> Iterator[Choice]:
    units, sets, costs, budget = spend.units, spend.sets, spend.costs, spend.budget
    cpu, heldout = budget.seconds * budget.workers, spend.heldout
    if costs.retraining.of(spend.different) <= cpu and not budget.noise and not budget.examples:
        yield spend.named()
        if budget.repeats:
            yield spend.in_each_order()
        if budget.repeats and costs.gradient is not None:
            yield spend.named(gradient=True)
    runs = spend.affordable(cpu)
    some = 0 if budget.examples or len(sets) > MOST_SETS else runs
    if some > 0:
        yield from spend.some(some)
    if runs >= 8:
        yield spend.make("retrainings", retrain=min(runs, 4 * units))
    if units <= directions.FEW and runs >= units * (units + 1) // 2:
        yield spend.make("retrainings of all units and pairs", retrain=min(runs, 4 * units**2), pairs=True)
    reserve = spend.retrainings(0, heldout)
    for degree, cost in costs.jets.items():
        for share, name in ((1.0, ""), (0.5, ", and retrainings")):
            m = min(cost.affordable(share * (cpu - reserve)), 2 * units)
            if m < 8:
                continue
            rest = spend.affordable(cpu - cost.of(m)) if share < 1 else 0
            yield spend.make(
                f"jets of degree {degree}{name}", jets=m, degree=degree, retrain=min(max(0, rest), 4 * units)
            )
    if costs.gradient is None or costs.gradient > cpu:
        return
    rest = spend.affordable(cpu - costs.gradient)
    if 0 < min(some, rest) < spend.different:  # of sets that are retrained, the first order is known
        yield from spend.some(rest, gradient=True)
    if rest >= 8:
        yield spend.make("exact first order, and retrainings", retrain=min(rest, 4 * units), gradient=True)
    else:
        yield spend.make(ALONE, gradient=True, heldout=max(0, min(heldout, rest + heldout)))


def sizes_of(sets: DeletionSets) -> tuple[int, ...]:
    """Of random sets: those of the sets that are asked about."""
    return tuple(int(s) for s in np.unique(np.maximum(1, sets.x.sum(1).round()))[:8])


@dataclass(frozen=True)
class _Spending:
    """What every choice of a plan is made of."""

    recipe: Recipe
    features: np.ndarray | None
    asked: Sequence[Query]
    sets: DeletionSets
    costs: Costs
    budget: Budget

    @property
    def units(self) -> int:
        return len(self.recipe.unit_names)

    @functools.cached_property
    def heldout(self) -> int:
        """Without those that take a batch of their own where that would take more than a quarter of the budget."""
        cpu, cost = self.budget.seconds * self.budget.workers, self.costs.retraining
        most = min(HELDOUT, cost.affordable(cpu) // 4)
        return most if 4 * cost.of(_late(most)) <= cpu else min(most, PATTERN.index("top"))

    @functools.cached_property
    def late(self) -> int:
        return _late(self.heldout)

    def affordable(self, seconds: float) -> int:
        """How many retrainings can be fitted for so many CPU seconds beside those that are held out; below 0: not even these."""
        cost = self.costs.retraining
        return cost.affordable(seconds - cost.of(self.late)) - (self.heldout - self.late)

    def retrainings(self, fitted: int, heldout: int) -> float:
        """CPU seconds of so many that are fitted and so many that are held out."""
        late = _late(heldout)
        return self.costs.retraining.of(fitted + heldout - late) + self.costs.retraining.of(late)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return sizes_of(self.sets)

    @functools.cached_property
    def prior(self) -> _Prior:
        return _Prior(np.bincount(self.recipe.unit_of.numpy()).astype(np.float64), self.features)

    @functools.cached_property
    def different(self) -> int:
        """How many of the sets are, as equal ones are retrained once."""
        return len(directions.different(self.sets.x))

    def named(self, gradient: bool = False) -> Choice:
        """All the sets, which then are known in one order; with the exact first order in each order of new runs, and held-out
        sets that tell how far these are."""
        arguments, name = {"without": self.sets, "queries": self.asked}, "retraining the sets themselves"
        seconds, heldout, error = 0.0, 0, 0.0
        if gradient:
            seconds, heldout = self.costs.gradient or 0.0, self.heldout
            arguments, name = arguments | {"gradient": True, "heldout": heldout}, f"exact first order, and {name}"
            error = ONE_ORDER * self.prior.bent(self.sets)  # which is known in one order alone
        seconds = (seconds + self.retrainings(self.different, heldout)) / self.budget.workers
        return Choice(name, arguments, seconds, *self._bytes(self.different + heldout, 0, 0), error)

    def in_each_order(self) -> Choice:
        """All the sets, in the same run and in the order of each new run with all data; and held-out sets, whose new runs tell
        what the steps are worth that a run on fewer rows does not take."""
        repeats, runs = self.budget.repeats, (1 + self.budget.repeats) * self.different
        cpu = self.retrainings(self.different, self.heldout) + repeats * self.costs.retraining.of(self.different)
        arguments = {"without": self.sets, "each_order": True, "heldout": self.heldout, "queries": self.asked}
        name = f"retraining the sets themselves in {1 + repeats} orders"
        return Choice(name, arguments, cpu / self.budget.workers, *self._bytes(runs + self.heldout, 0, 0), 0.0)

    def some(self, runs: int, gradient: bool = False) -> Iterator[Choice]:
        """The sets, and halves of them, that say most of all of them; nothing where these are just the sets."""
        x = telling(self.sets.x, runs, self.prior.of(gradient))
        named = {row.tobytes() for row in self.sets.x}
        whole = sum(row.tobytes() in named for row in x)
        name = "retraining " + ("the sets themselves" if whole == self.different else f"{whole} of the sets")
        if halves := len(x) - whole:
            name += f", and {'one half' if halves == 1 else f'{halves} halves'} of them"
        if len(x) != whole or whole < self.different:
            yield self.make(f"exact first order, and {name}" if gradient else name, gradient=gradient, chosen=x)

    def make(
        self,
        name: str,
        retrain: int = 0,
        jets: int = 0,
        degree: int = 1,
        gradient: bool = False,
        pairs: bool = False,
        heldout: int | None = None,
        chosen: np.ndarray | None = None,
    ) -> Choice:
        settings, design = MeasureSettings(sizes=self.sizes), "all pairs" if pairs else "auto"
        x = chosen
        if x is None:
            x = directions.design(design, retrain, self.units, settings.seed, settings.sizes, self.features, gradient)
            x = directions.different(x)
        retrain = len(x)  # with few units there are not as many different sets as could be paid for
        if heldout is None:
            drawer = HeldOut(self.units, settings.seed + 1000, settings.sizes, x, None, np.zeros((0, self.units)))
            heldout = len(drawer.draw(["random"] * self.heldout, range(self.heldout)))
        psi = directions.complex_uniform(0, jets, self.units)
        room = DESIGN_LIMIT // max(1, degree)
        planned = [(psi[: room // 2], degree)] if jets else []
        error = self.prior.error(self.sets, x[:DESIGN_LIMIT], planned, gradient, self.budget.noise)
        cpu = self.retrainings(len(x), heldout) + (self.costs.jets[degree].of(jets) if jets else 0.0)
        cpu += (self.costs.gradient or 0.0) if gradient else 0.0
        arguments: dict[str, Any] = {"heldout": heldout, "settings": settings, "queries": self.asked}
        if chosen is not None:
            arguments |= {"without": self.sets, "most": retrain}
        elif retrain:
            arguments |= {"retrain": retrain} | ({"design": design} if pairs else {})
        if jets:
            arguments |= {"directions": jets, "degree": degree}
        if gradient:
            arguments |= {"gradient": True}
        seconds = cpu / self.budget.workers
        return Choice(name, arguments, seconds, *self._bytes(len(x) + heldout, jets, degree), error)

    def _bytes(self, runs: int, jets: int, degree: int) -> tuple[int, int]:
        """Disk of the bank with query values, and memory of the estimator's largest matrices."""
        units, queries = self.units, len(self.asked)
        bank = 8 * runs * (units + queries) + 16 * jets * (units + degree * queries)
        numbers = min(runs + 2 * jets * degree, LARGEST)
        return bank + (self.costs.shared if runs else 0), 2 * bank + 24 * numbers**2


def _late(heldout: int) -> int:
    """How many of so many held-out sets are retrained in a batch of their own, as what is fitted chooses them."""
    return kinds_of(heldout, True, 0, True).count("top")


def _fits(choice: Choice, budget: Budget) -> bool:
    disk, memory = budget.disk, budget.memory
    return (
        choice.seconds <= budget.seconds
        and (disk is None or choice.disk <= disk)
        and (memory is None or choice.memory <= memory)
    )
