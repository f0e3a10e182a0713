"""Values of queries under what a run trained: one model, a stack of retrained ones, or the jets that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from leaveout.jets import Series, Space, install, restore
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Task, task_of
from leaveout.training.train import Parameters, Queries, losses_of_runs, own_parameters, query_series


def query_losses(recipe: Recipe, params: Parameters, queries: Queries) -> Tensor:
    """Losses of queries under trained parameters [*shape] or [runs, *shape]: [queries] or [runs, queries], nats."""
    task = task_of(recipe)
    own = own_parameters(task)
    stacked = all(params[name].dim() == p.dim() + 1 for name, p in own.items())
    runs = params if stacked else {name: p.unsqueeze(0) for name, p in params.items()}
    with torch.no_grad():
        if callable(queries):
            out = torch.cat([_values_of_runs(task, part, queries) for part in _chunks_of_runs(runs)])
        else:
            out = torch.cat([losses_of_runs(task, runs, task.encode_queries([q])) for q in queries], 1)
    return out if stacked else out[0]


def _chunks_of_runs(runs: Parameters, size: int = 64) -> Iterator[Parameters]:
    n = len(next(iter(runs.values())))
    return ({name: p[i : i + size] for name, p in runs.items()} for i in range(0, n, size))


class _Asked(nn.Module):
    """The values of queries as a module, so that parameters can be given by name."""

    def __init__(self, model: nn.Module, queries: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.queries = model, queries

    def forward(self) -> Tensor:
        return self.queries(self.model)


def _values_of_runs(task: Task, runs: Parameters, queries: Callable[[nn.Module], Tensor]) -> Tensor:
    asked = _Asked(task.model, queries)

    def one(values: Parameters) -> Tensor:
        return torch.func.functional_call(asked, {f"model.{name}": v for name, v in values.items()}, ())

    try:
        return torch.vmap(one)(runs)
    except RuntimeError:  # a function whose course depends on its values cannot be batched
        n = len(next(iter(runs.values())))
        return torch.stack([one({name: p[i] for name, p in runs.items()}) for i in range(n)])


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
