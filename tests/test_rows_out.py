"""Rows, hits and scores out: files by their names, tables of Arrow and pandas, columns of datasets, and commands to repeat."""

import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from command import run_command
from leaveout import Hit, Hits, Index
from leaveout.corpus import Corpus
from leaveout.corpus.writers import WRITTEN, arrow_table, write_rows
from leaveout.errors import FormatError, MismatchError, UnsupportedError
from readout.tiny import TEXTS, make_model, make_tokenizer

ROWS = [
    {"prompt": "a", "response": 'b, "c"\nd', "year": 1999, "note": None},
    {"messages": [{"role": "assistant", "content": "yes"}], "year": 2001},
]


def read_back(path):
    if path.suffix != ".arrow":
        return list(Corpus.open(path))
    with pa.memory_map(str(path)) as file:
        return list(Corpus.open(datasets.Dataset(pa.ipc.open_file(file).read_all())))


@pytest.mark.parametrize("suffix", WRITTEN)
def test_rows_that_are_written_are_read_as_they_were(tmp_path, suffix):
    for rows in ([ROWS[0]], [ROWS[1]], ROWS):
        if suffix == ".csv" and len(rows) == 2:
            continue  # a table of text cannot tell an empty prompt from none
        write_rows(tmp_path / f"rows{suffix}", rows)
        read = read_back(tmp_path / f"rows{suffix}")
        assert [row.content_hash for row in read] == [row.content_hash for row in Corpus.open(rows)]
        assert [row.meta["year"] for row in read] == [row["year"] for row in rows]
    assert [file.name for file in tmp_path.iterdir()] == [f"rows{suffix}"]


def test_file_that_rows_cannot_go_into_is_refused_before_and_leaves_nothing(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"rows.xls is not a file that rows are written to: .* one of \.jsonl, \.csv"
    ):
        write_rows(tmp_path / "rows.xls", ROWS)
    mixed = [{"n": 1}, {"n": "one"}]
    with pytest.raises(FormatError, match=r"field `n` has values of several kinds, .*: write JSON lines"):
        write_rows(tmp_path / "rows.parquet", mixed)
    assert list(tmp_path.iterdir()) == []


HITS = Hits(
    [
        Hit(1, "a", 2.5, "one", {"source": "web", "score": 7}, {"text": "one", "source": "web", "score": 7}),
        Hit(2, "b", 0.5, "two", {"year": 1999}, {"text": "two", "year": 1999}),
    ]
)


def test_hits_are_tables_and_datasets():
    wanted = {"rank": [1, 2], "score": [2.5, 0.5], "id": ["a", "b"], "text": ["one", "two"]}
    wanted |= {"source": ["web", None], "row_score": [7, None], "year": [None, 1999]}
    assert HITS.to_arrow().to_pydict() == wanted
    frame = HITS.to_pandas()
    assert list(frame.columns) == list(wanted) and frame["score"].tolist() == [2.5, 0.5]
    rows = HITS.to_dataset()
    assert rows["leaveout_score"] == [2.5, 0.5] and rows["score"] == [7, None] and rows["text"] == ["one", "two"]
    with pytest.raises(FormatError, match="fields `score` and `leaveout_score`: rename one"):
        Hits([Hit(1, "a", 1.0, "t", {}, {"score": 1, "leaveout_score": 1})]).rows()
    assert arrow_table([]).num_rows == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("llama").float().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write_rows(path, [{"Frage": TEXTS[at], "Antwort": " " + TEXTS[at + 1], "Jahr": 2000 + at} for at in range(4)])
    return path


COLUMNS = {"prompt": "Frage", "response": "Antwort"}


@pytest.fixture(scope="module")
def made(model, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "idx"
    return Index.build(model, Corpus.open(table, columns=COLUMNS), path)


def test_selection_is_the_users_own_rows_in_the_form_of_the_file(made, table, tmp_path, monkeypatch, capsys):
    own = [
        dict(zip(("Frage", "Antwort", "Jahr"), (TEXTS[at], " " + TEXTS[at + 1], 2000 + at), strict=True))
        for at in range(4)
    ]
    wanted = list(Corpus.open(table, columns=COLUMNS))
    for suffix in (".csv", ".parquet", ".jsonl"):
        out = tmp_path / f"best{suffix}"
        arguments = ("select", made.path, "--wanted", table, "--columns", "prompt=Frage,response=Antwort", "-n", 3)
        assert run_command(monkeypatch, capsys, *arguments, "--out", out)[0] == 0
        rows = [row.raw for row in Corpus.open(out, columns=COLUMNS)]
        assert [row.pop("score") for row in rows] == [hit.score for hit in made.select(wanted, 3)]
        back = [{COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
        assert all(row in own for row in back)
    code, _, err = run_command(monkeypatch, capsys, *arguments, "--out", tmp_path / "best.txt")
    assert code == 1 and "best.txt is not a file that rows are written to" in err


def test_search_writes_its_hits(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "hits.parquet"
    options = ("--query", TEXTS[1], "--query", TEXTS[2], "-k", 2, "--form", "text", "--out", out)
    assert run_command(monkeypatch, capsys, "search", made.path, *options)[0] == 0
    found = pq.read_table(out).to_pydict()
    assert found["query"] == [TEXTS[1]] * 2 + [TEXTS[2]] * 2 and found["rank"] == [1, 2, 1, 2] and "Jahr" in found


def test_scores_are_columns_of_the_dataset_in_its_own_order(made, table):
    rows = datasets.Dataset.from_list([{"Frage": TEXTS[at], "Antwort": " " + TEXTS[at + 1]} for at in (2, 0, 3, 2)])
    scored = made.add_scores(rows, [TEXTS[1], TEXTS[4]], ["one", "two"])
    scores = made.score([TEXTS[1], TEXTS[4]])
    places = [made.ids.index(row.id) for row in Corpus.open(rows, columns=COLUMNS)]
    np.testing.assert_array_equal(np.array([scored["one"], scored["two"]], np.float32), scores[:, places])
    with pytest.raises(ValueError, match=r"columns is \['Frage'\], but the dataset has 'Frage': give a new name"):
        made.add_scores(rows, [TEXTS[1]], ["Frage"])
    with pytest.raises(ValueError, match=r"but there are 2 queries"):
        made.add_scores(rows, [TEXTS[1], TEXTS[4]])
    other = datasets.Dataset.from_list([{"Frage": "x", "Antwort": "y"}])
    with pytest.raises(
        MismatchError, match=r"1 rows of the dataset are not in the index, the first is .*: append them"
    ):
        made.add_scores(other, [TEXTS[1]])


def test_index_says_by_which_commands_it_was_made(model, table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    columns = ("--columns", "prompt=Frage,response=Antwort")
    made = ("index", model, table, "--out", "my idx", *columns, "--limit", 2)
    for command in (made, ("append", "my idx", table, *columns), made[:-2], made):
        code, _, _ = run_command(monkeypatch, capsys, *command)
        assert code == (1 if command == made[:-2] else 0)
    _, out, _ = run_command(monkeypatch, capsys, "info", "my idx", "--json")
    commands = json.loads(out)["commands"]
    assert [one["command"] for one in commands] == [
        f"leaveout index {model} {table} --out 'my idx' {' '.join(columns)} --limit 2",
        f"leaveout append 'my idx' {table} {' '.join(columns)}",
    ]
    assert {"in": str(tmp_path), "version": sys.modules["leaveout"].__version__}.items() <= commands[0].items()
