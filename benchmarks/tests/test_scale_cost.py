"""What large corpora cost follows from the measured rates."""

from __future__ import annotations


def test_costs_follow_from_the_rates(script):
    module = script("scale_cost")
    rates = {"index": 0.5, "scan": 2e9, "compare": 1e5, "signature": 50_000, "bits": 1000, "catalogue": 500}
    table = module.cost(rates)
    assert "| signatures = rows x signature | 50 GB | 5 TB | 500 TB |" in table
    assert "| machines of 64 cores to index in a day | 1 | 10 | 905 |" in table  # 10^8 x 0.5 / 86,400 / 64 = 9.04
    assert (
        "| exact search of 16 queries = bytes / scan | 0.42 core minutes | 42 core minutes | 4,167 core minutes |"
        in table
    )
