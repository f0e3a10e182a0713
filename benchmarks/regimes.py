"""Where do jets win over retraining, at equal cost, and does the planner see it?

    python benchmarks/regimes.py --names NAMES.txt --accuracy ACCURACY.json --json OUT --picture OUT.png [--work DIR]

Three panels, microgpt on names, n = 1000 units: (1) noise: Gaussian noise is added to every retraining's value, as runs
with another seed or on another machine would have, in units of the median effect of one document; (2) small shares: a
part of each set's weight is removed, truth by retraining with these weights; (3) Spearman against budget, from the JSON
of `deletion_accuracy.py`. In (1) and (2) the budget is what 512 jets of degree 1 cost, which settle the first order; the
retrainings are as many as it pays for, and the exact first order by reverse mode costs a small part of it.
`--work` may be the directory of that benchmark: its truth is used again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deletion_accuracy as accuracy
from leaveout.deletion.estimators import LeaveOneOut
from leaveout.deletion.measurements import Measurements, MeasureSettings, Retrainings
from leaveout.deletion.plan import Budget
from leaveout.deletion.posterior import Posterior
from leaveout.deletion.predict import agreement
from leaveout.deletion.sets import DeletionSets
from leaveout.training.queries import as_queries
from provenance import provenance

NOISE = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARES = (0.02, 0.1, 0.3, 1.0)
DIRECTIONS = 512
NAMES = {
    "singles": "leave-one-out sums", "mixture": "posterior, retrainings", "jets": "posterior, jets of degree 1",
    "gradient": "posterior, exact first order",
}  # fmt: skip


def banks(s: accuracy.Setting, smoke: bool) -> dict[str, Measurements]:
    """Three ways to spend the same budget."""
    fast, units = MeasureSettings(check=False), len(s.recipe.unit_names)
    runs = {name: s.run(f"regimes {name}") for name in NAMES}
    runs["jets"].measure_vectors()
    runs["jets"].measure(24 if smoke else DIRECTIONS, 1, queries=s.queries, settings=fast)
    budget = int(accuracy.spent(runs["jets"]) / s.retraining)
    runs["singles"].measure(retrain=units, design="singles", queries=s.queries, settings=fast)
    runs["mixture"].measure_vectors()
    runs["mixture"].measure(retrain=budget, queries=s.queries, settings=fast)
    runs["gradient"].measure(gradient=True, queries=s.queries, settings=fast)
    return {
        name: replace(run.bank.measurements(s.queries), heldout=Retrainings(np.zeros((0, units)), np.zeros((0, 0))))
        for name, run in runs.items()
    }


def noisy(data: Measurements, level: float, unit: np.ndarray, rng: np.random.Generator) -> Measurements:
    """Retrainings with noise of deviation level * unit [queries], and the posterior told so."""
    if not len(data.retrainings) or not level:
        return data
    y = data.retrainings.y + level * unit * rng.standard_normal(data.retrainings.y.shape)
    return replace(data, retrainings=Retrainings(data.retrainings.x, y), noise=level * unit)


def effects(name: str, data: Measurements, x: np.ndarray) -> np.ndarray:
    return (LeaveOneOut(data) if name == "singles" else Posterior(data)).predict(x)[0]


def noise_panel(s: accuracy.Setting, data: dict[str, Measurements]) -> dict[str, list[float]]:
    unit = np.median(np.abs(data["singles"].retrainings.y), 0)
    kinds = np.array(s.kinds)
    out: dict[str, list[float]] = {name: [] for name in data}
    for level in NOISE:
        for name, known in data.items():
            found = effects(name, noisy(known, level, unit, np.random.default_rng(1)), s.sets.x)
            per_kind = [
                agreement(found[:, kinds == k], s.effects[:, kinds == k])["spearman"] for k in dict.fromkeys(kinds)
            ]
            out[name].append(float(np.mean([v for v in per_kind if v is not None])))
    return out


def share_panel(s: accuracy.Setting, data: dict[str, Measurements]) -> dict[str, Any]:
    """Median relative error for parts of each random set of 50 (or of 10, where there is none)."""
    kind = "50" if "50" in s.kinds else "10"
    chosen = [i for i, k in enumerate(s.kinds) if k == kind]
    run, errors = s.run("truth"), {name: [] for name in data}
    for share in SHARES:
        sets = DeletionSets(share * s.sets.x[chosen], tuple(s.sets.labels[i] for i in chosen))
        actual = run.retrain(s.queries, sets) - run.bank.base(as_queries(s.queries))[:, None]
        for name, known in data.items():
            errors[name].append(agreement(effects(name, known, sets.x), actual)["relative_error"])
    return {"shares": list(SHARES), "kind": kind, "relative_error": errors}


def plans(s: accuracy.Setting, budget: float) -> list[dict[str, Any]]:
    """What the planner buys as noise rises."""
    out = []
    for level in (0.0, 0.25, 1.0, 4.0):
        plan = s.run("plans").plan(s.queries, s.heldout, Budget(budget * s.retraining, noise=level, examples=True, repeats=0))
        choices = {c.name: c.error for c in plan.choices}
        out.append({"noise": level, "chosen": plan.best.name, "expected_error": plan.best.error, "choices": choices})
    return out


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (noise, share, budget) = pyplot.subplots(1, 3, figsize=(12, 3.4))
    for name, values in result["noise"]["spearman"].items():
        noise.plot(result["noise"]["levels"], values, marker="o", label=NAMES[name])
    noise.set(
        xlabel="noise of a retraining / effect of one document", ylabel="Spearman", title="noise", xscale="symlog"
    )
    noise.legend(fontsize="small", frameon=False)
    for name, values in result["small_shares"]["relative_error"].items():
        share.plot(result["small_shares"]["shares"], values, marker="o", label=NAMES[name])
    share.set(
        xlabel="weight removed", ylabel="median relative error", title="parts of a set", xscale="log", yscale="log"
    )
    for label, points in result["budget"].items():
        budget.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=label)
    budget.set(xlabel="cost in retrainings, n = 1000 units", ylabel="Spearman", title="budget", xscale="log")
    budget.legend(fontsize="x-small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def by_budget(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """(cost, Spearman) of arms that were bought at several budgets."""
    out: dict[str, list[tuple[float, float]]] = {}
    for name, arm in found["arms"].items():
        label, _, budget = name.rpartition(", ")
        if budget.isdigit():
            out.setdefault(label, []).append((arm["retraining_equivalents"], found["spearman"][name]["mean"]))
    return {label: sorted(points) for label, points in out.items()}


def describe(data: Measurements) -> str:
    """Counts of measurements, for people."""
    parts = [f"{len(b.psi)} jet runs of degree {b.degree}" for b in data.jets]
    parts += [f"{len(data.retrainings)} retrainings"] if len(data.retrainings) else []
    parts += ["the exact first order"] if data.gradient is not None else []
    return ", ".join(parts) or "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--accuracy", type=Path, required=True, help="the JSON of deletion_accuracy.py")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--n", type=int, default=1000, help="documents, and steps")
    parser.add_argument("--work", type=Path, help="where banks are kept; default: a temporary directory")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny form, to see that it runs")
    args = parser.parse_args(argv)
    args.units = "documents"
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        s = accuracy.make_setting(args, args.work or Path(temporary))
        accuracy.truth(s)
        data = banks(s, args.smoke)
        result = {
            "question": "Where do jets win over retraining, at equal cost?", "smoke": args.smoke, "names": NAMES,
            "measurements": {name: describe(d) for name, d in data.items()},
            "measuring_cpu_seconds": {name: accuracy.spent(s.run(f"regimes {name}")) for name in data},
            "noise": {"levels": list(NOISE), "spearman": noise_panel(s, data)},
            "small_shares": share_panel(s, data), "budget": by_budget(json.loads(args.accuracy.read_text())),
            "plans": plans(s, 368 if not args.smoke else 150), "cpu_seconds": time.process_time() - began,
            **provenance(args.seed),
        }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(result, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
