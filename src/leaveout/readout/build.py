"""From rows to an index: its directory, the statistics pass, then chunks of rows through the model, committed as they come.

The chunk (on a CPU 64 rows or about 4,096 tokens, in corpus order) is the unit of computation: how it is batched does not depend
on workers, resumption or commits, so that an index comes out the same however it was built, as long as torch has one
thread, as it has in workers and on the command line. Where a model's layers are streamed, many chunks make a wave, which
goes through the blocks together, in the batches that the chunks have alone; a killed build loses the wave it was at.
Memory: 2 * workers + 1 chunks or waves, and the rows of one segment (at most 64 MiB of signatures) that wait for the next
commit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from leaveout.corpus import Corpus, Row
from leaveout.corpus.rows import row_json
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.executor import Crew, run_tasks
from leaveout.models import ModelOptions, difference
from leaveout.readout.limits import Limits
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.opened import KIND, read_codecs, set_whitening
from leaveout.readout.preferences import Preferences, load_reference
from leaveout.readout.settings import SignatureSettings
from leaveout.readout.signature import Encoding, Signer
from leaveout.readout.tokens import TokenisedRow, Window, check_ids, tokenise
from leaveout.readout.whitening import moment_groups, whitening_digest, whitening_matrices
from leaveout.readout.wide import arrays_of
from leaveout.store import Record, Store
from leaveout.store.catalogue import CATALOGUE

Computed = tuple[int, list[Window]]  # a chunk as it is computed: its number of rows, and their windows
LISTED = 100  # messages that a report keeps; all are counted


LONG = 256  # tokens of a row, from which on a build tells its speed in tokens, too


@dataclass(frozen=True)
class Pace:
    """How many rows are computed together, and when they are kept; a killed build loses what was not committed.

    chunk_rows, chunk_tokens        a chunk ends when it has so many rows or tokens; None: as the device allows (`Limits`)
    commit_seconds, commit_bytes    what is computed is committed when so many seconds have passed, or so many bytes have
                                    gathered
    """

    chunk_rows: int | None = None
    chunk_tokens: int | None = None
    commit_seconds: float = 30.0
    commit_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class BuildOptions(Crew):
    """How rows are read and work is done, as `Index.build` says; none of it changes a signature."""

    skip_bad: bool = False
    pace: Pace = Pace()


@dataclass
class BuildReport:
    """What a build or an append did: counts of rows, and messages about those that were left out.

    added, skipped, repeated    rows that are new, bad, or there already
    seconds                     of the work, without the statistics pass
    """

    added: int = 0
    skipped: int = 0
    repeated: int = 0
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    def skip(self, message: str) -> None:
        """Counts a bad row."""
        self.skipped += 1
        if len(self.messages) < LISTED:
            self.messages.append(message)

    def add_skipped(self, corpus: Corpus) -> None:
        """Counts the bad rows of a whole corpus."""
        self.skipped += corpus.n_skipped
        self.messages = [*corpus.problems, *self.messages][:LISTED]


# ---------------------------------------------------------------- the directory


def new_settings(readout: Readout, signer: Signer, corpus: Corpus) -> dict[str, Any]:
    """What the store of a new index says about itself."""
    return {
        "kind": KIND,
        "signature": signer.settings.to_dict(),
        "codec": codecs_of(signer),
        "model": readout.identity(),
        "source": readout.source,
        "units": corpus.units,
        "corpus": corpus.name,
        "notes": [*readout.notes, *signer.notes, *corpus.notes],
        "preferences": signer.preferences.facts(),
        **({"columns": corpus.columns} if corpus.columns else {}),
    }


def codecs_of(signer: Signer) -> dict[str, Any]:
    """How rows are stored: the long form and the short one, None where there is none."""
    long = signer.codec.to_dict() if signer.settings.long == "stored" else None
    return {"long": long, "short": None if signer.short is None else signer.short.to_dict()}


def open_or_create(path: Path, wanted: dict[str, Any]) -> Store:
    """The store to write to, new or unfinished or finished with the same settings.

    Raises: MismatchError naming the first setting that differs.
    """
    if path.is_file():
        raise FileExistsError(f"{path} is a file: give a directory for the index.")
    if (path / CATALOGUE).exists():
        store = Store.open(path, write=True)
        differing = next(_differences(store.settings, wanted), None)
        if differing is None:
            return store
        store.close()
        if not _is_bare(store):
            _refuse_other(path, *differing)
        shutil.rmtree(path)
    elif path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} holds files that are no index: give an empty or a new directory for the index.")
    return Store.create(path, wanted)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in ("kind", "units"):
        if old.get(name) != new[name]:
            yield name, old.get(name), new[name]
    for group in ("signature", "model", "preferences"):
        before = old.get(group) or Preferences().facts()
        for name, value in new[group].items():
            if before.get(name) != value:
                yield name, before.get(name), value
    if old.get("codec") != new["codec"]:
        yield "codec", old.get("codec"), new["codec"]


def _is_bare(store: Store) -> bool:
    """Whether a build stopped before it kept anything, as at a bad first row: nothing is lost by beginning anew."""
    return not store.state("complete") and store.n_rows == 0 and store.side("whitening") is None


def _refuse_other(path: Path, name: str, old: Any, new: Any) -> None:
    if name == "adapters":
        raise MismatchError(
            f"{path} holds an index of another adapter than the given model has at work: give that model to resume, "
            "or another directory for a new index."
        )
    if name == "codec":
        read_codecs(old)  # refuses what a development version stored otherwise
    long = {
        "reference": "another reference model",
        "channels": "other channels",
        "template": "another chat template",
        "codec": "other parts",
    }
    other = long.get(name, f"{name} = {old!r}, not {new!r}")
    raise MismatchError(
        f"{path} holds an index with {other}: use the same settings to resume, or another directory for a new index."
    )


def refuse_other_rows(store: Store, corpus: Corpus) -> None:
    """Raises: MismatchError if a finished index is not of this corpus."""
    if store.state("corpus") != corpus_digest(corpus):
        raise MismatchError(
            f"{store.path} is the finished index of other rows than {corpus.name} now holds: add rows with append, "
            "or build into another directory."
        )


def corpus_digest(corpus: Corpus) -> str:
    """xxh3-128 over ids and contents of all rows. Cost: one pass over the corpus."""
    digest = xxhash.xxh3_128()
    for row in corpus:
        digest.update(f"{row.id} {row.content_hash}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- statistics


def add_whitening(store: Store, signer: Signer, corpus: Corpus, options: BuildOptions) -> None:
    """Runs the statistics pass over a sample of the corpus and stores the whitening matrices, once per index."""
    if not signer.settings.whitens or store.side("whitening") is not None:
        return
    settings, report = signer.settings, BuildReport()
    sample = _numbered(_tokenised(corpus.sample(settings.sample_rows, settings.seed), signer, options, report))
    windows = [
        window for _, tokens in sample for window in tokens.of_side(0).windows
    ]  # responses alone, as training has
    if not windows:
        raise FormatError(f"{corpus.name} has no rows to index: give a corpus with at least one row.")
    with _progress(len(windows) * len(moment_groups(signer)), "statistics", "window", options) as bar:
        arrays = arrays_of(whitening_matrices(signer, windows, bar.update))
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


def fill(
    store: Store, signer: Signer, corpus: Corpus, options: BuildOptions, between: tuple[int, int] | None = None
) -> BuildReport:
    """Adds what is missing of the rows of a corpus, or of those `between` two numbers, and marks the store as finished."""
    set_whitening(signer, store)
    first, end = between or (0, len(corpus))
    first = max(first, resume_point(store, corpus))
    rows = (row for row in corpus if first <= row.number < end)
    report = add_rows(store, signer, rows, end, options)
    report.add_skipped(corpus)
    if store.n_rows == 0 and between is None:
        raise FormatError(f"{corpus.name} has no rows to index: give a corpus with at least one row.")
    digest = corpus_digest(corpus)
    store.set_state("corpus", digest)
    store.set_state("complete", True)
    return report


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
    if row.weight != 1:
        extra["weight"] = row.weight
    if tokens.chosen is not None:
        extra["chosen"] = tokens.chosen
    if row.reference is not None:
        extra["reference"] = row.reference
    return Record(row.id, tokens.text, row.unit, row.meta, row.content_hash, extra, row_json(row))


def add_rows(
    store: Store, signer: Signer, rows: Iterable[Row], total: int, options: BuildOptions, append: bool = False
) -> BuildReport:
    """Adds rows to an open store; what is committed survives anything that happens later.

    `append`: rows whose content is there already are counted as repeated, not added again. Otherwise a row without an
    id of its own that repeats another gets that row's id with a number behind it.
    Raises: FormatError for an id that two different rows share, or a signature that is not finite (unless skip_bad).
    """
    report, began = BuildReport(), time.monotonic()
    pending = _Pending(store, options.pace)
    names = _Names(store, pending, options, report, append)
    fresh = names.admit(rows)
    chunks: dict[int, Chunk] = {}

    def pieces() -> Iterator[Computed]:
        source = _tokenised(fresh, signer, options, report)
        for number in itertools.count():
            piece = _numbered(_next_chunk(source, options.pace, signer.limits))
            if not piece:
                return
            chunks[number] = Chunk([row for row, _ in piece], [tokens for _, tokens in piece])
            yield len(piece), chunks[number].windows

    here = options.workers == 1 and options.backend == "processes"
    start, work = (lambda: signer, Signer.encoded_chunks) if here else (_worker_start(signer, store, options), _work)
    tasks = ([piece] for piece in pieces()) if signer.readout.stream is None else signer.waves(pieces())
    on_gpu = signer.readout.device.type == "cuda"
    results = run_tasks(tasks, work, start, options.workers, options.backend, on_gpu)
    label = "index" if signer.readout.stream is None else "index, layers streamed"
    seen = [0, 0]  # rows and tokens
    with _progress(total, label, "row", options) as bar, contextlib.closing(results):
        ahead = 1 if here and signer.readout.device.type != "cpu" else 0
        for number, arrays in enumerate(_arrived(itertools.chain.from_iterable(results), ahead)):
            chunk = chunks.pop(number)
            finite = arrays.pop("finite")
            references = arrays.pop("reference", None)
            for row in itertools.compress(chunk.rows, ~finite):
                problem = f"Row {row.id!r} has a signature that is not finite: run `leaveout doctor` on the model"
                if not options.skip_bad:
                    pending.commit()
                    raise FormatError(problem + ", or leave the row out with skip_bad.")
                report.skip(problem)
            records = [record_of(row, tokens) for row, tokens in zip(chunk.rows, chunk.tokens, strict=True)]
            if references is not None:
                for record, margin in zip(records, references.tolist(), strict=True):
                    if not math.isnan(margin):
                        record.extra["reference"] = margin
            pending.add(
                list(itertools.compress(records, finite)), {key: value[finite] for key, value in arrays.items()}
            )
            if number == 0:  # what an earlier run did is no part of this run's speed
                bar.initial = bar.n = chunk.rows[0].number
            seen = [seen[0] + len(chunk.rows), seen[1] + sum(len(row.ids) for row in chunk.tokens)]
            if seen[1] > LONG * seen[0]:
                bar.set_postfix_str(f"{seen[1] / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update(chunk.rows[-1].number + 1 - bar.n)
    signer.readout.refuse_changes()
    pending.commit()
    report.added, report.seconds = pending.added, time.monotonic() - began
    return report


Arrays = dict[str, np.ndarray]


def _arrived(chunks: Iterable[Encoding | Arrays], ahead: int) -> Iterator[Arrays]:
    """The arrays of each chunk, waited for when so many more are on their way: a device has work while rows are committed."""
    waiting: deque[Encoding | Arrays] = deque()
    for chunk in itertools.chain(chunks, itertools.repeat(None, ahead)):
        if chunk is not None:
            waiting.append(chunk)
        if waiting and (chunk is None or len(waiting) > ahead):
            first = waiting.popleft()
            yield first.arrays() if isinstance(first, Encoding) else first


def _next_chunk(
    source: Iterator[tuple[Row, TokenisedRow]], pace: Pace, limits: Limits
) -> Iterator[tuple[Row, TokenisedRow]]:
    n_tokens = 0
    for row, tokens in itertools.islice(source, pace.chunk_rows or limits.chunk_rows):
        yield row, tokens
        n_tokens += len(tokens.ids)
        if n_tokens >= (pace.chunk_tokens or limits.chunk_tokens):
            return


class _Pending:
    """Computed rows that wait for their commit."""

    def __init__(self, store: Store, pace: Pace) -> None:
        self.store = store
        self.pace = pace
        self.records: list[Record] = []
        self.arrays: list[dict[str, np.ndarray]] = []
        self.last = time.monotonic()
        self.added = 0

    def add(self, records: Sequence[Record], arrays: dict[str, np.ndarray]) -> None:
        self.records += records
        self.arrays.append(arrays)
        size = sum(value.nbytes for piece in self.arrays for value in piece.values())
        if size >= self.pace.commit_bytes or time.monotonic() - self.last >= self.pace.commit_seconds:
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


# ---------------------------------------------------------------- workers


def _worker_start(signer: Signer, store: Store, options: BuildOptions) -> Callable[[], Signer]:
    """What builds the signer in a worker process, from a model's path and options where it has them."""
    readout, settings = signer.readout, signer.settings
    if readout.source is None:
        if options.backend == "ray":
            raise UnsupportedError("Ray workers load the model by themselves: give its path or id, not a loaded model.")
        return functools.partial(_start_worker, readout, None, settings, str(store.path), *_preferences(signer))
    assert readout.options is not None
    loading = replace(readout.options, offload="none", max_memory=None)
    if readout.stream is not None:
        limit = readout.options.max_memory
        if limit is None and readout.device.type == "cpu":  # what was free is shared
            limit = readout.stream.limit // options.workers
        loading = replace(loading, offload="layers", max_memory=limit)
    name = readout.source["name"]  # a worker elsewhere has another working directory
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return functools.partial(_start_worker, name, loading, settings, str(store.path.resolve()), *_preferences(signer))


def _preferences(signer: Signer) -> tuple[float, Any, ModelOptions | None]:
    """Beta, and how a worker loads the reference model."""
    reference = signer.preferences.reference
    if reference is None:
        return signer.preferences.beta, None, None
    given, options = reference.given, reference.readout.options
    return signer.preferences.beta, str(Path(given).resolve()) if Path(str(given)).exists() else given, options


def _start_worker(
    readout: Readout | str,
    loading: ModelOptions | None,
    settings: SignatureSettings,
    store: str,
    beta: float,
    reference: Any,
    of_reference: ModelOptions | None,
) -> Signer:
    """A signer in a worker process, its whitening read from the store."""
    if isinstance(readout, str):
        readout = load_readout(readout, options=loading)
    options = of_reference or ModelOptions()
    found = None if reference is None else load_reference(reference, readout, options)
    signer = Signer(readout, settings, preferences=Preferences(beta, found))
    with Store.open(store) as opened:
        if other := difference(opened.settings["model"], readout.identity()):
            raise MismatchError(f"A worker found {other} in {readout.source}: leave the model's files alone meanwhile.")
        set_whitening(signer, opened)
    return signer


def _work(signer: Signer, chunks: list[Computed]) -> list[dict[str, np.ndarray]]:
    return [encoding.arrays() for encoding in signer.encoded_chunks(chunks)]


def _progress(total: int, label: str, unit: str, options: BuildOptions) -> tqdm:
    return tqdm(total=total, desc=label, unit=unit, file=sys.stderr, disable=not options.progress, leave=False)
