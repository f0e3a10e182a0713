"""The study of what is usual in a small form."""

from __future__ import annotations

import json


def test_shares_are_of_all_questions(script, tmp_path):
    usual = script("usual")
    found = json.loads(usual.main(["--smoke", "--out", str(tmp_path)]).read_text())["indexes"]["made"]
    assert set(found) == {"about its rows", "others"} and all(one["questions"] == 10 for one in found.values())
    own = found["about its rows"]
    assert own["above_the_limit_and_best"] <= min(own["row_is_best"], own["above_the_limit"]) <= 1
    assert own["quartiles"] == sorted(own["quartiles"])
