"""What the stored measurements of a bank say about given queries.

A segment holds query values, or trained parameters, from which any query's values are computed once and kept beside it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from leaveout.errors import MismatchError
from leaveout.store import Segment, Store
from leaveout.training.queries import Query, jet_values, query_function, query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.updates import UnitVectors, influence, query_gradients
from leaveout.training.tasks import Parameters, Task, task_of

DAMPING = 10.0
"""Of the influence scores, in mean diagonals of the Fisher matrix (docs/how-to/deletion.md)."""


@dataclass
class Stored:
    """Reads a bank's store; constants: the trained parameters by name."""

    store: Store
    recipe: Recipe
    constants: Parameters

    @functools.cached_property
    def task(self) -> Task:
        return task_of(self.recipe)

    def parts(self, asked: Sequence[Query]) -> Iterator[tuple[Any, ...]]:
        """(role, x, y) of retrainings and ("jets", psi, c, real) of each segment that knows the queries."""
        self.store.refresh()
        for part in self.store.segments():
            records, positions = self.store.live_rows(part)
            if not records or records[0].meta["kind"] == "gradient":
                continue
            meta, arrays = records[0].meta, part.arrays()
            values = self._values(part, meta, asked)
            if values is None:
                continue
            x, values = np.array(arrays["x"])[positions], values[positions]
            if meta["kind"] == "jets":
                psi, c = x.view(np.complex128)[..., 0], np.ascontiguousarray(values).view(np.complex128)[..., 0]
                yield "jets", psi, np.ascontiguousarray(c.transpose(1, 0, 2)), bool(meta["real"])
            else:
                roles = [r.meta["role"] for r in records]
                for role in dict.fromkeys(roles):
                    rows = [i for i, r in enumerate(roles) if r == role]
                    yield role, x[rows], values[rows]

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
        name = f"values/{part.name}/{digest_of(digests)}"
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
        ask = query_function(self.task, asked)
        if meta["kind"] == "retraining":
            runs = {n: torch.from_numpy(np.array(v)) for n, v in _split(flat, self.constants).items()}
            return query_losses(self.recipe, runs, ask).double().numpy()
        out = []
        for start in range(0, len(flat), 64):
            chunk = np.array(flat[start : start + 64])
            chunk = chunk.view(np.complex128 if chunk.dtype == np.float64 else np.complex64)[..., 0]
            series = {n: torch.from_numpy(v.swapaxes(0, 1).copy()) for n, v in _split(chunk, self.constants).items()}
            values = jet_values(self.recipe, self.constants, series, ask).h
            out.append(as_real(values.transpose(0, 1).to(torch.complex128).numpy()))
        return np.concatenate(out)

    def gradient(self, asked: Sequence[Query]) -> np.ndarray | None:
        """Exact first-order effects [queries, units], None unless those of all queries were measured."""
        found: dict[str, np.ndarray] = {}
        for part in self.store.segments():
            records, positions = self.store.live_rows(part)
            if records and records[0].meta["kind"] == "gradient":
                rows = np.asarray(part.arrays()["x"])[positions]
                found |= {r.id.removeprefix("gradient:"): row for r, row in zip(records, rows, strict=True)}
        if any(q.digest not in found for q in asked):
            return None
        return np.stack([found[q.digest] for q in asked])

    def scores(self, asked: Sequence[Query]) -> np.ndarray | None:
        """Influence scores [queries, units] of the units' vectors, None before these are measured."""
        side = self.store.side("vectors")
        if side is None:
            return None
        vectors = UnitVectors(np.asarray(side["updates"]), np.asarray(side["final"]), self.constants)
        width = vectors.final.shape[1]
        gradients = query_gradients(self.recipe, self.constants, query_function(self.task, asked), width)
        return influence(vectors, gradients, DAMPING)


def digest_of(digests: Sequence[str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(list(digests)).encode())


def as_real(values: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs of real ones in a last axis."""
    if values.dtype.kind != "c":
        return values
    return np.ascontiguousarray(values).view(np.real(values).dtype).reshape(*values.shape, 2)


def _split(flat: np.ndarray, like: Parameters) -> dict[str, np.ndarray]:
    """Parameters by name from flat ones [..., all]."""
    ends = np.cumsum([p.numel() for p in like.values()])
    parts = np.split(flat, ends[:-1], axis=-1)
    return {n: part.reshape(*flat.shape[:-1], *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}
