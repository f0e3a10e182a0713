"""What scores are held against: models retrained without known sets of units, answers to queries, and known rows.

All retraining goes through `TrainingRun.retrain`: stored with the role "truth" (no estimator is fitted to it), resumed after a
kill, and shared by all methods that are judged. A second run with another seed tells how much of the truth is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leaveout.corpus import Behaviour
from leaveout.deletion import directions
from leaveout.deletion.bank import measurement_ids
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.errors import FormatError, MismatchError, UnsupportedError, require_whole
from leaveout.methods.scores import numbers_of, read_objects
from leaveout.metrics import NoiseCeiling, noise_ceiling
from leaveout.training.queries import Query
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import task_of


@dataclass(frozen=True)
class EvaluationSettings:
    """What truth is bought. Costs are retrainings; those that the bank has already cost nothing.

    subsets, removed   random sets of which a share is removed (the datamodels' 1 - alpha): `subsets` retrainings; 0: no LDS
    second_order       the same again with the next seed: twice the retrainings, half the noise, and a ceiling
    removal_queries    queries of the QLD, spread evenly over all: so many retrainings a method; 0: no QLD
    removal_share      share of all units that the QLD removes for a query; draws: random removals it compares with
    brittleness        queries whose answer should change, spread evenly over those that the model answers; 0: none
    brittleness_shares shares of all units that are removed for each of them: as many retrainings a query and method
    tail_patch         one training step on each of the `top` best units of a query: no retraining, see `tail_patch`
    top                k of the tail-patch and of the retrieval metrics, at most half of the units; None: 10, or that half
    seed, level        of random sets and of intervals
    """

    subsets: int = 100
    removed: float = 0.5
    second_order: bool = True
    removal_queries: int = 10
    removal_share: float = 0.05
    draws: int = 8
    brittleness: int = 0
    brittleness_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    tail_patch: bool = False
    top: int | None = None
    seed: int = 0
    level: float = 0.95
    measure: MeasureSettings = field(default_factory=MeasureSettings)

    def top_of(self, units: int) -> int:
        """k for a run with so many units. Raises: ValueError if `top` is more than half of them."""
        most = units // 2
        if most < 1:
            raise ValueError(f"the run has {units} unit: the best and the worst can be told apart from two on")
        if self.top is not None and not 1 <= self.top <= most:
            raise ValueError(f"top is {self.top}: give 1 to {most}, half the number of units")
        return min(10, most) if self.top is None else self.top

    def __post_init__(self) -> None:
        for name in ("subsets", "removal_queries", "draws", "brittleness", "seed"):
            require_whole(name, getattr(self, name), 0)
        for name in ("removed", "removal_share", "level"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number between 0 and 1.")
        if not self.brittleness_shares or not all(0 < share < 1 for share in self.brittleness_shares):
            raise ValueError(f"wanted shares between 0 and 1 to remove, got {list(self.brittleness_shares)}")


@dataclass(frozen=True)
class Truth:
    """Retrainings on random subsets.

    removed  [subset, unit] true where the subset lacks the unit
    values   query values [query, subset] in nats: the mean of both orders if there are two
    ceiling  what a perfect prediction would reach, None without a second order
    orders   the values of each of the two orders; empty without a second one
    """

    removed: np.ndarray
    values: np.ndarray
    ceiling: NoiseCeiling | None = None
    orders: tuple[np.ndarray, ...] = ()


def subset_truth(
    run: TrainingRun,
    queries: Sequence[Query],
    n: int,
    removed: float = 0.5,
    *,
    second: TrainingRun | None = None,
    seed: int = 0,
    settings: MeasureSettings | None = None,
) -> Truth:
    """Query values after retraining without n random shares `removed` of all units; with `second`, the mean of both runs.

    Cost: n retrainings of each run. Those that were made before are read.
    Raises: UnsupportedError if the second run gives the same numbers, which says nothing about noise.
    """
    refuse_subsets(n, removed)
    x = directions.subsets(0, n, len(run.recipe.unit_names), seed, removed)
    values = values_without(run, queries, x, settings)
    if second is None:
        return Truth(x > 0, values)
    other = values_without(second, queries, x, settings)
    if np.array_equal(values, other):
        raise UnsupportedError(SAME_MODEL)
    return Truth(x > 0, (values + other) / 2, noise_ceiling(values, other, seed), (values, other))


def refuse_subsets(n: int, removed: float) -> None:
    """Raises: ValueError for subsets that no rank correlation can be taken over."""
    if n < 2:
        raise ValueError(f"a rank correlation over {n} subset(s) is undefined: ask for at least 2, better 50 or more.")
    if not 0 < removed < 1:
        raise ValueError(f"the share removed is {removed}: give a number between 0 and 1.")


SAME_MODEL = (
    "Another seed trains the same model here, so that no noise can be measured: use `order: shuffled`, or judge without a "
    "ceiling (`second_order=False`, `--no-ceiling`)."
)


def refuse_second_order(run: TrainingRun) -> None:
    """Compares what the recipe would train on with the next seed: its dropout, the order of its batches and where it starts.

    Raises: UnsupportedError if both are the same.
    """
    other = _reseeded(run)
    if run.recipe.dropout is not None or run.recipe.batches() != other.batches():
        return
    starts = [dict(task_of(recipe).model.named_parameters()) for recipe in (run.recipe, other)]
    if all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0]):
        raise UnsupportedError(SAME_MODEL)


def _reseeded(run: TrainingRun) -> Recipe:
    masks = None if run.recipe.dropout is None else run.recipe.dropout + 1
    return replace(run.recipe, seed=run.recipe.seed + 1, dropout=masks)


def second_order(run: TrainingRun, progress: bool = False) -> TrainingRun:
    """The same recipe with the next seed, which shuffles the data and drops anew, trained in the directory `second` of it."""
    return TrainingRun.train(_reseeded(run), run.path / "second", progress=progress, device=run.device)


def values_without(
    run: TrainingRun, queries: Sequence[Query], x: np.ndarray, settings: MeasureSettings | None = None
) -> np.ndarray:
    """Values [query, set] after retraining with deletion vectors x [set, unit]; equal vectors are trained once."""
    sets = DeletionSets(np.asarray(x, np.float64), tuple(f"set {i}" for i in range(len(x))))
    return run.retrain(queries, sets, settings)


def single_effects(run: TrainingRun, queries: Sequence[Query]) -> np.ndarray | None:
    """What leaving each unit out alone did to each query [query, unit], if the bank holds all these retrainings.

    Units: nats. Nothing is retrained here.
    """
    alone = np.eye(len(run.recipe.unit_names))
    if not run.bank.missing(measurement_ids("retraining", alone, queries, "truth")):
        return run.bank.truth(queries, alone) - run.bank.base(queries)[:, None]
    try:
        found = run.bank.measurements(queries).retrainings
    except MismatchError:  # nothing was measured for these queries
        return None
    if not len(found):
        return None
    single = np.flatnonzero((found.x == 1).sum(1) * (found.x != 0).sum(1) == 1)
    effects = {int(found.x[row].argmax()): found.y[row] for row in single}
    return None if len(effects) < len(alone) else np.stack([effects[unit] for unit in range(len(alone))], 1)


# --- answers: how likely the model gives what is learned of a query's row, its response or a classifier's label ---------


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of the whole answer in nats: minus the log of its probability."""
    return F.cross_entropy(logits, targets, reduction="sum")


def answer_lead(logits: Tensor, targets: Tensor) -> Tensor:
    """The smallest lead of a target's logit over the best other one.

    Above 0 exactly where greedy decoding gives the whole answer: as long as it does, it has read the same tokens.
    """
    chosen = F.one_hot(targets, logits.shape[-1]).bool()
    others = logits.masked_fill(chosen, float("-inf")).amax(-1)
    return (logits.gather(1, targets.unsqueeze(1)).squeeze(1) - others).min()


def of_answers(recipe: Recipe, queries: Sequence[Query], measure: Callable[[Tensor, Tensor], Tensor]) -> list[Query]:
    """The queries with another measure, whatever they asked before.

    Raises: UnsupportedError where a query has no answer.
    """
    for query in queries:
        if recipe.kind == "custom" or callable(query.row) or isinstance(query.row, Behaviour):
            raise UnsupportedError(
                f"The query {query.name!r} has no single answer with logits: leave tail-patch and brittleness out, or ask rows "
                "of a recipe that is not custom."
            )
    return [replace(query, measure=measure) for query in queries]


# --- rows that are known to be relevant ---------------------------------------------------------------------------


def load_relevant(path: str | Path, query_ids: Sequence[str], train_ids: Sequence[str]) -> np.ndarray:
    """Which rows are relevant, bool [query, train], from JSONL with one pair a line: {"query": ..., "id": ...}.

    Raises: FormatError for another form or a file without pairs; MismatchError for a query or row that is not there;
            ValueError if an id is asked for twice.
    """
    path = Path(path)
    places = numbers_of("query", query_ids), numbers_of("train", train_ids)
    relevant = np.zeros((len(query_ids), len(train_ids)), bool)
    for line, names in read_objects(path, ("query", "id")):
        for known, name in zip(places, names, strict=True):
            if str(name) not in known:
                raise MismatchError(
                    f"{path}, line {line}: {str(name)!r} is not there: name queries and rows as in this evaluation."
                )
        relevant[tuple(known[str(name)] for known, name in zip(places, names, strict=True))] = True
    if not relevant.any():
        raise FormatError(f"{path} has no pair: give a line for each relevant row of a query.")
    return relevant
