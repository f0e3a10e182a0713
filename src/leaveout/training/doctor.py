"""What a recipe allows, found by a few of its steps: seconds, randomness, kinks, batches of runs, reverse mode.

All of it costs less than two trainings (a few steps, where a training has fewer); whether power series grow is asked of
`check_stability`, which costs far more.

Can a training run be sketched? Four random real directions, at degree 4 by default, say so beforehand
(docs/explanation/methods.md).

For a direction on the unit sphere of G units, sqrt(C(G + k - 1, k)) |theta_k| is the size of the degree-k part of the
change that a deletion makes. A run whose table grows with k has no usable series, whatever the number of directions.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leaveout.errors import LeaveoutError, StabilityError
from leaveout.tables import Check, Diagnosis
from leaveout.training.batching import batching_problem
from leaveout.training.loop import RunOptions
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.flat_run import FlatRun, passes
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_jets, train_plain

STEPS = 4  # of the plain run that is timed


def probe_recipe(recipe: Recipe, device: str | torch.device = "cpu") -> Diagnosis:
    """What was found, one thing after another; prints as a table."""
    steps, task, options = len(recipe.batches()), task_of(recipe, device), RunOptions(device=device)
    few = min(STEPS, steps)
    began = time.monotonic()
    first = train_plain(recipe.first_steps(few), options=options)
    seconds = (time.monotonic() - began) / few * steps
    found = [Check("training", None, f"about {seconds:.1f} s for {steps} steps")]
    again = train_plain(recipe.first_steps(1), options=options) if few > 1 else first
    same = train_plain(recipe.first_steps(1), options=options)
    equal = all(torch.equal(again[name], same[name]) for name in again)
    what = "the first step gives the same numbers twice" if equal else "the first step gives other numbers each time"
    found.append(Check("randomness", equal, what))
    problem = batching_problem(recipe, task)
    found.append(
        Check("batches of runs", None, "several runs share a step" if problem is None else f"one by one: {problem}")
    )
    return Diagnosis((*found, _jets(recipe, options), _reverse(recipe, task.device)))


def _jets(recipe: Recipe, options: RunOptions) -> Check:
    try:
        psi = random_directions(1, len(recipe.unit_names), recipe.seed)
        run = train_jets(recipe.first_steps(1), psi, JetSettings(1, recipe.real_dtype), options=options)
    except LeaveoutError as error:
        return Check("jets", None, f"not of this model: {error}")
    if run.nonsmooth:
        names = ", ".join(sorted(run.nonsmooth))
        return Check("jets", None, f"degree 1; {names} has a kink, which higher degrees do not see")
    return Check("jets", True, "no kink; whether series grow at higher degrees: --growth")


def _reverse(recipe: Recipe, device: torch.device) -> Check:
    try:
        with passes(device):
            FlatRun(recipe.first_steps(1), device).require_second_pass()
    except LeaveoutError as error:
        return Check("exact first order", None, str(error))
    return Check("exact first order", True, "reverse mode agrees with differences of gradients")


def growth_seconds(recipe: Recipe, degree: int, options: RunOptions | None = None) -> float:
    """About how long `check_stability` takes at a degree, from one step."""
    psi = random_directions(DIRECTIONS, len(recipe.unit_names), recipe.seed)
    settings: Any = JetSettings(degree, recipe.real_dtype)
    began = time.monotonic()
    train_jets(recipe.first_steps(1), psi, settings, options=options)
    return (time.monotonic() - began) * len(recipe.batches())


# --- growth of the series ----------------------------------------------------------------------------------------------


DEGREE, DIRECTIONS = 4, 4
STABLE, MARGINAL = 1.0, 3.0
"""Largest ratio of neighbouring table entries (from degree 1 on) that counts as stable, and as marginal."""


@dataclass
class Stability:
    """What the check found.

    growth   sqrt(C(G + k - 1, k)) |theta_k| for k = 0..degree, the median over directions; inf after an overflow
    verdict  stable, marginal or unstable;  advice: what to change, in order of how much it was seen to help
    """

    growth: list[float]
    verdict: str
    units: int
    steps: int
    nonsmooth: dict[str, int] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Largest growth from one degree to the next, from degree 1 on."""
        pairs = zip(self.growth[1:], self.growth[2:], strict=False)
        return max((b / a if a > 0 else 0.0) if math.isfinite(b) else math.inf for a, b in pairs)

    def __str__(self) -> str:
        """The growth table, the verdict and the advice, as lines of text."""
        lines = [f"degree  size of the change ({self.units} units, {self.steps} steps)"]
        lines += [f"{k:>6}  {value:.3g}" for k, value in enumerate(self.growth)]
        lines.append(f"{self.verdict}: the size grows at most {self.ratio:.2g} times from one degree to the next")
        return "\n".join([*lines, *(f"- {line}" for line in self.advice)])

    def require(self) -> Stability:
        """Raises: StabilityError, with the table, unless the run is stable or marginal."""
        if self.verdict == "unstable":
            degree = len(self.growth) - 1
            raise StabilityError(
                f"This run has no usable power series up to degree {degree}: measure at a lower degree (degree 1 is the "
                f"derivative, which does not need one), or tame the recipe. {self}"
            )
        return self


def check_stability(
    recipe: Recipe, options: RunOptions | None = None, advise: bool = True, degree: int = DEGREE
) -> Stability:
    """Run the check; for a run that is not stable, try changes one at a time and report which help.

    Cost: four real directions at the degree, and as much again for each change that is tried (up to three).
    """
    if degree < 2:
        raise ValueError(
            f"growth is from one degree to the next, from degree 1 on: check degree 2 or more, not {degree}"
        )
    found = _measure(recipe, options, degree)
    if found.nonsmooth:
        found.advice.append(
            f"Activation or clipping: {', '.join(sorted(found.nonsmooth))} has a kink, which degrees above 1 do not see; "
            "use GELU, SiLU or tanh and average pooling, or stay at degree 1."
        )
    if found.verdict != "stable" and advise:
        tried = [(_measure(changed, options, degree).ratio, text) for text, changed in _changes(recipe)]
        for ratio, text in sorted(tried, key=lambda pair: pair[0]):
            if ratio < found.ratio:
                found.advice.append(f"{text}: growth {ratio:.2g} instead of {found.ratio:.2g}.")
        if not any(ratio <= STABLE for ratio, _ in tried):
            found.advice.append("No single change made the run stable: combine them, or train for fewer steps.")
    return found


def random_directions(n: int, units: int, seed: int) -> Tensor:
    """Real directions [n, units], uniform on the unit sphere, float64."""
    g = torch.Generator().manual_seed(seed)
    psi = torch.randn(n, units, generator=g, dtype=torch.float64)
    return psi / psi.norm(dim=1, keepdim=True)


def growth_scale(units: int, k: int) -> float:
    """sqrt(C(units + k - 1, k)), also for large numbers."""
    return math.exp(0.5 * (math.lgamma(units + k) - math.lgamma(k + 1) - math.lgamma(units)))


def _measure(recipe: Recipe, options: RunOptions | None, degree: int = DEGREE) -> Stability:
    units, steps = len(recipe.unit_names), len(recipe.batches())
    psi = random_directions(DIRECTIONS, units, recipe.seed)
    settings = JetSettings(degree, recipe.real_dtype)
    given = options or RunOptions()
    try:
        run = train_jets(recipe, psi, settings, options=RunOptions(progress=given.progress, device=given.device))
    except StabilityError:
        return Stability([math.nan] + [math.inf] * degree, "unstable", units, steps)
    size = sum(h.double().square().flatten(2).sum(-1) for h in run.coefficients.values())
    assert isinstance(size, Tensor)
    sizes = size.sqrt().median(dim=1).values
    start = math.sqrt(sum(float(c.double().square().sum()) for c in run.constants.values()))
    growth = [start, *(float(s) * growth_scale(units, k) for k, s in enumerate(sizes, 1))]
    found = Stability(growth, "", units, steps, run.nonsmooth)
    found.verdict = "stable" if found.ratio <= STABLE else "marginal" if found.ratio <= MARGINAL else "unstable"
    return found


def _changes(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Recipes with one thing tamed: learning rate, momentum, epsilon or the kind of Adam."""
    s, out = recipe.optimizer, []
    out.append((f"Learning rate {s.lr / 3:.2g} instead of {s.lr:.2g}", recipe.with_(lr=s.lr / 3)))
    if s.name == "sgd" and s.momentum:
        out.append((f"Momentum 0 instead of {s.momentum:.2g}", recipe.with_(momentum=0.0)))
    if s.name == "paper-adam":
        eps = s.eps or 1e-3
        out.append((f"Epsilon {eps * 10:.2g} instead of {eps:.2g}", recipe.with_(eps=eps * 10)))
    if s.name in ("adam", "adamw"):
        eps, paper = s.eps or 1e-8, replace(s, name="paper-adam", eps=1e-3, weight_decay=0.0)
        out.append((f"Epsilon {eps * 1e3:.2g} instead of {eps:.2g}", recipe.with_(eps=eps * 1e3)))
        out.append(("`paper-adam` with epsilon 1e-3 inside the root", recipe.with_(optimizer=paper)))
    return out
