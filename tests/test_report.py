"""Pages escape what comes from data, and tint by weight."""

from __future__ import annotations

import numpy as np

from leaveout.readout.search import Hit
from leaveout.report import blocks
from leaveout.tables import Table

EVIL = '<script>alert("x")</script>&'


def test_page_escapes_everything_from_data():
    hit = Hit(1, EVIL, 0.5, EVIL, {"<i>": "<u>"})
    parts = [
        blocks.heading(EVIL, EVIL),
        blocks.quote(EVIL),
        Table([EVIL], [[EVIL]], EVIL, [EVIL]).html(),
        blocks.highlighted([EVIL], np.array([1.0])),
        blocks.hit_block(hit, badge=EVIL),
        blocks.heat_map([EVIL], [EVIL], np.array([[1.0]])),
    ]
    page = blocks.page(EVIL, parts)
    for piece in ("<script", "<i>", "<u>"):
        assert piece not in page
    assert page.count("&lt;script&gt;") >= 10


def test_highlight_keeps_the_text_and_tints_by_sign():
    shown = blocks.highlighted(["a", "b", "c"], np.array([2.0, -1.0, 0.01]))
    assert "46,160,67,0.60" in shown and "218,54,51,0.30" in shown
    assert shown.endswith("c") and shown.count("<span") == 2


def test_heat_map_leaves_out_tokens_without_weight():
    shown = blocks.heat_map(["q0", "q1"], ["r0", "r1", "r2"], np.array([[0, 0, 0], [0, 1.0, -0.5]]))
    assert "q0" not in shown and "r0" not in shown and shown.count("<td") == 2


def test_heat_map_of_zeros_is_empty_not_an_error():
    assert "<td" not in blocks.heat_map(["q"], ["r"], np.zeros((1, 1)))
