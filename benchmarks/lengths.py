"""How should the length of a row count: as it is (the product), to some power, or not at all (the cosine)?

    python benchmarks/lengths.py --work bench/banks
    python benchmarks/lengths.py --smoke

Scores of `default` are divided by the row's norm to a power: 0 is the product, 1 the cosine; or they are cosines times the
norm that the row had before training. On the banks whose truth is
kept (see `bank_truths`) sums of them are judged by LDS, and lists of them by QLD: the rise of a query's loss when its top
5 % of rows are removed and the model is retrained, over random removals. A killed run goes on with what is in --work.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_truths import HALVES, TRUTHS, JudgedBank, judged, make_truth, queries_of
from leaveout.evaluation.judge import EvaluationSettings, judge
from leaveout.evaluation.report import Metric, Report
from leaveout.methods.registry import Scored
from leaveout.methods.scorer import Scorer, as_row
from leaveout.methods.signatures import readout_of, trained_part
from leaveout.readout.index import Index
from measuring import arguments, write_result

POWERS = {"product": 0.0, "power 0.5": 0.5, "cosine": 1.0, "power 1.25": 1.25}
BEFORE = "cosine, long as before"
REMOVED = ("product", "cosine")  # by QLD
CHECKPOINTS = ("third", "final")


def divided(scores: np.ndarray, norms: np.ndarray, power: float) -> np.ndarray:
    """Scores [query, row] over norms [row] to a power; 0 where a row is 0."""
    return np.divide(scores, norms**power, out=np.zeros(scores.shape), where=norms > 0)


def bank_scores(bank: JudgedBank, at: str) -> tuple[np.ndarray, np.ndarray]:
    """Products [query, row] of `default` at a checkpoint, and the rows' norms [row]."""
    scorer = Scorer(bank.run, bank.queries, 0)
    readout, recipe = readout_of(scorer, at), bank.run.recipe
    rows = [
        trained_part(row, readout.tokenizer, recipe.template, recipe.max_tokens) for row in map(as_row, scorer.rows)
    ]
    rows = [replace(row, id=str(number), unit=str(number)) for number, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(readout, rows, Path(place) / "index", template=recipe.template)
        return index.score([as_row(row) for row in scorer.query_rows]).astype(np.float64), index.lengths_of(
            np.arange(len(index))
        )


def judged_by(report: Report, method: str, metric: Metric) -> dict[str, Any]:
    """A metric of a method, and that minus the product's at the same checkpoint, paired by query."""
    found, product = {metric: report.interval(method, metric)}, "product@" + method.split("@")[1]
    if method != product:
        found[f"{metric}_minus_product"] = report.difference(method, product, metric)
    return {key: interval._asdict() for key, interval in found.items() if interval is not None}


def measured(name: str, work: Path, truths: Path, settings: EvaluationSettings) -> dict[str, Any]:
    """LDS and QLD of every power at every checkpoint."""
    bank = judged(name, work, truths)
    scores, norms, before = {}, {}, bank_scores(bank, "start")[1]
    for at in CHECKPOINTS:
        products, lengths = bank_scores(bank, at)
        scores |= {f"{power}@{at}": Scored(divided(products, lengths, POWERS[power])) for power in POWERS}
        scores[f"{BEFORE}@{at}"] = Scored(divided(products, lengths, 1.0) * before)
        norms[at] = np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1)).round(3).tolist()
    asked = queries_of(bank.bank)
    listed = {name: scored for name, scored in scores.items() if name.split("@")[0] in REMOVED}
    by_sums = judge(bank.run, asked, scores, bank.truth, replace(settings, removal_queries=0))
    by_lists = judge(bank.run, asked, listed, None, settings)
    lines = []
    for method in scores:
        power, at = method.split("@")
        line: dict[str, Any] = {"length": power, "at": at, **judged_by(by_sums, method, "lds")}
        lines.append(line | (judged_by(by_lists, method, "qld") if method in listed else {}))
    return {
        "bank": name, "rows": len(bank.bank.recipe.examples), "queries": len(asked), "norms": norms,
        "removed": by_lists.removed_units, "removal_queries": len(by_lists.removal_queries), "lines": lines,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--banks", nargs="+", choices=[name for name in HALVES if name != "smoke"], default=list(HALVES)[:4]
    )
    parser.add_argument("--work", type=Path, help="where the banks' runs are; default: a temporary directory")
    parser.add_argument("--lists", nargs="*", default=["stories", "neox", "qwen"], help="banks that have a QLD")
    parser.add_argument("--qld", type=int, default=10, help="queries of the QLD, four retrainings each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = EvaluationSettings(removal_queries=2 if args.smoke else args.qld, draws=2 if args.smoke else 8)
    with tempfile.TemporaryDirectory() as scratch:
        work, truths = args.work or Path(scratch), TRUTHS
        if args.smoke:
            truths = Path(scratch) / "truths"
            make_truth("smoke", work / "smoke", 1, truths)
        banks = []
        for name in ["smoke"] if args.smoke else args.banks:
            asked = settings if args.smoke or name in args.lists else replace(settings, removal_queries=0)
            banks.append(measured(name, work / name, truths, asked))
            for line in banks[-1]["lines"]:
                print(name, line, flush=True)
    result = {"question": (__doc__ or "").split("\n", 1)[0], "repeats": banks[0]["queries"], "banks": banks}
    print(write_result(args.out, "readout_lengths.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
