"""What a run leaves out of an ordinary training of the same model and data, in sentences for the one who trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from leaveout.training.formulas import slow_path
from leaveout.training.recipe import Recipe
from leaveout.training.start import tried_numbers
from leaveout.training.tasks import Task

NAMED = 5
"""Names in a sentence, at most."""
SKIPS = ("DropPath", "StochasticDepth")
"""Classes of timm and torchvision that leave out whole layers at random."""


def notes_on(recipe: Recipe, task: Task) -> list[str]:
    """Sentences on how the model was loaded, what of it is off or frozen, and what is never trained on; none if nothing is."""
    off = [] if recipe.dropout is not None else dropout_of(task.model)
    off += _norms(task)
    if recipe.autocast is not None:
        off.append(
            f"Plain runs and retrainings compute in {recipe.autocast}; jets and the exact first order are derivatives of the "
            f"run in {recipe.dtype}."
        )
    if not off and task.given and recipe.dropout is None and _acts_otherwise_in_training(recipe, task):
        off.append(
            "The model gives other losses in training form than in evaluation form, which is used here throughout: dropout, "
            "augmentation or the like is off."
        )
    return [*task.notes, *off, *_untrained(recipe)]


def dropout_of(model: nn.Module) -> list[str]:
    """A sentence on what a model drops in training form, or none."""
    found = {name: rate for name, module in model.named_modules() if (rate := _rate(module)) > 0}
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    found |= {
        f"config.{name}": float(value)
        for name, value in settings.items()
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }
    if not found:
        return []
    rates = [f"{name or 'model'} {rate:g}" for name, rate in found.items()]
    return [f"Dropout is off, in training too: {_listed(rates)}."]


def _rate(module: nn.Module) -> float:
    """The rate at which a module would drop something in training form."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    if type(module).__name__ in SKIPS:
        return float(getattr(module, "drop_prob", None) or getattr(module, "p", None) or 0.0)
    return 0.0


def _norms(task: Task) -> list[str]:
    names = [
        name or "model"
        for name, module in task.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]
    by_batches = [name.removesuffix(".running_mean") for name in task.running if name.endswith("running_mean")]
    if by_batches:
        return [
            "Batch norm is in training form: the statistics are those of the rows of a micro-batch that have weight, in "
            f"{_listed(by_batches)}."
        ]
    if not names:
        return []
    other = "; `batch_statistics` trains it" if task.given else ""
    return [
        f"Batch norm is frozen: its stored means and variances are used and not updated, in {_listed(names)}{other}."
    ]


def _acts_otherwise_in_training(recipe: Recipe, task: Task) -> bool:
    """Whether losses change when a copy of the model is put in training form."""
    rows = [recipe.examples[i] for i in tried_numbers(recipe.batches(), len(recipe.examples))[:2]]
    model = copy.deepcopy(task.model)
    with torch.no_grad(), slow_path(), torch.random.fork_rng(devices=[]):
        try:
            plain = [task.loss(model, task.encode([row])) for row in rows]
            model.train()
            trained = [task.loss(model, task.encode([row])) for row in rows]
        except Exception:  # it cannot be run in training form on one example: then it surely acts otherwise
            return True
    return any(not torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, trained, strict=True))


def _untrained(recipe: Recipe) -> list[str]:
    seen = {i for batch in recipe.batches() for i in batch}
    units, left = recipe.untrained_units(), len(recipe.examples) - len(seen)
    if units:
        return [
            f"{len(units)} of {len(recipe.unit_names)} units are in no step, so that nothing changes without them: "
            f"{_listed(units)}."
        ]
    names = [recipe.ids[i] for i in range(len(recipe.ids)) if i not in seen]
    return [f"{left} of {len(recipe.examples)} examples are in no step: {_listed(names)}."] if left else []


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def cut_notes(recipe: Recipe, task: Task) -> list[str]:
    """One sentence on how many examples are cut and how much of them, or none. Cost: every example is tokenised once."""
    if task.cut is None:
        return []
    cuts = [cut for row in recipe.examples if (cut := task.cut(row))]
    if not cuts:
        return []
    where, what = f"max_tokens = {recipe.max_tokens}", "tokens"
    if recipe.kind == "microgpt":
        where, what = "microgpt reads", "characters, with their ends,"
    return [
        f"{len(cuts)} of {len(recipe.examples)} rows are longer than {where} and are cut there: "
        f"{sum(cuts)} {what} are not learned."
    ]
