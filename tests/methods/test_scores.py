"""Scores of other tools: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.methods.scores import load_scores, save_scores

QUERIES, ROWS = ["q1", "q0"], ["c", "a", "b,\n", "ü"]
SCORES = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
PAIRS = [(q, r, float(SCORES[i, j])) for i, q in enumerate(QUERIES) for j, r in enumerate(ROWS)]


def write(path, pairs):
    if path.suffix == ".csv":
        cell = '"{}"'.format
        lines = ["rank,score,id,query", *(f"1,{score!r},{cell(row)},{query}" for query, row, score in pairs)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps({"query": q, "id": r, "score": s}) for q, r, s in pairs))
    return path


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_pairs_come_in_the_order_of_the_ids(kind, tmp_path):
    found = load_scores(write(tmp_path / f"s{kind}", PAIRS[::-1]), QUERIES, ROWS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, SCORES)
    np.testing.assert_array_equal(load_scores(tmp_path / f"s{kind}", QUERIES[::-1], ROWS[::-1]), SCORES[::-1, ::-1])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_arrays_come_as_they_are(dtype, tmp_path):
    np.save(tmp_path / "s.npy", (10 * SCORES).astype(dtype))
    found = load_scores(str(tmp_path / "s.npy"), QUERIES, ROWS)
    assert found.dtype == np.float32 and found.flags.writeable
    np.testing.assert_array_equal(found, (10 * SCORES).astype(dtype).astype(np.float32))


CHANGED = {
    "another query": ([*PAIRS, ("q9", "a", 1.0)], MismatchError, "query 'q9' is not asked for"),
    "another row": ([*PAIRS, ("q1", "z", 1.0)], MismatchError, "row 'z' is not asked for"),
    "twice": ([*PAIRS, PAIRS[0]], MismatchError, "'q1', 'c' stands there twice"),
    "missing": (PAIRS[:5], MismatchError, "lacks 3 pairs, the first is 'q0', 'a'"),
    "nan": ([*PAIRS[:-1], ("q0", "ü", float("nan"))], FormatError, "nan"),
    "too large": ([*PAIRS[:-1], ("q0", "ü", 1e39)], FormatError, "not a finite score"),
    "no number": ([*PAIRS[:-1], ("q0", "ü", "high")], FormatError, "'high'.* is not a finite score"),
}


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
@pytest.mark.parametrize("case", CHANGED)
def test_wrong_pairs_are_refused(case, kind, tmp_path):
    pairs, error, message = CHANGED[case]
    with pytest.raises(error, match=message):
        load_scores(write(tmp_path / f"s{kind}", pairs), QUERIES, ROWS)


def test_wrong_files_are_refused(tmp_path):
    def load(name, content=None, ids=QUERIES):
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        elif content is not None:
            np.save(tmp_path / name, content)
        return load_scores(tmp_path / name, ids, ROWS)

    with pytest.raises(MismatchError, match=r"shape \(4, 2\), wanted \[query, train\] = \(2, 4\)"):
        load("t.npy", SCORES.T)
    with pytest.raises(FormatError, match="not finite"):
        load("i.npy", np.where(SCORES > 0, np.inf, SCORES))
    with pytest.raises(FormatError, match="holds <U1, not numbers"):
        load("u.npy", np.full((2, 4), "a"))
    with pytest.raises(FormatError, match="without unpickling"):
        load("p.npy", np.full((2, 4), None))
    with pytest.raises(FormatError, match="no column 'id'"):
        load("h.csv", "query,row,score\nq0,a,1")
    for line in ("[1]", "{", '{"query": "q0", "score": 1}'):
        with pytest.raises(FormatError, match="line 1 is no object with query, id and score"):
            load("l.jsonl", line)
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(FormatError, match="has no columns query, id and score that can be read"):
            load(name, "nothing of Arrow")
    with pytest.raises(UnsupportedError, match=r"give \.npy, \.csv, \.jsonl, \.parquet, \.arrow"):
        load("s.txt", "1")
    with pytest.raises(ValueError, match="a query id stands twice"):
        load("s.txt", "1", ids=["q", "q"])
    with pytest.raises(FileNotFoundError):
        load("absent.csv")


@pytest.mark.parametrize("kind", [".npy", ".csv", ".jsonl", ".parquet", ".arrow"])
def test_written_scores_come_back(kind, tmp_path):
    place = tmp_path / f"s{kind}"
    place.write_text("what was there")
    assert save_scores(place, SCORES, QUERIES, ROWS) == place
    np.testing.assert_array_equal(load_scores(place, QUERIES, ROWS), SCORES)
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize(
    ("name", "scores", "error", "message"),
    [
        ("s.txt", SCORES, UnsupportedError, "give .npy, .csv, .jsonl, .parquet, .arrow"),
        ("s.npy", SCORES.T, MismatchError, r"have the shape \(4, 2\), wanted \(2, 4\)"),
        ("s.csv", np.full((2, 4), np.nan), FormatError, "not finite"),
        ("s.jsonl", np.full((2, 4), 1e39), FormatError, "not finite"),
        ("no/s.csv", SCORES, FileNotFoundError, "There is no directory .*no: make it first"),
    ],
)
def test_scores_that_cannot_be_read_are_not_written(name, scores, error, message, tmp_path):
    (tmp_path / Path(name).name).write_text("what was there")
    with pytest.raises(error, match=message):
        save_scores(tmp_path / name, scores, QUERIES, ROWS)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]


def test_a_text_that_no_file_holds_leaves_nothing_behind(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        save_scores(tmp_path / "s.csv", SCORES, ["\ud800", "q"], ROWS)
    assert not list(tmp_path.iterdir())
    long = ["x" * 200_000, "q"]
    np.testing.assert_array_equal(load_scores(save_scores(tmp_path / "s.csv", SCORES, long, ROWS), long, ROWS), SCORES)
