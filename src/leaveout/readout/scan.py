"""Scans over the stored forms of rows: all scores, and the k best rows of each query.

One kernel, `scan`: a codec unpacks blocks of stored rows into small buffers and multiplies them with the queries. Memory per
worker: some 32 MiB of buffers, and one score per row of two segments and query. With the model on a device one worker scans
there, see `Held`: the sums are of the same integers.

Ranks compare scores at a resolution, see `at_resolution`; rows that are equal there come in the order of their numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from leaveout.errors import choices
from leaveout.executor import run_tasks
from leaveout.readout.codec import Codec, Tensors
from leaveout.readout.held import Held
from leaveout.store import Segment

# Binary digits behind the leading one in which scores are compared. Rows of one text that were computed in other batches
# have scores up to 3e-6 of their size apart (float32 sums in another order, stored numbers rounded to the other side), so
# that a step of 1 / 8192 to 1 / 4096 holds nearly all of them. What storing loses is ten times a step (int8) or more.
DIGITS = 12
_DROPPED = 23 - DIGITS  # of the digits of a float32
PAGE = 256  # rows whose entries are read at a time, to see which group they are of

Scanners = Literal["threads", "ray"]
Length = Literal["product", "cosine"]


def check_length(length: str) -> None:
    """Raises: ValueError for what is no way to count the length of rows."""
    if length not in get_args(Length):
        raise ValueError(f"length is {length!r}: {choices(length, get_args(Length))}.")


def lengths_in(segment: Segment, positions: np.ndarray | None = None, side: str = "") -> np.ndarray:
    """Lengths [rows] float32, before they were rounded, of a side of rows of a segment by position; None: of all."""
    norms = segment.arrays()[f"{side}norms"]
    return np.linalg.norm(norms if positions is None else norms[positions], axis=1).astype(np.float32)


def counted(scores: np.ndarray, lengths: np.ndarray, length: Length) -> np.ndarray:
    """Products [rows, ...] as they count: as they are, or over the lengths [rows] of their rows, 0 where a row is 0.

    In the whitened metric the cosine is the relative influence of arXiv 2003.11630 (the l form): <q, G^-1 r> over the
    root of <r, G^-1 r>, which is the row's length there.
    """
    if length == "product":
        return scores
    by = lengths.reshape(-1, *[1] * (scores.ndim - 1))
    return np.divide(scores, by, out=np.zeros_like(scores), where=by > 0)


@dataclass(frozen=True)
class Scanner:
    """Scores of a side of the rows, that a codec stored under a name, with queries [queries, width] of its form; on the CPU,
    or where rows are `held`."""

    codec: Codec
    name: str
    queries: Tensor
    length: Length = "product"
    held: Held | None = None
    side: str = ""

    def taken(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a segment that are the codec's, by the names it gave them."""
        start = f"{self.side}{self.name}."
        return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}

    @functools.cached_property
    def score(self) -> Callable[[dict[str, np.ndarray], slice | np.ndarray], np.ndarray]:
        return self.codec.scorer(self.queries)

    @functools.cached_property
    def score_there(self) -> Callable[[Tensors], Tensor]:
        assert self.held is not None
        return self.codec.scorer_on(self.queries, self.held.device)

    def scores(self, segment: Segment, positions: np.ndarray | None) -> np.ndarray:
        """Scores [rows, queries] of rows of a segment by position; None: of all."""
        arrays, count = self.taken(segment.arrays()), segment.n_rows if positions is None else len(positions)
        if self.held is not None:
            name = self.side + self.name
            blocks_there = self.held.blocks(self.codec, (segment.path, name), arrays, positions)
            found = torch.cat([self.score_there(block) for block in blocks_there]).cpu().numpy()
        else:
            blocks = self.codec.blocks(count)
            found = np.concatenate([self.score(arrays, at if positions is None else positions[at]) for at in blocks])
        if self.length == "product":
            return found
        return counted(found, lengths_in(segment, positions, self.side), self.length)


def scan(
    segments: Sequence[Segment],
    scanners: Sequence[Scanner],
    wanted: np.ndarray | None = None,
    workers: int = 1,
    backend: Scanners = "threads",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per segment: numbers [rows] of its live (and wanted) rows and their scores [rows, queries] float32.

    `scanners`: of each side of the rows; their scores are added up.
    `wanted`: ascending global row numbers to restrict to; only these are read.
    `workers`: threads, or actors of a Ray cluster that sees the same files, each at a segment of its own, so that scores
    do not depend on their number.
    """
    for scanner in scanners:
        if scanner.held is not None:
            scanner.held.drop_others(segments)
        else:
            scanner.score  # noqa: B018  # made once, before threads share it
    return over_segments(functools.partial(_scanned, scanners, wanted), segments, workers, backend)


def _scanned(
    scanners: Sequence[Scanner], wanted: np.ndarray | None, segment: Segment
) -> tuple[np.ndarray, np.ndarray] | None:
    def scores(positions: np.ndarray | None) -> np.ndarray:
        return functools.reduce(np.add, (scanner.scores(segment, positions) for scanner in scanners))

    positions = positions_of(segment, wanted)
    if positions is None:
        return segment.first + np.arange(segment.n_rows), scores(None)
    if not positions.size:
        return None
    if wanted is not None:
        return segment.first + positions, scores(positions)
    return segment.first + positions, scores(None)[positions]


def positions_of(segment: Segment, wanted: np.ndarray | None) -> np.ndarray | None:
    """Positions of the live and wanted rows of a segment; None for all of them."""
    live = segment.live()
    if wanted is None:
        return None if live is None else np.flatnonzero(live)
    low, high = np.searchsorted(wanted, [segment.first, segment.first + segment.n_rows])
    positions = wanted[low:high] - segment.first
    return positions if live is None else positions[live[positions]]


Found = TypeVar("Found")


def over_segments(
    work: Callable[[Segment], Found | None],
    segments: Iterable[Segment],
    workers: int = 1,
    backend: Scanners = "threads",
) -> Iterator[Found]:
    """What `work` finds in each segment, in order, where it finds something; at most 2 * workers results wait.

    Raises: ValueError for workers < 1; for `ray` as `run_tasks`.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more.")
    if backend == "ray":
        results = run_tasks(segments, _at_work, functools.partial(_hired, work), workers, "ray")
    else:
        results = map(work, segments) if workers == 1 else _threaded(work, segments, workers)
    with contextlib.closing(results) if isinstance(results, Generator) else contextlib.nullcontext():
        yield from (found for found in results if found is not None)


def _threaded(
    work: Callable[[Segment], Found | None], segments: Iterable[Segment], workers: int
) -> Iterator[Found | None]:
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Found | None]] = deque()
        for segment in segments:
            waiting.append(pool.submit(work, segment))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def _hired(work: Callable[[Segment], Found | None]) -> Callable[[Segment], Found | None]:
    return work


def _at_work(work: Callable[[Segment], Found | None], segment: Segment) -> Found | None:
    return work(segment)


def at_resolution(scores: np.ndarray) -> np.ndarray:
    """Scores as ranks compare them, float32: rounded to 12 binary digits behind the leading one, halves away from zero.

    A grid, and a function of the score alone: the order is a strict weak one and does not depend on which other rows
    there are, nor on segments, batches and shards. Scores more than 1 / 4096 of their size apart never become equal.
    """
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)  # sign and magnitude: rounding moves the magnitude
    return ((bits + np.int32(1 << (_DROPPED - 1))) & np.int32(-1 << _DROPPED)).view(np.float32)


def ranking(scores: np.ndarray) -> np.ndarray:
    """Positions of scores [rows], best first, of equal ones (at the resolution of ranks) the first."""
    return np.argsort(-at_resolution(scores), kind="stable")


class Best:
    """The k best rows of each query so far, best first; equal scores (at the resolution of ranks) by row number.

    Memory: k numbers and scores per query.
    """

    def __init__(self, n_queries: int, k: int) -> None:
        self.k = k
        self.numbers = [np.empty(0, np.int64) for _ in range(n_queries)]
        self.scores = [np.empty(0, np.float32) for _ in range(n_queries)]

    def add(self, numbers: np.ndarray, scores: np.ndarray) -> None:
        """Considers rows `numbers` [rows] ascending, all above those before, with scores [rows, queries]."""
        floors = at_resolution(np.array([held[-1] if len(held) == self.k else -np.inf for held in self.scores]))
        above = scores > floors  # what rounds to the last one's score or below ranks behind it; what rounds up is here
        for query, floor in enumerate(floors):
            if floor == -np.inf:
                self.add_one(query, numbers, scores[:, query])
            elif len(rows := np.flatnonzero(above[:, query])):
                self.add_one(query, numbers[rows], scores[rows, query])

    def add_one(self, query: int, numbers: np.ndarray, scores: np.ndarray) -> None:
        """Considers rows for one query, with scores [rows]."""
        if len(scores) > self.k:
            rounded = at_resolution(scores)
            floor = np.partition(rounded, len(scores) - self.k)[len(scores) - self.k]
            keep = np.flatnonzero(rounded >= floor)
        else:
            keep = np.arange(len(scores))
        numbers_both = np.concatenate([self.numbers[query], numbers[keep]])
        scores_both = np.concatenate([self.scores[query], scores[keep]])
        order = ranking(scores_both)[: self.k]
        self.numbers[query], self.scores[query] = numbers_both[order], scores_both[order]


class BestGroups(Best):
    """The k groups with the highest best rows of each query, each as that row; equal scores (at the
    resolution of ranks) in order of row numbers.

    Cost: one catalogue entry for every row that beats the k-th group of its query so far; with fewer than k groups
    that is every row.
    """

    def __init__(self, n_queries: int, k: int, groups_of: Callable[[np.ndarray], Sequence[Hashable]]) -> None:
        super().__init__(n_queries, k)
        self.groups_of = groups_of
        self.held: list[dict[Hashable, tuple[float, int, float]]] = [{} for _ in range(n_queries)]  # see _consider
        self.known: dict[int, Hashable] = {}  # groups of the rows that are being added

    def add(self, numbers: np.ndarray, scores: np.ndarray) -> None:
        self.known.clear()
        super().add(numbers, scores)

    def add_one(self, query: int, numbers: np.ndarray, scores: np.ndarray) -> None:
        held, rounded = self.held[query], at_resolution(scores)
        order = np.argsort(-rounded, kind="stable")
        for start in range(0, len(order), PAGE):
            page = order[start : start + PAGE]
            if len(held) == self.k and rounded[page[0]] <= self._floor(query)[0]:
                break
            for at, group in zip(page, self._groups(numbers[page]), strict=True):
                self._consider(query, group, (float(rounded[at]), int(numbers[at]), float(scores[at])))
        ranked = sorted(held.values(), key=lambda row: (-row[0], row[1]))
        self.numbers[query] = np.array([number for _, number, _ in ranked], np.int64)
        self.scores[query] = np.array([score for _, _, score in ranked], np.float32)

    def _consider(self, query: int, group: Hashable, row: tuple[float, int, float]) -> None:
        """`row`: score at the resolution of ranks, row number, score."""
        held = self.held[query]
        if group in held:
            if row[0] > held[group][0]:
                held[group] = row
            return
        if len(held) == self.k:
            floor, worst = self._floor(query)
            if row[0] <= floor:
                return
            del held[worst]
        held[group] = row

    def _floor(self, query: int) -> tuple[float, Hashable]:
        """Rounded score and group of the last in the ranking."""
        group, row = min(self.held[query].items(), key=lambda item: (item[1][0], -item[1][1]))
        return row[0], group

    def _groups(self, numbers: np.ndarray) -> list[Hashable]:
        missing = [number for number in numbers.tolist() if number not in self.known]
        if missing:
            self.known.update(zip(missing, self.groups_of(np.array(missing)), strict=True))
        return [self.known[number] for number in numbers.tolist()]
