"""What do queries that are refined by curvature, and rows scored through the whole model, add to the index, judged by retraining?

    python benchmarks/refined.py --banks stories neox gemma qwen olmo --work bench/banks
    python benchmarks/refined.py --smoke

On the banks of `bank_truths.py`, at the parameters after a third of training: the LDS of `default`, of `influence`, and of
`influence` where only the best 5 or 25 % of the rows by the index are scored through the whole model, beside gradient dot,
EK-FAC (on olmo without its head), RapidIn, Z0-Inf (four snapshots of the run), and the exact first order where it is had for
few queries (`--exact N`); with paired differences and CPU seconds, and, for `--qld N` of the queries, what the loss rises by when
the best ten rows of each are removed, over that of eight random ten. Six products, 200 rows, 40 batches of 16 and the run's own
sum of rates were chosen on stories. That the metric is cut at its median was chosen on six queries of stories and of gemma, as
a cut at its .9 quantile (`readout_refined_gemma_before.json`) ruined gemma; nothing was chosen on neox, qwen and olmo.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bank_truths import HALVES, TRUTHS, JudgedBank, judged, make_truth
from leaveout.evaluation.truth import values_without
from leaveout.methods.registry import score_methods
from leaveout.metrics import bootstrap_interval, difference_interval, lds, qld, top_rows
from measuring import arguments, write_result

AT = "third"
LISTS = (0.05, 0.25)
REMOVED, DRAWS = 10, 8


def scores_of(bank: JudgedBank, name: str, work: Path) -> tuple[np.ndarray, float]:
    """Scores of a method and their CPU seconds; kept in `work`, so that a killed run goes on."""
    kept = work / f"scores-{name}.npz"
    if not kept.exists():
        found = score_methods(bank.run, bank.queries, [name])[name]
        np.savez(kept, scores=found.scores, cpu=found.cpu_seconds)
    with np.load(kept) as file:
        return file["scores"], float(file["cpu"])


def of_lists(refined: np.ndarray, cheap: np.ndarray, share: float) -> np.ndarray:
    """The refined scores of each query's best rows by the cheap ones; of the others these, times the slope on the list."""
    mixed = np.empty_like(refined)
    length = max(2, round(share * cheap.shape[1]))
    for own, cheaper, out in zip(refined, cheap, mixed, strict=True):
        best = np.argsort(-cheaper, kind="stable")[:length]
        out[:] = cheaper * (own[best] @ cheaper[best]) / max(cheaper[best] @ cheaper[best], 1e-300)
        out[best] = own[best]
    return mixed


def risen(bank: JudgedBank, scores: np.ndarray, count: int) -> np.ndarray:
    """QLD [queries] in nats: one retraining without the best REMOVED rows for each of so many queries, spread evenly."""
    asked = np.unique(np.linspace(0, len(bank.queries) - 1, count).round().astype(int))
    queries, n = [bank.queries[i] for i in asked], scores.shape[1]
    chance = np.random.default_rng(0)
    drawn = np.array([np.isin(np.arange(n), chance.choice(n, REMOVED, replace=False)) for _ in range(DRAWS)])
    without_random = values_without(bank.run, queries, drawn.astype(float))
    without_top = values_without(bank.run, queries, top_rows(scores[asked], REMOVED).astype(float))
    return qld(np.diag(without_top), without_random)


def bank_facts(name: str, work: Path, truths: Path, exact: int, n_removals: int) -> dict[str, Any]:
    bank = judged(name, work, truths)
    ek_fac = "ek-fac blocks" if name == "olmo" else "ek-fac"
    names = [f"{method}@{AT}" for method in ("default", "gradient dot", ek_fac, "influence", "rapidin")] + ["z0-inf"]
    listed = {f"default@{AT}", f"{ek_fac}@{AT}", f"influence@{AT}", "influence, list of 25%"}
    if name == "smoke":
        names.remove(f"ek-fac@{AT}")
    scores, seconds = {}, {}
    for method in names:
        scores[method], seconds[method] = scores_of(bank, method, work)
        print(name, method, round(seconds[method]), "s", file=sys.stderr, flush=True)
    for share in LISTS:
        scores[f"influence, list of {share:.0%}"] = of_lists(scores[f"influence@{AT}"], scores[f"default@{AT}"], share)
    by_query = {
        method: np.asarray(lds(found, bank.truth.removed, bank.truth.values)) for method, found in scores.items()
    }
    if exact:
        found = score_methods(bank.run, bank.queries[:exact], ["metagradient"])["metagradient"]
        by_query["exact first order"] = np.asarray(lds(found.scores, bank.truth.removed, bank.truth.values[:exact]))
        seconds["exact first order"] = found.cpu_seconds or 0.0
    rises = {method: risen(bank, scores[method], n_removals) for method in scores if n_removals and method in listed}
    lines = []
    for method, values in by_query.items():
        line: dict[str, Any] = {
            "method": method,
            "queries": len(values),
            "lds": bootstrap_interval(values, 0)._asdict(),
        }
        line["cpu_seconds"] = seconds.get(method)
        for other in (f"default@{AT}", f"{ek_fac}@{AT}"):
            if other in by_query and other != method:
                line[f"minus {other}"] = difference_interval(values, by_query[other][: len(values)], 0)._asdict()
        if method in rises:
            line["qld"] = bootstrap_interval(rises[method], 0)._asdict()
            line["qld minus influence"] = difference_interval(rises[method], rises[f"influence@{AT}"], 0)._asdict()
        lines.append(line)
    assert bank.truth.ceiling is not None
    return {"bank": name, "ceiling": bank.truth.ceiling.ceiling._asdict(), "lines": lines}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--banks", nargs="+", default=list(HALVES)[:5])
    parser.add_argument("--exact", type=int, default=0, help="queries of the exact first order, a few trainings each")
    parser.add_argument(
        "--qld", type=int, default=10, help="queries whose best rows are removed, a retraining each and method"
    )
    parser.add_argument("--work", type=Path, help="where the banks' runs are; default: a temporary directory")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work, truths = args.work or Path(scratch), TRUTHS
        for name in ["smoke"] if args.smoke else args.banks:
            if args.smoke:
                truths = Path(scratch)
                make_truth(name, work / name, 1, truths)
            facts = bank_facts(name, work / name, truths, *((2, 2) if args.smoke else (args.exact, args.qld)))
            result = {"question": (__doc__ or "").split("\n", 1)[0], "repeats": facts["lines"][0]["queries"], **facts}
            print(write_result(args.out, f"readout_refined_{name}.json", result, args).name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
