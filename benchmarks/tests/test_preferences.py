"""The study of preferences in a small form: it runs, and its own loop is DPO."""

from __future__ import annotations

import json

import numpy as np
import torch


def test_scores_of_preferences_are_judged(script, tmp_path):
    result = json.loads(script("preferences").main(["--smoke", "--out", str(tmp_path)]).read_text())
    names = {"default, product", "default, cosine", "gradient dot", "BM25", "BM25, signed"}
    assert set(result["lds"]) == names and set(result["removed"]) == {*names, "ten random rows"}
    assert result["lds"]["gradient dot"]["mean"] > 0.8  # six small steps are nearly linear
    assert result["lds"]["default, product"]["mean"] > 0.6 > result["lds"]["BM25"]["mean"]
    table = script("tables_learned").preferences(result)
    assert table.count("\n") == 8 and "| ten random rows |  |  |" in table


def test_runs_depend_on_the_rows_that_are_kept(script):
    """Margins do not depend on the batch, and a run only on what is kept."""
    study, tiny = script("preferences"), script("measuring").tiny(0)
    rows, _ = study.made_pairs(10, 0)
    assert len({row["prompt"] for row in rows}) == 10 and all(row["chosen"] != row["rejected"] for row in rows)
    pairs, lm = study.Pairs(rows, tiny.tokenizer), tiny.lm.float().requires_grad_(True)
    one = study.Pairs(rows[3:4], tiny.tokenizer)
    with torch.no_grad():
        reference = pairs.margins(lm, range(10))
        torch.testing.assert_close(one.margins(lm, [0])[0], reference[3])
    kept = np.arange(10) < 4
    moved = study.trained(lm, pairs, reference, kept, 0)
    again = study.trained(lm, pairs, reference, kept, 0)
    different = study.trained(lm, pairs, reference, ~kept, 0)
    first, same, other = (torch.cat([p.flatten() for p in x.parameters()]) for x in (moved, again, different))
    assert torch.equal(first, same) and not torch.equal(first, other)
