"""Pages escape what comes from data, tint by weight, and JSON is strict."""

from __future__ import annotations

import numpy as np
import pytest

from leaveout import report
from leaveout.readout.search import Hit

EVIL = '<script>alert("x")</script>&'


def test_page_escapes_everything_from_data():
    hit = Hit(1, EVIL, 0.5, EVIL, {"<i>": "<u>"})
    parts = [
        report.heading(EVIL, EVIL),
        report.quote(EVIL),
        report.html_table([EVIL], [[EVIL]]),
        report.highlighted([EVIL], np.array([1.0])),
        report.hit_block(hit, badge=EVIL),
        report.heat_map([EVIL], [EVIL], np.array([[1.0]])),
    ]
    page = report.page(EVIL, parts)
    for piece in ("<script", "<i>", "<u>"):
        assert piece not in page
    assert page.count("&lt;script&gt;") >= 10


def test_highlight_keeps_the_text_and_tints_by_sign():
    shown = report.highlighted(["a", "b", "c"], np.array([2.0, -1.0, 0.01]))
    assert "46,160,67,0.60" in shown and "218,54,51,0.30" in shown
    assert shown.endswith("c") and shown.count("<span") == 2


def test_heat_map_leaves_out_tokens_without_weight():
    shown = report.heat_map(["q0", "q1"], ["r0", "r1", "r2"], np.array([[0, 0, 0], [0, 1.0, -0.5]]))
    assert "q0" not in shown and "r0" not in shown and shown.count("<td") == 2


def test_heat_map_of_zeros_is_empty_not_an_error():
    assert "<td" not in report.heat_map(["q"], ["r"], np.zeros((1, 1)))


def test_json_refuses_not_a_number():
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_line({"score": float("nan")})


def test_shorten_makes_one_line():
    assert report.shorten("a\n b\t c", 5) == "a b c"
    assert report.shorten("abcdef", 5) == "abcd…"


def test_a_wide_table_puts_intervals_below_their_means(capsys, monkeypatch):
    rows = [("default", *["0.655 [0.587, 0.721]"] * 4)]
    monkeypatch.setenv("COLUMNS", "80")
    report.print_table(["method", "LDS", "QLD (nats)", "leave-one-out", "AP"], rows)
    shown = capsys.readouterr().out
    assert (
        max(map(len, shown.splitlines())) <= 80
        and shown.count("[0.587, 0.721]") == 4
        and " [" not in shown.split("0.655")[1]
    )
    monkeypatch.setenv("COLUMNS", "200")
    report.print_table(["method", "LDS", "QLD (nats)", "leave-one-out", "AP"], rows)
    assert capsys.readouterr().out.count("0.655 [0.587, 0.721]") == 4


def test_text_with_brackets_stays_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    report.print_table(["id", "text", "LDS"], [("row [a]", "list [1] and [2, 3] " + 30 * "x", "-0.1 [-0.2, 1e-05]")])
    shown = capsys.readouterr().out
    assert "row [a]" in shown and "list [1]" in shown and "-0.1 [-0.2" not in shown


@pytest.mark.parametrize("text", ["[user]Where?", "[INST] Where? [/INST] Here.", ":+1: [bold]x", "a\\[b]"])
def test_tables_show_text_as_it_is(text, capsys):
    report.print_table([text, "score"], [(text, 1.0)], title=text)
    assert capsys.readouterr().out.count(text) == 3
