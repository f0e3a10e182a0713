"""The run that people would do without some rows: the rows gone, the batches packed anew from the rest, another order.

The start of a run stays: a new run differs from another in the order of its batches and in its dropout masks alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leaveout.errors import UnsupportedError
from leaveout.training.recipe import Recipe

SAME_RUN = "ask for the same run (`--meaning same-run`)"
TOO_FEW = f"Without this set there are too few rows for one batch: leave out less, or {SAME_RUN}."


def new_run(recipe: Recipe, x: np.ndarray, seed: int) -> Recipe:
    """The recipe of a new run without what a deletion vector x [units] removes whole, its batches named one by one.

    Rows of which a part is removed stay in their batches; whoever trains gives them the weight 1 - x, as in the same run.
    A shuffled order is drawn anew each epoch, a given one is drawn once and kept over the epochs; recorded batches are
    packed by the sizes and the epochs that they have. Rates that were given step by step are read at the same part of the run.
    Raises: UnsupportedError for what cannot be packed anew, or where nothing is left to make a batch of.
    """
    if not isinstance(recipe.loss_per, str):
        raise UnsupportedError(
            f"`loss_per` has a number for each step, which says nothing of other batches: give a rule, or {SAME_RUN}."
        )
    packing = _packing_of(recipe)
    gone = np.asarray(x)[recipe.unit_of.numpy()] == 1
    order = packing.drawn([i for i in packing.rows if not gone[i]], random.Random(f"new run {seed}"))
    if not order:
        raise UnsupportedError(TOO_FEW)
    changes: dict[str, Any] = {"order": order, "steps": None, "dropout": None if recipe.dropout is None else seed}
    if not isinstance(recipe.schedule, str):
        before, parts = (np.arange(n) / n for n in (len(recipe.schedule), len(order)))
        changes["schedule"] = tuple(np.interp(parts, before, recipe.schedule).tolist())
    made = recipe.with_(**changes)
    for name in ("_tried", "_references"):  # what the same examples and the same start were found to be
        if hasattr(recipe, name):
            object.__setattr__(made, name, getattr(recipe, name))
    return made


def weights_left(recipe: Recipe, x: np.ndarray) -> np.ndarray:
    """What each row that is left weighs in a new run without x [sets, units], over what it weighs in the same run [sets].

    A batch shares one weight out over its rows: in a new run the rows that are left share out those of all its batches. In
    the same run the batches are those with all data, and what is removed takes its part of them. To Adam both are the same:
    its steps are as long for any scale of the gradients.
    Raises: UnsupportedError as `new_run` does.
    """
    packing, left = _left(recipe, x)
    before = packing.steps_of(len(packing.rows)) / len(packing.rows)
    steps = {n: packing.steps_of(n) for n in set(left)}
    if not all(steps.values()):
        raise UnsupportedError(TOO_FEW)
    if recipe.optimizer.name != "sgd":
        return np.ones(len(x))
    return np.array([steps[n] / n / before for n in left])


def steps_lost(recipe: Recipe, x: np.ndarray) -> np.ndarray:
    """The part of all steps that a new run without x [sets, units] does not take, as it has fewer rows [sets].

    0 for SGD, whose steps are as long as what rows weigh in them (`weights_left`). Others take steps of a length of their own.
    Raises: UnsupportedError as `new_run` does.
    """
    if recipe.optimizer.name == "sgd":
        return np.zeros(len(x))
    packing, left = _left(recipe, x)
    return np.array([1 - packing.steps_of(n) / packing.steps_of(len(packing.rows)) for n in left])


def _left(recipe: Recipe, x: np.ndarray) -> tuple[_Packing, list[int]]:
    """How epochs are packed, and how many rows are left without x [sets, units]."""
    packing, sizes = _packing_of(recipe), np.zeros(len(recipe.unit_names))
    np.add.at(sizes, recipe.unit_of.numpy()[list(packing.rows)], 1)
    return packing, (len(packing.rows) - (x == 1) @ sizes).round().astype(int).tolist()


@dataclass(frozen=True)
class _Packing:
    """How epochs are packed.

    rows    that take part; anew: whether each epoch has an order of its own; steps: of all epochs, None: all that they have
    size    of a micro-batch; parts: micro-batches of a step, None: batches have none of their own
    """

    rows: Sequence[int]
    size: int
    parts: int | None
    drop_last: bool
    anew: bool
    epochs: int
    steps: int | None

    def steps_of(self, rows: int) -> int:
        """How many steps a run on so many rows has; 0 where an epoch has none."""
        micro = rows // self.size if self.drop_last else -(-rows // self.size)
        steps = -(-micro // (self.parts or 1))
        return steps * self.epochs if self.steps is None or not steps else self.steps

    def drawn(self, rows: list[int], chance: random.Random) -> tuple[Any, ...]:
        """The batches of a run on these rows; none where an epoch has none."""
        out: list[Any] = []
        epochs = 0
        while epochs < self.epochs if self.steps is None else len(out) < self.steps:
            if self.anew or not epochs:
                chance.shuffle(rows)
            micro = [tuple(rows[i : i + self.size]) for i in range(0, len(rows), self.size)]
            if self.drop_last and micro and len(micro[-1]) < self.size:
                micro.pop()
            if not micro:
                return ()
            many = self.parts
            out += micro if many is None else [tuple(micro[i : i + many]) for i in range(0, len(micro), many)]
            epochs += 1
        return tuple(out[: self.steps])


def _packing_of(recipe: Recipe) -> _Packing:
    if isinstance(recipe.order, str):
        rows = range(len(recipe.examples))
        shuffled = recipe.order == "shuffled"
        return _Packing(rows, recipe.batch_size, None, recipe.drop_last, shuffled, recipe.epochs, recipe.steps)
    epochs = _epochs(recipe)
    rows = sorted({i for batch in recipe.batches() for i in batch})
    first = [batch for step in epochs[0] for part in step for batch in part]
    whole = all(len(epoch) == len(epochs[0]) for epoch in epochs)
    nested = any(isinstance(step[0], tuple) for step in recipe.order)
    steps = [step for epoch in epochs for step in epoch]
    packing = _Packing(
        rows, max(len(part) for step in steps for part in step), max(map(len, steps)) if nested else None,
        len(first) < len(rows), len({str(epoch) for epoch in epochs}) == len(epochs), len(epochs),
        None if whole else len(steps),
    )  # fmt: skip
    taken = [[i for step in epoch for part in step for i in part] for epoch in epochs]
    once = all(len(set(own)) == len(own) <= len(first) for own in taken) and len(rows) - len(first) < packing.size
    again = [_nested(step) for step in packing.drawn(list(rows), random.Random(0))]
    same = [[len(part) for part in step] for step in again] == [[len(part) for part in step] for step in steps]
    if not (once and same and all(len(own) == len(first) for own in taken[:-1])):
        raise UnsupportedError(
            "The recorded batches are no epochs of equal batches with each row once, so that they cannot be packed anew: "
            f"{SAME_RUN}."
        )
    return packing


def _epochs(recipe: Recipe) -> list[list[tuple[tuple[int, ...], ...]]]:
    """The steps of each epoch of given batches, as micro-batches; an epoch ends before the first row that comes again."""
    epochs: list[list[tuple[tuple[int, ...], ...]]] = []
    seen: set[int] = set()
    for step in map(_nested, recipe.order):
        numbers = [i for part in step for i in part]
        if not epochs or seen & set(numbers):
            epochs.append([])
            seen = set()
        epochs[-1].append(step)
        seen |= set(numbers)
    return epochs


def _nested(step: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return step if isinstance(step[0], tuple) else (step,)
