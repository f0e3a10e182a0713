"""A training run on disk: trained once, then measured, predicted from, and retrained.

A directory holds `examples` (a store with the ids, texts, units and fields of the training examples, and the trained
parameters), `bank` (the measurements) and `work` (checkpoints of what is under way).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leaveout.corpus import Row
from leaveout.corpus.rows import row_json
from leaveout.deletion import directions
from leaveout.deletion.bank import IN_ORDER, REPEAT, Bank, Measured, measurement_ids
from leaveout.deletion.directions import DESIGNS, FEW, SIMILAR, different, halved, real_orthogonal
from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.heldout import HeldOut, kinds_of, sources_of
from leaveout.deletion.measurements import JETS_TOGETHER, RUNS_TOGETHER, MeasureSettings, task_size
from leaveout.deletion.newton import Newton, cheaper
from leaveout.deletion.noise import LEAST_REPEATS
from leaveout.deletion.plan import FIRST, RUNS_A_REPEAT, Budget, Plan, make_plan, sizes_of
from leaveout.deletion.posterior import Posterior, default_kernel, telling
from leaveout.deletion.predict import NEW_RUN, SAME_RUN, Curve, Prediction, Verification, meaning_of
from leaveout.deletion.progress import progress
from leaveout.deletion.sets import DeletionSets, Without, deletion_sets
from leaveout.deletion.strong import STRONG, mended
from leaveout.errors import FormatError, MismatchError, StabilityError, UnsupportedError, choices, require_whole
from leaveout.executor import run_tasks
from leaveout.models import find_device
from leaveout.store import Record, Store
from leaveout.store.catalogue import CATALOGUE
from leaveout.training.batching import batching_problem
from leaveout.training.doctor import check_stability
from leaveout.training.loop import RunOptions
from leaveout.training.memory import runs_together
from leaveout.training.notes import cut_notes, notes_on
from leaveout.training.queries import Query, as_queries, query_function, query_losses
from leaveout.training.recipe import Recipe, libraries, other_library
from leaveout.training.repacking import new_run, steps_lost, weights_left
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import Parameters, task_of
from leaveout.training.train import JetSettings, Retrainer, train_jets, train_plain

PYTHON = ".".join(platform.python_version_tuple()[:2])
"""Whose bytecode the functions of a recipe are hashed by."""
Part = tuple[np.ndarray, str, str]
"""Deletion vectors [sets, units] to retrain, their design and their role."""
OWN = ("examples", "bank", "work")
"""What the directory of a run holds."""
LARGEST = 4
"""One of so many new runs of held-out sets is of the largest ones."""
ALONE = 8
"""New runs of one task: each goes by itself, and a kill loses no more than one of them, as finished ones have checkpoints."""
WIDTH = 8192
"""Numbers kept of each unit's update vector."""
NO_NOISE = (
    "How far runs are from each other was not measured for these queries: `leaveout measure RUN --repeats 4`, or ask for the "
    "same run (`--meaning same-run`)."
)
FIRST_ORDER_ERROR = 0.25
"""What an exact first order gets wrong of effects, about, where the run does not tell it: the largest of three kinds of runs
(benchmarks/LOG.md)."""
ROUNDING = 1e-6
"""Part of a query's value that float32 training does not fix."""


class TrainingRun:
    """A recipe, the model it trains, and the bank of its measurements.

    device  where all of it is computed; what is stored is the same for all of them, up to rounding
    """

    def __init__(self, recipe: Recipe, path: Path, parameters: Parameters, device: str | torch.device = "cpu") -> None:
        self.recipe, self.path, self.parameters, self.device = recipe, path, parameters, device
        self.bank = Bank(recipe, path / "bank", parameters, device)
        self.said: list[str] = []  # what was said of measurements since this run was opened

    def __repr__(self) -> str:
        kind, examples, units = self.recipe.kind, len(self.recipe.examples), len(self.recipe.unit_names)
        return f"TrainingRun({str(self.path)!r}: {kind}, {examples} examples, {units} units)"

    @classmethod
    def train(
        cls,
        recipe: Recipe | str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        progress: bool = False,
        device: str | torch.device = "cpu",
    ) -> TrainingRun:
        """Trains a recipe (or the YAML file of one) into a directory; what was trained there is opened.

        A killed training goes on from its last checkpoint, on whatever device.
        device: cpu, cuda, cuda:1, ..., or auto, of this and of all that is asked of the run; no part of the recipe
        Example: run = TrainingRun.train(Recipe.microgpt(["anna", "bob", "eve"]), "run")
        Raises: FileExistsError if the directory holds something else; MismatchError if it belongs to another recipe.
        """
        find_device(device)  # refused before any work
        source = None if isinstance(recipe, Recipe) else Path(recipe)
        made, path = _recipe_of(recipe), Path(path)
        if (path / "examples").exists():
            if Store.open(path / "examples").state("trained"):
                return cls.open(path, made, device=device)
            shutil.rmtree(path / "examples")  # killed between training and its record
        elif path.exists() and (not path.is_dir() or any(other.name not in OWN for other in path.iterdir())):
            raise FileExistsError(f"{path} holds something else than a training run: give an empty or a new directory.")
        path.mkdir(parents=True, exist_ok=True)
        task = task_of(made)
        for note in (notes := [*notes_on(made, task), *cut_notes(made, task)]):
            print(f"note: {note}", file=sys.stderr)
        del task
        options = RunOptions(directory=path / "work", progress=progress, device=device)
        parameters = train_plain(made, options=options)
        for name, p in parameters.items():
            if not p.isfinite().all():
                raise FormatError(f"Training gave values of {name} that are not finite: lower the learning rate.")
        _save_trained(path, made, source, parameters, notes)
        shutil.rmtree(path / "work", ignore_errors=True)
        return cls(made, path, parameters, device)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        recipe: Recipe | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> TrainingRun:
        """Opens a finished run.

        recipe  what it was trained from, for one that was made in Python; else its YAML file
        device  where it is measured and asked, wherever it was trained: cpu, cuda, cuda:1, ..., or auto
        Raises: FormatError if it is no run; MismatchError if the recipe or its data changed since; ValueError for a device
                that is not here.
        """
        find_device(device)
        path = Path(path)
        if not (path / "examples").exists():
            if (path / CATALOGUE).exists():
                raise FormatError(f"{path} is an index, not a training run: ask it with `leaveout search`.")
            raise FormatError(f"{path} is not a training run: make one with `leaveout train RECIPE --out {path}`.")
        store = Store.open(path / "examples")
        if not store.state("trained"):
            raise FormatError(f"The training of {path} was killed: train the same recipe again, which goes on.")
        made = _recipe_of(_source(store, path) if recipe is None else recipe)
        return cls(made, path, _saved_parameters(store, made, path), device)

    @property
    def notes(self) -> list[str]:
        """What was off or frozen in training, what was cut, and what was never trained on, in sentences."""
        return list(Store.open(self.path / "examples").state("notes") or [])

    def ids_where(self, where: str) -> list[str]:
        """Ids of the examples that satisfy an SQL condition over id, unit, text and fields.

        Raises: FormatError where none does.
        """
        store = Store.open(self.path / "examples")
        numbers = store.numbers_where(where)
        if not len(numbers):
            raise FormatError(store.unmatched(where, "example"))
        return [record.id for record in store.rows(numbers)]

    # --- measuring -----------------------------------------------------------------------------------------------

    def measure(
        self,
        directions: int = 0,
        degree: int = 1,
        *,
        retrain: int = 0,
        design: str = "auto",
        without: Without | None = None,
        halves: bool = False,
        most: int | None = None,
        heldout: Without | int | None = None,
        gradient: bool = False,
        repeats: int = 0,
        each_order: bool = False,
        queries: Any = None,
        settings: MeasureSettings | None = None,
    ) -> Bank:
        """Adds measurements to the bank; what is there already is not measured again, a killed call can be repeated.

        directions, degree  jet runs along complex uniform directions, or real orthogonal ones (settings.real)
        retrain, design     retrainings by a design (see `directions.DESIGNS`); without: retrain these deletion sets as well
        halves              retrain two random halves of each set of `without` instead of the set: they say of its parts, too
        most                of the sets of `without`, and of two halves of each, retrain the so many that say most about all of
                            those sets (`posterior.telling`)
        heldout             deletion sets, or a number of them of the kinds that may be asked about (see `deletion.heldout`),
                            retrained to calibrate standard deviations
        gradient            the exact first order of the queries (which then must be given)
        repeats             new runs with all data, each in an order of its own, from which the noise of a run is known; and
                            twice as many of the held-out sets, one each, which say how far the same run is from a new one;
                            with gradient, the exact first order of each of the runs with all data, too
        each_order          retrain the sets of `without` in the order of each new run with all data, too, where what is left
                            weighs what it would in a new run without the set: the mean effect over orders is measured
        queries             ask only these, and keep their values instead of trained parameters
        Example: run.measure(retrain=50, heldout=16, gradient=True, queries=["thames"])
        """
        settings = settings or MeasureSettings()
        self._refuse(directions, degree, retrain, design, heldout, gradient and queries is None, settings)
        self._refuse_other_libraries()
        require_whole("repeats", repeats, 0)
        if 0 < repeats < LEAST_REPEATS:
            raise ValueError(f"repeats is {repeats}: a deviation takes at least {LEAST_REPEATS} runs, 0 measures none")
        if halves and without is None:
            raise ValueError("halves are those of sets that you name: give them with without=")
        if most is not None:
            require_whole("most", most, 1)
            if without is None or halves:
                raise ValueError(
                    "most is of sets that you name and their halves: give it with without=, and no halves="
                )
        if each_order and (without is None or not repeats):
            raise ValueError(
                "each_order is of sets that you name and of new runs: give both (without=, repeats=; --without, --repeats)"
            )
        given = None if without is None else deletion_sets(self.recipe, without)
        held = heldout if heldout is None or isinstance(heldout, int) else deletion_sets(self.recipe, heldout)
        asked = None if queries is None else as_queries(queries)
        if asked is not None:
            self.bank.base(asked)
        if directions and degree > 1 and settings.check:
            self._require_stability(degree)
        if gradient and asked is not None:
            self._measure_gradient(asked, settings, [])
        if directions:
            self._measure_jets(directions, degree, asked, settings)
        parts = [] if given is None else [(given.x, "given", "fit")]
        if given is not None and halves:
            parts = [(halved(given.x, settings.seed), "halves", "fit")]
        if given is not None and most is not None:
            parts = [(self._telling(given.x, most, gradient, settings.seed), "telling", "fit")]
        if retrain:
            parts.append((self.design(design, retrain, settings, gradient), design, "fit"))
            more = "different sets of these sizes; give --sizes, or another --design"
            self._tell_fewer(parts[-1][0], retrain, f"of the design `{design}`", more)
        if isinstance(held, DeletionSets):
            self._tell_fitted(held.x, [x for x, _, _ in parts])
            parts.append((held.x, "given", "heldout"))
        if isinstance(held, int) and held:
            self._hold_out(held, parts, asked, settings)
        else:
            self._retrain(parts, asked, settings)
        if repeats:
            self._measure_noise(repeats, asked, settings)
            nothing = np.zeros(len(self.recipe.unit_names))
            orders = [_order_seed(nothing, settings.seed, k) for k in range(repeats)]
            if gradient and asked is not None:
                self._measure_gradient(asked, settings, orders)
            if each_order and given is not None:
                self._in_orders(given.x, orders, asked, settings)
        return self.bank

    def _measure_noise(self, repeats: int, asked: Sequence[Query] | None, settings: MeasureSettings) -> None:
        """New runs with all data, and of held-out sets: of all kinds, in whose order they stand, and of the largest.

        Without large ones it stays open what steps are worth that a run on fewer rows does not take.
        """
        held = self.bank.vectors_of("heldout")
        wanted = min(len(held), (RUNS_A_REPEAT - 1) * repeats)
        largest = np.argsort(-held.sum(1), kind="stable")[: wanted // LARGEST]
        others = np.setdiff1d(np.arange(len(held)), largest)
        spread = np.linspace(0, len(others) - 1, wanted - len(largest)).round().astype(int)
        chosen = np.unique(np.concatenate([largest, others[spread]]))
        self._new_runs(np.zeros((1, len(self.recipe.unit_names))), REPEAT, repeats, asked, settings)
        self._new_runs(held[chosen], "heldout", 1, asked, settings)

    def _new_runs(
        self, x: np.ndarray, role: str, times: int, asked: Sequence[Query] | None, settings: MeasureSettings
    ) -> None:
        """Trains each deletion vector [sets, units] so many times anew, in orders of their own."""
        rows, ids, metas = np.tile(x, (times, 1)), [], []
        for number in range(times):
            ids += measurement_ids(NEW_RUN, x, asked, role, settings.seed, number)
            metas += [
                {"design": "new order", "role": role, "seed": _order_seed(row, settings.seed, number)} for row in x
            ]
        missing = self.bank.missing(ids)
        for row in np.unique(rows[missing], axis=0):
            new_run(self.recipe, row, 0)  # refused before any work
        size = min(ALONE, -(-len(missing) // settings.workers))
        chunks = [missing[i : i + size] for i in range(0, len(missing), max(size, 1))]
        tasks = [_Task(NEW_RUN, rows[c], [ids[i] for i in c], [metas[i] for i in c]) for c in chunks]
        self._carry_out(tasks, asked, settings, "new runs")

    def _in_orders(
        self, x: np.ndarray, orders: Sequence[int], asked: Sequence[Query] | None, settings: MeasureSettings
    ) -> None:
        """Retrains deletion vectors [sets, units] in each order, at what rows weigh in new runs without them."""
        weights_left(self.recipe, x)  # refused before any work
        absent = float((x == 1)[:, self.recipe.unit_of.numpy()].mean())
        tasks = []
        for order in orders:
            ids = measurement_ids(IN_ORDER, x, asked, order)
            missing = self.bank.missing(ids)
            size = max(1, min(self._together(settings, absent, asked), -(-len(missing) // settings.workers)))
            for rows in (missing[i : i + size] for i in range(0, len(missing), size)):
                metas = [{"design": "given, new order", "seed": order}] * len(rows)
                tasks.append(_Task(IN_ORDER, x[rows], [ids[i] for i in rows], metas, batched=len(rows) > 1))
        self._carry_out(tasks, asked, settings, "retrainings in other orders")

    def _refuse(
        self, directions: int, degree: int, retrain: int, design: str, heldout: Any, unasked: bool, settings: Any
    ) -> None:
        """What can be known of measurements before any work. Raises: TypeError, ValueError, UnsupportedError."""
        if not isinstance(settings, MeasureSettings):
            raise TypeError(f"settings is {settings!r}: give a MeasureSettings.")
        for name, value, least in (("directions", directions, 0), ("retrain", retrain, 0), ("degree", degree, 1)):
            require_whole(name, value, least)
        if isinstance(heldout, (int, float)):
            require_whole("heldout", heldout, 0)
        if unasked:
            raise ValueError("the exact first order is computed for given queries: pass queries=")
        if retrain:
            self._refuse_design(design)
        if directions and settings.real:
            real_orthogonal(directions, directions, len(self.recipe.unit_names))  # refuses more than there are

    def _refuse_other_libraries(self) -> None:
        """Raises: MismatchError for a language model that was trained with other versions than those that are here."""
        known = Store.open(self.path / "examples").state("libraries") or {}
        if found := other_library(known):
            name, other, here = found
            raise MismatchError(
                f"{self.path} was trained with {name} {other}, and here is {here}, which may train another model: install "
                f"{name}=={other}, or train the recipe anew."
            )

    def _tell_fitted(self, held: np.ndarray, fitted: list[np.ndarray]) -> None:
        """Says which of the held-out sets are fitted as well."""
        others = np.concatenate([held[:0], *fitted])
        both = len(different(held)) + len(different(others)) - len(different(np.concatenate([held, others])))
        if both:
            self._tell(
                f"{both} of the held-out sets are fitted as well and say nothing about others: give other sets, or --sizes."
            )

    def _tell_fewer(self, x: np.ndarray, wanted: int, which: str, more: str) -> None:
        """Says that there are fewer different sets than were asked for."""
        made = len(different(x))
        if made < wanted:
            self._tell(
                f"{made} retrainings {which} instead of {wanted}: with {x.shape[1]} units there are no more {more}."
            )

    def _tell(self, note: str) -> None:
        self.said.append(note)
        print(f"leaveout: {note}", file=sys.stderr)

    def _refuse_design(self, name: str) -> None:
        """What can be known of a design before any work. Raises: ValueError, UnsupportedError."""
        if name not in DESIGNS:
            raise ValueError(f"there is no design {name!r}: {choices(name, DESIGNS)}")
        units = len(self.recipe.unit_names)
        if units < 2:
            raise UnsupportedError("A recipe with one unit has nothing to leave out: give its examples more units.")
        if name in ("along", "extremes") and units <= FEW:
            raise ValueError(f"the design `{name}` is for more than {FEW} units: use `auto`")

    def design(self, name: str, n: int, settings: MeasureSettings | None = None, exact: bool = False) -> np.ndarray:
        """The first n deletion vectors [n, units] of a design; fewer where a design ends.

        exact: the exact first order is measured, too, which `auto` then leaves to it
        """
        self._refuse_design(name)
        settings = settings or MeasureSettings()
        units, features = len(self.recipe.unit_names), None
        if name in SIMILAR and units > FEW:
            self.measure_vectors()
            features = self.bank.features()
        return directions.design(name, n, units, settings.seed, settings.sizes, features, exact)

    def measure_vectors(self) -> None:
        """Computes the units' update vectors once: similarity and cheap scores for `posterior`."""
        if self.bank.features() is None:
            began = time.process_time()
            vectors = unit_vectors(self.recipe, WIDTH, RunOptions(device=self.device))
            self.bank.put_vectors(vectors, time.process_time() - began)

    def _hold_out(self, n: int, parts: list[Part], asked: Sequence[Query] | None, settings: MeasureSettings) -> None:
        """Retrains parts and n sets that are held out; those that are chosen by it after what is fitted."""
        units, known = len(self.recipe.unit_names), self._known_of_units()
        sources = sources_of(self.recipe)
        kinds = kinds_of(n, known is not None or asked is not None, len(sources), asked is not None)
        chosen = ("top",) if known is not None else ("top", "block")
        fitted = np.concatenate([np.zeros((0, units)), *(x for x, _, _ in parts)])
        drawer = HeldOut(units, settings.seed + 1000, settings.sizes, fitted, known, sources)
        early, late = ([j for j in range(n) if (kinds[j] in chosen) == later] for later in (False, True))
        found = drawer.draw(kinds, early)
        self._retrain([*parts, *_held_parts(found)], asked, settings)
        if late and asked is not None:
            effects = self._effects_of_units(asked)
            more = drawer.draw(kinds if effects is not None else ["random"] * n, late, effects)
            self._retrain(_held_parts(more), asked, settings)
            found |= more
        x = np.array([row for _, row in found.values()]).reshape(-1, units)
        sizes = (
            "sets of these sizes that are not fitted; give --sizes" if settings.sizes else "sets that are not fitted"
        )
        self._tell_fewer(x, n, "held out", sizes)

    def _telling(self, x: np.ndarray, n: int, exact: bool, seed: int) -> np.ndarray:
        """Of sets x [sets, units] and their halves, the n that say most about x where the first order is known, or is not."""
        return telling(x, n, default_kernel(self.bank.sizes, self._known_of_units(), exact), seed)

    def _known_of_units(self) -> np.ndarray | None:
        """What says which units are alike; None for few units, and where update vectors cannot be had, which is said."""
        if self.bank.features() is None and len(self.recipe.unit_names) > FEW:
            try:
                self.measure_vectors()
            except UnsupportedError as error:
                self._tell(f"No blocks of like units are held out: {error}")
        return self.bank.features()

    def _effects_of_units(self, asked: Sequence[Query]) -> np.ndarray | None:
        """What each unit alone does to each query, by what was fitted so far or by cheap scores [queries, units]."""
        data = self.bank.measurements(asked)
        data = replace(data, heldout=data.heldout.take(slice(0)))
        return Posterior(data).predict(np.eye(data.units))[0] if data.measured else data.scores

    def _measure_gradient(self, asked: Sequence[Query], settings: MeasureSettings, orders: Sequence[int]) -> None:
        """The exact first order in the same run, or in the new runs with all data of these orders."""
        tasks = []
        for order in orders or [None]:
            name, meta = ("gradient", {"design": "exact"}) if order is None else (
                f"gradient in order {order}", {"design": "exact, new order", "seed": order}
            )  # fmt: skip
            ids = [f"{name}:{q.digest}" for q in asked]
            if missing := self.bank.missing(ids):
                chunks = [part.tolist() for part in np.array_split(missing, min(settings.workers, len(missing)))]
                tasks += [_Task("gradient", np.array(c), [ids[i] for i in c], [meta] * len(c)) for c in chunks]
        self._carry_out(tasks, asked, settings, "exact first order")

    def _measure_jets(self, n: int, degree: int, asked: Sequence[Query] | None, settings: MeasureSettings) -> None:
        dtype = settings.dtype or str(self.recipe.real_dtype.to_complex()).removeprefix("torch.")
        draw = directions.real_orthogonal if settings.real else directions.complex_uniform
        meta = {
            "design": "real orthogonal" if settings.real else "complex uniform", "seed": settings.seed,
            "degree": degree, "dtype": dtype, "real": settings.real,
        }  # fmt: skip
        tasks, units = [], len(self.recipe.unit_names)
        size = self._task_size(JETS_TOGETHER, degree * getattr(torch, dtype).itemsize, 16, asked)
        for start in range(0, n, size):
            psi = draw(start, min(n, start + size), units, settings.seed)
            psi = psi.astype(np.complex128)
            ids = measurement_ids("jets", psi, asked, degree, dtype)
            if missing := self.bank.missing(ids):
                metas = [meta] * len(missing)
                tasks.append(_Task("jets", psi[missing], [ids[i] for i in missing], metas, degree, dtype))
        self._carry_out(tasks, asked, settings, f"jets of degree {degree}")

    def _require_stability(self, degree: int) -> None:
        """Refuses a recipe whose power series grow up to this degree; checked once a degree and bank.

        At degree 1 nothing can grow: that its numbers are finite is checked while they are measured.
        """
        if degree == 1:
            return
        key = f"stability/{degree}"
        known = self.bank.store.state(key)
        if known is None or known["verdict"] == "unstable":
            found = check_stability(self.recipe, RunOptions(device=self.device), advise=False, degree=degree)
            self.bank.note(key, {"verdict": found.verdict, "growth": [repr(g) for g in found.growth]})
            found.require()

    def _retrain(self, parts: list[Part], asked: Sequence[Query] | None, settings: MeasureSettings) -> None:
        """Retrains deletion vectors, each part with its design and role; all of them share batches."""
        if not parts:
            return
        x = np.concatenate([p[0] for p in parts])
        metas = [{"design": design, "role": role} for p, design, role in parts for _ in p]
        ids = [id for p, _, role in parts for id in measurement_ids("retraining", p, asked, role)]
        missing = self.bank.missing(ids)
        if not missing:
            return
        absent = float((x[missing] == 1)[:, self.recipe.unit_of.numpy()].mean())
        size = min(self._together(settings, absent, asked), -(-len(missing) // settings.workers))
        chunks = [missing[i : i + size] for i in range(0, len(missing), size)]
        tasks = [
            _Task("retraining", x[rows], [ids[i] for i in rows], [metas[i] for i in rows], batched=size > 1)
            for rows in chunks
        ]
        self._carry_out(tasks, asked, settings, "retrainings")

    def _task_size(self, most: int, number: int, weight: int, asked: Sequence[Query] | None) -> int:
        """How many measurements make a task, of `number` bytes for each parameter or query and `weight` for each unit."""
        numbers = sum(p.numel() for p in self.parameters.values()) if asked is None else len(asked)
        each = numbers * number + len(self.recipe.unit_names) * weight
        return task_size(most, find_device(self.device), each)

    def _together(self, settings: MeasureSettings, absent: float, asked: Sequence[Query] | None) -> int:
        """How many retrainings share a batch; that none can is kept with the bank and said once."""
        memory = None if settings.memory is None else settings.memory // settings.workers
        task, most = task_of(self.recipe, self.device), self._task_size(RUNS_TOGETHER, 8, 8, asked)
        size = runs_together(self.recipe, task, most, memory, absent)
        if size == 1 or (problem := batching_problem(self.recipe, task)) is None:
            return size
        note = f"Retrainings go one by one, as runs of this model cannot be batched ({problem})."
        if self.bank.store.state("one by one") != note:
            self.bank.note("one by one", note)
            self._tell(note)
        return 1

    def _carry_out(
        self, tasks: list[_Task], asked: Sequence[Query] | None, settings: MeasureSettings, label: str
    ) -> None:
        workers = min(settings.workers, max(1, len(tasks)))
        memory = None if settings.memory is None else settings.memory // workers
        alone = settings.progress and workers == 1
        start = functools.partial(_start, self.recipe, asked, memory, self.path / "work", self.device, alone)
        if tasks:
            on_gpus = find_device(self.device).type == "cuda"
            results = run_tasks(tasks, _work, start, workers, settings.backend, on_gpus)
            sizes = {task.name: len(task.ids) for task in tasks}
            with progress(label, self.path / "work", sizes, settings.progress) as told, contextlib.closing(results):
                for measured, ids in results:
                    self.bank.add(measured, ids, None if measured.kind == "gradient" else asked)
                    told.add(len(ids))
        shutil.rmtree(self.path / "work", ignore_errors=True)

    # --- asking --------------------------------------------------------------------------------------------------

    def plan(self, queries: Any, without: Without, budget: Budget | float | str) -> Plan:
        """Which measurements to buy for predicting queries without deletion sets, best first.

        budget: seconds of wall time, a text such as "10min", or a `Budget` with other limits
        Example: run.measure(**run.plan(["thames"], ["rivers"], "10min").best.arguments)
        Cost: two retrainings, which count; for more than FEW units their update vectors (one training and more), which are
              kept; and at most a tenth of the budget. With noise or `Budget(jets=True)`, the probes of jets, too.
        Raises: UnsupportedError if not one choice fits the budget.
        """
        allowed, asked, sets = Budget.of(budget), as_queries(queries), deletion_sets(self.recipe, without)
        began = time.process_time()
        self._refuse_design("auto")
        if len(self.recipe.unit_names) > FEW:
            self.measure_vectors()
        self.measure(retrain=FIRST, queries=asked, settings=MeasureSettings(sizes=sizes_of(sets)))
        known = self.bank.retraining_seconds(), time.process_time() - began
        told = self.bank.first_order_error(sets.x)
        error = None if told is None else float(told.mean())
        return make_plan(self.recipe, self.bank.features(), asked, sets, allowed, known, self.device, error)

    def predict(
        self,
        queries: Any,
        without: Without,
        estimator: str | EstimatorSettings = "posterior",
        *,
        meaning: str | None = None,
    ) -> Prediction:
        """Values of queries under the model trained without deletion sets, with standard deviations.

        queries    texts, rows or functions of the model: see `as_queries`
        without    ids, a list of them, or several such lists: see `deletion_sets`
        estimator  its name, or settings with more (degree, kernel, scores, ...)
        meaning    "same-run" (the same batches with weight 0) or "new-run" (rows gone, batches packed anew, another order);
                   a new run where the noise of runs was measured (`measure(repeats=4)`), else the same run
        Shapes: all arrays [query, set]. Units: that of the query, nats for a loss.
        Example: print(run.predict(["thames", "tyne"], [["rivers"], ["herbs", "dogs"]]))
        """
        settings = EstimatorSettings(estimator) if isinstance(estimator, str) else estimator
        asked, sets = as_queries(queries), deletion_sets(self.recipe, without)
        fitted, calibration = self.bank.fit(asked, settings)
        trained, names = self.bank.trained, self.recipe.unit_names
        removed = sets.x * trained
        noise = self.bank.noise(asked)
        meant = meaning_of(meaning, noise is not None)
        if meant == NEW_RUN and noise is None:
            raise UnsupportedError(NO_NOISE)
        point = removed if meant == SAME_RUN else self.bank.asked_at(removed, settings, asked)
        effect, std = fitted.predict(point)
        strong = self._strong(fitted, removed, settings, asked)
        if strong.any() and isinstance(fitted, Posterior):
            known = self.bank.measurements(asked).retrainings
            steps = functools.partial(self._stepped, asked=asked, required=bool(settings.steps))
            heavier = effect - fitted.predict(removed)[0]  # what rows that are left weigh more in a new run
            effect, std = mended((effect, std), fitted.predict_unbent(point), removed, strong, known, steps)
            effect = effect + strong * heavier
        factor, outside = calibration.factor(removed, effect, std), calibration.outside(removed, effect)
        if not calibration.sets and isinstance(fitted, Posterior) and fitted.exact:
            std = np.hypot(std, self._curved(fitted, removed) * np.abs(effect))
        untrained = [np.flatnonzero(row) for row in (sets.x != 0) & ~trained]
        # New runs in other orders train on what this one left out, of which nothing is known.
        unknown = (sets.x != removed).any(1) & (meant == NEW_RUN and isinstance(self.recipe.order, str))
        never = (sets.x != 0).any(1) & ~(removed != 0).any(1) & ~unknown
        effect, std = np.where(never, 0.0, effect), np.where(never, 0.0, std)
        std = std * factor
        if meant == SAME_RUN or noise is None:
            base, more = self.bank.base(asked), {}
        else:
            shift = self.bank.shift(asked, settings, noise)
            effect, std = shift.shifted(removed, self.bank.at_new_runs(removed, settings), effect, std, strong)
            noise = shift.noise
            effect, std = shift.as_measured(removed, effect, std, self.bank.in_orders(asked, removed))
            effect, std = shift.shortened(steps_lost(self.recipe, sets.x), effect, std)
            std = np.hypot(std, noise.std[:, None] / np.sqrt(noise.runs))  # the error of the mean with all data
            run_std = np.repeat(noise.std[:, None], len(sets), 1)
            base, more = noise.mean, {"run_std": run_std, "freedom": noise.freedom}
        measured = meant == SAME_RUN and all(row is not None for row in self.bank.measured_values(asked, removed))
        base = np.repeat(base[:, None], len(sets), 1)
        std = np.hypot(std, ROUNDING * (1 + np.abs(base)) * (sets.x != 0).any(1))
        std = np.where(unknown, np.inf, std)
        return Prediction(
            tuple(q.name for q in asked), sets.labels, base, effect, std, settings.name, factor,
            untrained=tuple(tuple(names[i] for i in places) for places in untrained), never=tuple(never.tolist()),
            outside=outside & ~never, measures=tuple(q.called for q in asked), chosen=sets.chosen, meaning=meant,
            heldout=None if measured else calibration.sets, **more,
        )  # fmt: skip

    def _curved(self, fitted: Posterior, removed: np.ndarray) -> np.ndarray:
        """What an exact first order that no held-out set has tested gets wrong, over the effect [sets]."""
        told = self.bank.first_order_error(removed)
        return fitted.unknown(removed) * (FIRST_ORDER_ERROR if told is None else told)

    def _strong(
        self, fitted: Any, removed: np.ndarray, settings: EstimatorSettings, asked: Sequence[Query]
    ) -> np.ndarray:
        """Whether Gauss-Newton steps mend a prediction [query, set]: of sets that take most of what helps a query."""
        wanted = cheaper(self.recipe) if settings.steps is None else settings.steps
        if not wanted or not isinstance(fitted, Posterior):
            return np.zeros((len(asked), len(removed)), bool)
        measured = np.array([row is not None for row in self.bank.measured_values(asked, removed)])
        return (fitted.share(removed) >= STRONG) & ~measured

    def _stepped(self, x: np.ndarray, asked: Sequence[Query], required: bool) -> np.ndarray:
        """Effects [queries, sets] by Gauss-Newton steps; NaN where they do not settle and were not asked for, which is told."""
        try:
            return self._newton.effects(x, query_function(task_of(self.recipe, self.device), asked))
        except StabilityError:
            if required:
                raise
            self._tell("Gauss-Newton steps without a set that takes most of what helps do not settle and are left out.")
            return np.full((len(asked), len(x)), np.nan)

    @functools.cached_property
    def _newton(self) -> Newton:
        return Newton(self.recipe, self.parameters, self.device)

    def curve(
        self,
        queries: Any,
        without: Without,
        estimator: str | EstimatorSettings = "posterior",
        points: int = 21,
        *,
        meaning: str | None = None,
    ) -> list[Curve]:
        """Predictions as the share removed grows from 0 to 1, one curve per deletion set."""
        sets = deletion_sets(self.recipe, without)
        shares = np.linspace(0, 1, points)
        out = []
        for x, name in zip(sets.x, sets.labels, strict=True):
            along = DeletionSets(shares[:, None] * x, tuple(f"{100 * s:g} %" for s in shares))
            out.append(Curve(name, shares, self.predict(queries, along, estimator, meaning=meaning)))
        return out

    # --- truth ---------------------------------------------------------------------------------------------------

    def retrain(
        self,
        queries: Any,
        without: Without,
        settings: MeasureSettings | None = None,
        *,
        meaning: str = "same-run",
        runs: int = 1,
    ) -> np.ndarray:
        """Values [query, set] of models really retrained without deletion sets.

        Kept in the bank as truth: neither fitted nor calibrated with, and not computed twice.
        meaning, runs   see `predict`; of new runs the mean over so many orders
        """
        settings, asked = settings or MeasureSettings(), as_queries(queries)
        sets = deletion_sets(self.recipe, without)
        _refuse_runs(meant := meaning_of(meaning, False), runs)
        self._refuse_other_libraries()
        self.bank.base(asked)
        if meant == NEW_RUN:
            self._new_runs(np.unique(sets.x, axis=0), "truth", runs, asked, settings)
            found = self.bank.new_runs(asked, "truth")
            rows = {(row.tobytes(), seed): y for row, seed, y in zip(found.x, found.seeds, found.y, strict=True)}
            wanted = [[(row.tobytes(), _order_seed(row, settings.seed, k)) for k in range(runs)] for row in sets.x]
            return np.stack([np.mean([rows[key] for key in keys], 0) for keys in wanted], 1)
        self._retrain([(sets.x, "given", "truth")], asked, settings)
        return self.bank.truth(asked, sets.x)

    def verify(
        self,
        queries: Any,
        without: Without,
        estimator: str | EstimatorSettings = "posterior",
        settings: MeasureSettings | None = None,
        *,
        meaning: str | None = None,
        runs: int = 1,
    ) -> Verification:
        """Predicts, retrains and compares. The retrainings are resumed after a kill and used for nothing else.

        A set that was measured to be fitted or held out is no proof of a prediction: its value is read, and it is counted
        apart. queries, without, estimator, meaning: see `predict`; settings: how it is retrained; runs: new runs of each set,
        with whose mean the interval of such a mean is compared
        """
        asked, sets = as_queries(queries), deletion_sets(self.recipe, without)
        prediction = self.predict(asked, sets, estimator, meaning=meaning)
        _refuse_runs(prediction.meaning, runs)
        if prediction.meaning == NEW_RUN:
            held = self.bank.new_runs(asked, "heldout")
            own = [held.y[(held.x == row).all(1)] for row in sets.x]
            known = [y[0] if len(y) else None for y in own]
        else:
            known = self.bank.measured_values(asked, sets.x)
        measured = np.array([row is not None for row in known])
        actual = np.empty((len(asked), len(sets)))
        for column, row in enumerate(known):
            if row is not None:
                actual[:, column] = row
        if not measured.all():
            rest = np.flatnonzero(~measured)
            new = DeletionSets(sets.x[rest], tuple(sets.labels[i] for i in rest))
            name = prediction.meaning.replace(" ", "-")
            actual[:, rest] = self.retrain(asked, new, settings, meaning=name, runs=runs)
        return Verification(**{**vars(prediction), "runs": runs}, actual=actual, measured=measured)


# --- what is kept beside the bank: examples, trained parameters, and the recipe that they are of ------------------


def _refuse_runs(meaning: str, runs: int) -> None:
    """Raises: ValueError for several runs where one is like another."""
    require_whole("runs", runs, 1)
    if meaning == SAME_RUN and runs > 1:
        raise ValueError(f"runs is {runs}, and the same run is the same each time: ask for new runs, or leave runs out")


def _recipe_of(given: Recipe | str | os.PathLike[str]) -> Recipe:
    return given if isinstance(given, Recipe) else Recipe.from_yaml(Path(given))


def _source(store: Store, path: Path) -> Path:
    """The YAML file that a run was trained from. Raises: UnsupportedError without one, MismatchError if it is gone."""
    source = store.state("source")
    if source is None:
        raise UnsupportedError(f"{path} was trained from Python: open it with TrainingRun.open(path, recipe=...).")
    if not Path(source).exists():
        raise MismatchError(f"The recipe {source} of this run is gone: put it back, or train again.")
    return Path(source)


def _save_trained(path: Path, recipe: Recipe, source: Path | None, parameters: Parameters, notes: list[str]) -> None:
    """Writes the examples of a run with what they trained; the run is there once the last state is set."""
    with Store.create(path / "examples", {"what": "training examples"}) as store:
        for records in _records(recipe):
            store.put(records, {"unit": np.array([int(r.extra["unit"]) for r in records])})
        # The store's names are narrower than torch's: parameters are numbered, in the order of the task.
        store.put_side("parameters", {f"p{i}": p.numpy() for i, p in enumerate(parameters.values())})
        store.set_state("source", None if source is None else str(source.resolve()))
        store.set_state("recipe", {"digests": recipe.digests(), "python": PYTHON})
        store.set_state("libraries", libraries() if recipe.kind == "causal-lm" else {})
        store.set_state("notes", notes)
        store.set_state("trained", True)


def _records(recipe: Recipe, size: int = 10_000) -> Iterator[list[Record]]:
    places = recipe.unit_of.tolist()
    found = []
    for i, (example, id) in enumerate(zip(recipe.examples, recipe.ids, strict=True)):
        extra = {"unit": places[i]}
        if isinstance(example, Row):
            raw = row_json(example)
            found.append(
                Record(id, example.text, recipe.units[i], dict(example.meta), example.content_hash, extra, raw)
            )
        else:
            meta = {"label": int(example[1])} if recipe.kind == "classifier" else {}
            found.append(Record(id, "", recipe.units[i], meta, "", extra))
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found


def _saved_parameters(store: Store, recipe: Recipe, path: Path) -> Parameters:
    """The parameters that a run trained. Raises: MismatchError, naming the fields, for a run of another recipe."""
    stored = store.state("recipe")
    if difference := recipe.difference(stored["digests"]):
        python = stored["python"]
        other = "" if python == PYTHON else f" (a function is hashed as bytecode, and this was Python {python})"
        raise MismatchError(
            f"{path} was trained by another recipe, or the recipe or its data changed since: {difference}{other}. Restore "
            "it, or train into a new directory."
        )
    side = store.side("parameters")
    assert side is not None
    return {name: torch.from_numpy(np.array(side[f"p{i}"])) for i, name in enumerate(task_of(recipe).parameters())}


def _held_parts(found: dict[int, tuple[str, np.ndarray]]) -> list[Part]:
    return [(row[None], kind, "heldout") for _, (kind, row) in sorted(found.items())]


# --- tasks in worker processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    kind: str
    vectors: np.ndarray
    ids: list[str]
    metas: list[dict[str, Any]]
    degree: int = 0
    dtype: str = ""
    batched: bool = False

    @property
    def name(self) -> str:
        """Of its folder: batches may be cut otherwise after a kill."""
        return hashlib.sha256(" ".join(self.ids).encode()).hexdigest()[:32]


@dataclass
class _Worker:
    recipe: Recipe
    memory: int | None
    work: Path
    device: torch.device
    queries: Sequence[Query] | None
    progress: bool

    @functools.cached_property
    def retrainer(self) -> Retrainer:
        """Made with the first retraining."""
        return Retrainer(self.recipe, RunOptions(self.work, memory=self.memory, device=self.device))

    @functools.cached_property
    def ask(self) -> Any:
        """What is asked of the model in jets; None where parameters are kept."""
        return None if self.queries is None else query_function(task_of(self.recipe, self.device), self.queries)

    @functools.cached_property
    def values(self) -> Any:
        """What is asked of retrained models, which share what is below the lowest trained block; None as for `ask`."""
        if self.queries is None:
            return None
        below = self.retrainer.below
        return query_function(self.retrainer.task, self.queries, None if below is None else below.asking)


def _start(
    recipe: Recipe,
    asked: Sequence[Query] | None,
    memory: int | None,
    work: Path,
    device: str | torch.device,
    progress: bool,
) -> _Worker:
    return _Worker(recipe, memory, work, find_device(device), asked, progress)  # of several GPUs that of this worker


def _work(worker: _Worker, task: _Task) -> tuple[Measured, list[str]]:
    began = time.process_time()
    options = RunOptions(worker.work / task.name, memory=worker.memory, batched=task.batched, device=worker.device)
    numbers, vectors = {}, task.vectors
    if task.kind == "gradient":  # whose vectors are the places of its queries, and then their effects
        assert worker.queries is not None
        asked = [worker.queries[i] for i in task.vectors]
        recipe, order = worker.recipe, task.metas[0].get("seed")
        if order is not None:
            recipe = new_run(recipe, np.zeros(len(recipe.unit_names)), order)
        vectors = metagradient(recipe, asked, replace(options, progress=worker.progress)).effects
    else:
        make = {"jets": _jets, "retraining": _runs, NEW_RUN: _new_runs, IN_ORDER: _in_order}[task.kind]
        numbers = make(worker, task, options)
    shutil.rmtree(options.directory or "", ignore_errors=True)
    seconds = (time.process_time() - began) / len(task.ids)
    return Measured(task.kind, [{**m, "cpu_seconds": seconds} for m in task.metas], vectors, numbers), task.ids


def _jets(worker: _Worker, task: _Task, options: RunOptions) -> dict[str, np.ndarray]:
    dtype, psi = getattr(torch, task.dtype), torch.tensor(task.vectors)  # Ray hands out arrays read-only
    if task.metas[0]["real"]:
        dtype, psi = dtype.to_real(), psi.real
    run = train_jets(worker.recipe, psi, JetSettings(task.degree, dtype, worker.ask is None), worker.ask, options)
    if run.losses is not None:
        return {"values": run.losses.h.to(torch.complex128).numpy().swapaxes(0, 1)}
    flat = torch.cat([h.flatten(2) for h in run.coefficients.values()], -1)
    return {"parameters": flat.transpose(0, 1).to(getattr(torch, task.dtype)).numpy()}


def _runs(worker: _Worker, task: _Task, options: RunOptions) -> dict[str, np.ndarray]:
    params = worker.retrainer.train(torch.from_numpy(1 - task.vectors), options, len(task.vectors))
    return _asked(worker, params)


def _new_runs(worker: _Worker, task: _Task, options: RunOptions) -> dict[str, np.ndarray]:
    found = []
    for number, (x, meta) in enumerate(zip(np.array(task.vectors), task.metas, strict=True)):
        part = number, len(task.metas)
        own = replace(options, directory=(options.directory or Path()) / str(number), round=part)
        recipe = new_run(worker.recipe, x, meta["seed"])
        if (retrainer := worker.retrainer.in_order_of(recipe)) is None:
            weights = None if np.isin(x, (0, 1)).all() else torch.from_numpy(1 - x)
            found.append(train_plain(recipe, weights, own))
        else:
            weights = torch.from_numpy(np.where(x == 1, 1.0, 1 - x))  # what is removed whole is in no batch
            found.append({name: p[0] for name, p in retrainer.train(weights[None], own).items()})
    return _asked(worker, {name: torch.stack([params[name] for params in found]) for name in found[0]})


def _in_order(worker: _Worker, task: _Task, options: RunOptions) -> dict[str, np.ndarray]:
    x = np.array(task.vectors)
    recipe = new_run(worker.recipe, np.zeros(x.shape[1]), task.metas[0]["seed"])
    retrainer = worker.retrainer.in_order_of(recipe) or Retrainer(recipe, options)
    weights = weights_left(worker.recipe, x)[:, None] * (1 - x)
    return _asked(worker, retrainer.train(torch.from_numpy(weights), options, len(x)))


def _asked(worker: _Worker, params: Parameters) -> dict[str, np.ndarray]:
    """What the bank keeps of trained parameters [runs, ...]."""
    if worker.values is not None:
        values = query_losses(worker.recipe, params, worker.values, worker.device, worker.retrainer.task)
        return {"values": values.double().numpy()}
    return {"parameters": torch.cat([p.flatten(1) for p in params.values()], 1).numpy()}


def _order_seed(x: np.ndarray, seed: int, number: int) -> int:
    """The seed of the order of a new run: another for each set, so that their errors are apart."""
    digest = hashlib.sha256(np.ascontiguousarray(x).tobytes() + f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
