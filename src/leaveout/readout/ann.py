"""A FAISS index of the signatures (extra `ann`): inverted lists over projected rows, which a search reads a share of.

Rows are projected to 1,024 numbers by a randomised Hadamard transform, shared out to about sqrt(rows) lists by k-means
and kept in 8 bits a number. It is a side file in IDX/ann that can be thrown away and made again.
Memory: building holds 1 KiB a row, the only part of an index that grows with its rows; searching maps the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.readout.projection import Hadamard
from leaveout.readout.search import positions_of
from leaveout.readout.storage import blocks
from leaveout.readout.storage import width as stored_width
from leaveout.store import Store

FOLDER = "ann"
WIDTH = 1024
SHARE = 8  # one list in so many is read,
FEWEST = 16  # but not fewer than these
TRAINED = 64  # rows per list that k-means sees, and fewest rows per list
MAX_LISTS = 4096


def update(index: Store, seed: int = 0) -> None:
    """Makes the FAISS index of all rows, tombstoned ones included.

    Raises: UnsupportedError if faiss is not installed.
    """
    faiss, place = require_faiss(), index.path / FOLDER
    segments = index.segments()
    lists = max(1, min(MAX_LISTS, math.isqrt(index.n_rows), index.n_rows // TRAINED))
    project = _projection(stored_width(segments[0].arrays()), seed)
    made = faiss.index_factory(len(project.outputs), f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    made.train(_sample(index, project, TRAINED * lists, seed))
    for segment in segments:
        start = segment.first
        for rows in blocks(segment.arrays(), 256):
            made.add_with_ids(project(rows).numpy(), np.arange(start, start + len(rows)))
            start += len(rows)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    faiss.write_index(made, str(place / "rows.faiss"))
    facts = {"segments": [segment.name for segment in segments], "seed": seed}
    (place / "facts.json").write_text(json.dumps(facts))  # last: without it the file is not used


def prepared(index: Store) -> dict[str, Any]:
    """What is known of the FAISS index. Raises: as `shortlist`."""
    require_faiss()
    place = index.path / FOLDER / "facts.json"
    facts = json.loads(place.read_text()) if place.exists() else {}
    if facts.get("segments") != [segment.name for segment in index.segments()]:
        raise MismatchError(
            f"{index.path} has no FAISS index of its present rows: call prepare('faiss') (`leaveout prepare`)."
        )
    return facts


def shortlist(
    index: Store, vectors: Tensor, n: int, wanted: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per query: ascending numbers of about the n rows with the highest estimated scores, and these estimates.

    Raises: MismatchError if the FAISS index is not of the present rows; UnsupportedError if faiss is not installed.
    """
    faiss, place = require_faiss(), index.path / FOLDER
    facts = prepared(index)
    found = faiss.read_index(str(place / "rows.faiss"), faiss.IO_FLAG_MMAP)
    options: dict[str, Any] = {"nprobe": min(found.nlist, max(FEWEST, found.nlist // SHARE))}
    if wanted is not None or any(segment.tombstones.size for segment in index.segments()):
        options["sel"] = faiss.IDSelectorBatch(_allowed(index, wanted))
    project = _projection(vectors.shape[1], facts["seed"])
    scores, numbers = found.search(project(vectors).numpy(), n, params=faiss.SearchParametersIVF(**options))
    for query in range(len(vectors)):
        there = numbers[query] >= 0
        order = np.argsort(numbers[query][there])
        yield numbers[query][there][order], scores[query][there][order]


def remove(path: Path) -> None:
    """Removes the FAISS index of an index, if it has one."""
    shutil.rmtree(path / FOLDER, ignore_errors=True)


def require_faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError("this needs the package faiss: pip install 'leaveout[ann]'") from error
    return faiss


def _projection(width: int, seed: int) -> Hadamard:
    return Hadamard.make(width, min(WIDTH, 1 << max(width - 1, 1).bit_length()), seed, "ann")


def _sample(index: Store, project: Hadamard, n: int, seed: int) -> np.ndarray:
    """Projected rows [at most n, width] drawn at random, in order."""
    chosen = np.sort(np.random.default_rng(seed).choice(index.n_rows, min(n, index.n_rows), replace=False))
    found = []
    for segment in index.segments():
        low, high = np.searchsorted(chosen, [segment.first, segment.first + segment.n_rows])
        arrays, at = segment.arrays(), chosen[low:high] - segment.first
        found += [project(rows).numpy() for rows in blocks({name: arrays[name][at] for name in arrays}, 256)]
    return np.concatenate(found)


def _allowed(index: Store, wanted: np.ndarray | None) -> np.ndarray:
    parts = []
    for segment in index.segments():
        positions = positions_of(segment, wanted)
        parts.append(segment.first + (np.arange(segment.n_rows) if positions is None else positions))
    return np.concatenate(parts)
