"""Rows to segments: the statistics pass, then chunks of rows through the model, committed as they come.

The chunk (64 rows or about 4,096 tokens, in corpus order) is the unit of computation: how it is batched does not depend
on workers, resumption or commits, so that an index comes out the same however it was built, as long as torch has one
thread, as it has in workers and on the command line. Memory: 2 * workers + 1 chunks, and the rows of one segment (at
most 64 MiB of signatures) that wait for the next commit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from tqdm import tqdm

from leaveout.corpus import Corpus, Row
from leaveout.corpus.rows import row_json
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.executor import Backend, refuse_crew, run_tasks
from leaveout.models import ModelOptions, difference
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.settings import SignatureSettings
from leaveout.readout.signature import Signer
from leaveout.readout.storage import encode
from leaveout.readout.tokens import TokenisedRow, Window, check_ids, tokenise
from leaveout.readout.whitening import whitening_digest, whitening_matrices
from leaveout.store import Record, Store

LISTED = 100  # messages that a report keeps; all are counted


@dataclass(frozen=True)
class BuildOptions:
    """How rows are read and work is done; none of it changes a signature.

    units           field whose value says which rows belong together
    skip_bad        count and list bad rows instead of stopping at the first
    workers         processes, one torch thread each
    backend         where they run: `processes` of this machine, or `ray` actors, which load the model from its path
    progress        progress on stderr
    chunk_rows, chunk_tokens        a chunk ends when it has so many rows or tokens
    commit_seconds, commit_bytes    what is computed is committed when so much time has passed, or so much has gathered
    """

    units: str | None = None
    skip_bad: bool = False
    workers: int = 1
    backend: Backend = "processes"
    progress: bool = False
    chunk_rows: int = 64
    chunk_tokens: int = 4096
    commit_seconds: float = 30.0
    commit_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        refuse_crew(self.workers, self.backend)  # here, as the statistics pass comes before the first task


@dataclass
class BuildReport:
    """What a build or an append did: counts of rows, and messages about those that were left out."""

    added: int = 0
    skipped: int = 0
    repeated: int = 0
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    def skip(self, message: str) -> None:
        self.skipped += 1
        if len(self.messages) < LISTED:
            self.messages.append(message)


@dataclass
class Chunk:
    """Rows that are computed together, with their tokens."""

    rows: list[Row] = field(default_factory=list)
    tokens: list[TokenisedRow] = field(default_factory=list)

    @property
    def windows(self) -> list[Window]:
        return [window for row in self.tokens for window in row.windows]


def record_of(row: Row, tokens: TokenisedRow) -> Record:
    """The catalogue's entry of a row."""
    extra = {
        "number": row.number,
        "form": row.form,
        "rendered": tokens.rendered,
        "responses": tokens.responses,
        "tokens": len(tokens.ids),
        "targets": tokens.n_targets,
    }
    if row.kept is not None:
        extra["kept"] = row.kept
    return Record(row.id, tokens.text, row.unit, row.meta, row.content_hash, extra, row_json(row))


def row_of(record: Record) -> Row:
    """The row that a catalogue entry was made of; chats and instructions come back as they were rendered."""
    extra = record.extra
    spans = tuple((start, end) for start, end in extra["responses"])
    return Row(
        record.id, record.text, spans, None, record.unit, record.meta, record.content_hash, extra["number"],
        rendered=extra["rendered"], kept=extra.get("kept"),
    )  # fmt: skip


# ---------------------------------------------------------------- workers


def _start_worker(
    readout: Readout | nn.Module | str, options: dict[str, Any], settings: SignatureSettings, store: str
) -> Signer:
    """A signer in a worker process, its whitening read from the store."""
    if isinstance(readout, str):
        readout = load_readout(readout, options=ModelOptions(**options))
    assert isinstance(readout, Readout)
    signer = Signer(readout, settings)
    with Store.open(store) as opened:
        if other := difference(opened.settings["model"], readout.identity()):
            raise MismatchError(f"A worker found {other} in {readout.source}: leave the model's files alone meanwhile.")
        set_whitening(signer, opened)
    return signer


def set_whitening(signer: Signer, store: Store) -> None:
    """Gives the signer the whitening matrices of the store, if it has any."""
    arrays = store.side("whitening") or {}
    device = signer.readout.device
    signer.whitening = {name: torch.tensor(np.array(value)).to(device, signer.dtype) for name, value in arrays.items()}


def _work(signer: Signer, task: tuple[int, list[Window]]) -> dict[str, np.ndarray]:
    n_rows, windows = task
    vectors = signer.rows(windows, n_rows)
    finite = torch.isfinite(vectors).all(1).cpu().numpy()
    return {**encode(torch.nan_to_num(vectors), signer.settings.storage), "finite": finite}


# ---------------------------------------------------------------- statistics


def add_whitening(store: Store, signer: Signer, corpus: Corpus, options: BuildOptions) -> None:
    """Runs the statistics pass over a sample of the corpus and stores the whitening matrices, once per index."""
    if not signer.settings.whitens or store.side("whitening") is not None:
        return
    settings, report = signer.settings, BuildReport()
    sample = _numbered(_tokenised(corpus.sample(settings.sample_rows, settings.seed), signer, options, report))
    windows = [window for _, tokens in sample for window in tokens.windows]
    if not windows:
        raise FormatError(f"{corpus.name} has no rows to index: give a corpus with at least one row.")
    with _progress(len(windows), "statistics", "window", options) as bar:
        matrices = whitening_matrices(signer, windows, bar.update)
    arrays = {name: matrix.cpu().numpy() for name, matrix in matrices.items()}
    rows = len({window.row for window in windows})
    positions = sum(len(window.positions) for window in windows)
    facts = {"rows": rows, "positions": positions, "seed": settings.seed, "digest": whitening_digest(arrays)}
    store.set_state("statistics", facts)
    store.put_side("whitening", arrays)  # last: a build that finds it skips the pass


def _numbered(rows: Iterable[tuple[Row, TokenisedRow]]) -> list[tuple[Row, TokenisedRow]]:
    """The rows with their windows' row numbers counted from 0."""
    return [
        (row, replace(tokens, windows=[replace(window, row=number) for window in tokens.windows]))
        for number, (row, tokens) in enumerate(rows)
    ]


def _tokenised(
    rows: Iterable[Row], signer: Signer, options: BuildOptions, report: BuildReport
) -> Iterator[tuple[Row, TokenisedRow]]:
    readout = signer.readout
    for row in rows:
        try:
            tokens = tokenise(row, 0, readout.tokenizer, signer.settings, readout.context)
        except FormatError as error:
            if not options.skip_bad:
                raise
            report.skip(str(error))
            continue
        check_ids([tokens], readout.vocabulary)
        yield row, tokens


# ---------------------------------------------------------------- rows


def add_rows(
    store: Store, readout: Readout, signer: Signer, rows: Iterable[Row], total: int, options: BuildOptions, append: bool
) -> BuildReport:
    """Adds rows to an open store; what is committed survives anything that happens later.

    `append`: rows whose content is there already are counted as repeated, not added again. Otherwise a row without an
    id of its own that repeats another gets that row's id with a number behind it.
    Raises: FormatError for an id that two different rows share, or a signature that is not finite (unless skip_bad).
    """
    report, began = BuildReport(), time.monotonic()
    pending = _Pending(store, options)
    names = _Names(store, pending, options, report, append)
    fresh = names.admit(rows)
    chunks: dict[int, Chunk] = {}

    def tasks() -> Iterator[tuple[int, list[Window]]]:
        source = _tokenised(fresh, signer, options, report)
        for number in itertools.count():
            piece = _numbered(_next_chunk(source, options))
            if not piece:
                return
            chunks[number] = Chunk([row for row, _ in piece], [tokens for _, tokens in piece])
            yield len(piece), chunks[number].windows

    start = functools.partial(_same, signer)
    if options.workers > 1 or options.backend != "processes":
        if readout.source is None and options.backend == "ray":
            raise UnsupportedError("Ray workers load the model by themselves: give its path or id, not a loaded model.")
        start = _worker_start(readout, signer.settings, store)
    results = run_tasks(tasks(), _work, start, options.workers, options.backend)
    with _progress(total, "index", "row", options) as bar, contextlib.closing(results):
        for number, arrays in enumerate(results):
            chunk = chunks.pop(number)
            finite = arrays.pop("finite")
            for row in itertools.compress(chunk.rows, ~finite):
                problem = f"Row {row.id!r} has a signature that is not finite: run `leaveout doctor` on the model"
                if not options.skip_bad:
                    pending.commit()
                    raise FormatError(problem + ", or leave the row out with skip_bad.")
                report.skip(problem)
            records = [record_of(row, tokens) for row, tokens in zip(chunk.rows, chunk.tokens, strict=True)]
            pending.add(
                list(itertools.compress(records, finite)), {key: value[finite] for key, value in arrays.items()}
            )
            if number == 0:  # what an earlier run did is no part of this run's speed
                bar.initial = bar.n = chunk.rows[0].number
            bar.update(chunk.rows[-1].number + 1 - bar.n)
    readout.refuse_changes()
    pending.commit()
    report.added, report.seconds = pending.added, time.monotonic() - began
    return report


def _next_chunk(
    source: Iterator[tuple[Row, TokenisedRow]], options: BuildOptions
) -> Iterator[tuple[Row, TokenisedRow]]:
    n_tokens = 0
    for row, tokens in itertools.islice(source, options.chunk_rows):
        yield row, tokens
        n_tokens += len(tokens.ids)
        if n_tokens >= options.chunk_tokens:
            return


def _same(signer: Signer) -> Signer:
    return signer


def _worker_start(readout: Readout, settings: SignatureSettings, store: Store) -> Any:
    if readout.source is None:
        return functools.partial(_start_worker, readout, {}, settings, str(store.path))
    options = {key: value for key, value in readout.source.items() if key != "name"}
    options["device"] = str(readout.device)
    name = readout.source["name"]  # a worker elsewhere has another working directory
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return functools.partial(_start_worker, name, options, settings, str(store.path.resolve()))


class _Pending:
    """Computed rows that wait for their commit."""

    def __init__(self, store: Store, options: BuildOptions) -> None:
        self.store = store
        self.options = options
        self.records: list[Record] = []
        self.arrays: list[dict[str, np.ndarray]] = []
        self.last = time.monotonic()
        self.added = 0

    def add(self, records: Sequence[Record], arrays: dict[str, np.ndarray]) -> None:
        self.records += records
        self.arrays.append(arrays)
        size = sum(value.nbytes for piece in self.arrays for value in piece.values())
        if size >= self.options.commit_bytes or time.monotonic() - self.last >= self.options.commit_seconds:
            self.commit()

    def commit(self) -> None:
        if self.records:
            arrays = {key: np.concatenate([piece[key] for piece in self.arrays]) for key in self.arrays[0]}
            self.store.put(self.records, arrays)
            self.added += len(self.records)
        self.records, self.arrays, self.last = [], [], time.monotonic()


class _Names:
    """Gives every new row an id that no other has, looking into the store so that memory stays bounded."""

    def __init__(
        self, store: Store, pending: _Pending, options: BuildOptions, report: BuildReport, append: bool
    ) -> None:
        self.store = store
        self.pending = pending
        self.options = options
        self.report = report
        self.append = append
        self.recent: dict[str, str] = {}  # id -> content hash of rows that may not be committed yet

    def admit(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            own_id = row.id == row.content_hash[:16]
            there = self._hash_of(row.id)
            if there == row.content_hash and self.append:
                self.report.repeated += 1
                continue
            if there is not None and own_id:
                self.report.repeated += 1
                row = self._renamed(row)
            elif there is not None:
                problem = (
                    f"The id {row.id!r} of row {row.number + 1} is that of an earlier row: give every row its own id"
                )
                if not self.options.skip_bad:
                    raise FormatError(problem + ", or leave the row out with skip_bad.")
                self.report.skip(problem)
                continue
            self._forget_committed()
            self.recent[row.id] = row.content_hash
            yield row

    def _hash_of(self, id: str) -> str | None:
        if id in self.recent:
            return self.recent[id]
        return self.store.rows(self.store.numbers([id]))[0].content_hash if self.store.has([id]) else None

    def _renamed(self, row: Row) -> Row:
        for count in itertools.count(2):
            name = f"{row.id}-{count}"
            if self._hash_of(name) is None:
                return replace(row, id=name, unit=name if row.unit == row.id else row.unit)
        raise AssertionError

    def _forget_committed(self) -> None:
        if len(self.recent) >= 50_000:
            there = self.store.has(list(self.recent))
            self.recent = {id: content for id, content in self.recent.items() if id not in there}


def resume_point(store: Store, corpus: Corpus) -> int:
    """Number of source rows that the store has already dealt with, after checking that they are the same rows.

    Cost: two passes over the catalogue and one over the corpus, up to that point.
    Raises: MismatchError naming the first row that differs.
    """
    last = -1
    for record in store.iter_rows():
        last = record.extra["number"]
    if last < 0:
        return 0
    known = iter(store.iter_rows())
    record = next(known, None)
    for row in corpus:
        if record is None or row.number > last:
            break
        if row.number == record.extra["number"]:
            if row.content_hash != record.content_hash:
                raise MismatchError(
                    f"Row {row.number + 1} of {corpus.name} is not the row {record.id!r} that this unfinished index holds: "
                    "give the same corpus again, or build into a new directory."
                )
            record = next(known, None)
    if record is not None:
        raise MismatchError(
            f"{corpus.name} no longer has the row {record.id!r} that this unfinished index holds: "
            "give the same corpus again, or build into a new directory."
        )
    return last + 1


def corpus_digest(corpus: Corpus) -> str:
    """xxh3-128 over ids and contents of all rows. Cost: one pass over the corpus."""
    digest = xxhash.xxh3_128()
    for row in corpus:
        digest.update(f"{row.id} {row.content_hash}\n".encode())
    return digest.hexdigest()


def _progress(total: int, label: str, unit: str, options: BuildOptions) -> tqdm:
    return tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=not options.progress, leave=False)
