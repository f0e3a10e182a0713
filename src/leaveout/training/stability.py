"""Can a training run be sketched? Four random real directions, at degree 4 by default, say so beforehand (METHODS A2).

For a direction on the unit sphere of G units, sqrt(C(G + k - 1, k)) |theta_k| is the size of the degree-k part of the
change that a deletion makes. A run whose table grows with k has no usable series, whatever the number of directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leaveout.errors import StabilityError
from leaveout.training.recipe import Recipe
from leaveout.training.train import JetSettings, RunOptions, train_jets

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
    progress = RunOptions(progress=options.progress if options else False)
    try:
        run = train_jets(recipe, psi, settings, options=progress)
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
        eps = s.eps or 1e-8
        out.append((f"Epsilon {eps * 1e3:.2g} instead of {eps:.2g}", recipe.with_(eps=eps * 1e3)))
        out.append(("`paper-adam` with epsilon 1e-3 inside the root", _paper(recipe)))
    return out


def _paper(recipe: Recipe) -> Recipe:
    settings: dict[str, Any] = {"name": "paper-adam", "eps": 1e-3, "weight_decay": 0.0}
    return recipe.with_(optimizer=type(recipe.optimizer)(**{**vars(recipe.optimizer), **settings}))
