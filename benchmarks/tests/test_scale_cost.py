"""What large corpora cost follows from the measured rates."""

from __future__ import annotations


def test_costs_follow_from_the_rates(script):
    module = script("scale_cost")
    rates = {
        "index": 0.5, "short": 20_000, "long": 1000, "list": 10_000, "short bytes": 2000, "long bytes": 14_000,
        "catalogue": 500,
    }  # fmt: skip
    table = module.cost(rates)
    assert "| long forms = rows x long form | 14 GB | 1.4 TB | 140 TB |" in table
    assert "| machines of 64 cores to index in a day | 1 | 10 | 905 |" in table  # 10^8 x 0.5 / 86,400 / 64 = 9.04
    assert "| machines of 30 TB to hold it | 1 | 1 | 6 |" in table  # 165 TB
    lists = "0.83 core minutes | 83 core minutes | 8,333 core minutes"
    assert f"| lists of 16 queries = rows / scan of short forms | {lists} |" in table
    assert "| a list of 10,000 scored exactly, one query | " + " | ".join(["0.017 core minutes"] * 3) in table
