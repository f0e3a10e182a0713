"""Pages escape what comes from data, and tint by weight."""

from __future__ import annotations

import re

import numpy as np

from leaveout import report
from leaveout.readout.explain import Explanation
from leaveout.readout.search import Hit
from leaveout.tables import Table

EVIL = '<script>alert("x")</script>&'


def test_page_escapes_everything_from_data():
    hit = Hit(1, EVIL, 0.5, EVIL, {"<i>": "<u>"})
    parts = [
        report.heading(EVIL, EVIL),
        report.quote(EVIL),
        Table([EVIL], [[EVIL]], EVIL, [EVIL]).html(),
        report.highlighted([EVIL], np.array([1.0])),
        report.hit_block(hit, badge=EVIL),
        report.heat_map([EVIL], [EVIL], np.array([[1.0]]), EVIL),
        report.cut([EVIL], np.array([1.0])),
        report.verdict(EVIL),
    ]
    page = report.page(EVIL, parts)
    for piece in ("<script", "<i>", "<u>"):
        assert piece not in page
    assert page.count("&lt;script&gt;") >= 10


def test_highlight_keeps_the_text_and_tints_whole_words_by_sign():
    shown = report.highlighted(["A fer", "ry", " sank", " soon"], np.array([1.0, 1.0, -1.0, 0.01]))
    assert 'class="tint up" style="--share:1.00"' in shown and 'class="tint down" style="--share:0.50"' in shown
    assert "ferry</span> <span" in shown and shown.endswith(" soon") and shown.count("<span") == 2
    assert report.highlighted([" x"], np.array([0.0])) == " x"


def test_long_rows_begin_with_the_passage_that_matters():
    weights = np.zeros(200)
    weights[150] = 1.0
    shown = report.cut([f" w{n}" for n in range(200)], weights)
    first, whole = shown.split("<details>")
    assert "w150" in first and "w1 " not in first and first.count("…") == 2 and "w1 " in whole and "200 words" in whole
    assert "<details>" not in report.cut([" a", " b"], np.array([1.0, 0.0]))


def test_heat_map_leaves_out_words_without_weight_and_begins_where_it_matters():
    values = np.array([[0, 0, 0], [0, 1.0, -0.5]])
    shown = report.heat_map(["q0", "q1"], ["r0", "r1", "r2"], values, "down, across")
    assert "q0" not in shown and "r0" not in shown and shown.count("<td") == 2
    assert ">+</td>" in shown and ">−</td>" in shown and "down, across" in shown  # not by colour alone
    part = report.heat_map(["q0", "q1"], ["r0", "r1", "r2"], values, "", columns=slice(2, 3))
    assert "r1" not in part and "--share:0.50" in part  # relative to the strongest of all


def test_heat_map_of_zeros_is_empty_not_an_error():
    assert "<td" not in report.heat_map(["q"], ["r"], np.zeros((1, 1)), "")


def test_explanation_shows_both_texts_in_words_and_the_strongest_region_first():
    row = [f" w{n}" for n in range(100)]
    row[70:72] = [" Ly", "on"]
    pairs = np.zeros((3, 100))
    pairs[1, 70], pairs[2, 71], pairs[2, 5] = 2.0, 1.0, -0.5
    found = Explanation("r", ["The", " to", "wer"], row, pairs, 2.5, 2.4)
    shown = report.explain_page("The tower", found, usual=0.5)
    assert "“Lyon” of the row answers “tower” of the query most" in shown and "5 times the usual best" in shown
    near, full = shown[shown.index('class="heat"') :].split("The whole of both texts")
    assert "Lyon" in near and "w5<" not in near and "w5<" in full and "+85.7 %" in shown


def test_ticks_are_round_and_hold_the_range():
    for low, high in ((0.0, 1.0), (-0.137, 0.4121), (3.0, 3.0), (0.0, 0.0), (-7e-5, 2e-5), (0.0, 12345.0)):
        ticks = report.round_ticks(low, high)
        assert ticks[0] <= low + 1e-12 and high <= ticks[-1] + 1e-12 and 2 <= len(ticks) <= 8
        steps = np.diff(ticks)
        assert np.allclose(steps, steps[0]) and f"{steps[0]:.6e}"[0] in "125"


def test_text_has_contrast_on_paper_and_on_every_tint():
    """4.5:1, light and dark, as the page of the WCAG says it."""

    def light(colour):
        part = np.array(colour) / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one, other):
        low, high = sorted([light(one), light(other)])
        return (high + 0.05) / (low + 0.05)

    for scheme in report.STYLE.split("@media")[:2]:
        named = {n: [int(v[i : i + 2], 16) for i in (0, 2, 4)] for n, v in re.findall(r"--(\w+): #(\w{6})", scheme)}
        for name in ("ink", "soft"):
            assert contrast(named[name], named["paper"]) >= 4.5 and contrast(named[name], named["tint"]) >= 4.5
        for tint in ("up", "down"):
            mixed = 0.55 * np.array(named[tint]) + 0.45 * np.array(named["paper"])
            assert contrast(named["ink"], mixed) >= 4.5, tint
        for mark in ("mark", "ring"):  # of charts: 3:1
            assert contrast(named[mark], named["paper"]) >= 3
