"""The bank: everything measured about one recipe, on disk, in the shared store format.

A row is one measurement: a jet run along one direction, a retraining or a new run with one deletion vector, or the exact
first order of one query. Its id is made of its content, so that the same measurement is never stored twice, and banks of
the same recipe measured on several machines merge. It holds query values (when the queries were given beforehand) or the
trained parameters (then any query can be asked later). Vectors are stored, not seeds: random number generators change
between versions.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from leaveout.deletion.calibration import Calibration
from leaveout.deletion.estimators import EstimatorSettings, Fitted, fit
from leaveout.deletion.measurements import JetBlock, Measurements, NewRuns, distinct, gathered
from leaveout.deletion.noise import LEAST_REPEATS, RunNoise, run_noise
from leaveout.deletion.predict import NEW_RUN
from leaveout.deletion.shift import BY_SHARE, Shift, fit_shift
from leaveout.errors import FormatError, MismatchError
from leaveout.models import full_precision
from leaveout.store import Record, Segment, Store
from leaveout.training.below import Below, below_of
from leaveout.training.loop import Steps
from leaveout.training.queries import Query, as_queries, jet_values, query_function, query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.repacking import steps_lost, weights_left
from leaveout.training.reverse.updates import UnitVectors, first_order_error, influence, query_gradients
from leaveout.training.tasks import Parameters, Task, task_of

ROLES = ("fit", "heldout", "truth")
"""What a retraining is for: estimators fit it, calibration holds it against them, or `verify` compares with it."""
REPEAT = "repeat"
"""The role of a new run with all data, from which the noise of runs is known; a new run is a kind of its own, a retraining
whose batches are packed anew in another order (`training.repacking`)."""
IN_ORDER = "retraining in another order"
"""The kind of a retraining in the batches of a new run with all data, at what rows weigh in a new run without the set."""
DAMPING = 10.0
"""Of the influence scores, in mean diagonals of the Fisher matrix (docs/evidence/deletion.md)."""


@dataclass(frozen=True)
class Measured:
    """Finished measurements of one kind, as they go into the bank.

    kind "jets", "retraining", IN_ORDER, NEW_RUN or "gradient"; metas: what each row's record says; vectors [rows, units]: psi,
    complex, or x; numbers: name -> array with the rows first ("values" or "parameters")
    """

    kind: str
    metas: list[dict[str, Any]]
    vectors: np.ndarray
    numbers: dict[str, np.ndarray]


class Bank:
    """Measurements of one recipe; made and added to by `TrainingRun.measure`.

    constants  the trained parameters by name; device: where queries are pushed through what was trained
    """

    def __init__(self, recipe: Recipe, path: Path, constants: Parameters, device: str | torch.device = "cpu") -> None:
        self.recipe, self.path, self.constants, self.device = recipe, Path(path), constants, device
        self._fits: dict[tuple[Any, ...], tuple[Fitted, Calibration]] = {}
        settings = {"what": "measurements", "recipe": recipe.hash(), "digests": recipe.digests()}
        if not self.path.is_dir() or not any(self.path.iterdir()):
            Store.create(self.path, settings).close()
        self.store = Store.open(self.path)
        if self.store.settings != settings:
            difference = recipe.difference(self.store.settings.get("digests", {})) or "it is of another kind"
            raise MismatchError(
                f"{path} is the bank of another recipe: {difference}. Restore the recipe and its data, or measure into "
                "another run."
            )

    @functools.cached_property
    def _task(self) -> Task:
        return task_of(self.recipe, self.device)

    @functools.cached_property
    def _below(self) -> Below | None:
        """What queries share of retrained models whose parameters are kept."""
        with full_precision():
            return below_of(Steps(self.recipe, self._task))

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """Whether any example of a unit is in a step, bool [units]."""
        untrained = set(self.recipe.untrained_units())
        return np.array([name not in untrained for name in self.recipe.unit_names])

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples of each unit [units]."""
        return np.bincount(self.recipe.unit_of.numpy()).astype(np.float64)

    def features(self) -> np.ndarray | None:
        """The units' update vectors [units, k], None before `TrainingRun.measure_vectors`."""
        side = self.store.side("vectors")
        return None if side is None else np.asarray(side["updates"], np.float64)

    def first_order_error(self, x: np.ndarray) -> np.ndarray | None:
        """What the exact first order of deletion vectors [sets, units] gets wrong, over the size of effects, about: [sets].

        It is told from the run alone, without retraining; None before `TrainingRun.measure_vectors`.
        """
        side = self.store.side("vectors")
        return None if side is None else first_order_error(self._vectors(side), x)

    def _vectors(self, side: Mapping[str, np.ndarray]) -> UnitVectors:
        updates, final, *others = (np.asarray(side[name]) for name in ("updates", "final", "lengths", "owned"))
        return UnitVectors(updates, final, self.constants, *others)

    def __len__(self) -> int:
        return len(self.store)

    # --- writing -------------------------------------------------------------------------------------------------

    def missing(self, ids: Sequence[str]) -> list[int]:
        """Positions of the ids that are not in the bank yet, each id once."""
        self.store.refresh()
        there = self.store.has(ids)
        first = {id: i for i, id in reversed(list(enumerate(ids)))}
        return sorted(i for id, i in first.items() if id not in there)

    def add(self, measured: Measured, ids: Sequence[str], queries: Sequence[Query] | None) -> None:
        """Stores measurements as one transaction; those that are there already are left out."""
        keep = self.missing(ids)
        if not keep:
            return
        for name, values in {"an effect": measured.vectors, **measured.numbers}.items():
            if not np.isfinite(values).all():
                what = {"values": "a query value", "parameters": "a trained parameter"}.get(name, name)
                raise FormatError(f"A {measured.kind} gave {what} that is not finite: ask `leaveout doctor RECIPE`.")
        asked = None if queries is None else [q.digest for q in queries]
        digest = "" if asked is None else _digest_of(asked)
        common = {"kind": measured.kind, "queries": digest}
        numbers = {"x": measured.vectors, **measured.numbers}
        arrays = {name: _as_real(np.ascontiguousarray(values[keep])) for name, values in numbers.items()}
        with Store.open(self.path, write=True) as store:
            if asked is not None and store.state(f"queries/{digest}") is None:
                store.set_state(f"queries/{digest}", asked)
            store.put([Record(ids[i], "", measured.kind, {**common, **measured.metas[i]}) for i in keep], arrays)
        self.store.refresh()
        self._fits.clear()

    def note(self, key: str, value: Any) -> None:
        """Keeps a small JSON value."""
        with Store.open(self.path, write=True) as store:
            store.set_state(key, value)
        self.store.refresh()

    def retraining_seconds(self) -> float:
        """CPU seconds of one retraining, the most that any took: those that shared their steps with few others."""
        return max(float(r.meta["cpu_seconds"]) for r in self.store.iter_rows() if r.meta["kind"] == "retraining")

    def put_vectors(self, vectors: UnitVectors, cpu_seconds: float) -> None:
        """Keeps what similarity between units and cheap scores are computed from."""
        with Store.open(self.path, write=True) as store:
            store.set_state("vectors cpu_seconds", cpu_seconds)
            store.put_side(
                "vectors",
                {
                    "updates": vectors.updates,
                    "final": vectors.final,
                    "lengths": vectors.lengths,
                    "owned": vectors.owned,
                },
            )
        self.store.refresh()
        self._fits.clear()

    def merge(self, other: str | os.PathLike[str]) -> int:
        """Adds the measurements of another bank of the same recipe; how many were new. A killed merge can be repeated.

        The same measurement of two machines may differ by rounding: ours is kept.
        """
        if not Path(other).is_dir():
            raise FormatError(f"{other} is not a bank: give the directory `bank` of another run.")
        theirs = Bank(self.recipe, Path(other), self.constants).store
        with Store.open(self.path, write=True) as store:
            for digest in {str(record.meta["queries"]) for record in theirs.iter_rows()} - {""}:
                if store.state(f"queries/{digest}") is None:
                    store.set_state(f"queries/{digest}", theirs.state(f"queries/{digest}"))
            added = sum(store.take(theirs, part) for part in theirs.segments())
            if store.side("vectors") is None and (side := theirs.side("vectors")) is not None:
                store.put_side("vectors", side)
                store.set_state("vectors cpu_seconds", theirs.state("vectors cpu_seconds"))
        self.store.refresh()
        self._fits.clear()
        return added

    # --- reading -------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Counts by kind, design and degree, bytes, CPU seconds spent, and notes on how it was measured."""
        counts: dict[str, int] = {}
        seconds = self.store.state("vectors cpu_seconds") or 0.0
        for record in self.store.iter_rows():
            m = record.meta
            degree = f" of degree {m['degree']}" if "degree" in m else ""
            name = f"{m['kind']}{degree}, {m.get('design', '')}{', ' + m['role'] if 'role' in m else ''}"
            counts[name] = counts.get(name, 0) + 1
            seconds += float(m.get("cpu_seconds", 0))
        notes = [note] if (note := self.store.state("one by one")) else []
        facts = {"measurements": counts, "cpu_seconds": round(seconds, 3), "bytes": self.store.info()["bytes"]}
        return facts | ({"notes": notes} if notes else {})

    def measurements(
        self,
        queries: Any,
        noise: float | np.ndarray | None = None,
        features: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> Measurements:
        """All that the bank knows about some queries.

        features [units, k]: what says which units are alike, instead of the update vectors; signatures of a readout
            index, in the order of `recipe.unit_names`, for example.
        scores [queries, units]: a guess of the effects up to one common factor, positive where a unit helps, instead of
            influence scores of the update vectors; scores of a readout index, for example. Not used beside `gradient`.
        noise: standard deviation of one retraining's value, one number or one per query; 0 where training is exact.
        Memory: 16 bytes x measurements x units, and the query values.
        Raises: MismatchError if a query was not measured and no parameters were kept; FormatError for a NaN value.
        """
        asked = as_queries(queries)
        base = self.base(asked)
        parts = list(self._parts(asked))
        units = len(self.sizes)
        features, scores = (None if given is None else np.asarray(given) for given in (features, scores))
        if features is not None:
            _refuse("features", features, f"[{units} units, k]", features.ndim == 2 and len(features) == units)
        if scores is not None:
            _refuse("scores", scores, f"[{len(asked)} queries, {units} units]", scores.shape == (len(asked), units))
        of_role = {role: [p for p in parts if p[0] == role] for role in ROLES}
        gradient = self._gradient(asked)
        if scores is None and gradient is None:
            scores = self._scores(asked)
        if not parts and gradient is None and len(self):
            raise MismatchError(
                f"No measurement of this bank knows the query {asked[0].name!r}: it was measured for other queries, and "
                "without keeping parameters; measure again with these queries, or with none given."
            )
        return Measurements(
            base, self.sizes,
            distinct([JetBlock(*p[1:]) for p in parts if p[0] == "jets"]),
            gathered(of_role["fit"], base, self.trained), gathered(of_role["heldout"], base, self.trained),
            None if noise is None else _deviations(noise, len(asked)),
            gradient,
            None if gradient is not None else scores,
            self.features() if features is None else np.asarray(features, np.float64),
        )  # fmt: skip

    def base(self, asked: Sequence[Query]) -> np.ndarray:
        """Values of queries under the model trained on everything [queries]."""
        ask = query_function(self._task, asked)
        values = query_losses(self.recipe, self.constants, ask, self.device).double().numpy()
        for q, value in zip(asked, values, strict=True):
            if not np.isfinite(value):
                raise FormatError(
                    f"The query {q.name!r} has the value {value} already for the model trained on all data."
                )
        return values

    def truth(self, asked: Sequence[Query], x: np.ndarray) -> np.ndarray:
        """Values [query, set] of the retrainings of deletion vectors x [sets, units] that were stored as truth."""
        found = {
            row.tobytes(): y for p in self._parts(asked) if p[0] == "truth" for row, y in zip(p[1], p[2], strict=True)
        }
        return np.stack([found[row.tobytes()] for row in np.ascontiguousarray(x)], 1)

    def measured_values(self, asked: Sequence[Query], x: np.ndarray) -> list[np.ndarray | None]:
        """Values [query] of each deletion vector of x [sets, units] that was retrained to be fitted or held out, else None.

        Vectors are the same that differ by units which are in no step.
        """
        found = {
            row.tobytes(): y
            for p in self._parts(asked)
            if p[0] in ("fit", "heldout")
            for row, y in zip(p[1] * self.trained, p[2], strict=True)
        }
        return [found.get(row.tobytes()) for row in np.ascontiguousarray(x * self.trained)]

    def new_runs(self, asked: Sequence[Query], role: str) -> NewRuns:
        """The new runs of a role, each deletion vector and order once, in the order in which they were measured."""
        found: dict[tuple[bytes, int], tuple[np.ndarray, np.ndarray]] = {}
        for records, x, values in self._known(asked):
            for r, row, y in zip(records, x, values, strict=True):
                if r.meta["kind"] == NEW_RUN and r.meta["role"] == role:
                    found.setdefault((row.tobytes(), int(r.meta["seed"])), (row, y))
        rows, values = zip(*found.values(), strict=True) if found else ((), ())
        seeds = np.array([seed for _, seed in found], np.int64)
        return NewRuns(np.reshape(rows, (-1, len(self.sizes))), np.reshape(values, (-1, len(asked))), seeds)

    def noise(self, asked: Sequence[Query]) -> RunNoise | None:
        """How far runs with all data are from each other, None where too few were measured for these queries."""
        values = self.new_runs(asked, REPEAT).y
        return run_noise(values) if len(values) >= LEAST_REPEATS else None

    def in_orders(self, asked: Sequence[Query], x: np.ndarray) -> list[np.ndarray]:
        """Effects [orders, queries] of each deletion vector of x [sets, units] in the orders in which it was retrained.

        The same run is one of them where rows that are left weigh the same there as in a new run.
        """
        repeats = self.new_runs(asked, REPEAT)
        base = dict(zip(repeats.seeds.tolist(), repeats.y, strict=True))
        found: dict[bytes, dict[int, np.ndarray]] = defaultdict(dict)
        for records, rows, values in self._known(asked):
            if records[0].meta["kind"] != IN_ORDER:
                continue
            for r, row, y in zip(records, rows, values, strict=True):
                if (seed := int(r.meta["seed"])) in base:
                    found[(row * self.trained).tobytes()][seed] = y - base[seed]
        if not found:
            return [np.zeros((0, len(asked)))] * len(x)
        base_here, here = self.base(asked), self.measured_values(asked, x)
        out = []
        for row, same, more in zip(np.ascontiguousarray(x), here, weights_left(self.recipe, x), strict=True):
            others = [*found.get(row.tobytes(), {}).values()]
            own = [same - base_here] if others and same is not None and more == 1 else []
            out.append(np.reshape([*own, *others], (-1, len(asked))))
        return out

    def at_new_runs(self, x: np.ndarray, settings: EstimatorSettings) -> np.ndarray:
        """1 less what units weigh in new runs without x [sets, units], over what they weigh in the same run: see `shift`."""
        if settings.name in ("leave_one_out", "pairwise"):  # which know whole deletions alone
            return x
        more = weights_left(self.recipe, x)[:, None]
        return np.where(x == 1, x, 1 - more * (1 - x)) * self.trained

    def asked_at(self, x: np.ndarray, settings: EstimatorSettings, asked: Sequence[Query]) -> np.ndarray:
        """Where an estimator of the same run is asked for new runs without x [sets, units]: see `shift`."""
        return x if len(self._first_orders(asked)) else self.at_new_runs(x, settings)

    def shift(self, asked: Sequence[Query], settings: EstimatorSettings, noise: RunNoise) -> Shift:
        """What the first orders of other orders and the new runs of held-out sets say of the way to new runs."""
        fitted, calibration = self.fit(asked, settings)
        held = self.new_runs(asked, "heldout")
        x = held.x * self.trained
        places = self.at_new_runs(x, settings)
        effect, std = fitted.predict(self.asked_at(x, settings, asked))
        std = std * calibration.factor(x, effect, std)
        orders = self._first_orders(asked)
        prior = Shift(noise, self.sizes / self.sizes.sum(), orders, BY_SHARE[len(orders) > 1])
        return fit_shift(prior, held, x, places, effect, std, steps_lost(self.recipe, held.x))

    def vectors_of(self, role: str) -> np.ndarray:
        """The different deletion vectors [sets, units] of retrainings of a role, as they were measured, for whatever queries."""
        self.store.refresh()
        found: dict[bytes, np.ndarray] = {}
        for part in self.store.segments():
            records, positions = self.store.live_rows(part)
            for r, place in zip(records, positions, strict=True):
                if r.meta["kind"] == "retraining" and r.meta["role"] == role:
                    row = np.array(part.arrays()["x"][place])
                    found.setdefault(row.tobytes(), row)
        return np.reshape(list(found.values()), (-1, len(self.sizes)))

    def fit(self, asked: Sequence[Query], settings: EstimatorSettings) -> tuple[Fitted, Calibration]:
        """The fitted estimator and what is known of its standard deviations; kept until the bank changes."""
        given = tuple(vars(settings).values())
        key = (tuple(q.digest for q in asked), *given)
        plain = all(value is None or isinstance(value, (int, float, str)) for value in given)
        if plain and key in self._fits:
            return self._fits[key]
        data = self.measurements(asked, settings.noise, settings.features, settings.scores)
        found = fit(data, settings)
        if plain:  # arrays and kernels have no cheap identity: their fits are not kept
            self._fits[key] = found
        return found

    # --- what a segment says: query values, or trained parameters, whose values are computed once and kept beside it

    def _parts(self, asked: Sequence[Query]) -> Iterator[tuple[Any, ...]]:
        """Of each segment that knows the queries ("jets", psi, c, real), or (role, x, y, designs) of retrainings in the same
        batches."""
        for records, x, values in self._known(asked):
            meta = records[0].meta
            if meta["kind"] == "jets":
                psi, c = x.view(np.complex128)[..., 0], np.ascontiguousarray(values).view(np.complex128)[..., 0]
                yield "jets", psi, np.ascontiguousarray(c.transpose(1, 0, 2)), bool(meta["real"])
            elif meta["kind"] == "retraining":
                roles = [r.meta["role"] for r in records]
                for role in dict.fromkeys(roles):
                    rows = [i for i, r in enumerate(roles) if r == role]
                    yield role, x[rows], values[rows], [str(records[i].meta["design"]) for i in rows]

    def _known(self, asked: Sequence[Query]) -> Iterator[tuple[list[Record], np.ndarray, np.ndarray]]:
        """Records, vectors and query values [rows, ...] of the runs of each segment that knows the queries."""
        self.store.refresh()
        for part in self.store.segments():
            records, positions = self.store.live_rows(part)
            if not records or records[0].meta["kind"] == "gradient":
                continue
            if (values := self._values(part, records[0].meta, asked)) is not None:
                yield records, np.array(part.arrays()["x"])[positions], values[positions]

    def _values(self, part: Segment, meta: dict[str, Any], asked: Sequence[Query]) -> np.ndarray | None:
        """Query values [rows, ...] of a segment, from its numbers or its parameters; None if it does not know them."""
        digests = [q.digest for q in asked]
        if meta["queries"]:
            known = {d: i for i, d in enumerate(self.store.state(f"queries/{meta['queries']}"))}
            if any(d not in known for d in digests):
                return None
            columns = [known[d] for d in digests]
            values = np.asarray(part.arrays()["values"], np.float64)
            return values[:, :, columns] if meta["kind"] == "jets" else values[:, columns]
        name = f"values/{part.name}/{_digest_of(digests)}"
        if (side := self.store.side(name)) is not None:
            return np.asarray(side["values"])
        values = self._asked(part, meta, asked)
        try:
            with Store.open(self.store.path, write=True) as store:
                store.put_side(name, {"values": values})
        except MismatchError:
            return values  # somebody is measuring: the values are computed again next time
        self.store.refresh()
        return values

    def _asked(self, part: Segment, meta: dict[str, Any], asked: Sequence[Query]) -> np.ndarray:
        """Query values computed from stored parameters, in the form of stored values."""
        flat = part.arrays()["parameters"]
        jets = meta["kind"] == "jets"
        ask = query_function(self._task, asked, None if jets or self._below is None else self._below.asking)
        if not jets:
            runs = {n: torch.from_numpy(np.array(v)) for n, v in _split(flat, self.constants).items()}
            return query_losses(self.recipe, runs, ask, self.device, self._task).double().numpy()
        out = []
        for start in range(0, len(flat), 64):
            chunk = np.array(flat[start : start + 64])
            chunk = chunk.view(np.complex128 if chunk.dtype == np.float64 else np.complex64)[..., 0]
            series = {n: torch.from_numpy(v.swapaxes(0, 1).copy()) for n, v in _split(chunk, self.constants).items()}
            values = jet_values(self.recipe, self.constants, series, ask, self.device).h
            out.append(_as_real(values.transpose(0, 1).to(torch.complex128).numpy()))
        return np.concatenate(out)

    def _gradient(self, asked: Sequence[Query], order: int | None = None) -> np.ndarray | None:
        """Exact first-order effects [queries, units] in the same run, or in the new run of this order; None unless those of
        all queries were measured."""
        found: dict[str, np.ndarray] = {}
        for r, row in self._gradients():
            if r.meta.get("seed") == order:
                found[r.id.rpartition(":")[2]] = row
        if any(q.digest not in found for q in asked):
            return None
        return np.stack([found[q.digest] for q in asked])

    def _first_orders(self, asked: Sequence[Query]) -> np.ndarray:
        """Exact first-order effects [orders, queries, units], those in the same run first; none unless known in several."""
        own = self._gradient(asked)
        others = [found for seed in self._orders() if (found := self._gradient(asked, seed)) is not None]
        return np.stack([own, *others]) if own is not None and others else np.zeros((0, 0, 0))

    def _orders(self) -> list[int]:
        """The orders of new runs whose exact first order was measured for any query."""
        return list(dict.fromkeys(int(r.meta["seed"]) for r, _ in self._gradients() if "seed" in r.meta))

    def _gradients(self) -> Iterator[tuple[Record, np.ndarray]]:
        for part in self.store.segments():
            records, positions = self.store.live_rows(part)
            if records and records[0].meta["kind"] == "gradient":
                yield from zip(records, np.asarray(part.arrays()["x"])[positions], strict=True)

    def _scores(self, asked: Sequence[Query]) -> np.ndarray | None:
        """Influence scores [queries, units] of the units' vectors, None before these are measured."""
        side = self.store.side("vectors")
        if side is None:
            return None
        vectors = self._vectors(side)
        width = vectors.final.shape[1]
        ask = query_function(self._task, asked)
        gradients = query_gradients(self.recipe, self.constants, ask, width, self.device)
        return influence(vectors, gradients, DAMPING)


def measurement_ids(kind: str, vectors: np.ndarray, queries: Sequence[Query] | None, *parts: Any) -> list[str]:
    """An id for each row [rows, units], made of what is measured and for which queries."""
    asked = "parameters" if queries is None else _digest_of([q.digest for q in queries])
    common = "/".join(map(str, parts))
    rows = (xxhash.xxh3_128_hexdigest(np.ascontiguousarray(v).tobytes()) for v in vectors)
    return [f"{kind}:{common}:{asked}:{row}" for row in rows]


def _refuse(name: str, values: np.ndarray, wanted: str, fits: bool) -> None:
    """Raises: ValueError for an array of a wrong shape, or with numbers that are not finite."""
    if not fits:
        raise ValueError(f"wanted {name} {wanted}, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold numbers that are not finite: put 0 where nothing is known")


def _deviations(noise: float | np.ndarray, n_queries: int) -> np.ndarray:
    """The noise of each query [queries]. Raises: ValueError for what is no standard deviation, or not one per query."""
    values = np.asarray(noise)
    if values.dtype.kind not in "iuf" or values.shape not in ((), (1,), (n_queries,)) or not (values >= 0).all():
        raise ValueError(f"noise is {noise!r}: give one number of at least 0, or one for each of {n_queries} queries")
    if not np.isfinite(values).all():
        raise ValueError(f"noise is {noise!r}: give numbers that are finite")
    return np.broadcast_to(values.astype(np.float64), (n_queries,))


def _digest_of(digests: Sequence[str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(list(digests)).encode())


def _as_real(values: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs of real ones in a last axis."""
    if values.dtype.kind != "c":
        return values
    return np.ascontiguousarray(values).view(np.real(values).dtype).reshape(*values.shape, 2)


def _split(flat: np.ndarray, like: Parameters) -> dict[str, np.ndarray]:
    """Parameters by name from flat ones [..., all]."""
    ends = np.cumsum([p.numel() for p in like.values()])
    parts = np.split(flat, ends[:-1], axis=-1)
    return {n: part.reshape(*flat.shape[:-1], *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}
