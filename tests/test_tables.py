"""Tables of text and HTML show what they are given as it is, and JSON is strict."""

from __future__ import annotations

import numpy as np
import pytest

from leaveout.cli.marked import print_legend, print_marked
from leaveout.cli.program import to_line
from leaveout.tables import Table, Tabular, number, shorten


def test_json_refuses_not_a_number():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line({"score": float("nan")})


def test_shorten_makes_one_line():
    assert shorten("a\n b\t c", 5) == "a b c"
    assert shorten("abcdef", 5) == "abcd…"


def test_a_wide_table_puts_intervals_below_their_means(capsys, monkeypatch):
    rows = [("default", *["0.655 [0.587, 0.721]"] * 4)]
    monkeypatch.setenv("COLUMNS", "80")
    print(Table(["method", "LDS", "QLD (nats)", "leave-one-out", "AP"], rows))
    shown = capsys.readouterr().out
    assert (
        max(map(len, shown.splitlines())) <= 80
        and shown.count("[0.587, 0.721]") == 4
        and " [" not in shown.split("0.655")[1]
    )
    monkeypatch.setenv("COLUMNS", "200")
    print(Table(["method", "LDS", "QLD (nats)", "leave-one-out", "AP"], rows))
    assert capsys.readouterr().out.count("0.655 [0.587, 0.721]") == 4


def test_a_wide_table_breaks_texts_between_words(monkeypatch):
    """Such as that of `verify` on a terminal of 80 columns: sentences are broken, and no word while there is room."""
    headers = ["query", "without", "base", "predicted", "± (95 %)", "verdict", "actual", "inside"]
    row = ("Ottoline Marsh did go abroad.", "travel, guide", 3.1415, 2.7182, 0.0123, "cannot tell from zero", 2.7, "no")
    monkeypatch.setenv("COLUMNS", "80")
    shown = str(Table(headers, [row]))
    assert max(map(len, shown.splitlines())) <= 80
    for cell in [*headers, *row]:
        for word in number(cell).split():
            assert word in shown, shown
    long = str(Table(headers, [("q" * 200, *row[1:])]))  # one word that no table has room for
    assert max(map(len, long.splitlines())) <= 80 and long.count("q") == 201 and "─" not in long
    assert all(word in long for word in ("predicted", "verdict", "cannot"))
    empty = str(Table(["", "", "text"], [("", " ", "word " * 40)] * 2))
    assert max(map(len, empty.splitlines())) <= 80 and empty.count("word") == 80


def test_a_narrow_terminal_gets_a_block_a_row(monkeypatch):
    """And no columns of three letters: each cell stands beside its name."""
    headers = ["query", "left out", "effect (nats) [95 % interval]", "verdict"]
    rows = [
        ("Ottoline Marsh did go abroad.", "travel", "+0.12 [+0.05, +0.19]", "rises"),
        ("other", "", "+1 [+0, +2]", "falls"),
    ]
    monkeypatch.setenv("COLUMNS", "40")
    shown = str(
        Table(
            headers, rows, "What was found in one sentence, which is long.", ["A note that is longer than a line is."]
        )
    )
    assert max(map(len, shown.splitlines())) <= 40
    assert shown.splitlines()[2] == "query          Ottoline Marsh did go"
    assert "verdict        rises\n\nquery          other" in shown and "left out       travel" in shown
    assert shown.count("left out") == 1  # an empty cell has no line
    for width in (1, 10, 20):
        monkeypatch.setenv("COLUMNS", str(width))
        assert all(letter in str(Table(headers, rows)) for letter in "Ottoline")


def test_text_with_brackets_stays_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print(Table(["id", "text", "LDS"], [("row [a]", "list [1] and [2, 3] " + 40 * "x", "-0.1 [-0.2, 1e-05]")]))
    shown = capsys.readouterr().out
    assert "row [a]" in shown and "list [1]" in shown and "-0.1 [-0.2" not in shown


@pytest.mark.parametrize("text", ["[user]Where?", "[INST] Where? [/INST] Here.", ":+1: [bold]x", "a\\[b]"])
def test_tables_show_text_as_it_is(text, capsys):
    print(Table([text, "score"], [(text, 1.0)], text))
    assert capsys.readouterr().out.count(text) == 3


def test_a_result_prints_its_table_and_shows_html():
    class Result(Tabular):
        def table(self):
            return Table(["query", "score"], [("a<b", 0.123456)], notes=["One query alone."])

    shown = str(Result())
    assert "a<b" in shown and "0.1235" in shown and shown.endswith("\nOne query alone.") and "\x1b" not in shown
    assert Result()._repr_html_() == (
        '<table><tr><th>query</th><th>score</th></tr><tr><td>a&lt;b</td><td class="number">0.1235</td></tr></table>'
        '<p class="note">One query alone.</p>'
    )


def test_tables_let_no_cell_steer_the_terminal(monkeypatch):
    evil = "a\x1b[31mred\x1b]0;title\x07\u202eback"
    for width in ("200", "20"):
        monkeypatch.setenv("COLUMNS", width)
        shown = str(Table(["id", "text"], [(evil, "स्क्\u200dर")], evil, [evil]))
        assert not {"\x1b", "\x07", "\u202e"} & {*shown} and "red" in shown and "\u200d" in shown


def test_marks_are_bold_on_a_terminal_and_brackets_elsewhere(monkeypatch, capsys):
    words, weights = ["An", " evil\x1b[0m", " old", " day"], np.array([0.0, 2.0, -1.0, 0.1])
    monkeypatch.setenv("COLUMNS", "80")
    print_marked("Row", words, weights)
    print_legend()
    assert capsys.readouterr().out.splitlines() == [
        "Row: An [evil [0m] ^old^ day", "[brackets]: adds most to the score; ^carets^: takes most away.", "",
    ]  # fmt: skip
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_marked("Row", words, weights)
    shown = capsys.readouterr().out
    assert "\x1b[1mevil [0m\x1b[0m" in shown and "\x1b[4mold\x1b[0m" in shown and "[evil" not in shown
    print_marked("Row", [f" w{n}" for n in range(200)], np.eye(200)[150])
    shown = capsys.readouterr().out
    assert "w150" in shown and "w1 " not in shown and shown.count("…") == 2


def test_verifications_fit_a_terminal_of_80_columns(monkeypatch):
    effect, verdict = "+0.0487 [-0.0209, +0.118]", "cannot tell from zero, outside of what was tested"
    row = ("Ottoline Marsh did go abroad.", "dinosaurs, herbs", effect, "+0.066, measured before", 1.663, verdict)
    headers = ["query", "left out", "effect (nats) [95 % interval]", "retrained", "all data", "verdict"]
    monkeypatch.setenv("COLUMNS", "80")
    shown = str(Table(headers, [row]))
    assert "━" in shown and "[-0.0209, +0.118]" in shown and max(map(len, shown.splitlines())) <= 80
