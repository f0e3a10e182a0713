"""Pages escape what comes from data, and tint by weight."""

from __future__ import annotations

import numpy as np

from leaveout import report
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
