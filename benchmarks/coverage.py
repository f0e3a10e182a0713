"""After the default commands alone: do the 95 % intervals hold, for each kind of deletion set, and how wide are they?

    python benchmarks/coverage.py --cases names digits lora [--workers 2] [--work DIR] [--smoke]
    python benchmarks/coverage.py --cases cnn prose smollm2            # looked at once, when all rules were chosen

A case (see coverage_cases.py) is trained, `plan` is asked with a budget of 60 plain trainings (names 15, smollm2 30), what it
lists first is bought, and `predict` is asked. Then all sets are retrained, and what was measured before is left out. Seven
kinds: one unit, 5 %, 20 %, a source (a class, names that end alike, an article), half of one, two of them, and the 2, 5 and
12 % of units that help a query most by the prediction itself, which are judged on that query. `inside` has an interval by
resampling sets. A width is the median over pairs of a query and a set, divided by the width of the one constant interval that
would hold 95 % of that kind's errors.

Where new runs were bought as well, the first NEW sets of each kind are trained once more as new runs (rows gone, batches packed
anew, an order of their own), and held against the interval of one new run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coverage_cases import CASES, Case
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.plan import Budget
from leaveout.deletion.predict import Prediction, agreement
from leaveout.deletion.run import TrainingRun
from leaveout.training.train import train_plain
from measuring import arguments, write_result

OWN, UNIONS, NEW = (0.02, 0.05, 0.12), 12, 6
NAME = "deletion_coverage_{}.json"
BOUGHT = "bought.json"
Sets = dict[str, list[list[str]]]
"""Kind -> deletion sets, each a list of names of units."""


def sets_of(case: Case, seed: int) -> Sets:
    """Sets of the kinds that need no prediction."""
    units, n = list(case.recipe.unit_names), case.tested
    chance = random.Random(f"tested {seed}")
    sizes = {"one unit": 1, "5 %": max(1, round(0.05 * len(units))), "20 %": round(0.2 * len(units))}
    found = {kind: [chance.sample(units, size) for _ in range(n)] for kind, size in sizes.items()}
    parts = chance.sample(case.parts, min(n, len(case.parts)))
    halves = [chance.sample(part, len(part) // 2) for part in (parts * n)[:n]]
    drawn = [chance.sample(parts, 2) for _ in range(min(n, UNIONS))]
    unions = [one + [unit for unit in other if unit not in one] for one, other in drawn]
    return {**found, "source": parts, "half of a source": halves, "two sources": unions}


def top_sets(case: Case, alone: np.ndarray) -> tuple[list[list[str]], list[int]]:
    """Units that help each query most by their predicted effects alone [queries, units], and whose they are."""
    units = np.array(case.recipe.unit_names)
    sizes = (
        sorted({max(1, round(part * len(units))) for part in OWN}) if case.tested > 2 else [round(0.12 * len(units))]
    )
    queries = range(min(case.own, len(alone)))
    return [units[np.argsort(-alone[q])[:n]].tolist() for q in queries for n in sizes], [
        q for q in queries for _ in sizes
    ]


def buy(run: TrainingRun, case: Case, sets: Sets) -> dict[str, Any]:
    """Plans and measures; a repeated call measures what it had planned."""
    path, settings = run.path.parent / BOUGHT, MeasureSettings(check=False)
    if not path.exists():
        began = time.process_time()
        train_plain(case.recipe)
        plain = time.process_time() - began
        alike = [found[0] for found in sets.values()]  # as an example of what is asked about
        best = run.plan(case.queries, alike, Budget(case.budget * plain, examples=True)).best
        kept = {k: v for k, v in best.arguments.items() if k not in ("queries", "settings")}
        sizes = best.arguments["settings"].sizes
        path.write_text(json.dumps({"choice": best.name, "training": plain, "arguments": kept, "sizes": sizes}))
    bought = json.loads(path.read_text())
    settings = MeasureSettings(check=False, sizes=tuple(bought["sizes"]), progress=True)
    run.measure(**bought["arguments"], queries=case.queries, settings=settings)
    return bought


def measure(name: str, smoke: bool, seed: int, work: Path) -> dict[str, Any]:
    """One case: bought, predicted, retrained and judged."""
    torch.set_num_threads(1)
    began, case = time.process_time(), CASES[name](smoke, seed)
    run, sets = TrainingRun.train(case.recipe, work / "run"), sets_of(case, seed)
    bought = buy(run, case, sets)
    alone = run.predict(case.queries, [[unit] for unit in case.recipe.unit_names], meaning="same-run").effect
    own, whose = top_sets(case, alone)
    kinds = [kind for kind, found in sets.items() for _ in found] + ["own top rows"] * len(own)
    without = [units for found in sets.values() for units in found] + own
    found = run.predict(case.queries, without, meaning="same-run")
    known = [row is not None for row in run.bank.measured_values(*_asked(run, case, without))]
    actual = run.retrain(case.queries, without, MeasureSettings(check=False, progress=True))
    asked = np.ones((len(case.queries), len(kinds)), bool)
    asked[:, len(kinds) - len(own) :] = np.arange(len(case.queries))[:, None] == np.array(whose)
    pairs = {kind: asked & ~np.array(known) & (np.array(kinds) == kind) for kind in dict.fromkeys(kinds)}
    by_kind = {kind: summary(found, actual, chosen, seed) for kind, chosen in pairs.items() if chosen.any()}
    coverage = [s["inside"] for s in by_kind.values()]
    return {
        "question": "Do 95 % intervals hold, by kind of set, after the default commands alone?", "case": name,
        "recipe": case.recipe.hash(), "units": len(case.recipe.unit_names), "queries": len(case.queries),
        "budget_in_trainings": case.budget, "bought": {k: bought[k] for k in ("choice", "arguments")},
        "measurements": run.bank.info()["measurements"], "kinds": by_kind,
        "measured_before": {kind: sum(k for k, name in zip(known, kinds, strict=True) if name == kind) for kind in pairs},
        "new_runs": new_runs(run, case, without, np.array(kinds), asked),
        "mean_inside": float(np.mean(coverage)), "least_inside": min(coverage),
        "widest": max(s["width_over_constant"] for s in by_kind.values()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def new_runs(run: TrainingRun, case: Case, without: Any, kinds: np.ndarray, asked: np.ndarray) -> dict[str, Any] | None:
    """By kind, how often one new run lies inside its interval; None where no new runs were bought. asked [query, set]: pairs."""
    if not json.loads((run.path.parent / BOUGHT).read_text())["arguments"].get("repeats"):
        return None
    chosen = np.concatenate([np.flatnonzero(kinds == kind)[:NEW] for kind in dict.fromkeys(kinds)])
    sets = [without[i] for i in chosen]
    found = run.predict(case.queries, sets)
    settings = MeasureSettings(seed=1, check=False, progress=True)  # orders that were not measured
    inside = np.abs(run.retrain(case.queries, sets, settings, meaning="new-run") - found.mean) <= found.reach()
    out = {}
    for kind in dict.fromkeys(kinds):
        pairs = asked[:, chosen] & (kinds[chosen] == kind)
        out[kind] = {
            "sets": int(pairs.any(0).sum()), "pairs": int(pairs.sum()), "inside": float(inside[pairs].mean()),
            "not_distinguishable": float(found.drowned[pairs].mean()),
        }  # fmt: skip
    return out


def _asked(run: TrainingRun, case: Case, without: Any) -> tuple[Any, np.ndarray]:
    from leaveout.deletion.sets import deletion_sets
    from leaveout.training.queries import as_queries

    return as_queries(case.queries), deletion_sets(run.recipe, without).x


def summary(p: Prediction, actual: np.ndarray, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """Numbers of one kind; chosen [query, set]: the pairs that are judged."""
    sets = chosen.any(0)
    error, reach = np.abs(actual - p.mean), p.reach()
    inside = error <= reach
    bare = error <= reach / p.factor
    share = [float(inside[chosen[:, j], j].mean()) for j in np.flatnonzero(sets)]
    draws = np.random.default_rng(seed).integers(0, len(share), (2000, len(share)))
    low, high = np.quantile(np.array(share)[draws].mean(1), [0.025, 0.975])
    outside = chosen & p.outside
    return {
        "sets": int(sets.sum()), "pairs": int(chosen.sum()), "inside": float(inside[chosen].mean()),
        "interval": [float(low), float(high)], "inside_not_calibrated": float(bare[chosen].mean()),
        "width_over_constant": float(np.median(reach[chosen]) / np.quantile(error[chosen], 0.95)),
        "median_width": float(2 * np.median(reach[chosen])), "median_factor": float(np.median(p.factor[chosen])),
        "outside_of_what_was_tested": float(outside.sum() / chosen.sum()),
        "inside_where_outside": float(inside[outside].mean()) if outside.any() else None,
        "spearman": agreement(p.effect[:, sets], (actual - p.base)[:, sets])["spearman"],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['case']}: {result['bought']['choice']}, {result['measurements']}"]
    lines.append(
        f"{'kind':<17}{'sets':>5}{'inside':>8}{'':>14}{'bare':>7}{'width':>7}{'factor':>8}{'outside':>9}{'rank':>6}"
    )
    for kind, s in result["kinds"].items():
        low, high = s["interval"]
        rank = "" if s["spearman"] is None else f"{s['spearman']:.2f}"
        lines.append(
            f"{kind:<17}{s['sets']:>5}{s['inside']:>8.1%}  {low:>5.1%}-{high:<6.1%}{s['inside_not_calibrated']:>6.0%}"
            f"{s['width_over_constant']:>7.2f}{s['median_factor']:>8.2f}{s['outside_of_what_was_tested']:>9.0%}{rank:>6}"
        )
    lines.append(f"mean {result['mean_inside']:.3f}, least {result['least_inside']:.3f}, widest {result['widest']:.2f}")
    new = {kind: round(facts["inside"], 3) for kind, facts in (result["new_runs"] or {}).items()}
    return "\n".join([*lines, f"measured before: {result['measured_before']}", f"new runs: {new}"])


def case_done(args: argparse.Namespace, name: str) -> str:
    """Measures one case and writes its result."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if args.work is None else args.work / f"coverage_{name}"
        work.mkdir(parents=True, exist_ok=True)
        result = measure(name, args.smoke, args.seed, work)
    command = f"python benchmarks/coverage.py --cases {name} --seed {args.seed}"
    write_result(args.out, NAME.format(name), {**result, "command": command}, args)
    return table(result)


def main(given: Sequence[str] | None = None) -> int:
    """Runs cases, each in a process of its own where there are several workers."""
    parser = arguments(__doc__)
    parser.add_argument("--cases", choices=list(CASES), nargs="+", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the runs here: a repeated call measures nothing twice")
    args = parser.parse_args(given)
    if args.workers == 1:
        for name in args.cases:
            print(case_done(args, name), flush=True)
        return 0
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for shown in pool.starmap(case_done, [(args, name) for name in args.cases], chunksize=1):
            print(shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
