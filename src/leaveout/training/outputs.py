"""Values of queries under what a run trained: one model, a stack of retrained ones, or the jets that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.jets import Series, Space, install, restore
from leaveout.training.batching import Bound, Parameters, checked_of_runs, of_runs, one_by_one, run_count
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Task, task_of
from leaveout.training.train import Queries, own_parameters, query_series


def query_losses(recipe: Recipe, params: Parameters, queries: Queries) -> Tensor:
    """Losses of queries under trained parameters [*shape] or [runs, *shape]: [queries] or [runs, queries], nats."""
    task = task_of(recipe)
    own = own_parameters(task)
    stacked = all(params[name].dim() == p.dim() + 1 for name, p in own.items())
    runs = params if stacked else {name: p.unsqueeze(0) for name, p in params.items()}
    values = queries if callable(queries) else _losses_of(task, queries)
    with torch.no_grad():
        out = _values_of_runs(Bound(task, values), runs)
    return out if stacked else out[0]


def _losses_of(task: Task, rows: Sequence[Any]) -> Callable[[nn.Module], Tensor]:
    batches = [task.encode_queries([row]) for row in rows]
    return lambda model: torch.cat([task.loss(model, batch) for batch in batches])


def _values_of_runs(asked: Bound, runs: Parameters) -> Tensor:
    """Values [runs, queries]; one run after the other where a batch of the first ones gives other numbers, or none."""
    out, batched = [], None
    for part in _chunks_of_runs(runs):
        if batched is None:
            values, batched = checked_of_runs(asked.under, part)
        else:
            values = (of_runs if batched else one_by_one)(asked.under, part)
        out.append(values)
    return torch.cat(out)


def _chunks_of_runs(runs: Parameters, size: int = 64) -> Iterator[Parameters]:
    return ({name: p[i : i + size] for name, p in runs.items()} for i in range(0, run_count(runs), size))


def jet_values(recipe: Recipe, constants: Parameters, coefficients: Parameters, queries: Queries) -> Series:
    """Series of queries [queries] from what a jet run kept: its `constants` and `coefficients`."""
    task = task_of(recipe)
    first = next(iter(coefficients.values()))
    space = Space(first.shape[0], first.shape[1], first.dtype)
    replaced = install(task.model, {n: space.jet(constants[n], h) for n, h in coefficients.items()})
    try:
        return query_series(task, space, queries)
    finally:
        restore(task.model, replaced)
