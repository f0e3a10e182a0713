"""Rows of training data: forms, sources, bad rows, chat."""

import functools
import gzip
import json
import math
import pickle
import re
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from datetime import date, datetime, time
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leaveout.corpus import Corpus, Row, render
from leaveout.corpus.rows import SEAM, row_json
from leaveout.errors import FormatError, UnsupportedError

ASK = {"role": "user", "content": "Where?"}
TELL = {"role": "assistant", "content": "Here."}
ADD = "### Instruction:\nAdd\n\n### Response:\n"
ADD_INPUT = "### Instruction:\nAdd\n\n### Input:\n2, 2\n\n### Response:\n"
packed = functools.partial(gzip.compress, mtime=0)  # without the time of day


def one(row, **options) -> Row:
    [parsed] = Corpus.open([row], **options)
    return parsed


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Forms


@pytest.mark.parametrize(
    ("raw", "text", "prompt", "meta"),
    [
        ("a tale", "a tale", "", {}),
        ({"text": "a tale"}, "a tale", "", {}),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4", "2+2=", {}),
        ({"prompt": "2+2=", "response": "4"}, "2+2=4", "2+2=", {}),
        ({"prompt_text": "2+2=", "completion": "4"}, "2+2=4", "2+2=", {}),
        ({"prompt_text": "2+2=", "response": "4"}, "2+2=4", "2+2=", {}),
        ({"prompt": "", "response": "4"}, "4", "", {}),
        ({"text": "2+2=4", "prompt_text": "2+2="}, "2+2=4", "2+2=", {}),
        ({"text": "2+2=4", "prompt_text": None}, "2+2=4", "", {}),
        ({"instruction": "Add", "output": "4"}, ADD + "4", ADD, {}),
        ({"instruction": "Add", "input": "", "output": "4"}, ADD + "4", ADD, {}),
        ({"instruction": "Add", "input": None, "output": "4"}, ADD + "4", ADD, {}),
        ({"instruction": "Add", "input": "2, 2", "output": "4"}, ADD_INPUT + "4", ADD_INPUT, {}),
        # fields of another form that is not complete, or not of its type, are metadata
        ({"prompt": "a", "completion": "b", "input": "i", "output": "o"}, "ab", "a", {"input": "i", "output": "o"}),
        ({"prompt": "a", "completion": "b", "text": None}, "ab", "a", {"text": None}),
        ({"text": "a", "prompt": "p", "messages": 3}, "a", "", {"prompt": "p", "messages": 3}),
        ({"instruction": "Add", "output": "4", "response": "r"}, ADD + "4", ADD, {"response": "r"}),
    ],
)
def test_row_form_gives_text_and_response(raw, text, prompt, meta):
    row = one(raw)
    assert row.text == text and text.startswith(prompt) and row.responses == ((len(prompt), len(text)),)
    assert row.messages is None and row.meta == meta


def test_chat_row_has_the_plain_form_until_a_template_renders_it():
    row = one({"messages": [ASK, TELL | {"name": None, "tool": {"n": 1}}], "source": "web"})
    assert (row.text, row.meta) == ("### User:\nWhere?\n\n### Assistant:\nHere.", {"source": "web"})
    assert learned(row) == ["Here."]
    assert row.messages == (ASK, TELL | {"tool": {"n": 1}})  # null and missing are one and the same in Parquet


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "Bergen", "near": None}}}
FIND = {"type": "function", "function": {"name": "find", "parameters": {"default": None}}}
CALLS = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "60.4"}, TELL]


def test_plain_form_of_a_chat_with_tools():
    row = one({"messages": CALLS, "tools": [FIND]})
    called = '{"function":{"arguments":{"near":null,"what":"Bergen"},"name":"find"},"type":"function"}'
    tools = '### Tools:\n{"function":{"name":"find","parameters":{"default":null}},"type":"function"}\n\n'
    turns = [("User", "Where?"), ("Assistant", called), ("Tool", "60.4"), ("Assistant", "Here.")]
    assert row.text == tools + "\n\n".join(f"### {role}:\n{said}" for role, said in turns)
    assert learned(row) == [called, "Here."] and row.tools == (FIND,) and row.meta == {}


@pytest.mark.parametrize("tools", [[FIND], json.dumps([FIND])])
def test_chats_with_tools_are_the_same_from_json_and_parquet(tools, tmp_path):
    """Parquet gives every object the fields of all others, as null; JSON keeps the nulls that someone wrote."""
    other = {"type": "function", "function": {"name": "sum", "arguments": {"n": 1}}}
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "Bergen"}}}
    messages = [ASK, {"role": "assistant", "tool_calls": [call, other]}, {"role": "tool", "content": "60.4"}, TELL]
    rows = [{"messages": messages, "tools": tools}, {"messages": [ASK, TELL], "tools": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    written = list(Corpus.open(write_jsonl(tmp_path / "rows.jsonl", rows)))
    stored = list(Corpus.open(tmp_path / "rows.parquet"))
    assert [row.messages for row in stored] == [row.messages for row in written]
    assert stored[1].tools is None and stored[1].content_hash == one({"messages": [ASK, TELL]}).content_hash
    assert written[0].messages[1]["content"] is None  # templates compare it with none
    if isinstance(tools, str):  # of the tools themselves a null may be Arrow's
        assert [row.content_hash for row in stored] == [row.content_hash for row in written]


def test_row_keeps_what_it_came_as():
    raw = {"text": "t", "id": 7, "day": date(2024, 2, 29), "tags": ["b", "a"], "price": Decimal("1.10"), "n": None}
    row = one(raw)
    assert row.raw == raw and one("t").raw == {"text": "t"}
    assert (
        row_json(row) == '{"text": "t", "id": 7, "day": "2024-02-29", "tags": ["b", "a"], "price": "1.10", "n": null}'
    )


def test_metadata_keeps_scalars_and_writes_the_rest_as_text():
    fields = {"_x": 1, "": "empty name", "b": True, "f": 0.5, "n": None, "s": "web"}
    others = {
        "l": [1, None],
        "o": {"b": "é", "a": 1},
        "day": date(2024, 2, 29),
        "now": datetime(2024, 2, 29, 12, 30),
        "at": time(12, 30),
        "price": Decimal("1.10"),
        "days": [date(2024, 2, 29)],
        "np": np.float32(0.5),
    }
    assert one({"text": "t", "id": 1} | fields | others).meta == fields | {
        "l": "[1,null]",
        "o": '{"a":1,"b":"é"}',
        "day": "2024-02-29",
        "now": "2024-02-29T12:30:00",
        "at": "12:30:00",
        "price": "1.10",
        "days": '["2024-02-29"]',
        "np": 0.5,
    }


@pytest.mark.parametrize(
    ("row", "units", "id", "unit"),
    [
        ({"id": "a"}, None, "a", "a"),
        ({"id": 7}, None, "7", "7"),
        ({"id": np.int64(7)}, None, "7", "7"),
        ({"id": "a", "source": "web"}, "source", "a", "web"),
        ({"id": "a", "year": 1999}, "year", "a", "1999"),
        ({"id": "a", "made": True}, "made", "a", "true"),
        ({"id": 7}, "id", "7", "7"),
        ({"source": "web"}, "source", None, "web"),
        ({}, None, None, None),
    ],
)
def test_id_and_unit(row, units, id, unit):
    row = one({"text": "t"} | row, units=units)
    id = row.content_hash[:16] if id is None else id
    assert (row.id, row.unit) == (id, id if unit is None else unit)
    assert row.meta.keys() == ({units} - {"id", None})  # the units field is metadata, too


# Content hash

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
filled = words.filter(str.strip)


@given(words, words, filled)
def test_content_hash_of_instructions_is_that_of_their_fields(instruction, more, output):
    raw = {"instruction": instruction, "input": more, "output": output}
    row = one(raw)
    assert row.content_hash == one(raw | {"id": "x", "source": "web"}).content_hash
    if not more:
        assert row.content_hash == one({"instruction": instruction, "output": output}).content_hash
    assert row.content_hash != one(row.text).content_hash
    assert row.content_hash != one(raw | {"output": output + "."}).content_hash


@given(filled, words, filled, words)
def test_content_hash_depends_on_content_only(text, prompt, response, other):
    content = one({"prompt": prompt, "completion": response}).content_hash
    assert len(content) == 32 and int(content, 16) >= 0
    assert content == one({"prompt_text": prompt, "response": response, "id": "x", "source": other}).content_hash
    assert content == one({"text": prompt + response, "prompt_text": prompt}).content_hash
    assert (content == one(prompt + response).content_hash) == (prompt == "")
    assert (content == one({"prompt": prompt, "completion": text}).content_hash) == (text == response)


def test_content_hash_tells_seams_and_messages_apart_and_stays():
    contents = [
        "1ab",
        {"prompt": "1a", "completion": "b"},
        {"prompt": "1", "completion": "ab"},
        {"messages": [ASK, TELL]},
        {"messages": [ASK, ASK, TELL]},
        {"messages": [ASK, TELL | {"name": "x"}]},
    ]
    assert len({one(content).content_hash for content in contents}) == len(contents)
    swapped = {"messages": [dict(reversed(message.items())) for message in (ASK, TELL)]}
    assert one(swapped).content_hash == one({"messages": [ASK, TELL]}).content_hash
    assert one("a tale").id == "f240bd896d174413"  # ids of stored indexes depend on it


# Sources

FORMS = [
    st.fixed_dictionaries({"text": filled}),
    st.fixed_dictionaries({"prompt": words, "completion": filled}),
    st.fixed_dictionaries({"instruction": words, "input": words, "output": filled}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": st.just("assistant"), "content": filled}), min_size=1)}
    ),
]
META = st.fixed_dictionaries(
    {
        "id": words.filter(str.strip) | st.integers(0, 9).map(str),
        "source": st.none() | words,
        "year": st.none() | st.integers(-(2**63), 2**63 - 1),
        "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "_tags": st.lists(words, max_size=2),
        "where": st.fixed_dictionaries({"b": words, "a": st.integers(0, 9)}),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.one_of([st.lists(st.builds(dict.__or__, form, META), min_size=1, max_size=4) for form in FORMS]))
def test_sources_of_every_kind_give_the_same_rows(tmp_path_factory, raws):
    folder = tmp_path_factory.mktemp("sources")
    lines = "".join(json.dumps(raw, ensure_ascii=False) + "\n" for raw in raws).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.NDJSON").write_bytes(lines.rstrip(b"\n"))
    (folder / "a.jsonl.gz").write_bytes(packed(lines))
    (folder / "a.json").write_text(json.dumps(raws), encoding="utf-8")
    (folder / "a.json.gz").write_bytes(packed(json.dumps(raws).encode()))
    dataset = datasets.Dataset.from_list(raws)
    dataset.to_parquet(folder / "a.parquet")
    dataset.save_to_disk(folder / "saved")
    (folder / "parts").mkdir()
    for part, start in reversed([*enumerate(range(0, len(raws), 2))]):  # read in the order of names, not of writing
        pq.write_table(dataset.data.table.slice(start, 2), folder / "parts" / f"{part}.parquet")
    files = ["a.jsonl", "a.NDJSON", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "saved", "parts"]
    rows = list(Corpus.open(raws))
    assert [row.number for row in rows] == list(range(len(raws)))
    for source in [tuple(raws), dataset, *(str(folder / name) for name in files)]:
        corpus = Corpus.open(source)
        assert list(corpus) == rows and len(corpus) == len(rows), source
        assert list(pickle.loads(pickle.dumps(corpus))) == rows  # workers open the same source


def test_dataset_order_follows_its_selection_whatever_its_format():
    dataset = datasets.Dataset.from_list([{"text": str(number), "n": number} for number in range(600)])
    picked = dataset.shuffle(seed=0).with_format("numpy")
    rows = list(Corpus.open(picked))
    assert [row.text for row in rows] == [str(n) for n in picked["n"]] and rows[0].meta == {"n": int(rows[0].text)}


def test_json_list_may_hold_texts(tmp_path):
    (tmp_path / "a.json").write_text('["one", {"text": "two"}]')
    assert [row.text for row in Corpus.open(tmp_path / "a.json")] == ["one", "two"]


@pytest.mark.parametrize("pack", [lambda data: data, packed], ids=["plain", "gz"])
def test_jsonl_only_newlines_end_a_line(tmp_path, pack):
    path = tmp_path / ("a.jsonl" if pack(b"") == b"" else "a.jsonl.gz")
    texts = ["cr\r\nlf", "sep\u2028\u2029\x85\x0b\x0c", "\U0001f600e\u0301 \ufeff", "last"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(pack(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  \t\n" + b"\n".join(lines[1:])))
    corpus = Corpus.open(path)
    assert [row.text for row in corpus] == texts and len(corpus) == 4


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\xef\xbb\xbf\n\n"),
        ("a.jsonl.gz", packed(b"")),
        ("a.json", b"[]"),
        (None, []),
    ],
    ids=["no bytes", "blank lines", "gz", "json", "list"],
)
def test_empty_corpus_has_no_rows(tmp_path, name, data):
    if name:
        (tmp_path / name).write_bytes(data)
    corpus = Corpus.open(tmp_path / name if name else data)
    assert list(corpus) == [] and len(corpus) == 0 and corpus.sample(3, seed=0) == []


def test_empty_parquet_and_dataset_have_no_rows(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", datasets.Dataset.from_list([])):
        assert list(Corpus.open(source)) == [] and len(Corpus.open(source)) == 0


def test_open_returns_a_corpus_as_it_is_or_with_new_options():
    corpus = Corpus.open([{"text": "a", "source": "web"}, {"text": 3}])
    assert Corpus.open(corpus) is corpus
    changed = Corpus.open(corpus, units="source", skip_bad=True)
    assert [row.unit for row in changed] == ["web"] and corpus.units is None
    for same in (Corpus.open(changed, skip_bad=True), Corpus.open(changed, units="source")):
        assert [row.unit for row in same] == ["web"]  # options that are not given stay
    assert Corpus.open(corpus, skip_bad=True).skip_bad


def test_name_says_what_was_opened(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [])
    names = [Corpus.open(source).name for source in (path, ["a", "b"], datasets.Dataset.from_list([{"text": "a"}]))]
    assert names == ["a.jsonl", "list of 2 rows", "dataset of 1 rows"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_are_streamed(tmp_path, kind):
    path, texts = tmp_path / f"a.{kind}", [f"{number:02000}" for number in range(4000)]
    if kind == "jsonl":
        write_jsonl(path, ({"text": text} for text in texts))
    else:  # 8 MB in one row group
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    del texts
    corpus = Corpus.open(path)
    next(iter(corpus))  # imports
    before = pa.total_allocated_bytes()
    arrow = max(pa.total_allocated_bytes() - before for _ in corpus)
    tracemalloc.start()  # does not see Arrow's memory
    try:
        assert len(corpus) == 4000 and len(corpus.sample(50, seed=0)) == 50
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert python < 2_000_000 and arrow < 4_000_000, (python, arrow)


def test_length_is_counted_once_and_a_file_that_is_gone_is_missed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        corpus = Corpus.open(path)
        assert len(corpus) == 1
        path.unlink()
        assert len(corpus) == 1
        with pytest.raises(FileNotFoundError):
            list(corpus)


# Sample


@given(st.integers(0, 12), st.integers(0, 12), st.integers())
def test_sample_is_a_subset_in_order_and_repeats(size, n, seed):
    corpus = Corpus.open([str(number) for number in range(size)])
    rows = corpus.sample(n, seed)
    numbers = [row.number for row in rows]
    assert numbers == sorted(set(numbers)) and len(rows) == min(n, size)
    assert rows == corpus.sample(n, seed)


def test_sample_is_uniform():
    corpus, draws = Corpus.open([str(number) for number in range(10)]), 2000
    counts = Counter(pair for seed in range(draws) for pair in pairs(corpus.sample(3, seed)))
    chance = 3 * 2 / (10 * 9)  # of each pair; a sample of single rows alone would not show dependence
    assert len(counts) == 45
    assert max(abs(count - draws * chance) for count in counts.values()) < 5 * math.sqrt(draws * chance * (1 - chance))


def pairs(rows):
    return [(a.number, b.number) for a in rows for b in rows if a.number < b.number]


def test_sample_of_fewer_than_none_is_refused():
    with pytest.raises(ValueError, match=r"cannot have -1 rows, ask for 0 or more"):
        Corpus.open(["a"]).sample(-1, seed=0)


# Bad rows

HALF = "\ud83d"
BAD_ROWS = [
    (3, "is a number, not an object"),
    (["a"], "is a list, not an object"),
    (None, "is null, not an object"),
    (
        {},
        "has no fields, but a row needs `text`, `prompt` and `completion`, `instruction` and `output`, `messages`, or `ch",
    ),
    ({"body": "a", "prompt": "b"}, "has only the fields `body`, `prompt`, but a row needs `text`"),
    ({f"f{n}": 1 for n in range(12)}, "`f9` and 2 more, but a row needs"),
    ({"text": "a", "messages": [TELL]}, "has two forms at once, `text` and `messages`, keep one"),
    ({"text": "a", "prompt": "b", "completion": "c"}, "two forms at once, `text` and `prompt` with `completion`"),
    ({"prompt": "a", "completion": "b", "response": "c"}, "`prompt` with `completion` and `prompt` with `response`"),
    ({"instruction": "a", "output": "b", "text": "c"}, "`text` and `instruction` with `output`"),
    ({"text": None}, "field `text` must be text, not null"),
    ({"text": 3}, "field `text` must be text, not a number"),
    ({"text": 3.5}, "field `text` must be text, not a decimal number"),
    ({"text": True}, "field `text` must be text, not true or false"),
    ({"text": ["a"]}, "field `text` must be text, not a list"),
    ({"text": {"en": "a"}}, "field `text` must be text, not an object"),
    ({"prompt": [ASK], "completion": 3}, "field `prompt` must be text, not a list"),
    ({"prompt": [ASK, TELL], "completion": [ASK]}, "field `completion` has no assistant's text, so nothing is learned"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "`from` of message 1 is 'narrator', write one of human"),
    ({"question": "a", "answer": {"value": "b"}}, "field `answer` must be text, not an object"),
    ({"prompt": "a", "completion": None}, "field `completion` must be text, not null"),
    ({"instruction": "a", "input": 3, "output": "b"}, "field `input` must be text, not a number"),
    ({"text": "ab", "prompt_text": 3}, "field `prompt_text` must be text, not a number"),
    ({"text": "ab", "prompt_text": "b"}, "field `prompt_text` must be the beginning of `text`"),
    ({"text": "ab", "prompt_text": "ab"}, "field `text` is empty or blank after its prompt, so nothing is learned"),
    ({"text": ""}, "field `text` is empty or blank, so nothing is learned: fill it or drop the row"),
    ({"text": " \n\u3000"}, "field `text` is empty or blank, so"),
    ({"prompt": "a", "completion": ""}, "field `completion` is empty or blank, so nothing is learned"),
    ({"prompt_text": "a", "response": ""}, "field `response` is empty or blank, so nothing is learned"),
    ({"instruction": "a", "output": " "}, "field `output` is empty or blank, so nothing is learned"),
    ({"messages": "a"}, "field `messages` must be a list of messages, not text"),
    ({"messages": None}, "field `messages` must be a list of messages, not null"),
    ({"messages": []}, "field `messages` has no assistant's text, so nothing is learned"),
    ({"messages": [ASK]}, "field `messages` has no assistant's text, so nothing is learned: add some or drop the row"),
    ({"messages": [ASK, TELL | {"content": ""}]}, "field `messages` has no assistant's text"),
    ({"messages": ["a"]}, "field `messages` must hold objects, but message 1 is text"),
    ({"messages": [ASK, {"role": "assistant"}]}, "`content` of message 2 must be text, not null"),
    ({"messages": [{"role": 1, "content": "a"}]}, "`role` of message 1 must be text, not a number"),
    ({"messages": [TELL | {"content": HALF}]}, "field 'messages' has half a surrogate pair"),
    (
        {"text": "a", "weight": math.nan},
        "field `weight` is nan, but a row's loss is multiplied by it: give a number, or re",
    ),
    ({"text": "a", "weight": "3 kg"}, "field `weight` is text, but a row's loss is multiplied by it"),
    ({"text": "a", "weight": True}, "field `weight` is true or false, but a row's loss is multiplied by it"),
    (
        {"chosen": "a b", "rejected": "a b"},
        "has the same answer as `chosen` and as `rejected`, so that nothing is preferred",
    ),
    ({"prompt": "a", "chosen": "b"}, "has `chosen` without `rejected`, a preference row needs both"),
    ({"rejected": "b"}, "has `rejected` without `chosen`, a preference row needs both: add it or drop the row"),
    (
        {"chosen": "a", "rejected": [TELL]},
        "`rejected` are text and a list, they must both be text, or both lists of messages",
    ),
    (
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        "are text and text after a number, they must both be text, or both",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "field `rejected` is empty or blank, so nothing is learned"),
    ({"text": "a", "chosen": "b", "rejected": "c"}, "two forms at once, `chosen` with `rejected` and `text`, keep one"),
    ({"chosen": [ASK], "rejected": [TELL]}, "field `chosen` has no assistant's text, so nothing is learned"),
    (
        {"prompt": "b", "chosen": [ASK, TELL], "rejected": [TELL]},
        "`prompt` is text that no message of `chosen` has, give it",
    ),
    (
        {"prompt": "a", "completion": "b", "label": True},
        "is an unpaired preference .*as KTO has them.*or rename `label`",
    ),
    ({"text": "ab" + HALF}, "field 'text' has half a surrogate pair at character 3, which is not valid UTF-8"),
    ({"text": "a", "source": HALF}, "field 'source' has half a surrogate pair"),
    ({"text": "a", "tags": [HALF]}, "field 'tags' has half a surrogate pair"),
    ({"text": "a", HALF: 1}, r"field '\\ud83d' has half a surrogate pair"),
    ({"text": "a", "id": HALF}, "field 'id' has half a surrogate pair"),
    ({"text": "a", "id": ""}, "field `id` is empty, fill it"),
    ({"text": "a", "id": " "}, "field `id` is empty, fill it"),
    ({"text": "a", "id": None}, "field `id` must be text or a whole number, not null"),
    ({"text": "a", "id": 1.0}, "field `id` must be text or a whole number, not a decimal number"),
    ({"text": "a", "id": True}, "field `id` must be text or a whole number, not true or false"),
    ({"text": "a", "id": ["b"]}, "field `id` must be text or a whole number, not a list"),
    ({"text": "a", "id": 2**63}, "field `id` is a whole number beyond 64 bits, write it as text"),
    ({"text": "a", "n": -(2**63) - 1}, "field `n` is a whole number beyond 64 bits, write it as text"),
    ({"text": "a", "score": math.nan}, "field `score` is nan, write null where there is no number"),
    ({"text": "a", "score": -math.inf}, "field `score` is -inf, write null"),
    ({"text": "a", "scores": [math.nan]}, r"field `scores` \(a list\) cannot be written as JSON, change or drop it"),
]
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]
BAD_ROWS_IN_PYTHON = [
    ({"text": "a", "deep": DEEP}, r"field `deep` \(a list\) cannot be written as JSON"),
    (b"a", "is bytes, not an object"),
    ({1: "a"}, "has a number as the name of a field, names must be text"),
    ({"text": "a", "image": b"\x89PNG"}, r"field `image` \(bytes\) cannot be written as JSON, change or drop it"),
    ({"text": "a", "x": {"y": object()}}, r"field `x` \(an object\) cannot be written as JSON"),
    ({"text": "a", "x": {1}}, r"field `x` \(a set\) cannot be written as JSON"),
    ({"text": "a", "score": np.float32("nan")}, "field `score` is nan"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS + BAD_ROWS_IN_PYTHON)
def test_bad_row_is_refused_or_listed(row, reason):
    rows = ["fine", row, "fine, too"]
    corpus = Corpus.open(rows)
    with pytest.raises(FormatError, match=f"^list of 3 rows, row 2: .*{reason}") as caught:
        list(corpus)
    assert "\n" not in str(caught.value)
    skipping = Corpus.open(rows, skip_bad=True)
    assert [row.number for row in skipping] == [0, 2]
    assert (skipping.n_skipped, skipping.problems) == (1, [str(caught.value)])


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_row_in_jsonl_has_its_line(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(FormatError, match=rf"^a\.jsonl, line 3: .*{reason}"):
        list(Corpus.open(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', r"is not valid JSON \(Expecting ',' delimiter at character 13\)"),
        (b"text", r"is not valid JSON \(Expecting value at character 1\)"),
        (b'{"text": "a"} {"text": "b"}', r"is not valid JSON \(Extra data at character 15\)"),
        (b'{"text": "a", "text": "b"}', r"is not valid JSON \(an object has the same field twice\)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"text": "a\xff"}', r"is not valid UTF-8 \(byte 12 is 0xff\)"),
        ('{"text": "a"}'.encode("utf-16"), r"is not valid UTF-8 \(byte 1 is 0xff\)"),
        (b'\xef\xbb\xbf{"text": "a"}', "is not valid JSON"),  # a byte order mark inside the file
        (b'"a tale"', r'is text, not an object with fields, write {"text": ...}'),
    ],
    ids=["open", "bare", "two", "twice", "long number", "deep", "no UTF-8", "UTF-16", "byte order mark", "text"],
)
def test_bad_line_is_refused_or_listed(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n" + b'{"text": "fine, too"}\n')
    with pytest.raises(FormatError, match=rf"^a\.jsonl, line 2: {reason}"):
        list(Corpus.open(path))
    corpus = Corpus.open(path, skip_bad=True)
    assert len(list(corpus)) == 2 and corpus.n_skipped == 1 and len(corpus) == 3


def test_bad_rows_beyond_a_hundred_are_counted():
    corpus = Corpus.open([{"text": None}] * 250 + ["fine"], skip_bad=True)
    assert (corpus.problems, corpus.n_skipped) == ([], 0)
    assert [row.number for row in corpus] == [250] and (len(corpus.problems), corpus.n_skipped) == (100, 250)
    next(iter(corpus))  # an iteration that does not end reports nothing
    list(corpus)
    assert (len(corpus.problems), corpus.n_skipped) == (100, 250)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "field `source` is missing, but the units are named by it"),
        ({"source": None}, "field `source` must be text or a number, not null"),
        ({"source": ["web"]}, "field `source` must be text or a number, not a list"),
        ({"source": ""}, "field `source` is empty"),
        ({"source": math.nan}, "field `source` is nan"),
    ],
)
def test_row_without_unit_is_refused(row, reason):
    with pytest.raises(FormatError, match=f"^list of 1 rows, row 1: {reason}"):
        one({"text": "a"} | row, units="source")


def test_parquet_row_that_is_not_utf8_is_one_bad_row(tmp_path):
    texts = [b"fine", b"\xff", b"fine, too"]
    offsets = pa.py_buffer(np.cumsum([0, *map(len, texts)], dtype=np.int32))
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"".join(texts)))
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "parts" / "a.parquet")
    pq.write_table(pa.table({"text": column}), tmp_path / "parts" / "b.parquet")
    with pytest.raises(FormatError, match=r"^b\.parquet, row 2: cannot be read \('utf-8' codec"):
        list(Corpus.open(tmp_path / "parts"))
    assert [row.number for row in Corpus.open(tmp_path / "parts", skip_bad=True)] == [0, 1, 3]


# Sources that cannot be read


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "a.xlsx",
            b"",
            r"is not of a known kind, give a file of \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, \.md, ",
        ),
        ("a.parquet.gz", b"", "is not of a known kind"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"is not valid JSON .*; if it has one row a line, name it \.jsonl"),
        ("a.json", b'{"text": "a"}', "is an object, not a list of rows; if it has one row a line, name it"),
        ("a.json", b'["\xff"]', "is not valid UTF-8"),
        ("a.jsonl.gz", packed(b'{"text": "a"}\n' * 1000)[:-20], r"is cut off or damaged \(.*\), copy or"),
        ("a.json.gz", b"[]", r"is cut off or damaged \(Not a gzipped file"),
        ("a.json.gz", packed(b"[]")[:10] + b"\xff" * 20, r"is cut off or damaged \(Error -3"),
        ("a.parquet", b"PAR1 no more", r"is cut off or damaged \(.*\), copy or write it again"),
    ],
    ids=[
        "xlsx",
        "parquet gz",
        "lines in json",
        "object in json",
        "no UTF-8",
        "gz cut off",
        "no gz",
        "gz damaged",
        "parquet",
    ],
)
def test_unreadable_file_is_refused_even_if_bad_rows_are_not(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    for use in (list, len):
        with pytest.raises(FormatError, match=f"^{re.escape(name)} {reason}"):
            use(Corpus.open(tmp_path / name, skip_bad=True))


def test_damage_inside_a_parquet_file_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 1000]}), path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.parquet is cut off or damaged"):
        list(Corpus.open(path))


def test_path_without_rows_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no\.jsonl does not exist, give a file or directory of rows, or a dataset of"
    ):
        Corpus.open(tmp_path / "no.jsonl")
    with pytest.raises(FormatError, match=r" is not of a known kind, give .* a directory of them or from"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"text": "a"}, "^an object is not a corpus, give a path, a dataset, or a list of dicts or of texts"),
        (iter(["a"]), "^a list_iterator is not a corpus"),
        (b"a", "^bytes is not a corpus"),
        (None, "^null is not a corpus"),
    ],
)
def test_object_that_is_no_corpus_is_refused(source, reason):
    with pytest.raises(TypeError, match=reason):
        Corpus.open(source)


def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    for module, source in (("pyarrow.parquet", "a.parquet"), ("datasets", "saved")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            UnsupportedError, match=rf"needs the package {module[:7]}.*: pip install 'leaveout\[data\]'"
        ):
            Corpus.open(tmp_path / source)
    assert len(Corpus.open(["works without"])) == 1


# Chat


class Tokenizer:
    """A tokenizer whose chat template is a Python function of the messages."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
        assert not tokenize
        return self.chat_template(messages, add_generation_prompt)


def plain(messages, prompted):
    turns = "".join(f"<{message['role']}>\n{message['content']}</s>\n" for message in messages)
    return turns + "<assistant>\n" * prompted


def closing(messages, prompted):  # the last turn is written differently
    return plain(messages, prompted) if prompted else plain(messages, prompted)[:-1] + "<end>"


def trimming(messages, prompted):
    return closing([message | {"content": message["content"].strip()} for message in messages], prompted)


def leading(messages, prompted):
    return closing([message | {"content": message["content"].lstrip()} for message in messages], prompted)


def thinking(messages, prompted):  # asks for a thought that it then leaves out
    return plain(messages, prompted) + "<think>\n" * prompted


def needs_messages(messages, prompted):
    if not messages:
        raise ValueError("an empty conversation")
    return plain(messages, prompted)


def deaf(messages, prompted):  # leaves the assistant out
    return plain([message for message in messages if message["role"] != "assistant"], False)


def forgetful(messages, prompted):  # keeps the last exchange
    return plain(
        messages[max(index for index, message in enumerate(messages) if message["role"] == "user") :], prompted
    )


def refuse(messages, prompted):
    raise ValueError("roles must alternate")


def learned(row):
    return [row.text[start:end] for start, end in row.responses]


CHAT = [ASK, TELL, ASK | {"content": "assistant"}, TELL | {"content": "assistant"}]


@pytest.mark.parametrize(
    ("template", "messages", "spans"),
    [
        (plain, CHAT, ["Here.</s>\n", "assistant</s>\n"]),
        (plain, [*CHAT, ASK], ["Here.</s>\n", "assistant</s>\n"]),
        (plain, [TELL, ASK], ["Here.</s>\n"]),
        (plain, [ASK, TELL | {"content": ""}, TELL], ["</s>\n", "Here.</s>\n"]),
        (closing, CHAT, ["Here.", "assistant"]),
        (closing, [ASK, TELL | {"content": ""}, TELL], ["Here."]),
        (trimming, [ASK, TELL | {"content": " yes \n"}, TELL], ["yes", "Here."]),
        (leading, [ASK, TELL | {"content": " yes \n"}, TELL], ["yes \n", "Here."]),
        (thinking, CHAT, ["Here.", "assistant"]),
        (needs_messages, [TELL, ASK, TELL], ["Here.", "Here."]),
    ],
)
def test_render_finds_what_the_assistant_says(template, messages, spans):
    row = one({"messages": messages})
    rendered = render(row, Tokenizer(template))
    assert rendered == replace(row, text=template(messages, False), responses=rendered.responses, rendered=True)
    assert learned(rendered) == spans
    assert all(rendered.text[:start].endswith("<assistant>\n") for start, _ in rendered.responses)
    assert render(rendered, Tokenizer(template)) == rendered


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), min_size=1, max_size=5), st.booleans())
def test_render_covers_contents_in_any_chat(turns, stable):
    messages = [*({"role": role, "content": content} for role, content in turns), ASK]
    contents = [content for role, content in turns if role == "assistant"]
    if not any(map(str.strip, contents)):
        return
    rendered = render(one({"messages": messages}), Tokenizer(plain if stable else closing))
    assert learned(rendered) == ([content + "</s>\n" for content in contents] if stable else [c for c in contents if c])


def test_render_leaves_other_rows_alone():
    row = one("a tale")
    assert render(row, object()) is row


@pytest.mark.parametrize(
    ("template", "error", "reason"),
    [
        (refuse, FormatError, r"the chat template refuses the messages \(roles must alternate\), .* --template none$"),
        (deaf, FormatError, "its assistant messages cannot be found in what the chat template makes of them, change"),
        (forgetful, FormatError, "its assistant messages cannot be found"),
        (lambda messages, _: closing(messages, _).upper(), FormatError, "its assistant messages cannot be found"),
    ],
)
def test_render_names_the_row_it_cannot_render(template, error, reason):
    row = one({"id": "chat-7", "messages": [ASK, TELL, ASK, TELL]})
    with pytest.raises(error, match=f"^row `chat-7`.*{reason}"):
        render(row, Tokenizer(template))


# Preferences


def test_a_pair_has_two_sides_that_begin_after_what_they_share():
    """TRL's forms: a prompt given or shared, up to a whole word; of messages a list before both, or one text of both."""
    say = [TELL | {"content": answer} for answer in ("blue", "green")]
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"chosen": "a yes please", "rejected": "a yes"},
        {"prompt": [ASK], "chosen": say[:1], "rejected": say[1:]},
        {"chosen": [ASK, say[0]], "rejected": [ASK, say[1]]},
        {"prompt": ASK["content"], "chosen": [ASK, say[0]], "rejected": [ASK, say[1]], "weight": 2, "score": 3},
    ]
    found = list(Corpus.open(rows))
    answers = [[side.text[start:end] for side in row.pair for start, end in side.responses] for row in found]
    assert answers == [[" blue.", " black."]] * 2 + [[" yes please", " yes"]] + [["blue", "green"]] * 3
    for row in found:
        assert [row.text[start:end] for start, end in row.responses] == answers[row.number]
        assert row.text == row.pair[0].text + SEAM + row.pair[1].text
    assert [row.form for row in found] == ["prompt", "text", "text", "messages", "messages", "messages"]
    assert found[3].content_hash == found[4].content_hash != found[5].content_hash  # of another weight
    assert (found[5].weight, found[5].meta) == (2.0, {"weight": 2, "score": 3}) and found[4].weight == 1
    turned = next(iter(Corpus.open([{"chosen": "The sky is black.", "rejected": "The sky is blue."}])))
    assert turned.content_hash != found[1].content_hash == next(iter(Corpus.open([rows[0]]))).content_hash
