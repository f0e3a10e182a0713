"""The index: signatures of a corpus on disk, and what can be asked of it.

    index = Index.build(model, "rows.jsonl", "idx"); hits = index.search(["text"], k=10)

Conventions: scores are [query, train] in the order of `index.ids`; a positive score means that removing the row raises
the query's loss (the row helps), in units that compare rows of one query, not queries or presets with each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Corpus
from leaveout.corpus.asking import asked_row, commonest
from leaveout.corpus.chat import chosen_template
from leaveout.corpus.tokens import NoTargetError
from leaveout.errors import FormatError, MismatchError, UnsupportedError, made, require_list, require_whole
from leaveout.models import ModelOptions, difference
from leaveout.readout import ann, finding, simhash
from leaveout.readout.build import BuildReport, add_rows, set_whitening
from leaveout.readout.directory import (
    KIND,
    add_skipped,
    fill,
    open_or_create,
    refuse_former_rules,
    refuse_other_rows,
    same_place,
    split_options,
    wanted_settings,
)
from leaveout.readout.finding import Approximation, SearchOptions
from leaveout.readout.low_rank import LowRank
from leaveout.readout.merging import Places, merge_indexes
from leaveout.readout.model import Readout, load_readout, verify_readout
from leaveout.readout.queries import Queries, QueryRow, query_row
from leaveout.readout.search import Hit, Product, evened, scan
from leaveout.readout.settings import SignatureSettings, resolve_settings
from leaveout.readout.shards import shard_of, share_statistics
from leaveout.readout.signature import Signer
from leaveout.readout.storage import decode
from leaveout.readout.tokens import TokenisedRow, check_ids, tokenise
from leaveout.store import Record, Store

__all__ = ["Index", "Queries", "QueryRow"]

QUERY_RANK = 64  # singular triples of a query where rows are low-rank: all there are, up to 64 learned tokens


class Index:
    """Signatures of a corpus in a directory. Make one with `Index.build`, reopen it with `Index.open`."""

    def __init__(self, store: Store, readout: Readout | None = None) -> None:
        self._store = store
        self._readout = readout
        self._signer: Signer | None = None
        self._options: dict[str, Any] = {}  # of the model, as `open` was given them
        settings = store.settings
        if settings.get("kind") != KIND:
            raise MismatchError(f"{store.path} holds a {settings.get('kind', 'store')}, not an index: give an index.")
        refuse_former_rules(store)
        self.settings = SignatureSettings.from_dict(settings["signature"])
        self.identity: dict[str, Any] = settings["model"]
        sizes = settings["low_rank"]
        self.low_rank = None if sizes is None else LowRank(tuple((left, right) for left, right in sizes))
        self.last_report = BuildReport()

    # ---------------------------------------------------------------- making and opening

    @classmethod
    def build(
        cls,
        model: Any,
        corpus: Any,
        path: str | Path,
        preset: str | SignatureSettings = "default",
        tokenizer: Any = None,
        **options: Any,
    ) -> Index:
        """The finished index of a corpus; resumes an unfinished build, and reopens a finished one.

        `model`: path or id of a causal language model or of a peft adapter, a .gguf file, or a loaded one with `tokenizer`.
        `corpus`: anything that `Corpus.open` takes. `options`: the fields of `ModelOptions`, `BuildOptions` and
        `SignatureSettings` (device, dtype, workers, units, skip_bad, targets, temperature, ...), and two about merging:
        `shard`: only one range of the rows, into a directory below `path` ("auto" under torchrun or srun, or (number,
        count)); `statistics`: an index whose whitening is taken over instead of one from a sample of these rows.

        Raises: MismatchError if the directory holds an index with other settings (naming the one that differs).
                FormatError at a bad row, with its place and reason. UnsupportedError for a model without a readout.
        """
        shard, statistics = shard_of(options.pop("shard", None)), options.pop("statistics", None)
        path = shard.place(path)
        model_options, build_options, changes = split_options(options)
        settings = resolve_settings(preset, **changes)
        corpus = Corpus.open(corpus, units=build_options.units, skip_bad=build_options.skip_bad)
        if isinstance(model, str) and path.exists() and same_place(model, path):
            raise ValueError(f"The index cannot be written over its model in {path}: give another directory.")
        if statistics is not None:
            cls.open(statistics)
        readout = load_readout(model, tokenizer, model_options)
        if readout is model:  # whatever was done to it since it was loaded
            verify_readout(readout).identity(anew=True)
        settings = replace(settings, template=chosen_template(settings.template, readout.tokenizer))
        signer = Signer(readout, settings)
        with open_or_create(path, wanted_settings(readout, signer, corpus)) as store:
            index = cls(store, readout)
            if statistics is not None:
                share_statistics(store, statistics)
            if store.state("complete"):
                refuse_other_rows(store, corpus)
            else:
                index.last_report = fill(store, readout, signer, corpus, build_options, shard)
        return cls.open(path, readout)._with_report(index.last_report)

    @classmethod
    def merge(cls, parts: Places, path: str | Path, progress: bool = False) -> Index:
        """One index of all shards of a corpus, or of several indexes: see `leaveout.readout.merging.merge_indexes`."""
        report = merge_indexes(parts, path, progress)
        return cls.open(path)._with_report(report)

    @classmethod
    def open(cls, path: str | Path, model: Any = None, tokenizer: Any = None, **options: Any) -> Index:
        """The index in a directory. Its model is loaded when a query first needs it, from where the build found it.

        `model`, `tokenizer`: the model, if it has moved or was in memory (see `build`). `options`: the fields of
        `ModelOptions`; the device is the CPU unless given, the dtype that of the index.
        Raises: MismatchError if the model is not the one that the index was built with.
        """
        if not Path(path).is_dir():
            kind = "is a file" if Path(path).exists() else "does not exist"
            raise FileNotFoundError(f"There is no index in {path}, which {kind}: build one with `leaveout index`.")
        store = Store.open(path)
        index = cls(store)
        if not store.state("complete"):
            raise MismatchError(f"The index {path} is unfinished: run the command that built it again to finish it.")
        index._options = options
        if model is not None:
            index._readout = index._checked(load_readout(model, tokenizer, index._model_options({})))
        return index

    def _with_report(self, report: BuildReport) -> Index:
        self.last_report = report
        return self

    def _model_options(self, known: dict[str, Any]) -> ModelOptions:
        """How the model is loaded: as `open` was told, else as `known`; the dtype is that of the index."""
        names = [field.name for field in fields(ModelOptions)]
        if unknown := [name for name in self._options if name not in names]:
            raise ValueError(f"There is no option {unknown[0]!r} of a model: options are {', '.join(names)}.")
        source = self._store.settings["source"] or {}
        dtype = source.get("dtype", self.identity["dtype"])
        return ModelOptions(**{"dtype": dtype, **known, **self._options})

    def _checked(self, readout: Readout) -> Readout:
        if other := difference(self.identity, readout.identity()):
            raise MismatchError(
                f"The given model has {other} than the one that {self._store.path} was built with "
                f"(a {self.identity['family']} in {self.identity['dtype']}): give that model, or build a new index."
            )
        return readout

    @property
    def readout(self) -> Readout:
        """The model of the index, loaded on first use."""
        if self._readout is None:
            source = self._store.settings["source"]
            if source is None:
                raise MismatchError(
                    "This index was built with a model in memory: give it with Index.open(path, model, tokenizer)."
                )
            options = self._model_options({name: source[name] for name in ("revision", "trust_remote_code")})
            try:
                found = load_readout(source["name"], options=options)
            except (UnsupportedError, OSError) as error:
                raise MismatchError(
                    f"The model of this index no longer loads from {source['name']} ({error}): "
                    "say where it is now (--model, or Index.open(path, model))."
                ) from error
            self._readout = self._checked(found)
        return self._readout

    def _unchanged(self) -> Readout:
        """The model, after a quick look that it is still that of the index (see `LanguageModel.refuse_changes`)."""
        self.readout.refuse_changes()
        return self._checked(self.readout)

    @property
    def signer(self) -> Signer:
        """Computes signatures of queries: as rows are stored, but with more triples where those are low-rank."""
        if self._signer is None:
            triples = replace(self.settings, rank=QUERY_RANK, final_width=None)
            self._signer = Signer(self.readout, self.settings if self.low_rank is None else triples)
            set_whitening(self._signer, self._store)
        return self._signer

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def ids(self) -> list[str]:
        """Ids of all rows, in order. Memory: one string a row."""
        return self._store.ids()

    def __len__(self) -> int:
        return len(self._store)

    @property
    def fingerprint(self) -> str:
        """Hex digits that queries must share with the index: settings, model, tokenizer, and whitening statistics."""
        statistics = self._store.state("statistics") or {}
        parts = (self.settings.fingerprint(), *(self.identity[name] for name in ("weights", "config", "tokenizer")))
        return "-".join([*parts, str(statistics.get("digest", "plain"))])

    # ---------------------------------------------------------------- queries

    def tokenised(self, queries: Sequence[QueryRow]) -> list[TokenisedRow]:
        """Queries as rows with their windows. A text is learned as a whole; of a prompt and response, the response."""
        rows = [query_row(row, number) for number, row in enumerate(queries)]
        readout, signer = self._unchanged(), self.signer
        tokens = []
        for number, row in enumerate(rows):
            try:
                tokens.append(tokenise(row, number, readout.tokenizer, signer.settings, readout.context))
            except NoTargetError:
                raise FormatError(
                    f"Query {number + 1} has no token that could be predicted: give more words, or a prompt before it."
                ) from None
        check_ids(tokens, readout.vocabulary)
        return tokens

    def encode(self, queries: Sequence[QueryRow] | Queries) -> Queries:
        """Signatures of queries: texts, or rows in any form that a corpus has.

        Raises: FormatError for a query without a token to learn, MismatchError for queries made with another index.
        """
        if isinstance(queries, Queries):
            if queries.fingerprint != self.fingerprint:
                raise MismatchError(
                    "These queries were made with other settings, another model or other statistics than this index: "
                    "encode them again with this index."
                )
            return queries
        require_list("queries", queries, "queries")
        if not queries:
            raise ValueError("queries is empty: give at least one query.")
        tokens = self.tokenised(queries)
        vectors = self.signer.rows([window for row in tokens for window in row.windows], len(tokens))
        if not bool(torch.isfinite(vectors).all()):
            raise FormatError("A query has a signature that is not finite: run `leaveout doctor` on the model.")
        return Queries(vectors.float().cpu(), tuple(row.text for row in tokens), self.fingerprint)

    @property
    def forms(self) -> dict[str, int]:
        """How many rows have which form: text, prompt, instruction, messages. Cost: one pass over the catalogue."""
        return self._store.count("form")

    def ask(self, prompt: str | None, answer: str, form: str | None = None) -> dict[str, Any]:
        """A row that asks for an answer after a prompt, in the commonest form of this index's rows, or in another."""
        return asked_row(answer, prompt, form if form or prompt is None else commonest(self.forms))

    # ---------------------------------------------------------------- answers

    def search(
        self, queries: Sequence[QueryRow] | Queries, k: int = 10, where: str | None = None, **options: Any
    ) -> list[list[Hit]]:
        """The k rows with the highest scores for each query, best first: `hits[query][rank]`.

        Scores that are equal in 12 binary digits behind the leading one rank by row number (`search.at_resolution`).
        `where`: an SQL expression over id, unit, text and the rows' fields, such as "source = 'web'".
        `options`: the fields of `SearchOptions` (approximate, rescore, group_by, unique, workers, backend).
        Cost: one exact scan of the stored signatures for all queries together, unless `approximate` is given.
        """
        how, wanted = self.refuse_search(k, where, **options)
        found = finding.find(self, self.encode(queries), k, wanted, how)
        return [self.hits(numbers, scores) for numbers, scores in found]

    def refuse_search(self, k: int, where: str | None, **options: Any) -> tuple[SearchOptions, np.ndarray | None]:
        """Refuses what `search` could not do, before its model is loaded; what it may do, and the rows of `where`."""
        require_whole("k", k, 1)
        how = made(SearchOptions, "option of search", options)
        finding.refuse(self, how)
        return how, self._wanted(where)

    def prepare(self, kind: Approximation = "simhash", bits: int = simhash.BITS) -> None:
        """Makes the side file that `search(approximate=kind)` reads, or adds the rows that it lacks.

        `bits`: sign bits per row, for `simhash`. Deleting rows needs no new preparation, appending and purging do.
        Raises: UnsupportedError for rows stored by singular triples, or without the package that `faiss` needs.
        """
        finding.prepare(self, kind, bits)

    def score(self, queries: Sequence[QueryRow] | Queries) -> np.ndarray:
        """All scores [query, train] float32, columns in the order of `ids`. Memory: 4 bytes per query and row."""
        encoded = self.encode(queries)
        scores = np.empty((len(encoded), len(self)), np.float32)
        start = 0
        for numbers, part in scan(self._store.segments(), self.product(encoded.vectors)):
            scores[:, start : start + len(numbers)] = part.T
            start += len(numbers)
        return scores

    def hits(self, numbers: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """Hits of row numbers and their scores, ranked in the given order."""
        records = self._store.rows(numbers)
        return [
            Hit(rank, record.id, float(score), record.text, record.meta, record.row)
            for rank, (record, score) in enumerate(zip(records, scores, strict=True), start=1)
        ]

    @property
    def store(self) -> Store:
        """The store at the version that this index reads."""
        return self._store

    def product(self, vectors: Tensor) -> Product:
        """A function from stored rows [rows, width] to their products [rows, queries] with vectors [queries, width]."""
        if self.low_rank is not None:
            return Product(self.low_rank.product(vectors), degree=2)
        transposed = evened(vectors).t().contiguous()
        return Product(lambda rows: (rows @ transposed)[:, : len(vectors)])

    def directions(self, numbers: np.ndarray) -> Tensor:
        """Stored signatures [rows, width] of rows by number, of unit length; zero where a row is zero."""
        order = np.sort(numbers)
        parts = []
        for segment in self._store.segments():
            low, high = np.searchsorted(order, [segment.first, segment.first + segment.n_rows])
            if low < high:
                arrays, at = segment.arrays(), order[low:high] - segment.first
                parts.append(decode({name: values[at] for name, values in arrays.items()}))
        vectors = torch.cat(parts)[np.searchsorted(order, numbers)]
        length = vectors.norm(dim=1) if self.low_rank is None else self.low_rank.norm(vectors).sqrt()
        return vectors / length.clamp_min(1e-30)[:, None]

    def lengths(self, queries: Queries) -> Tensor:
        """Lengths [queries] of query signatures."""
        return queries.vectors.norm(dim=1) if self.low_rank is None else self.low_rank.norm(queries.vectors)

    def _wanted(self, where: str | None) -> np.ndarray | None:
        if where is not None and (not isinstance(where, str) or not where.strip()):
            raise ValueError(f"where is {where!r}: give an SQL expression such as source = 'web', or leave it out.")
        return None if where is None else np.sort(self._store.select(where))

    def ids_where(self, where: str) -> list[str]:
        """Ids of the rows that satisfy an SQL expression (see `search`)."""
        return [record.id for record in self._store.rows(self._store.select(where))]

    def records(self, ids: Sequence[str]) -> list[Record]:
        """Catalogue entries of rows by id. Raises: ValueError naming an id that is not in the index."""
        return self._store.rows(self._store.numbers(ids))

    def stored_scores(self, queries: Queries, ids: Sequence[str]) -> np.ndarray:
        """Scores [query, id] float32 of given rows, as `search` would show them."""
        numbers = np.asarray(self._store.numbers(ids))
        order = np.sort(numbers)
        found = [part for _, part in scan(self._store.segments(), self.product(self.encode(queries).vectors), order)]
        return np.concatenate(found)[np.searchsorted(order, numbers)].T

    def scan(self, queries: Queries, where: str | None = None) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Row numbers [rows] and scores [rows, queries], segment by segment."""
        return scan(self._store.segments(), self.product(self.encode(queries).vectors), self._wanted(where))

    def select(self, wanted: Sequence[QueryRow] | Queries, n: int = 1000, **options: Any) -> list[Hit]:
        """The n rows whose training would help the wanted rows most: see `leaveout.readout.select.select_rows`."""
        from leaveout.readout.select import select_rows

        return select_rows(self, wanted, n, **options)

    def explain(self, query: QueryRow, id: str) -> Any:
        """Which tokens of a row answer which of the query: see `leaveout.readout.explain.explain_pair`."""
        from leaveout.readout.explain import explain_pair

        return explain_pair(self, query, id)

    # ---------------------------------------------------------------- changing

    def append(self, rows: Any, **options: Any) -> BuildReport:
        """Adds rows with the settings and whitening of the index; rows that it has already are counted, not added.

        Raises: FormatError for a bad row, or an id that another row has. What was committed before stays.
        """
        _, build_options, changes = split_options(options)
        if changes:
            raise ValueError(f"An index keeps its settings: {sorted(changes)[0]!r} cannot be changed by append.")
        units = build_options.units or self._store.settings["units"]
        corpus = Corpus.open(rows, units=units, skip_bad=build_options.skip_bad)
        readout = self._unchanged()
        readout.identity(anew=True)  # in full, as rows are written
        signer = Signer(self._checked(readout), self.settings)
        with Store.open(self.path, write=True) as store:
            set_whitening(signer, store)
            report = add_rows(store, readout, signer, corpus, len(corpus), build_options, append=True)
        add_skipped(report, corpus)
        self._store.refresh()
        return report

    def delete(self, ids: Collection[str]) -> int:
        """Hides rows from every later search, score and selection; returns how many there were. See `purge`."""
        require_list("ids", ids, "ids")
        with Store.open(self.path, write=True) as store:
            count = store.delete(ids)
        self._store.refresh()
        return count

    def purge(self) -> dict[str, int]:
        """Removes the bytes and texts of deleted rows from the files, and proves it; returns counts.

        The side files of `prepare` go first, as they hold traces of the deleted rows: prepare them again.
        """
        simhash.remove(self.path)
        ann.remove(self.path)
        with Store.open(self.path, write=True) as store:
            counts = store.purge()
        self._store.refresh()
        return counts

    def check(self) -> list[str]:
        """What is wrong with the files, one sentence each; empty when all is well. Cost: reads everything once."""
        return self._store.check()

    def info(self) -> dict[str, Any]:
        """Facts: rows, bytes, settings, model, statistics, notes."""
        settings = self._store.settings
        facts = {key: settings[key] for key in ("corpus", "units", "source", "model", "signature", "notes")}
        return {**self._store.info(), "forms": self.forms, "statistics": self._store.state("statistics"), **facts}
