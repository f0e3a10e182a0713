"""What is asked of a trained model: each query is one number, computed from the model's outputs.

The same function runs on an ordinary model, on a stack of retrained ones, in jets and under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.corpus import Behaviour, Corpus, Probe, Row
from leaveout.corpus.behaviour import called, summed, texts_of
from leaveout.corpus.rows import in_words
from leaveout.errors import FormatError, UnsupportedError, choices
from leaveout.jets import Jet, Series, Space, install, restore
from leaveout.models import full_precision
from leaveout.training.batching import checked_of_runs, of_runs, one_by_one, run_count
from leaveout.training.digest import digest_of
from leaveout.training.examples import IGNORED, as_row
from leaveout.training.formulas import plain_formulas, slow_path
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Batch, Bound, Parameters, Task, task_of, token_losses

TOGETHER = 8
"""Queries that share one forward pass."""


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of the whole answer: the product over its positions."""
    return torch.exp(_log_likelihood(logits, targets).sum())


def logit(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean logit of the targets."""
    return logits.gather(1, targets.unsqueeze(1)).mean()


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over positions of log p - log(1 - p) of the target, the margin of arXiv 2303.14186."""
    chosen = F.one_hot(targets, logits.shape[-1]).bool()
    others = torch.log_softmax(logits.masked_fill(chosen, float("-inf")), -1)
    another = ((targets + 1) % logits.shape[-1]).unsqueeze(1)
    # The log-sum-exp of the other classes, by one of them: z - log softmax(z).
    total = logits.gather(1, another) - others.gather(1, another)
    return (logits.gather(1, targets.unsqueeze(1)) - total).mean()


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"probability": probability, "logit": logit, "margin": margin}


@dataclass(frozen=True)
class Query:
    """One number asked of a trained model.

    row      in the form of the recipe's examples: a text, a dictionary or Row, or (features, label); a `Contrast` or
             `Behaviour` of several texts or rows, whose measures are summed by their weights; or, instead, a function of the
             model that gives a scalar
    measure  "loss" (mean over the learned tokens, nats), "probability" of the answer, "logit" or "margin" of its tokens
             (means), or a function of logits [positions, classes] and targets [positions] that gives a scalar
    name     what it is called in tables and files of scores; default: the row's own `id` if it has one, else what it says
    version  stands for what of a function cannot be hashed: change it whenever that changes
    source   where it was read, for messages
    """

    row: Any
    measure: str | Callable[[Tensor, Tensor], Tensor] = "loss"
    name: str = ""
    version: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.measure, str) and self.measure not in ("loss", *MEASURES):
            known = ["loss", *MEASURES]
            raise ValueError(f"there is no measure {self.measure!r}: {choices(self.measure, known, 'a function')}")
        if isinstance(self.row, Behaviour) and self.row.measure is not None:
            object.__setattr__(self, "measure", _measure_of(self.row.measure, self.measure))
        if not self.name:
            object.__setattr__(self, "name", _name(self.row))

    @property
    def called(self) -> str:
        """The measure by name; a function by its own."""
        return self.measure if isinstance(self.measure, str) else getattr(self.measure, "__name__", "measure")

    @property
    def digest(self) -> str:
        """Names the content: equal digests mean equal questions."""
        row = self.row
        if isinstance(row, Behaviour):
            row = ["behaviour", *((weight, as_row(text).content_hash) for weight, text in row.terms)]
        elif isinstance(row, (str, dict, Row)):
            row = as_row(row).content_hash
        elif isinstance(row, tuple):
            row = [torch.as_tensor(part) for part in row]
        return digest_of([row, self.measure], f"The query {self.name!r}", self.version)


def _measure_of(behaviour: Any, query: Any) -> Any:
    """The measure of a behaviour's texts. Raises: UnsupportedError for a probe; ValueError where the query has another."""
    if isinstance(behaviour, Probe):
        raise UnsupportedError(
            "A probe is asked of an index, whose rows have gradients: ask a run a function of the logits, or of the model."
        )
    if query not in ("loss", behaviour):
        raise ValueError("The query has a measure, and its behaviour another: give one of them.")
    return behaviour


def _name(row: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, Behaviour):
        return called([row], [_name(text) for text in row.rows])[0]
    if isinstance(row, (dict, Row)):
        row = as_row(row)
        return in_words(row) if row.id == row.content_hash[:16] else row.id
    if isinstance(row, tuple) and len(row) == 2:
        return f"{digest_of(torch.as_tensor(row[0]), 'The query')[:8]} as {row[1]}"
    return getattr(row, "__name__", type(row).__name__)


def as_queries(given: Any) -> list[Query]:
    """Queries from a query, a row, the rows (with a `measure`, perhaps) of a path or a Corpus, or a sequence of them.

    A string is a text, unless it ends in .jsonl: then it is a path.
    Raises: FormatError if there are none.
    """
    if isinstance(given, (Path, Corpus)) or (isinstance(given, str) and given.endswith(".jsonl")):
        given = [Query(row, str(row.meta.get("measure", "loss"))) for row in Corpus.open(given)]
    elif isinstance(given, (str, Query, dict, Row, Behaviour)) or callable(given):
        given = [given]
    if not isinstance(given, Iterable):
        raise TypeError(
            f"queries is {given!r}: give texts, rows or functions of the model, or the path of a file of rows."
        )
    out = [q if isinstance(q, Query) else Query(q) for q in given]
    if not out:
        raise FormatError("There is no query: give at least one.")
    return out


def in_sides(queries: Sequence[Query]) -> list[Query]:
    """The queries, of a behaviour one for each of its texts."""
    return [replace(q, row=text) for q in queries for text in texts_of([q.row])]


Asking = Callable[[Batch, Callable[[nn.Module], Any]], AbstractContextManager[None]]
"""What is around a forward pass of a batch, which a model is given by a function."""


def query_function(task: Task, queries: Sequence[Query], asking: Asking | None = None) -> Callable[[nn.Module], Tensor]:
    """The function model -> values [queries] of a task's model; rows are encoded once.

    asking: what is around the passes of rows (`Below.asking`); functions of the model do as they do
    """
    groups: list[tuple[list[Query], Any]] = []
    for q in in_sides(queries):
        if callable(q.row):
            groups.append(([q], None))
        elif groups and groups[-1][1] is not None and len(groups[-1][0]) < TOGETHER:
            groups[-1][0].append(q)
        else:
            groups.append(([q], ()))
    encoded = [(group, None if kind is None else _encoded(task, group)) for group, kind in groups]

    def values(model: nn.Module) -> Tensor:
        found = torch.cat([_values(task, model, group, batch, asking) for group, batch in encoded])
        if not any(isinstance(q.row, Behaviour) for q in queries):
            return found
        return torch.stack(summed([q.row for q in queries], (found[i] for i in range(len(found)))))

    return values


def _encoded(task: Task, group: Sequence[Query]) -> Any:
    """The rows of queries as a batch. Raises: FormatError with the place of the row, where that is known."""
    try:
        return task.encode_queries([q.row for q in group])
    except FormatError as error:
        if len(group) > 1:
            for q in group:
                _encoded(task, [q])
        text = str(error).removeprefix("A query: ")
        raise FormatError(f"{group[0].source}: {text}" if group[0].source else str(error)) from None


def _values(task: Task, model: nn.Module, group: Sequence[Query], batch: Any, asking: Asking | None = None) -> Tensor:
    if batch is None:
        return torch.stack([q.row(model).reshape(()) for q in group])
    if task.outputs is None:
        if any(q.measure != "loss" for q in group):
            raise UnsupportedError("A custom recipe has no logits: ask for the loss, or give a function of the model.")
        return task.loss(model, batch)
    outputs = task.outputs
    with nullcontext() if asking is None else asking(batch, lambda m: outputs(m, batch)):
        logits, targets = outputs(model, batch)
    # Each query's own mean, also where the recipe's loss is a mean over the tokens of a batch.
    losses = token_losses(logits, targets) if any(q.measure == "loss" for q in group) else None
    if losses is not None and all(q.measure == "loss" for q in group):
        return losses
    return torch.stack([_value(q, i, logits, targets, losses) for i, q in enumerate(group)])


def _value(query: Query, i: int, logits: Tensor, targets: Tensor, losses: Tensor | None) -> Tensor:
    if query.measure == "loss":
        assert losses is not None
        return losses[i]
    learned = (targets[i] != IGNORED).nonzero().squeeze(1)
    measure = MEASURES[query.measure] if isinstance(query.measure, str) else query.measure
    return measure(logits[i].index_select(0, learned), targets[i].index_select(0, learned)).reshape(())


# --- values under what a run trained: one model, a stack of retrained ones, or the jets that were kept ------------------


Queries = Sequence[Any] | Callable[[nn.Module], Tensor]
"""Rows in the form of the recipe's examples, or a function of the trained model that gives a vector; for reverse mode also
`Query`s."""


def query_losses(
    recipe: Recipe, params: Parameters, queries: Queries, device: str | torch.device = "cpu", task: Task | None = None
) -> Tensor:
    """Losses of queries under trained parameters [*shape] or [runs, *shape]: [queries] or [runs, queries], nats.

    A function of the model is called with it on the device; parameters and losses are on the CPU. task: the recipe's, if
    it is made already.
    """
    task = task or task_of(recipe, device)
    own = task.parameters()
    stacked = all(params[name].dim() == p.dim() + 1 for name, p in own.items())
    runs = params if stacked else {name: p.unsqueeze(0) for name, p in params.items()}
    with torch.no_grad(), full_precision(), slow_path():
        out = _values_of_runs(Bound(task, _function(task, queries, 1)), runs, task.device).cpu()
    return out if stacked else out[0]


def _function(task: Task, queries: Queries, together: int) -> Callable[[nn.Module], Tensor]:
    """The function model -> values [queries]; of rows their losses, so many in a batch."""
    if callable(queries):
        return queries
    batches = [task.encode_queries(queries[i : i + together]) for i in range(0, len(queries), together)]
    return lambda model: torch.cat([task.loss(model, batch) for batch in batches])


def _values_of_runs(asked: Bound, runs: Parameters, device: torch.device) -> Tensor:
    """Values [runs, queries]; one run after the other where a batch of the first ones gives other numbers, or none."""
    out, batched = [], None
    for chunk in _chunks_of_runs(runs):
        part = {name: p.to(device) for name, p in chunk.items()}
        if batched is None:
            values, batched = checked_of_runs(asked.under, part)
        else:
            values = (of_runs if batched else one_by_one)(asked.under, part)
        out.append(values)
    return torch.cat(out)


def _chunks_of_runs(runs: Parameters, size: int = 64) -> Iterator[Parameters]:
    return ({name: p[i : i + size] for name, p in runs.items()} for i in range(0, run_count(runs), size))


def jet_values(
    recipe: Recipe,
    constants: Parameters,
    coefficients: Parameters,
    queries: Queries,
    device: str | torch.device = "cpu",
) -> Series:
    """Series of queries [queries] from what a jet run kept: its `constants` and `coefficients`. The device: `query_losses`."""
    task = task_of(recipe, device)
    first, at = next(iter(coefficients.values())), task.device
    space = Space(first.shape[0], first.shape[1], first.dtype)
    replaced = install(task.model, {n: space.jet(constants[n].to(at), h.to(at)) for n, h in coefficients.items()})
    try:
        with full_precision(), plain_formulas(at):
            return query_series(task, space, queries).map(Tensor.cpu)
    finally:
        restore(task.model, replaced)


def query_series(task: Task, space: Space, queries: Queries) -> Series:
    """Series of queries [queries] under the jets that the task's model holds."""
    with torch.no_grad():
        values = _function(task, queries, TOGETHER)(task.model)
    return values.series if isinstance(values, Jet) else space.constant(values).series
