"""An opened index: its store, its model on first use, and what searching, explaining and selecting need of both.

Conventions: scores are [query, train] in the order of `ids`; a positive score means that removing the row raises the
query's loss (the row helps), in units that compare rows of one query, not queries or presets with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Behaviour, Corpus, Row
from leaveout.corpus.behaviour import Measure, called, measures_of, summed, terms_of, texts_of
from leaveout.corpus.rows import SEAM, in_words, with_labels
from leaveout.corpus.tokens import NoTargetError
from leaveout.errors import FormatError, MismatchError, UnsupportedError, require_list
from leaveout.models import ModelOptions, difference
from leaveout.readout.codec import Codec, read_codec
from leaveout.readout.forms import Form, Triples, low_rank
from leaveout.readout.held import Held
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.preferences import ADAPTERS_OFF, Preferences, load_reference
from leaveout.readout.scan import Length, Scanner, Scanners, counted, lengths_in, positions_of, scan
from leaveout.readout.settings import SignatureSettings
from leaveout.readout.signature import QUERY_RANK, SIDES, Signer
from leaveout.readout.tokens import TokenisedRow, check_ids, tokenise
from leaveout.readout.wide import roots_of
from leaveout.store import Record, Segment, Store

KIND = "readout index"
ENCODED = 16  # rows that are encoded anew at a time
PROMPT_WEIGHT = 0.7  # of cosines, where a row has both sides: chosen on two seeds of benchmarks/learned_rows.py
SPREAD_ROWS = 512  # from which it is known how large the cosines of a query's sides are

QueryRow = str | Mapping[str, Any] | Row | Behaviour


@dataclass(frozen=True)
class EncodedQueries:
    """Signatures of queries, made by `Index.encode`, with what they were made with.

    Shapes: vectors [queries, width] float32; texts: what is asked, one of each query.
    """

    vectors: Tensor
    texts: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.texts)


class OpenIndex:
    """An index whose rows are read, and queries scored. Its model is loaded when a query first needs it."""

    def __init__(self, store: Store, loading: Mapping[str, Any] | None = None) -> None:
        """`loading`: fields of `ModelOptions` with which the model is loaded, beside those that the build was told."""
        settings = store.settings
        if settings.get("kind") != KIND:
            raise MismatchError(f"{store.path} holds a {settings.get('kind', 'store')}, not an index: give an index.")
        self.store = store
        self.settings = SignatureSettings.from_dict(settings["signature"])
        self.identity: dict[str, Any] = settings["model"]
        self.long, self.short = read_codecs(settings.get("codec"))
        self._loading = dict(loading or {})
        self._readout: Readout | None = None
        self._signer: Signer | None = None
        self._held: Held | None = None

    @property
    def form(self) -> Form:
        """What rows and queries mean: of both sides, one behind the other, where they have two."""
        return self.side_form.beside(self.settings.sides)

    @property
    def side_form(self) -> Form:
        """What one side means."""
        stored = self.long or self.short
        assert stored is not None
        return stored.form

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def ids(self) -> list[str]:
        """Ids of all rows, in order. Memory: one string a row."""
        return self.store.ids()

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self)} rows)"

    @property
    def fingerprint(self) -> str:
        """Hex digits that queries must share with the index: settings, model, tokenizer, and whitening statistics."""
        statistics = self.store.state("statistics") or {}
        parts = (self.settings.fingerprint(), *(self.identity[name] for name in ("weights", "config", "tokenizer")))
        return "-".join([*parts, str(statistics.get("digest", "plain"))])

    # ---------------------------------------------------------------- the model

    @property
    def readout(self) -> Readout:
        """The model of the index, loaded on first use."""
        if self._readout is None:
            source = self.store.settings["source"]
            if source is None:
                raise MismatchError(
                    "This index was built with a model in memory: give it with Index.open(path, model, tokenizer)."
                )
            try:
                found = load_readout(source["name"], options=self.model_options())
            except (UnsupportedError, OSError) as error:
                raise MismatchError(
                    f"The model of this index no longer loads from {source['name']} ({error}): "
                    "say where it is now (--model, or Index.open(path, model))."
                ) from error
            self.take(found)
        assert self._readout is not None
        return self._readout

    def model_options(self, elsewhere: bool = False) -> ModelOptions:
        """How the model is loaded: in the dtype of the index, on the CPU, streamed where it does not fit, and but for what was
        given since as the build was told; of a model `elsewhere`, the revision is another matter."""
        source = self.store.settings["source"] or {}
        told = {"dtype": source.get("dtype", self.identity["dtype"]), "offload": "auto"}
        if not elsewhere:
            told |= {"revision": source["revision"], "trust_remote_code": source["trust_remote_code"]}
        return ModelOptions(**{**told, **self._loading})

    def take(self, readout: Readout) -> None:
        """Answers with this model from now on. Raises: MismatchError if it is not that of the index."""
        self._readout = self.checked(readout)

    def checked(self, readout: Readout) -> Readout:
        """The readout, if it is that of the index. Raises: MismatchError."""
        if other := difference(self.identity, readout.identity()):
            raise MismatchError(
                f"The given model has {other} than the one that {self.path} was built with "
                f"(a {self.identity['family']} in {self.identity['dtype']}): give that model, or build a new index."
            )
        return readout

    def unchanged(self) -> Readout:
        """The model, after a quick look that it is still that of the index (see `LanguageModel.refuse_changes`)."""
        self.readout.refuse_changes()
        return self.checked(self.readout)

    @property
    def signer(self) -> Signer:
        """Computes signatures of queries: as rows are stored, but with more triples where those are triples."""
        if self._signer is None:
            preferences = Preferences(self.preference_facts["beta"])  # rows know the margins of their reference
            self._signer = self.fitting(Signer(self.readout, self.settings, QUERY_RANK, preferences))
            set_whitening(self._signer, self.store)
        return self._signer

    @property
    def preference_facts(self) -> dict[str, Any]:
        """How preference rows were indexed: `beta`, and the identity of their `reference`."""
        return self.store.settings.get("preferences") or Preferences().facts()

    def preferences(self, reference: Any) -> Preferences:
        """The same with the reference model, to add rows with. Raises: MismatchError if it is not that of the index."""
        facts = self.preference_facts
        given = ADAPTERS_OFF if facts["reference"] == ADAPTERS_OFF else reference
        found = None if given is None else load_reference(given, self.readout, self.model_options(elsewhere=True))
        preferences = Preferences(facts["beta"], found)
        if preferences.facts() != facts:
            wanted = "no reference model" if facts["reference"] is None else "a reference model"
            raise MismatchError(f"{self.path} holds preference rows against {wanted}: give the same (reference).")
        return preferences

    def fitting(self, signer: Signer) -> Signer:
        """A signer, if its signatures are scored with the rows. Raises: MismatchError."""
        if signer.form != self.side_form:
            raise MismatchError(
                f"The rows of {self.path} have other parts than this {self.identity['family']} model has now, as a package "
                "with its family was installed or taken away: install what the build had, or build it anew."
            )
        return signer

    # ---------------------------------------------------------------- queries

    def tokenised(self, queries: Sequence[QueryRow]) -> list[TokenisedRow]:
        """Queries as rows with their windows. A text is learned as a whole; of a prompt and response, the response.

        Behaviours are no rows: see `texts_of`.
        """
        rows = [query_row(row, number) for number, row in enumerate(queries)]
        readout, signer = self.unchanged(), self.signer
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

    def encode(self, queries: Sequence[QueryRow] | EncodedQueries) -> EncodedQueries:
        """Signatures of queries: texts, or rows in any form that a corpus has.

        Raises: FormatError for a query without a token to learn, MismatchError for queries made with another index.
        """
        if isinstance(queries, EncodedQueries):
            if queries.fingerprint != self.fingerprint:
                raise MismatchError(
                    "These queries were made with other settings, another model or other statistics than this index: "
                    "encode them again with this index."
                )
            return queries
        require_list("queries", queries, "queries")
        if not queries:
            raise ValueError("queries is empty: give at least one query.")
        tokens, measures = self.tokenised(texts_of(queries)), measures_of(queries)
        if all(measure is None for measure in measures):
            vectors = self.signer.rows([window for row in tokens for window in row.windows], len(tokens))
        else:
            vectors = torch.cat([self._measured(*both) for both in zip(tokens, measures, strict=True)])
        if not bool(torch.isfinite(vectors).all()):
            raise FormatError("A query has a signature that is not finite: run `leaveout doctor` on the model.")
        names = called(queries, [in_words(query_row(row, n)) for n, row in enumerate(texts_of(queries))])
        vectors, rest = weighted(self.form, vectors.float().cpu(), queries), iter(tokens)
        for query, vector in zip(queries, vectors.chunk(self.settings.sides, 1)[-1], strict=True):
            total: dict[str, float] = defaultdict(float)
            for weight, _ in terms_of(query):
                total[repr(_prompt(next(rest)))] += weight
            if self.settings.sides == 2 and all(abs(weight) < 1e-9 for weight in total.values()):
                vector.zero_()  # prompts cancel, and their rounding would not
        return EncodedQueries(vectors, tuple(names), self.fingerprint)

    def both_ways(self, queries: EncodedQueries) -> EncodedQueries:
        """The queries, and then each the other way round: its best rows are those that push the query down most."""
        vectors = torch.cat([queries.vectors, self.form.negated(queries.vectors)])
        return EncodedQueries(vectors, queries.texts * 2, queries.fingerprint)

    def _measured(self, tokens: TokenisedRow, measure: Measure | None) -> Tensor:
        """The signature [1, width] of a measure of one text; it has none of the prompt's side."""
        windows = [replace(window, row=0, prompt=window.prompt and []) for window in tokens.windows]
        return self.asking(tokens, measure).rows(windows, 1)

    def asking(self, tokens: TokenisedRow, measure: Measure | None) -> Signer:
        """What computes signatures of a measure of a text. Raises: UnsupportedError for a function of more than a window."""
        if callable(measure) and len(tokens.windows) > 1:
            raise UnsupportedError(
                f"A function of logits takes those of a whole text, and one has {len(tokens.ids)} tokens, more than a window "
                "of this index: give a shorter text."
            )
        return self.signer.asking(measure)

    def apart(self, vectors: Tensor) -> list[tuple[str, Tensor]]:
        """Each side's name and the queries [queries, width] with that side alone, the other being zero."""
        halves = vectors.chunk(self.settings.sides, 1)
        sides = [torch.cat([x if x is one else torch.zeros_like(x) for x in halves], 1) for one in halves]
        return list(zip(SIDES, sides, strict=False))

    def scales(self, vectors: Tensor, length: Length, prompt_weight: float | None) -> Tensor:
        """By what the score of each side of each query is multiplied before both are added up [sides, queries].

        The weights of both sides (see `Index.search`), and for cosines over the root of their mean square over some of the
        rows that have that side: the cosines of one are several times as large as those of the other.
        """
        weight = self.checked_weight(length, prompt_weight)
        weights = torch.tensor([[1 - weight], [weight]] if self.settings.sides == 2 else [[1.0]])
        if length == "product" or self.settings.sides == 1:
            return weights.repeat(1, len(vectors))
        rows, sizes = self.spread_rows(SPREAD_ROWS), []
        scan = self.scan_short if self.long is None else self.scan
        for side, own in self.apart(vectors):
            found = np.concatenate([part for _, part in scan(own, rows, length=length)])
            count = max(np.count_nonzero(self.lengths_of(rows, side)), 1)
            sizes.append(torch.from_numpy(np.sqrt(np.square(found, dtype=np.float64).sum(0) / count)))
        size = torch.stack(sizes).float()
        return torch.where(size > 0, weights / size.clamp_min(1e-30), 0.0)

    def checked_weight(self, length: Length, prompt_weight: float | None) -> float:
        """The weight of prompts, or what it is by default. Raises: ValueError for one that this index cannot use."""
        if prompt_weight is None:
            return PROMPT_WEIGHT if length == "cosine" else 0.0
        if self.settings.sides == 1:
            raise ValueError(f"{self.path} has no prompts of their own to weigh: build it with targets='both'.")
        if not 0 <= prompt_weight <= 1:
            raise ValueError(f"prompt_weight is {prompt_weight}: give 0, responses alone, to 1, prompts alone.")
        return float(prompt_weight)

    def weighed(self, vectors: Tensor, scales: Tensor) -> Tensor:
        """Queries [queries, width] whose sides count by their `scales`."""
        halves = zip(vectors.chunk(self.settings.sides, 1), scales, strict=True)
        return torch.cat([self.side_form.times(half, scale) for half, scale in halves], 1)

    # ---------------------------------------------------------------- rows

    def scan(
        self,
        vectors: Tensor,
        wanted: np.ndarray | None = None,
        workers: int = 1,
        backend: Scanners = "threads",
        *,
        length: Length,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers [rows] and exact scores [rows, queries] with vectors [queries, width], in order (see `scan.scan`).

        Without a long form the rows are encoded anew from their texts, a forward pass each.
        """
        if self.long is None:
            return self.scan_anew(vectors, wanted, length=length)
        return self._scan(self.long, "long", vectors, wanted, workers, backend, length)

    def scan_short(
        self,
        vectors: Tensor,
        wanted: np.ndarray | None = None,
        workers: int = 1,
        backend: Scanners = "threads",
        *,
        length: Length,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `scan`, with estimates from the short form."""
        assert self.short is not None
        return self._scan(self.short, "short", vectors, wanted, workers, backend, length)

    def _scan(
        self, codec: Codec, name: str, vectors: Tensor, wanted: np.ndarray | None, workers: int, backend: Scanners,
        length: Length,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
        """A scan of the sides that count."""
        held = self._where(workers, backend)
        halves = zip(SIDES, vectors.chunk(self.settings.sides, 1), strict=False)
        scanners = [Scanner(codec, name, half, length, held, side) for side, half in halves]
        counting = [one for one in scanners if one.queries.any()]
        return scan(self.store.segments(), counting or scanners[:1], wanted, workers, backend)

    def _where(self, workers: int, backend: Scanners) -> Held | None:
        """Rows on the device of the model, where it is loaded on one and one worker scans; None: the CPU scans."""
        device = torch.device("cpu") if self._readout is None else self._readout.device
        if device.type in ("cpu", "mps") or workers != 1 or backend != "threads":  # mps has no products of integers
            return None
        if self._held is None or self._held.device != device:
            self._held = Held(device)
        return self._held

    def scan_anew(
        self, vectors: Tensor, wanted: np.ndarray | None = None, *, length: Length
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `scan`, of rows that are encoded anew from their texts, a forward pass each; their lengths are the stored ones."""
        for segment in self.store.segments():
            positions = positions_of(segment, wanted)
            positions = np.arange(segment.n_rows) if positions is None else positions
            for start in range(0, len(positions), ENCODED):
                piece = positions[start : start + ENCODED]
                rows, found = self.encoded_anew(segment.first + piece), np.zeros((len(piece), len(vectors)), np.float32)
                halves = (x.chunk(self.settings.sides, 1) for x in (rows, vectors))
                for side, own, asked in zip(SIDES, *halves, strict=False):
                    products = self.side_form.products(own, asked).numpy()
                    found += counted(products, lengths_in(segment, piece, side), length)
                yield segment.first + piece, found

    def lengths_of(self, numbers: np.ndarray, side: str = "") -> np.ndarray:
        """Lengths [rows] float32 of a side of rows by number, before they were rounded."""
        order = np.unique(numbers)
        parts = [lengths_in(segment, positions, side) for segment, positions in self._by_segment(order)]
        return np.concatenate([np.empty(0, np.float32), *parts])[np.searchsorted(order, numbers)]

    def _by_segment(self, order: np.ndarray) -> Iterator[tuple[Segment, np.ndarray]]:
        """Segments and positions in them of rows by number, ascending."""
        for segment in self.store.segments():
            low, high = np.searchsorted(order, [segment.first, segment.first + segment.n_rows])
            if low < high:
                yield segment, order[low:high] - segment.first

    def encoded_anew(self, numbers: np.ndarray) -> Tensor:
        """Rows [rows, width] of the form by number, from their texts by the model, before any rounding.

        Raises: MismatchError if the model is not that of the index.
        """
        records = self.store.rows(numbers)
        tokens = self.tokenised([row_of(record) for record in records])
        return self.signer.rows([window for row in tokens for window in row.windows], len(tokens)).float().cpu()

    def scores_of(self, vectors: Tensor, numbers: np.ndarray, *, length: Length) -> np.ndarray:
        """Exact scores [rows, queries] float32 of rows by number."""
        order = np.unique(numbers)
        found = [part for _, part in self.scan(vectors, order, length=length)]
        return np.concatenate(found or [np.empty((0, len(vectors)), np.float32)])[np.searchsorted(order, numbers)]

    def directions(self, numbers: np.ndarray) -> Tensor:
        """Stored rows [rows, width] by number, of unit length, as is each side of them; zero where a row is zero."""
        order = np.sort(numbers)
        if self.long is None:
            rows = self.encoded_anew(order)
        else:
            halves = []
            for side in SIDES[: self.settings.sides]:
                scanner, found = Scanner(self.long, "long", torch.empty(0), side=side), self._by_segment(order)
                parts = [self.long.decode(scanner.taken(segment.arrays()), positions) for segment, positions in found]
                halves.append(joined(self.side_form, parts))
            rows = beside(self.side_form, halves)
        rows = rows[np.searchsorted(order, numbers)]
        for form, count in dict.fromkeys(((self.side_form, self.settings.sides), (self.form, 1))):
            sides = [form.divided(half, form.lengths(half).clamp_min(1e-30)) for half in rows.chunk(count, 1)]
            rows = torch.cat(sides, 1)
        return rows

    def spread_rows(self, wanted: int) -> np.ndarray:
        """Numbers of at most so many rows, evenly apart."""
        numbers = self.live_numbers()
        return numbers[spread(len(numbers), wanted)]

    def live_numbers(self) -> np.ndarray:
        """Numbers of all rows that are not deleted, ascending."""
        parts = [(part, part.live()) for part in self.store.segments()]
        live = [part.first + (np.arange(part.n_rows) if own is None else np.flatnonzero(own)) for part, own in parts]
        return np.concatenate([np.empty(0, np.int64), *live])

    def numbers_where(self, where: str | None) -> np.ndarray | None:
        """Row numbers, ascending, that satisfy an SQL expression; None for None. Raises: ValueError for a bad one."""
        if where is not None and (not isinstance(where, str) or not where.strip()):
            raise ValueError(f"where is {where!r}: give an SQL expression such as source = 'web', or leave it out.")
        return None if where is None else np.sort(self.store.numbers_where(where))

    def ids_where(self, where: str) -> list[str]:
        """Ids of the rows that satisfy an SQL expression (see `Index.search`)."""
        return [record.id for record in self.store.rows(self.store.numbers_where(where))]

    def sources(self, field: str = "unit") -> dict[str, int]:
        """How many rows have each value of a field (or `unit`) as text, most first; "" stands for those that lack it.

        Cost: one pass over the catalogue. Raises: ValueError for a field that no row has.
        """
        return self.store.tally(field)

    def among(self, field: str, values: Sequence[str]) -> str:
        """The SQL expression for rows whose value is one of these, as `sources` names them (see `Index.search`)."""
        return self.store.among(field, values)

    def records(self, ids: Sequence[str]) -> list[Record]:
        """Catalogue entries of rows by id. Raises: ValueError naming an id that is not in the index."""
        return self.store.rows(self.store.numbers(ids))


def query_row(query: QueryRow, number: int) -> Row:
    """A query as a row. Raises: TypeError if it is neither a text nor a row."""
    if isinstance(query, Row):
        return query
    if not isinstance(query, (str, Mapping)):
        raise TypeError(f"Query {number + 1} is of type {type(query).__name__}: give a text, or a row as a dict.")
    raw = {"text": query} if isinstance(query, str) else {key: value for key, value in query.items() if key != "id"}
    rows = list(Corpus.open([raw]))
    return replace(rows[0], id=f"query {number + 1}", number=number)


def weighted(form: Form, vectors: Tensor, queries: Sequence[QueryRow]) -> Tensor:
    """Vectors [queries, width] of queries, given those of all their texts, in order: weighted sums.

    Triples of several texts are cut to the largest of the sum, so that what they share takes no room where it cancels.
    """
    if len(vectors) == len(queries) and not any(isinstance(query, Behaviour) for query in queries):
        return vectors
    if not isinstance(form, Triples):
        return torch.stack(summed(queries, vectors))
    pieces = vectors.split([len(terms_of(query)) for query in queries])
    return torch.cat([_sum_of_triples(form, some, query) for some, query in zip(pieces, queries, strict=True)])


def _sum_of_triples(form: Triples, vectors: Tensor, query: QueryRow) -> Tensor:
    weights = vectors.new_tensor([weight for weight, _ in terms_of(query)])[:, None, None]
    if len(vectors) == 1:
        return form.joined([(weights * u, v) for u, v in form.factors(vectors)])
    factors = [((weights * u).flatten(0, 1), v.flatten(0, 1)) for u, v in form.factors(vectors)]
    return torch.cat([low_rank(u, v, form.rank(vectors)) for u, v in factors])[None]


def _prompt(row: TokenisedRow) -> list[Any]:
    """What the prompt of a row and its signature are made of."""
    return [
        (window.start, window.prompt, window.ids[: window.prompt[-1] + 2]) for window in row.windows if window.prompt
    ]


def spread(count: int, wanted: int) -> np.ndarray:
    """At most so many of `count` positions, evenly apart."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def row_of(record: Record) -> Row:
    """The row that a catalogue entry was made of; chats and instructions come back as they were rendered."""
    extra = record.extra
    spans = tuple((start, end) for start, end in extra["responses"])
    return Row(
        record.id, record.text, spans, None, record.unit, record.meta, record.content_hash, extra["number"],
        rendered=extra["rendered"], kept=extra.get("kept"), weight=extra.get("weight", 1.0),
        pair=_pair_of(record), reference=extra.get("reference"),
    )  # fmt: skip


def shown_text(record: Record) -> str:
    """The text of a catalogue entry as people read it: both answers of a preference row have labels."""
    chosen = record.extra.get("chosen")
    return record.text if chosen is None else with_labels(record.text, record.extra["responses"], chosen)


def _pair_of(record: Record) -> tuple[Row, Row] | None:
    """Both sides of a preference row, as they were rendered."""
    if (length := record.extra.get("chosen")) is None:
        return None
    shift = length + len(SEAM)
    spans = [(start, end) for start, end in record.extra["responses"]]
    first, second = (
        Row(
            record.id,
            text,
            tuple(own),
            None,
            record.unit,
            {},
            "",
            record.extra["number"],
            rendered=record.extra["rendered"],
        )
        for text, own in (
            (record.text[:length], [span for span in spans if span[0] < length]),
            (record.text[shift:], [(start - shift, end - shift) for start, end in spans if start >= length]),
        )
    )
    return first, second


def joined(form: Form, parts: Sequence[Tensor]) -> Tensor:
    """Rows of pieces, whose triples may be more or fewer."""
    return torch.cat(_widened(form, parts))


def beside(form: Form, sides: Sequence[Tensor]) -> Tensor:
    """Rows of several sides, one behind the other."""
    return torch.cat(_widened(form, sides), 1)


def _widened(form: Form, parts: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(form, Triples):
        return list(parts)
    rank = max(form.rank(rows) for rows in parts)
    return [form.widened(rows, rank) for rows in parts]


def read_codecs(facts: Mapping[str, Any] | None) -> tuple[Codec | None, Codec | None]:
    """The long form and the short one that the settings of an index name.

    Raises: MismatchError for what no codec of this version is, as in indexes of development versions.
    """
    if facts is None or set(facts) != {"long", "short"}:
        raise MismatchError("This index does not say how its rows are stored: build it anew.")
    long, short = (None if facts[name] is None else read_codec(facts[name]) for name in ("long", "short"))
    return long, short


def set_whitening(signer: Signer, store: Store) -> None:
    """Gives the signer the whitening matrices of the store, if it has any."""
    arrays = store.side("whitening") or {}
    device = signer.readout.device
    signer.whitening = {name: root.to(device, signer.dtype) for name, root in roots_of(arrays).items()}
