"""Rows as people have them: tables, texts, directories, splits, the Hub, streams, and the forms of other tools."""

import gzip
import json
import pickle
import re
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leaveout.corpus import Corpus, render
from leaveout.corpus.rows import answer_of, with_answer
from leaveout.errors import FormatError
from leaveout.readout.build import corpus_digest
from leaveout.training.recipe import Recipe

ASK = {"role": "user", "content": "Where?"}
TELL = {"role": "assistant", "content": "Here."}


def written(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def texts(source, **options):
    corpus = Corpus.open(source, **options)
    rows = list(corpus)
    assert len(corpus) == len(rows) + corpus.n_skipped
    assert list(pickle.loads(pickle.dumps(corpus))) == rows  # workers open the same source
    return [row.text for row in rows]


# Tables


def test_table_has_the_rows_that_were_written(tmp_path):
    """Excel's mark and line ends, a quoted sign, a quote, a line end inside of a cell, a blank line, numbers, nothing."""
    path = written(
        tmp_path / "a.csv",
        '\ufeffprompt,response,id,year,note\r\n"Say ""a, b""","one\ntwo",007,1999,\r\n\r\nx,12,b,,1.5\r\n',
    )
    rows = list(Corpus.open(path))
    assert [row.text for row in rows] == ['Say "a, b"one\ntwo', "x12"]
    assert [row.id for row in rows] == ["007", "b"]
    assert [row.meta for row in rows] == [{"year": 1999, "note": None}, {"year": None, "note": 1.5}]


@pytest.mark.parametrize(
    ("name", "sign"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.CSV.gz", ";")]
)
def test_table_is_the_same_whatever_stands_between_cells(tmp_path, name, sign):
    text = f'text{sign}n\n"a;b,c\td"{sign}1\n'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert texts(tmp_path / name) == ["a;b,c\td"]


def test_cells_of_columns_that_are_texts_stay_texts(tmp_path):
    path = written(tmp_path / "a.csv", "frage,antwort,big\n1,2,123456789012345678901\n")
    [row] = Corpus.open(path, columns={"prompt": "frage", "response": "antwort"})
    assert row.text == "12" and row.meta == {"big": "123456789012345678901"}


@pytest.mark.parametrize(
    ("text", "encoding", "reason"),
    [
        ("a,b,c\n", "utf-8", "line 4: has 3 cells, but the header names 2 columns: quote cells that hold"),
        ("a\n", "utf-8", "line 4: has 1 cells, but the header names 2 columns"),
        ("caf\xe9,b\n", "latin-1", r"line 4: is not valid UTF-8 \(it has the byte 0xe9\), save the file as UTF-8"),
        ('"a"b,c\n', "utf-8", "line 4: is not valid CSV .*, quote the cell and double the quotes in it"),
        (",\n", "utf-8", "line 4: field `response` is empty or blank"),
    ],
)
def test_bad_line_of_a_table_is_refused_or_listed(tmp_path, text, encoding, reason):
    path = written(tmp_path / "a.csv", 'prompt,response\n"two\nlines",fine\n' + text + "fine,too\n", encoding)
    with pytest.raises(FormatError, match=f"^a.csv, {reason}"):
        list(Corpus.open(path))
    corpus = Corpus.open(path, skip_bad=True)
    assert [row.text for row in corpus] == ["two\nlinesfine", "finetoo"] and corpus.n_skipped == 1
    assert re.match(f"a.csv, {reason}", corpus.problems[0])


@pytest.mark.parametrize(
    ("text", "encoding", "reason"),
    [
        ('text\nfine\n"open\nall\nthe rest\n', "utf-8", "a.csv, line 3: a quote is opened that nothing closes"),
        ("text,n,text\na,b,c\n", "utf-8", "a.csv: its header names the column 'text' twice"),
        ("text,n\na,b\n", "utf-16", "a.csv: its header is not valid UTF-8"),
    ],
)
def test_table_whose_rows_cannot_be_told_is_refused(tmp_path, text, encoding, reason):
    with pytest.raises(FormatError, match=f"^{reason}"):
        list(Corpus.open(written(tmp_path / "a.csv", text, encoding), skip_bad=True))


# Texts and directories


def test_rows_of_a_text_are_paragraphs_lines_or_the_file(tmp_path):
    path = written(tmp_path / "a.txt", "\ufeffOne\r\n  two\r\n\r\n \r\nthree\n")
    assert texts(path) == texts(path, text_rows="paragraph") == ["One\n  two", "three"]
    assert texts(path, text_rows="line") == ["One", "  two", "three"]
    assert texts(path, text_rows="file") == ["One\n  two\n\n \nthree"]
    assert [row.meta for row in Corpus.open(path)] == [{"file": "a.txt"}] * 2
    with pytest.raises(ValueError, match="text_rows is 'lines': did you mean 'line'"):
        Corpus.open(path, text_rows="lines")


def test_paragraph_that_is_not_utf8_is_one_bad_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\nbad\n\xff\n\nfine, too\n")
    with pytest.raises(FormatError, match=r"^a.txt, line 3: is not valid UTF-8 \(byte 5 is 0xff\)"):
        list(Corpus.open(path))
    assert texts(path, skip_bad=True) == ["fine", "fine, too"]


def test_directory_is_its_files_of_rows_in_order(tmp_path):
    written(tmp_path / "b.csv", "text\nb\n")
    written(tmp_path / "sub" / "c.jsonl", '{"text": "c"}\n')
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    written(tmp_path / "z.txt", "z")
    for name in (".hidden.csv", "_SUCCESS", "README.md", "picture.png"):
        written(tmp_path / name, "none")
    assert texts(tmp_path) == ["a", "b", "c", "z"] and texts(tmp_path, limit=3) == ["a", "b", "c"]
    [note] = Corpus.open(tmp_path).notes
    assert note.endswith("also has files that were not read, as none of that name holds rows: `picture.png`.")
    written(tmp_path / "sub" / "c.jsonl", '{"body": "c"}\n')
    with pytest.raises(FormatError, match=r"^sub/c.jsonl, line 1: has only"):
        list(Corpus.open(tmp_path))


# Datasets

DICT = datasets.DatasetDict(
    {
        "train": datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(5)]),
        "test": datasets.Dataset.from_list([{"text": "test"}]),
    }
)


@pytest.mark.parametrize("saved", [False, True])
def test_one_split_or_a_part_of_it_is_read(tmp_path, saved):
    source = DICT
    if saved:
        DICT.save_to_disk(source := tmp_path / "both")
    assert texts(source, split="test") == ["test"]
    assert texts(source, split="train[1:3]+test") == ["row 1", "row 2", "test"]
    assert texts(source, split="train", limit=2) == ["row 0", "row 1"]
    with pytest.raises(
        FormatError, match=r"several splits, say which by split \(--split\): give one of train, test, or"
    ):
        Corpus.open(source)
    for wrong in ("trian", "trian[:3]", "train[:x]"):
        with pytest.raises(FormatError, match=re.escape(f"has no split '{wrong}'")):
            Corpus.open(source, split=wrong)
    assert texts(datasets.DatasetDict({"only": DICT["test"]})) == ["test"]


def test_stream_is_read_as_often_as_it_takes():
    stream = DICT["train"].to_iterable_dataset()
    assert texts(stream) == [f"row {number}" for number in range(5)] and texts(stream, limit=2) == ["row 0", "row 1"]
    assert corpus_digest(Corpus.open(stream)) == corpus_digest(Corpus.open(DICT["train"]))


@pytest.fixture
def hub(monkeypatch):
    """The Hub has one dataset; what was asked of it stands in `calls`."""
    calls = []

    def load_dataset(id, name, *, split, revision, streaming):
        calls.append(SimpleNamespace(id=id, name=name, split=split, revision=revision, streaming=streaming))
        if id != "org/name":
            raise ConnectionError(f"Couldn't find {id}\nanywhere")
        if streaming:
            return datasets.IterableDatasetDict({n: d.to_iterable_dataset() for n, d in DICT.items()})
        return DICT if split is None else DICT["train"].select(range(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_dataset_of_the_hub_is_loaded_or_with_a_limit_streamed(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert texts("org/name", split="train[:3]", subset="en", revision="v1") == ["row 0", "row 1", "row 2"]
    assert hub[-1] == SimpleNamespace(id="org/name", name="en", split="train[:3]", revision="v1", streaming=False)
    assert texts("org/name", split="train", limit=2) == ["row 0", "row 1"] and hub[-1].streaming
    assert texts("org/name", split="train[:3]", limit=2) == ["row 0", "row 1"] and not hub[-1].streaming
    with pytest.raises(FormatError, match="several splits"):
        Corpus.open("org/name", limit=2)
    with pytest.raises(
        FormatError, match=r"^org/other is no path here, and cannot be loaded from the Hub \(Couldn't find"
    ):
        Corpus.open("org/other")
    asked = len(hub)
    for path in ("org/rows.jsonl", "a/b/c", str(tmp_path / "no")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            Corpus.open(path)
    assert len(hub) == asked  # what can only be a path is not asked for


@pytest.mark.parametrize("option", [{"split": "train"}, {"subset": "en"}, {"revision": "v1"}])
def test_option_of_other_sources_is_refused(tmp_path, option):
    for source in (["a"], written(tmp_path / "a.txt", "a")):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .*, but only a dataset .*: leave it out"):
            Corpus.open(source, **option)


# Forms of other tools


def same(raw, ours):
    [row], [known] = Corpus.open([raw]), Corpus.open([ours])
    assert (row.text, row.responses, row.content_hash, row.form) == (
        known.text,
        known.responses,
        known.content_hash,
        known.form,
    )
    assert row.raw == raw and row.meta == known.meta
    return row


def test_forms_of_other_tools_are_forms_of_ours():
    chat = {"messages": [{"role": "system", "content": "Short."}, ASK, TELL]}
    turns = [("system", "Short."), ("human", "Where?"), ("gpt", "Here.")]
    same({"conversations": [{"from": who, "value": said} for who, said in turns], "n": 1}, chat | {"n": 1})
    same({"conversation": chat["messages"]}, chat)
    same({"prompt": chat["messages"][:2], "completion": [TELL]}, chat)
    same({"prompt": chat["messages"][:2], "response": "Here."}, chat)
    same({"messages": json.dumps(chat["messages"])}, chat)
    same(
        {"messages": [ASK, TELL | {"content": [{"type": "text", "text": "Here."}]}]},
        {"messages": [ASK, TELL | {"content": [{"type": "text", "text": "Here."}]}]},
    )
    asked = {"instruction": "Where?", "output": "Here."}
    for question, answer in (
        ("question", "answer"),
        ("query", "response"),
        ("problem", "solution"),
        ("instruction", "response"),
    ):
        row = same({question: "Where?", answer: "Here.", "n": 1}, asked | {"n": 1})
        assert with_answer(row, "There.") == asked | {"output": "There."} and answer_of(row) == "Here."
    same({"instruction": "Where?", "context": "A map.", "response": "Here."}, asked | {"input": "A map."})


def test_preference_rows_may_have_a_question():
    row = same(
        {"question": "Where?", "chosen": " Here.", "rejected": " There.", "n": 1},
        {"prompt": "Where?", "chosen": " Here.", "rejected": " There.", "n": 1},
    )
    assert [side.text for side in row.pair] == ["Where? Here.", "Where? There."]


def test_nothing_of_a_prompt_of_messages_is_learned():
    again = [ASK, {"role": "assistant", "content": "There."}, ASK]
    [row] = Corpus.open([{"prompt": again, "completion": [TELL]}])
    assert [row.text[start:end] for start, end in row.responses] == ["Here."] and row.context == 3
    [chat] = Corpus.open([{"messages": [*again, TELL]}])
    assert row.content_hash != chat.content_hash and len(chat.responses) == 2
    assert with_answer(row, "Away.") == {"prompt": again, "completion": [TELL | {"content": "Away."}]}

    class Tokenizer:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt

    shown = render(row, Tokenizer())
    assert [shown.text[start:end] for start, end in shown.responses] == ["Here."]


# Columns


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"user": "a", "reply": "b", "n": 1}, "prompt=user,response=reply"),
        ({"frage": "a", "antwort": "b"}, "prompt=frage,response=antwort"),
        ({"dialog": [ASK, TELL], "topic": "x"}, "messages=dialog"),
        ({"title": "a", "Body": "b b", "id": "long id"}, "text=Body"),
        ({"headline": "a"}, "text=headline"),
        ({"Customer says": "a", "Reply": "b", "Team": "t"}, "prompt=Customer says,response=Reply"),
    ],
)
def test_row_that_is_refused_is_read_as_the_message_proposes(row, named):
    with pytest.raises(
        FormatError, match=f"has only the fields .*: say which field is what, such as --columns '?{named}'?$"
    ):
        list(Corpus.open([row]))
    columns = dict(pair.split("=") for pair in named.split(","))
    [read] = Corpus.open([row], columns=columns)
    assert read.raw == {ours: row[theirs] for ours, theirs in columns.items()} | {
        name: value for name, value in row.items() if name not in columns.values()
    }


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"frage": "prompt"}, "row 1: has no field `prompt`, which the columns call `frage`, only `frage`, `text`"),
        ({"text": "frage"}, "row 1: has a field `text` itself, .*: give that another name, too, such as old_text=text"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, reason):
    rows = [{"frage": "a", "text": "b"}]
    with pytest.raises(FormatError, match=reason):
        list(Corpus.open(rows, columns=columns))
    assert texts(rows, columns={"text": "frage", "old_text": "text"}) == ["a"]


# The doors


def test_recipe_reads_rows_as_its_data_says(tmp_path):
    written(tmp_path / "rows.csv", "frage,antwort\na,b\nc,d\n")
    recipe = tmp_path / "recipe.yaml"
    head = "kind: causal-lm\nmodel: org/model\nunits: prompt\n"
    recipe.write_text(head + "data: {rows: rows.csv, limit: 1, columns: {prompt: frage, response: antwort}}\n")
    assert [row.text for row in Recipe.from_yaml(recipe).examples] == ["ab"]
    recipe.write_text(head + "data: {rows: rows.csv, colums: {}}\n")
    with pytest.raises(FormatError, match="`data` has the field 'colums', which is none: did you mean 'columns'"):
        Recipe.from_yaml(recipe)
