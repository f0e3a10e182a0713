"""Filters find what SQL says, among live rows only, and can do no harm."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leaveout.store import Store, filters

from .stores import record, vectors

ODD = [
    "text",
    "ID",
    "Year",
    "year",
    "where",
    "select",
    "a.b",
    'say "it"',
    "it's",
    "",
    " ",
    "é",
    "rowid",
    "leaveout key",
    "$",
    "a\\b",
    "live",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with Store.create(tmp_path_factory.mktemp("filters") / "store", {}) as store:
        sources = ["web", "books", None, "web"]
        rows = [record(f"r{n}", source=source, year=2000 + n, flag=n > 1) for n, source in enumerate(sources)]
        store.put(
            [*rows, record("odd", 'it\'s; -- (a) "text"', **{name: n for n, name in enumerate(ODD)})],
            vectors([*"abcde"]),
        )
        store.delete(["r3"])
    return store


CONDITIONS = {
    "source = 'web'": [0],
    "source IS NULL and id like 'r%'": [2],
    "year BETWEEN 2001 AND 2002": [1, 2],
    'YEAR > 2000 or "Year" < 100': [1, 2, 4],
    "flag": [2],
    "not flag and unit = 'unit of r1'": [1],
    "id in ('r0', 'r3', 'odd')": [0, 4],
    "lower(upper(text)) = 'the text of r2'": [2],
    "text = 'it''s; -- (a) \"text\"'": [4],
    "(coalesce(year, 0) % 2 = 0) and (id || '!' != 'r0!')": [2],
    "case when year > 2001 then 1 else 0 end": [2],
    "instr(text, ';') > 0 -- ".removesuffix(" -- "): [4],
    "1": [0, 1, 2, 4],
    "NULL": [],
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_select_finds_live_rows(library: Store, where: str) -> None:
    found = library.numbers_where(where)
    assert found.dtype == np.int64 and found.tolist() == CONDITIONS[where]


@pytest.mark.parametrize("name", ODD)
def test_select_knows_odd_field_names(library: Store, name: str) -> None:
    column = {"text": "meta.text", "ID": "meta.ID", "Year": "meta.Year", "leaveout key": "meta.leaveout key"}.get(
        name, name
    )
    column = '"' + column.replace('"', '""') + '"'
    assert library.numbers_where(f"{column} = {ODD.index(name)}").tolist() == [4]


REFUSED_CONDITIONS = {
    "1) OR (1": r"has '\)' at character 2",
    "deleted > 0": 'unknown column .*deleted.*the columns are "id", "unit", "text", "source"',
    "\"sorce\" = 'web'": "unknown column 'sorce'; the columns are",
    "rowid_ = 1": "unknown column",
    "_rowid_ = 1": "unknown column",
    "sqlite_master.sql = 1": "unknown column",
    "rows.deleted = 0": "unknown column",
    "live.id = 'r0'": "unknown column",
    "1; DROP TABLE rows": "has ';'",
    "1 -- x": "has '--'",
    "1 /* x */": r"has '/\*'",
    "'open": 'has "\'"',
    "(1": "unbalanced parentheses",
    "id = ?": r"has '\?'",
    "id = :end": "has ':'",
    "1 \0": "has '.x00'",
    "": "must be an SQL condition",
    "id =": "refused .*syntax error",
    "EXISTS (SELECT 1)": "not authorized",
    "id IN (SELECT id FROM rows)": "refused",
    "id IN (VALUES ('r0'))": "refused",
    "id IN row": "refused",
    "id IN rows": "refused",
    "id IN pragma_table_info('rows')": "refused",
    "1 UNION SELECT 1": "refused",
    "1 ORDER BY 1": "refused",
    "load_extension('x')": "load_extension",
    "ATTACH DATABASE 'x' AS y": "refused",
    "PRAGMA user_version = 9": "refused",
    "EXISTS (SELECT * FROM pragma_user_version)": "refused",
    "1 IN (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c)": "refused",
    "zeroblob(9000000000) = 1": "zeroblob",
    "printf('%999999999d', 1) = 1": "printf",
    "hex(text) = ''": "hex",
    "fts3_tokenizer('x') = 1": "refused",
    "json_each('[1]') = 1": "refused",
    "id REGEXP 'x'": "refused",
    "readfile('/etc/passwd')": "readfile",
    "writefile('x', 'y')": "writefile",
    "randomblob(1000000000) = 1": "randomblob",
    "count(*) > 0": "count",
    "row_number() OVER () > 0": "row_number",
    "id MATCH 'x'": "refused",
    "abs(-9223372036854775808)": "cannot be evaluated: integer overflow",
}


@pytest.mark.parametrize("where", REFUSED_CONDITIONS)
def test_select_refuses(library: Store, where: str) -> None:
    with pytest.raises(ValueError, match=REFUSED_CONDITIONS[where]) as caught:
        library.numbers_where(where)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["id", "(", ")", "'", '"', "OR", "1", "=", "--", ";", "SELECT", "FROM rows", "IN", "deleted", "[", "`", ","]
        ),
        max_size=8,
    )
)
def test_select_never_shows_a_deleted_row(library: Store, words: list[str]) -> None:
    with suppress(ValueError):
        assert 3 not in library.numbers_where(" ".join(words))


def test_select_stops_an_endless_condition(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_FILTER_SECONDS", 0)
    many = " AND ".join(["length(text) > 1"] * 900)
    filled.put([record(f"n{n}") for n in range(500)], {"x": np.zeros(500, np.int8)})
    with pytest.raises(ValueError, match="took more than 0 s; use a simpler"):
        filled.numbers_where(many)


def test_unmatched_names_what_the_fields_have(library: Store) -> None:
    said = library.unmatched("SOURCE = 'year' AND flag = 2", "example")
    assert said == (
        """No example satisfies "SOURCE = 'year' AND flag = 2": source has none, 'books', 'web'; flag has '0', none, '1'."""
    )
    assert library.unmatched("id = 'x'") == """No row satisfies "id = 'x'"."""
