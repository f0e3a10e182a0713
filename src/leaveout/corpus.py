"""Rows of training data, streamed from JSONL, JSON, Parquet, Hugging Face datasets or a Python list.

A row has exactly one form: `text`, whose beginning may be given as `prompt_text`; `prompt` (or `prompt_text`) and
`completion` (or `response`); `instruction`, `input` and `output`; or chat `messages`. Its other fields are metadata.
A bad row stops the reading, unless `skip_bad` counts and lists it.

Conventions: only a newline ends a line of JSONL, blank lines are not rows, a byte order mark at the start of a file is
not text, and text is never normalised. Spans count characters. Ids may repeat here: the index refuses that.
"""

import codecs
import gzip
import importlib
import json
import math
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from .errors import FormatError, MismatchError, UnsupportedError

Scalar = str | int | float | bool | None
Spans = tuple[tuple[int, int], ...]

# The fields that a form needs -> those that may join them.
_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text",): ("prompt_text",),
    **dict.fromkeys(product(("prompt", "prompt_text"), ("completion", "response")), ()),
    ("instruction", "output"): ("input",),
    ("messages",): (),
}
_ACCEPTED = "`text`, `prompt` and `completion`, `instruction` and `output`, or `messages`"
_FILES = ".jsonl, .ndjson or .json (also .gz), .parquet, or a directory of .parquet files or from `save_to_disk`"
_BATCH = 256  # Arrow rows that become Python objects at a time
_LISTED = 100  # bad rows whose messages are kept


@dataclass(frozen=True, slots=True)
class Row:
    """One example of the training data."""

    id: str  # the field `id`, else the first 16 digits of the content hash
    text: str  # prompt and response; "" for a chat row until it is rendered
    responses: Spans  # the parts [start, end) of the text that are learned
    messages: tuple[Mapping[str, Any], ...] | None  # chat rows only
    unit: str  # what is deleted together: the value of the units field, else the id
    meta: dict[str, Scalar]  # all other fields; lists and objects as compact JSON, dates in ISO 8601
    content_hash: str  # xxh3-128 of the text and where the response begins, or of the messages; nothing else
    number: int  # position in the source, from 0, bad rows included


class _BadRow(Exception):
    """Why a row cannot be read, without its place."""


class _Source(NamedTuple):
    """Where rows come from; `read` gives the place of each row and its raw value, or why it has none (a _BadRow)."""

    name: str
    read: Callable[[], Iterable[tuple[str, Any]]]
    count: Callable[[], int]


class Corpus:
    """The rows of one source, in order; it can be iterated any number of times.

    After a complete iteration, `problems` has the messages of the bad rows that it skipped (the first 100), and
    `n_skipped` counts all of them.
    """

    def __init__(self, source: _Source, units: str | None = None, skip_bad: bool = False) -> None:
        self.name = source.name
        self.units = units
        self.skip_bad = skip_bad
        self.problems: list[str] = []
        self.n_skipped = 0
        self._source = source
        self._length: int | None = None

    @classmethod
    def open(cls, source: Any, *, units: str | None = None, skip_bad: bool = False) -> "Corpus":
        """The corpus of a file, a directory, a `datasets.Dataset`, or a list of dicts or of texts.

        `units` names the field whose value says which rows are deleted together. A corpus comes back as it is, or, when
        options are given, as a new one over the same source.
        Cost: a .json file is parsed as a whole on each iteration; everything else is streamed.
        Raises: FileNotFoundError if there is no such path, FormatError for an unknown kind of file, TypeError for an
        object of another kind, UnsupportedError if a package is missing.
        """
        if not isinstance(source, Corpus):
            return cls(_source_of(source), units, skip_bad)
        if units is None and not skip_bad:
            return source
        return cls(source._source, source.units if units is None else units, skip_bad or source.skip_bad)

    def __iter__(self) -> Iterator[Row]:
        """Raises: FormatError at a bad row, without `skip_bad`, and wherever a file turns out to be damaged."""
        problems: list[str] = []
        n_skipped = 0
        for number, (place, raw) in enumerate(self._source.read()):
            try:
                row = _row(raw, number, self.units)
            except _BadRow as bad:
                if not self.skip_bad:
                    raise FormatError(f"{place}: {bad}") from None
                n_skipped += 1
                if len(problems) < _LISTED:
                    problems.append(f"{place}: {bad}")
                continue
            yield row
        self.problems, self.n_skipped = problems, n_skipped

    def __len__(self) -> int:
        """Number of rows that an iteration visits, bad ones included."""
        if self._length is None:
            self._length = self._source.count()
        return self._length

    def sample(self, n: int, seed: int) -> list[Row]:
        """A uniform random sample of n rows, in source order; all rows if there are fewer.

        Cost: one pass over the source, n rows of memory.
        """
        if n < 0:
            raise ValueError(f"a sample cannot have {n} rows, ask for 0 or more")
        chance = random.Random(seed)
        kept: list[Row] = []
        for seen, row in enumerate(self):
            if seen < n:
                kept.append(row)
            elif (slot := chance.randrange(seen + 1)) < n:
                kept[slot] = row
        return sorted(kept, key=lambda row: row.number)


def _source_of(source: Any) -> _Source:
    if isinstance(source, str | os.PathLike):
        return _path_source(Path(source))
    datasets = sys.modules.get("datasets")  # whoever has a Dataset has imported it
    if datasets and isinstance(source, datasets.Dataset):
        return _dataset_source(f"dataset of {len(source)} rows", source)
    if datasets and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"a {type(source).__name__} is several corpora, pick one of its splits: {_names(source)}")
    if datasets and isinstance(source, datasets.IterableDataset):
        raise TypeError("an IterableDataset has no length, save it as JSONL and open that file")
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
        name = f"{type(source).__name__} of {len(source)} rows"
        return _Source(name, partial(_numbered, name, source), partial(len, source))
    raise TypeError(f"{_kind(source)} is not a corpus, give a path, a datasets.Dataset, or a list of dicts or of texts")


def _dataset_source(name: str, dataset: Any) -> _Source:
    batches = partial(dataset.with_format("arrow").iter, batch_size=_BATCH)
    return _Source(name, partial(_arrow_rows, {name: batches}), partial(len, dataset))


def _path_source(path: Path) -> _Source:
    name = path.name or str(path.resolve())
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, give a file or directory of rows")
    if (path / "dataset_dict.json").is_file():
        raise FormatError(f"{name} holds several splits of a dataset, give the directory of one of them")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _dataset_source(name, _extra("datasets").load_from_disk(str(path)))
    kind = path.name.lower()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if kind.endswith(".parquet") else []
    if files:
        _extra("pyarrow.parquet")
        parts = {path.name: partial(_parquet, path) for path in files}
        return _Source(name, partial(_arrow_rows, parts), partial(_parquet_count, files))
    kind = kind.removesuffix(".gz")
    if path.is_file() and kind.endswith((".jsonl", ".ndjson")):
        return _Source(name, partial(_jsonl, path), partial(_count, _lines, path))
    if path.is_file() and kind.endswith(".json"):
        return _Source(name, partial(_json, path), partial(_count, _json, path))
    raise FormatError(f"{name} is not of a known kind, give {_FILES}")


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnsupportedError(f"this needs the package {package}: pip install 'leaveout[data]'") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, unpacked or as Parquet; damage is a FormatError at whatever moment it shows."""
    opener: Any = partial(open, mode="rb")
    damage: tuple[type[Exception], ...] = ()
    if path.suffix.lower() == ".gz":
        opener, damage = gzip.open, (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix.lower() == ".parquet":
        # with its defaults pyarrow holds a whole row group: 123 MB instead of 3 MB for a group of 120 MB, and slower
        opener = partial(_extra("pyarrow.parquet").ParquetFile, pre_buffer=False, buffer_size=2**16)
        damage = (_extra("pyarrow").ArrowException, OSError)
    try:
        with opener(path) as file:
            yield file
    except damage as error:
        if isinstance(error, OSError) and error.errno:  # the system's own errors say enough
            raise
        raise FormatError(f"{path.name} is cut off or damaged ({error}), copy or write it again") from error


def _count(read: Callable[[Path], Iterable[Any]], path: Path) -> int:
    return sum(1 for _ in read(path))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line.rstrip()


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            raw = _loads(line)
            if isinstance(raw, str):
                raw = _BadRow('is text, not an object with fields, write {"text": ...}')
        except _BadRow as bad:
            raw = bad
        yield f"{path.name}, line {number}", raw


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        data = file.read()
    try:
        rows = _loads(data.removeprefix(codecs.BOM_UTF8))
        if not isinstance(rows, list):
            raise _BadRow(f"is {_kind(rows)}, not a list of rows")
    except _BadRow as bad:
        raise FormatError(f"{path.name} {bad}; if it has one row a line, name it .jsonl") from None
    return _numbered(path.name, rows)


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not valid UTF-8 (byte {error.start + 1} is {data[error.start]:#04x})") from None
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"is not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _BadRow("is not valid JSON (an object has the same field twice)")
    return fields


def _arrow_rows(parts: Mapping[str, Callable[[], Iterable[Any]]]) -> Iterator[tuple[str, Any]]:
    """The rows of all parts, numbered one part at a time; a part is what reads its Arrow batches."""
    for name, read in parts.items():
        yield from _numbered(name, chain.from_iterable(map(_python_rows, read())))


def _python_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # a value that Python cannot hold, such as text that is not UTF-8
        if batch.num_rows == 1:
            return [_BadRow(f"cannot be read ({error})")]
        return [row for index in range(batch.num_rows) for row in _python_rows(batch.slice(index, 1))]


def _parquet(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _parquet_count(files: list[Path]) -> int:
    total = 0
    for path in files:
        with _opened(path) as file:
            total += file.metadata.num_rows
    return total


def _row(raw: Any, number: int, units: str | None) -> Row:
    if isinstance(raw, _BadRow):
        raise raw
    if isinstance(raw, str):
        raw = {"text": raw}
    if not isinstance(raw, Mapping):
        raise _BadRow(f"is {_kind(raw)}, not an object with fields")
    for name in raw:
        if not isinstance(name, str):
            raise _BadRow(f"has {_kind(name)} as the name of a field, names must be text")
        _utf8(name, name)
    form = _form(raw)
    used = {"id", *form, *_FORMS[form]}
    if form == ("messages",):
        text, responses, messages = "", (), _messages(raw["messages"])
        content = "chat\n" + _compact("messages", messages)
    else:
        text, seam = _text_and_seam(raw, form)
        responses, messages = ((seam, len(text)),), None
        content = f"{seam}\n{text}"
    content_hash = xxhash.xxh3_128_hexdigest(content.encode())
    given = _label("id", raw["id"], (str, int)) if "id" in raw else content_hash[:16]
    if units is not None and units not in raw:
        raise _BadRow(f"field `{units}` is missing, but the units are named by it")
    unit = given if units is None else _label(units, raw[units], (str, int, float, bool))
    meta = {name: _scalar(name, value) for name, value in raw.items() if name not in used}
    return Row(given, text, responses, messages, unit, meta, content_hash, number)


def _form(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The one form whose fields are all there and of the right type."""
    typed = {name for name, value in raw.items() if isinstance(value, list | tuple if name == "messages" else str)}
    complete = [form for form in _FORMS if typed.issuperset(form)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        one, other = (" with ".join(f"`{name}`" for name in form) for form in complete[:2])
        raise _BadRow(f"has two forms at once, {one} and {other}, keep one of them")
    for form in _FORMS:
        if raw.keys() >= set(form):
            name = next(name for name in form if name not in typed)
            wanted = "a list of messages" if name == "messages" else "text"
            raise _BadRow(f"field `{name}` must be {wanted}, not {_kind(raw[name])}")
    raise _BadRow(f"has {f'only the fields {_names(raw)}' if raw else 'no fields'}, but a row needs {_ACCEPTED}")


def _text_and_seam(raw: Mapping[str, Any], form: tuple[str, ...]) -> tuple[str, int]:
    """The whole text, and where its response begins."""
    for name in _FORMS[form]:
        if not isinstance(raw.get(name), str | None):
            raise _BadRow(f"field `{name}` must be text, not {_kind(raw[name])}")
    if form == ("text",):
        prompt, text = raw.get("prompt_text") or "", raw["text"]
        if not text.startswith(prompt):
            raise _BadRow("field `prompt_text` must be the beginning of `text`")
    elif form == ("instruction", "output"):
        given = f"### Input:\n{raw['input']}\n\n" if raw.get("input") else ""
        prompt = f"### Instruction:\n{raw['instruction']}\n\n{given}### Response:\n"
        text = prompt + raw["output"]
    else:
        prompt = raw[form[0]]
        text = prompt + raw[form[1]]
    if not text[len(prompt) :].strip():
        after = " after its prompt" if form == ("text",) and prompt else ""
        raise _BadRow(f"field `{form[-1]}` is empty or blank{after}, so nothing is learned: fill it or drop the row")
    for name in (*form, *_FORMS[form]):
        _utf8(name, raw.get(name) or "")
    return text, len(prompt)


def _messages(value: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """The messages without their null fields, which Parquet cannot tell from missing ones."""
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise _BadRow(f"field `messages` must hold objects, but message {number} is {_kind(message)}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise _BadRow(f"`{name}` of message {number} must be text, not {_kind(message.get(name))}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        raise _BadRow("field `messages` has no assistant's text, so nothing is learned: add some or drop the row")
    return tuple({name: item for name, item in message.items() if item is not None} for message in value)


def _label(name: str, value: Any, kinds: tuple[type, ...]) -> str:
    """An id or a unit as text."""
    value = _plain(value)
    if type(value) not in kinds:
        number = "number" if float in kinds else "whole number"
        raise _BadRow(f"field `{name}` must be text or a {number}, not {_kind(value)}")
    value = _scalar(name, value)
    if isinstance(value, str) and not value.strip():
        raise _BadRow(f"field `{name}` is empty, fill it")
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """Dates, decimals and numpy's scalars as plain values."""
    value = value.item() if isinstance(value, np.generic) else value
    value = value.isoformat() if isinstance(value, date | time) else value
    return str(value) if isinstance(value, Decimal) else value


def _scalar(name: str, value: Any) -> Scalar:
    value = _plain(value)
    if isinstance(value, str):
        return _utf8(name, value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _BadRow(f"field `{name}` is a whole number beyond 64 bits, write it as text")
    if isinstance(value, float) and not math.isfinite(value):
        raise _BadRow(f"field `{name}` is {value}, write null where there is no number")
    return value if isinstance(value, int | float | None) else _compact(name, value)


def _compact(name: str, value: Any) -> str:
    """JSON that is the same whatever the order of the fields."""
    write = partial(json.dumps, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    try:
        return _utf8(name, write(value, default=_plain))
    except (TypeError, ValueError, RecursionError):
        raise _BadRow(f"field `{name}` ({_kind(value)}) cannot be written as JSON, change or drop it") from None


def _utf8(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start + 1}"
        raise _BadRow(f"field {name!a} has half a surrogate pair {where}, which is not valid UTF-8") from None
    return text


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {type(None): "null", bool: "true or false", int: "a number", float: "a decimal number"}
    kinds |= {str: "text", bytes: "bytes", list: "a list", tuple: "a list", dict: "an object"}
    return kinds.get(type(value)) or f"a {type(value).__name__}"


def _names(fields: Iterable[Any]) -> str:
    names = [f"`{name}`" for name in fields]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def render(row: Row, tokenizer: Any) -> Row:
    """The chat row with its text and assistant spans by the tokenizer's chat template; other rows as they are.

    A span begins after the generation prompt and includes the end-of-turn marker. With a template that writes the first
    turns otherwise when more follow, a span is the message's content alone. The text has its special tokens: tokenize
    it with `add_special_tokens=False`.
    Raises: MismatchError if there is no chat template, FormatError if it refuses or alters the messages.
    """
    if row.messages is None:
        return row
    if not getattr(tokenizer, "chat_template", None):
        raise MismatchError(
            f"row `{row.id}` is a chat and the tokenizer has no chat template, "
            "give prompt and completion rows or a tokenizer with a template"
        )
    messages = [dict(message) for message in row.messages]
    try:
        text = _rendered(tokenizer, messages)
        responses = _turns(tokenizer, messages, text) or _contents(tokenizer, messages, text)
    except _BadRow as bad:
        raise FormatError(f"row `{row.id}`: {bad}, change it or give a prompt and completion") from bad
    return replace(row, text=text, responses=responses)


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own and may raise anything
        raise _BadRow(f"the chat template refuses the messages ({error})") from error


def _turns(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Spans:
    """Spans of the assistant's turns, or () if a rendered beginning is not the beginning of the text."""
    spans: list[tuple[int, int]] = []
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        try:
            before = _rendered(tokenizer, messages[:index], add_generation_prompt=True)
            after = _rendered(tokenizer, messages[: index + 1])
        except _BadRow:  # most templates refuse an empty beginning
            return ()
        stable = text.startswith(before) and text.startswith(after)
        if not stable or not (spans[-1][1] if spans else 0) <= len(before) < len(after):
            return ()
        spans.append((len(before), len(after)))
    return tuple(spans)


def _contents(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Spans:
    """Spans of the assistant's contents: where marks in their place stand, if putting the contents back gives the text.

    A plain search could hit the same words elsewhere, say "assistant" in the header of a turn.
    """
    mark = "\ue000leaveout\ue000"
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    marked = [message | ({"content": mark} if message["role"] == "assistant" else {}) for message in messages]
    pieces = _rendered(tokenizer, marked).split(mark)
    for trim in (str, str.strip, str.lstrip, str.rstrip):  # what templates do to contents
        if len(pieces) != len(contents) + 1:
            break
        built, spans = pieces[0], []
        for content, piece in zip(contents, pieces[1:], strict=True):
            learned = trim(content)
            spans.append((len(built), len(built) + len(learned)))
            built += learned + piece
        if built == text:
            return tuple(span for span in spans if span[0] < span[1])
    raise _BadRow("its assistant messages cannot be found in what the chat template makes of them")
