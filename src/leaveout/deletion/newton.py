"""Where a trained model goes when it goes on without some units, by a few damped Gauss-Newton steps and no retraining.

A sum over units takes each one's effect as if the others stayed, and no first order knows that a set holds all that taught a
query. So the model itself is moved: with the loss J of a step of the run, as an expectation over its batches, and P the
optimizer's metric, the run that goes on for its whole length T (the sum of its learning rates) follows

    d delta / d tau = -P [grad J_x(theta + delta) - grad J(theta)]        x: the share of each unit that is gone

from the trained parameters theta, at which all data together pull nowhere. It is followed in STEPS steps that are exact where
the Gauss-Newton matrix is constant (`influence.refined`), and the queries are asked of the model that comes out: neither loss nor
model are linearised. K-FADE's idea (Gauss-Newton steps on the set), in the metric and for the time of the run (the segments of
SOURCE, arXiv 2405.12186). Of the rest of the data a sample is enough, as it only has to resist; the set counts whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from leaveout.errors import StabilityError, UnsupportedError
from leaveout.influence import refined
from leaveout.training.loop import Steps
from leaveout.training.queries import query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Parameters, task_of
from leaveout.training.whole import batches_of, run_of, whole_model

STEPS = 8
SHORTEST = 1024  # a step takes at least this part of the run's length; it is halved where it would climb
SAMPLE = 200  # examples whose curvature counts
REST = 1000  # examples that resist
TOKENS = 4096  # of a batch
FIRST = 32  # examples of the sample's batches: a product goes six more times through its first


class Newton:
    """Moves the trained parameters of a recipe.

    Cost a set: STEPS gradients of at most REST examples, and six products each with the Gauss-Newton matrix of SAMPLE examples.
    Raises: UnsupportedError for a recipe whose task gives no logits.
    """

    def __init__(self, recipe: Recipe, parameters: Parameters, device: str | torch.device = "cpu") -> None:
        self._recipe, self._device = recipe, device
        self._task = task = task_of(recipe, device)
        if task.outputs is None or recipe.loss is not None:
            raise UnsupportedError("Gauss-Newton steps need a model that gives logits: retrain the sets instead.")
        if recipe.batch_statistics:
            raise UnsupportedError(
                "Gauss-Newton steps do not know batch norm in training form: retrain the sets instead."
            )
        if recipe.label_smoothing:
            raise UnsupportedError("Gauss-Newton steps know no label smoothing: retrain the sets instead.")
        self._model = model = whole_model(task, {n: p.to(task.device) for n, p in parameters.items()})
        self._pull = _pulls(recipe, Steps(recipe, task))
        self._together = max(1, TOKENS // max(1, task.encode(recipe.examples[:1])[0].shape[-1]))
        chance = np.random.default_rng(recipe.seed)
        drawn = np.flatnonzero(self._pull)
        chosen = [recipe.examples[i] for i in np.sort(chance.permutation(drawn)[:SAMPLE])]
        self._run = run_of(recipe, model, task, chosen, recipe.seed)
        self._sample = batches_of(task, chosen, min(self._together, FIRST))
        self._rest = np.sort(chance.permutation(drawn)[:REST])

    def moved(self, x: np.ndarray) -> Tensor:
        """The parameters [parameters] after going on without the shares x [units].

        Raises: StabilityError if what is left pulls harder the further it goes, however small the steps are.
        """
        theta = self._model.theta
        gone = x[self._recipe.unit_of.numpy()]
        here = np.flatnonzero(gone * self._pull)
        kept = self._rest[gone[self._rest] < 1]
        weights = (1 - gone[kept]) * self._pull[kept]
        weights *= ((1 - gone) * self._pull).sum() / max(weights.sum(), 1e-300)
        level, pull = self._loss(theta, kept, weights)
        held = pull + self._loss(theta, here, gone[here] * self._pull[here])[1]  # what all data pull at the start
        pull, delta = pull - held, torch.zeros_like(theta)
        left = whole = self._run.rates
        time = whole / STEPS
        while left > 1e-9 * whole:
            time = min(time, left)
            there = delta - refined(self._model, self._sample, [pull], replace(self._run, rates=time))[0]
            loss, slope = self._loss(theta + there, kept, weights)
            if not (found := loss - float(held @ there)) <= level + 1e-6 * abs(level):  # a descent does not climb
                time /= 2
                if time < whole / SHORTEST:
                    raise StabilityError(
                        "Gauss-Newton steps without this set do not settle: retrain it (`measure --without`)."
                    )
                continue
            level, delta, pull, left = found, there, slope - held, left - time
        return theta + delta

    def effects(self, x: np.ndarray, ask: Callable[[nn.Module], Tensor]) -> np.ndarray:
        """Effects [queries, sets] of leaving out the shares x [sets, units]."""
        moved = torch.stack([self._model.theta, *(self.moved(row) for row in x)])
        named = [self._model.named(one) for one in moved]
        stacked = {name: torch.stack([one[name] for one in named]).cpu() for name in named[0]}
        values = query_losses(self._recipe, stacked, ask, self._device).double().numpy()
        return (values[1:] - values[:1]).T

    def _loss(self, theta: Tensor, numbers: np.ndarray, weights: np.ndarray) -> tuple[float, Tensor]:
        """The sum of these examples' losses by their weights, and its gradient."""
        value, total, at = 0.0, torch.zeros_like(theta), 0
        examples = [self._recipe.examples[i] for i in numbers]
        for batch in batches_of(self._task, examples, self._together):
            own = torch.from_numpy(weights[at : at + batch.n_rows]).to(theta.device)
            point = theta.clone().requires_grad_()
            loss = (self._model.at(point, batch).losses(batch.n_rows) * own).sum()
            total += torch.autograd.grad(loss, point)[0]
            value, at = value + float(loss.detach()), at + batch.n_rows
        return value, total


def cheaper(recipe: Recipe) -> bool:
    """Whether the steps of a set take fewer passes of examples than training without it."""
    n = len(recipe.examples)
    passes = 3 * min(n, REST) + 6 * 4 * min(n, SAMPLE)  # a gradient is three forward passes, a product four
    plain = recipe.kind != "custom" and recipe.loss is None and not (recipe.label_smoothing or recipe.batch_statistics)
    return plain and STEPS * passes < 3 * sum(map(len, recipe.batches()))


def _pulls(recipe: Recipe, steps: Steps) -> np.ndarray:
    """What an example's loss counts in the expected loss of a step [examples]."""
    found = np.zeros(len(recipe.examples))
    for step in range(len(steps)):
        for part in steps.parts(step):
            sizes = np.ones(len(part.numbers)) if part.sizes is None else part.sizes.double().numpy()
            np.add.at(found, list(part.numbers), sizes / part.divisor)
    return found / len(steps)
