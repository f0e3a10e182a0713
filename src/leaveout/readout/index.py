"""The index: signatures of a corpus on disk, and what can be asked of it.

    index = Index.build(model, "rows.jsonl", "idx"); hits = index.search(["text"], k=10)

Conventions: scores are [query, train] in the order of `index.ids`; a positive score means that removing the row raises
the query's loss (the row helps), in units that compare rows of one query, not queries or presets with each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.corpus import Corpus
from leaveout.corpus.chat import Template, chosen_template
from leaveout.corpus.rows import asked_row, commonest
from leaveout.errors import MismatchError, require_list
from leaveout.executor import Backend
from leaveout.models import ModelOptions, Offload
from leaveout.quantities import byte_count
from leaveout.readout.build import (
    BuildOptions,
    BuildReport,
    Pace,
    add_rows,
    add_whitening,
    fill,
    new_settings,
    open_or_create,
    refuse_other_rows,
)
from leaveout.readout.columns import with_columns
from leaveout.readout.explain import Explanation, explain_rows
from leaveout.readout.groups import GroupScore, group_scores, set_scores
from leaveout.readout.model import load_readout, verify_readout
from leaveout.readout.opened import EncodedQueries, OpenIndex, QueryRow, set_whitening
from leaveout.readout.parts import Ask, Places, copy_statistics, merge_indexes, shard_of, share_statistics
from leaveout.readout.preferences import Preferences, load_reference
from leaveout.readout.rerank import Refinement
from leaveout.readout.scan import Length, Scanners, check_length
from leaveout.readout.search import Hits, SearchOptions, find, planned, refuse
from leaveout.readout.select import Combine, select_rows
from leaveout.readout.settings import Long, SignatureSettings, Targets, resolve_settings
from leaveout.readout.shortlist import SearchPlan, measured_recall
from leaveout.readout.signature import Signer
from leaveout.store import Store


class Index(OpenIndex):
    """Signatures of a corpus in a directory. Make one with `Index.build`, reopen it with `Index.open`."""

    last_report = BuildReport()
    """What the build or merge did that gave this index."""

    # ---------------------------------------------------------------- making and opening

    @classmethod
    def build(
        cls,
        model: Any,
        corpus: Any,
        path: str | Path,
        preset: str | SignatureSettings = "default",
        tokenizer: Any = None,
        *,
        targets: Targets | None = None,
        temperature: float | None = None,
        template: Template | None = None,
        bytes_per_row: int | None = None,
        long: Long | None = None,
        units: str | None = None,
        skip_bad: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        offload: Offload = "auto",
        max_memory: int | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        workers: int = 1,
        backend: Backend = "processes",
        progress: bool = False,
        shard: Ask = None,
        statistics: str | Path | None = None,
        beta: float = Preferences.beta,
        reference: Any = None,
        pace: Pace = Pace(),  # noqa: B008  # frozen
    ) -> Index:
        """The finished index of a corpus; resumes an unfinished build, and reopens a finished one.

            index = Index.build("HuggingFaceTB/SmolLM2-135M", "rows.jsonl", "idx", units="source", workers=2)

        model           path or id of a causal language model or of a peft adapter, a .gguf file, or a loaded one, with
                        its `tokenizer`
        corpus          anything that `Corpus.open` takes: a file, a directory of `datasets`, a list of texts or rows
        path            directory of the index
        preset          `default`, `residual`, `similarity`, `paper`, `paper-responses`, or any settings, such as
                        `dataclasses.replace(PRESETS["default"], temperature=2.0)`
        targets         which tokens are learned: `response` (prompts are context only), `all`, or `both`, each as a side of
                        the row that a search can weigh (`prompt_weight`); None: as the preset says
        temperature     of the softmax; None: as the preset says
        template        how chats and instructions become text (see `SignatureSettings`)
        bytes_per_row   of a stored row; None: as the preset says, 16384 of `default` (see `SignatureSettings`)
        long            `none`: only short forms are kept, and the rows of a search's list are encoded anew from their
                        texts; None: as the preset says
        units           field whose value says which rows belong together; None: every row is its own unit
        skip_bad        count and list bad rows instead of stopping at the first
        dtype           of the model: float32, bfloat16, float16, float64, or auto, as it is stored
        device          cpu, cuda, cuda:1, ..., or auto: cuda where there is one; of several the one of this process (worker
                        i takes cuda:i, a process of torchrun that of its LOCAL_RANK)
        offload         `layers`: the model's blocks stay in its safetensors files, and each is read once for many rows;
                        `none`: the whole model is loaded; `auto`: `layers` where it does not fit. The index is the same
        max_memory      for the weights of each process and for what waits while layers are streamed: bytes, or a text such
                        as 8GB; None: four fifths of what is free, half of it on a GPU
        device_map      `auto`: accelerate shares the model out over several devices; or a map of its own
        revision        of a model that is named by id
        trust_remote_code   run code that a model ships
        workers         processes, one torch thread each
        backend         where they run: `processes` of this machine, or `ray` actors, which load the model from its path
        progress        bars on stderr
        shard           only one range of the rows, into a directory below `path`: (number, count), or "auto" under torchrun
                        or srun
        statistics      an index whose whitening is taken over instead of one from a sample of these rows, so that both merge
        beta            of DPO, for preference rows
        reference       the model that preference rows are held against: as `model`, or `base` for the model without its
                        adapters; None: the model itself, so that every pair counts as in the first step of training
        pace            rows computed together, and when they are committed

        Raises: MismatchError if the directory holds an index with other settings (naming the one that differs).
                FormatError at a bad row, with its place and reason. UnsupportedError for a model without a readout.
        """
        part, options = shard_of(shard), BuildOptions(workers, backend, progress, skip_bad, pace)
        path = part.place(path)
        changes = {
            "targets": targets,
            "temperature": temperature,
            "template": template,
            "bytes_per_row": bytes_per_row,
            "long": long,
        }
        settings = resolve_settings(preset, **{name: value for name, value in changes.items() if value is not None})
        corpus = Corpus.open(corpus, units=units, skip_bad=skip_bad)
        if (
            isinstance(model, str)
            and path.exists()
            and Path(model).exists()
            and Path(model).resolve() == path.resolve()
        ):
            raise ValueError(f"The index cannot be written over its model in {path}: give another directory.")
        if statistics is not None:
            cls.open(statistics)
        loading = ModelOptions(
            dtype, device, revision, trust_remote_code, offload, byte_count(max_memory, "max_memory"), device_map
        )
        readout = load_readout(model, tokenizer, loading)
        if readout is model:  # whatever was done to it since it was loaded
            verify_readout(readout).identity(anew=True)
        settings = replace(settings, template=chosen_template(settings.template, readout.tokenizer))
        referred = None if reference is None else load_reference(reference, readout, loading)
        signer = Signer(readout, settings, preferences=Preferences(beta, referred))
        report = BuildReport()
        with open_or_create(path, new_settings(readout, signer, corpus)) as store:
            if statistics is not None:
                share_statistics(store, statistics)
            if store.state("complete"):
                refuse_other_rows(store, corpus)
            else:
                if part.number:
                    copy_statistics(store, signer, part)
                else:
                    add_whitening(store, signer, corpus, options)
                report = fill(store, signer, corpus, options, None if part.of == 1 else part.bounds(len(corpus)))
            cls.open(path, readout)._measure_recall(store)
        return cls.open(path, readout)._with_report(report)

    @classmethod
    def merge(cls, parts: Places, path: str | Path, progress: bool = False) -> Index:
        """One index of its parts, in their order; goes on with a merge that was killed. The parts stay.

            whole = Index.merge("shards", "idx")

        parts   the directory that shards were built in, or the directories of all of them; rows get the ids that one process
                would have given. Or directories of other indexes, built with the same `statistics`; then a row that an
                earlier part has under the same id and with the same content is counted as repeated, not added again
        path    directory of the new index

        Memory: one segment (64 MiB) with its texts.
        Raises: MismatchError naming a part that is missing, unfinished, or of another model, setting or whitening.
                FormatError naming an id that two different rows have, or a part that is damaged.
        """
        report = merge_indexes(parts, path, progress)
        return cls.open(path)._with_report(report)

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        offload: Offload | None = None,
        max_memory: int | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
    ) -> Index:
        """The index in a directory. Its model is loaded when a query first needs it, from where the build found it.

        model, tokenizer    the model, if it has moved or was in memory (see `build`)
        dtype               None: that of the index
        device              None: the CPU
        offload, max_memory, device_map     as of `build`; None: `auto`, four fifths of what is free (half on a GPU), no map
        revision, trust_remote_code     None: as the build was told
        Raises: MismatchError if the model is not the one that the index was built with.
        """
        if not Path(path).is_dir():
            kind = "is a file" if Path(path).exists() else "does not exist"
            raise FileNotFoundError(f"There is no index in {path}, which {kind}: build one with `leaveout index`.")
        loading = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
        loading |= {"offload": offload, "max_memory": byte_count(max_memory, "max_memory"), "device_map": device_map}
        index = cls(Store.open(path), {name: value for name, value in loading.items() if value is not None})
        if not index.store.state("complete"):
            raise MismatchError(f"The index {path} is unfinished: run the command that built it again to finish it.")
        if model is not None:
            index.take(load_readout(model, tokenizer, index.model_options(elsewhere=True)))
        return index

    def _with_report(self, report: BuildReport) -> Index:
        self.last_report = report
        return self

    # ---------------------------------------------------------------- asking

    @property
    def forms(self) -> dict[str, int]:
        """How many rows have which form: text, prompt, instruction, messages. Cost: one pass over the catalogue."""
        return self.store.count("form")

    def ask(self, prompt: str | None, answer: str, form: str | None = None) -> dict[str, Any]:
        """A row that asks for an answer after a prompt, in the commonest form of this index's rows, or in another."""
        return asked_row(answer, prompt, form if form or prompt is None else commonest(self.forms))

    def search(
        self,
        queries: Sequence[QueryRow] | EncodedQueries,
        k: int = 10,
        where: str | None = None,
        *,
        length: Length = "cosine",
        shortlist: int | None = None,
        exact: bool = False,
        reencode: int = 0,
        rerank: int = 0,
        refine: Refinement | None = None,
        group_by: str | None = None,
        unique: bool | float = False,
        workers: int = 1,
        backend: Scanners = "threads",
        prompt_weight: float | None = None,
        controls: bool | Sequence[str] = False,
    ) -> list[Hits]:
        """The k rows with the highest scores for each query, best first: `hits[query][rank]`.

            index.search(["The tower is in Lyon"], k=5, where="source = 'web'", unique=True)

        Scores that are equal in 12 binary digits behind the leading one rank by row number (`scan.at_resolution`).
        queries         texts, rows in any form that a corpus has, or what `encode` gave
        where           an SQL expression over id, unit, text and the rows' fields; only rows that satisfy it are ranked
        length          how a row's length counts: `cosine`, not at all, so that rows come first that point where the query
                        does, however well the model has learned them; `product`, as it is, so that scores can be added up,
                        but rows that are badly learned come first
        shortlist       rows whose scores are exact, the best by their short form; None: as many as held 95 % of the best
                        ten when the index was built, and all rows of a small index
        exact           True: all rows are scored exactly, from their long form
        reencode        rows, the best so far, that are encoded anew by the model, so that their scores have no rounding
        rerank          rows, the best so far, that are scored once more through the whole model, along the query's gradient
                        over all trained parameters: two forward passes a row
        refine          a `Refinement`: what the run's optimizer and curvature make of that gradient; then `rerank` is 100 if
                        it is not given
        group_by        field, or `unit`: one hit per value, its best row; rows without the field are one group
        unique          True: of rows with the same content only the best; a number: of rows whose signatures have a cosine
                        above it, too
        workers         of the scan; the hits do not depend on them
        backend         what they are: `threads`, or actors of a `ray` cluster
        prompt_weight   of an index with `targets="both"`: what prompts count, from 0 (responses alone) to 1 (prompts alone). A
                        score is (1 - weight) times that of the responses plus weight times that of the prompts, cosines
                        in units of their size over rows; None: 0.7 by cosine, 0 by product. A side that the query does
                        not have, as the prompt of a text, counts 0, so that the other decides. `rerank` counts both alike
        controls        True: whether anything but the query explains its hits, `hits[query].controls`; or other answers of
                        the same form to compare with, one, or one for each query (see `leaveout.readout.controls`)
        Cost: one scan for all queries together, of the short form and of the list's long form: see `plan_search`.
        """
        options = SearchOptions(
            length, shortlist, exact, reencode, rerank, refine, group_by, unique, workers, backend, prompt_weight
        )
        return find(self, queries, k, where, options, controls)

    def plan_search(
        self,
        k: int = 10,
        where: str | None = None,
        *,
        length: Length = "cosine",
        shortlist: int | None = None,
        exact: bool = False,
        reencode: int = 0,
        rerank: int = 0,
    ) -> SearchPlan:
        """What a search with these arguments reads, and how many of the best rows its list may hold."""
        options = SearchOptions(length, shortlist, exact, reencode, rerank)
        return planned(self, k, refuse(self, k, where, options), options)

    def score(
        self,
        queries: Sequence[QueryRow] | EncodedQueries,
        *,
        length: Length = "product",
        prompt_weight: float | None = None,
    ) -> np.ndarray:
        """All scores [query, train] float32, columns in the order of `ids`. Memory: 4 bytes per query and row.

        length, prompt_weight   see `search`; sums over sets of rows predicted retraining best with `product`
        """
        check_length(length)
        self.checked_weight(length, prompt_weight)
        encoded = self.encode(queries)
        vectors = self.weighed(encoded.vectors, self.scales(encoded.vectors, length, prompt_weight))
        scores = np.empty((len(encoded), len(self)), np.float32)
        start = 0
        for numbers, part in self.scan(vectors, length=length):
            scores[:, start : start + len(numbers)] = part.T
            start += len(numbers)
        return scores

    def add_scores(
        self,
        dataset: Any,
        queries: Sequence[QueryRow] | EncodedQueries,
        columns: Sequence[str] = ("score",),
        *,
        length: Length = "product",
        prompt_weight: float | None = None,
    ) -> Any:
        """A `datasets.Dataset` with a column of its rows' scores for each query.

            rows = index.add_scores(rows, ["The tower is in Lyon"]).sort("score", reverse=True)

        dataset    rows of the index, in any order; they are found by their ids
        columns    a name for each query
        length, prompt_weight   see `score`
        Raises: MismatchError for a row that is not in the index; ValueError for a column that the dataset has.
        """
        rows = Corpus.open(dataset, columns=self.store.settings.get("columns"))
        scores = self.score(queries, length=length, prompt_weight=prompt_weight)
        return with_columns(dataset, self.ids, scores, columns, rows)

    def group_scores(
        self,
        queries: Sequence[QueryRow] | EncodedQueries,
        by: str = "source",
        where: str | None = None,
        *,
        together: bool = False,
    ) -> list[list[GroupScore]]:
        """What whole groups of rows, such as sources, did to each query: sums of their scores, the highest first.

            for group in index.group_scores(["The tower is in Lyon"], by="source")[0]: print(group.name, group.total)

        by          a field of the rows, or `unit`; rows without the field are one group
        where       an SQL expression, as in `search`
        together    True: also what they did as rows that leave together, without others to stand in for them; for groups
                    of at most 500 rows, a product of every two of them
        Memory: what is returned, and a row number for each row of groups of at most 500 rows.
        """
        return group_scores(self, self.encode(queries), by, where, together)

    def set_scores(
        self,
        queries: Sequence[QueryRow] | EncodedQueries,
        sets: Mapping[str, Collection[str]],
        *,
        together: bool = True,
    ) -> list[list[GroupScore]]:
        """What sets of rows, by their ids, did to each query: `scores[query][set]`, as `group_scores` has it of groups.

        Nothing of this is calibrated by retraining: sets can be ranked by it, and no loss be told.
        Raises: ValueError for an unknown id, and for a set that is empty or holds all rows.
        """
        return set_scores(self, self.encode(queries), sets, together)

    def explain(
        self, query: QueryRow, id: str, *, length: Length = "cosine", prompt_weight: float | None = None
    ) -> Explanation:
        """The score of a query and a row of the index, split over pairs of their tokens.

            found = index.explain("The tower is in Lyon", "row-17"); found.row_weights

        length, prompt_weight   see `search`: the score is what a search with the same shows
        Cost:   a forward pass for each side of each of the two.
        Raises: ValueError for an id that is not in the index.
        """
        return explain_rows(self, query, [id], length, prompt_weight)[0]

    def select(
        self,
        wanted: Sequence[QueryRow] | EncodedQueries,
        n: int = 1000,
        unwanted: Sequence[QueryRow] | EncodedQueries | None = None,
        combine: Combine = "mean",
        where: str | None = None,
        *,
        length: Length = "product",
        prompt_weight: float | None = None,
    ) -> Hits:
        """The n rows whose training would help the wanted rows most, best first.

        unwanted    rows that the model should not become good at
        combine     `mean`: score against the mean of the wanted signatures, each of unit length so that long rows have no
                    more say, minus that of the unwanted ones; `rrf`: sum over wanted rows of 1 / (60 + rank), minus that
                    over unwanted ones
        where       an SQL expression, as in `search`
        length, prompt_weight   see `search`; what training on a row would change grows with its length, so that `product` is
                    the rule
        Memory: `rrf` holds 16 bytes per row of the index, `mean` n rows.
        """
        return select_rows(self, wanted, unwanted, n, combine, where, length, prompt_weight)

    # ---------------------------------------------------------------- changing

    def append(
        self,
        rows: Any,
        *,
        units: str | None = None,
        skip_bad: bool = False,
        workers: int = 1,
        backend: Backend = "processes",
        progress: bool = False,
        reference: Any = None,
        pace: Pace = Pace(),  # noqa: B008  # frozen
    ) -> BuildReport:
        """Adds rows with the settings and whitening of the index; rows that it has already are counted, not added.

        rows    anything that `Corpus.open` takes
        units   field whose value says which rows belong together; None: as the build was told. The others as in `build`
        reference   the model that the build held preference rows against, where it did
        Raises: FormatError for a bad row, or an id that another row has. What was committed before stays.
        """
        options = BuildOptions(workers, backend, progress, skip_bad, pace)
        corpus = Corpus.open(rows, units=units or self.store.settings["units"], skip_bad=skip_bad)
        readout = self.unchanged()
        readout.identity(anew=True)  # in full, as rows are written
        preferences = self.preferences(reference)
        signer = self.fitting(Signer(self.checked(readout), self.settings, preferences=preferences))
        with Store.open(self.path, write=True) as store:
            set_whitening(signer, store)
            report = add_rows(store, signer, corpus, len(corpus), options, append=True)
            self.store.refresh()
            self._measure_recall(store)
        report.add_skipped(corpus)
        self.store.refresh()
        return report

    def _measure_recall(self, store: Store) -> None:
        """Writes the table of short lists (see `measured_recall`), where there is none yet and there are enough rows."""
        if store.state("recall") is None and (recall := measured_recall(self)) is not None:
            store.set_state("recall", recall)

    def delete(self, ids: Collection[str]) -> int:
        """Hides rows from every later search, score and selection; returns how many there were. See `purge`."""
        require_list("ids", ids, "ids")
        with Store.open(self.path, write=True) as store:
            count = store.delete(ids)
        self.store.refresh()
        return count

    def purge(self) -> dict[str, int]:
        """Removes the bytes and texts of deleted rows from the files, and proves it; returns counts."""
        with Store.open(self.path, write=True) as store:
            counts = store.purge()
        self.store.refresh()
        return counts

    def check(self) -> list[str]:
        """What is wrong with the files, one sentence each; empty when all is well. Cost: reads everything once."""
        return self.store.check()

    def info(self) -> dict[str, Any]:
        """Facts: rows, bytes, settings, stored form, model, statistics, notes."""
        settings = self.store.settings
        facts = {key: settings[key] for key in ("corpus", "units", "source", "model", "signature", "codec", "notes")}
        facts["preferences"] = self.preference_facts
        states = {name: self.store.state(name) for name in ("statistics", "recall")}
        if states["recall"] is not None:
            states["recall"] |= {
                "note": "of the best 10, with rows of the corpus as queries; other queries may do worse"
            }
        return {**self.store.info(), "forms": self.forms, **states, **facts}
