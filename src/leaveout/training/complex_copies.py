"""The second engine on recipes: one direction trained as ordinary complex copies at roots of unity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leaveout.jets import roots
from leaveout.training.recipe import Recipe
from leaveout.training.steps import Steps
from leaveout.training.tasks import Batch, task_of
from leaveout.training.train import Parameters, encoded


def train_roots(
    recipe: Recipe, psi: Tensor, circle: roots.Circle, queries: Sequence[Any] = ()
) -> tuple[Parameters, Tensor]:
    """One direction psi [units] by complex copies: parameters [points, *shape], query losses [points, queries].

    `roots.coefficients` turns both into series. The independent engine: slower at low degrees, the way to high ones.
    """
    task, s = task_of(recipe), recipe.optimizer
    gradient = roots.Gradient(task.model, task.loss, task.trained)
    chosen: dict[str, Any] = {k: v for k, v in (("betas", s.betas), ("eps", s.eps)) if v is not None}
    optimizer: roots.Sgd | roots.Adam
    if s.name == "sgd":
        optimizer = roots.Sgd(s.lr, s.momentum, s.nesterov, s.weight_decay)
    else:
        decay = {"weight_decay": s.weight_decay, "decoupled": s.name == "adamw"}
        optimizer = roots.Adam(s.lr, **chosen, **decay, eps_inside=s.name == "paper-adam")
    steps = Steps(recipe.with_(dtype="float64"), task)
    parts = [steps.parts_of(batch, 1)[0] for batch in steps.batches]  # copies do not accumulate: one part a step
    batches = [_doubled(encoded(recipe, task, part.numbers)) for part in parts]
    circle.schedule = lambda step: recipe.rate(step, len(steps))
    circle.clip_norm = recipe.clip_norm
    entries = psi.to(torch.complex128)[recipe.unit_of]
    along = [entries[list(part.numbers)] for part in parts]
    shares = [(torch.ones(len(p.numbers)) if p.sizes is None else p.sizes).double() / p.divisor for p in parts]
    params = roots.train(gradient, batches, along, optimizer, circle, shares)
    ones = torch.ones(circle.points, 1, dtype=torch.complex128)
    losses = [gradient(params, _doubled(task.encode_queries([q])), ones)[1] for q in queries]
    return params, torch.cat(losses, 1) if losses else torch.zeros(circle.points, 0)


def _doubled(batch: Batch) -> Batch:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)
