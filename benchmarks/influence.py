"""Which attribution scores predict what retraining without rows really does?

    python benchmarks/influence.py --bank stories --json benchmarks/results/readout_influence_stories.json
    python benchmarks/influence.py --smoke

A training run (see `influence_banks`) is retrained without random halves of its rows, in two data orders. A method's LDS is
the rank correlation of its summed scores with the mean of both; its QLD is the rise of a query's loss when the method's top
5 % of rows are removed, over random removals. Both have intervals over queries. `@start`, `@third` and `@final` name the
parameters that a method looks at. The exact first order and the posterior are costly: they are judged on the queries of the
QLD only, with the other methods on the same queries beside them.
Everything is kept in --work and not made twice, so that a killed run goes on.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_banks import BANKS, TruthBank
from leaveout.baselines.gradients import example_gradients
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.settings import MeasureSettings
from leaveout.evaluation.judge import EvaluationSettings, judge, removal_queries
from leaveout.evaluation.methods import METHODS, Scored, Scorer, parse
from leaveout.evaluation.report import Judged, Report
from leaveout.evaluation.truth import Truth, second_order, subset_truth
from leaveout.metrics import lds
from leaveout.readout.settings import PRESETS, SignatureSettings
from leaveout.training.queries import Query
from measuring import RESULTS, arguments, write_result

CHEAP = (
    "random", "bm25", "embedding@start", "gradient dot@start", "gradient dot@final", "gradient cosine@final", "tracin",
    "rapidin@final", "ek-fac@start", "ek-fac@third", "ek-fac@final", "paper@start", "paper@final", "default@start",
    "default@third", "default@final", "residual@start", "residual@third", "residual@final", "similarity@start",
)  # fmt: skip
COSTLY = ("metagradient", "posterior")
REMOVED = (
    "bm25",
    "embedding@start",
    "gradient dot@final",
    "ek-fac@third",
    "paper@start",
    "default@third",
    "residual@third",
)
COMPARED = "default@third"


def variants() -> dict[str, tuple[SignatureSettings, str]]:
    """Changes of the default, one at a time: why is it as good or bad as it is?"""
    default, residual = PRESETS["default"], PRESETS["residual"]
    channel = default.channels[0]
    raw = replace(channel, whiten_left=False, whiten_right=False)
    rh = replace(channel, kind="rh")
    changed = {
        "temperature 2": (replace(default, temperature=2.0), ("start", "third", "final")),
        "all targets": (replace(default, targets="all"), ("start",)),
        "not whitened": (replace(default, channels=(raw,)), ("start",)),
        "damping 0.03": (replace(default, channels=(replace(channel, damping=0.03),)), ("start",)),
        "damping 0.3": (replace(default, channels=(replace(channel, damping=0.3),)), ("start",)),
        "unit length": (replace(default, unit_length=True), ("start",)),
        "rh whitened": (replace(default, channels=(rh,)), ("start", "third")),
        "residual, 16384 numbers": (replace(residual, final_width=16384, rank=None), ("start", "third")),
        "default and residual": (replace(residual, channels=(channel, *residual.channels)), ("third",)),
        "residual, temperature 2": (replace(residual, temperature=2.0), ("start", "final")),
        "residual, exact": (replace(residual, final_width=None, rank=None, storage="float32"), ("start",)),
    }
    return {f"{name}@{at}": (settings, at) for name, (settings, ats) in changed.items() for at in ats}


def scored(name: str, scorer: Scorer, place: Path) -> Scored:
    """Scores of a method or variant, from the working directory if they were made before."""
    file = place / f"{name.replace(' ', '_')}.npz"
    if file.exists():
        with np.load(file) as kept:
            return Scored(kept["scores"], float(kept["seconds"]))
    began = time.process_time()
    if name in (found := variants()):
        scores = scorer.signatures(*found[name])
    else:
        method, at = parse(name)
        scores = METHODS[method](scorer, at)
    made = Scored(np.asarray(scores, np.float64), time.process_time() - began)
    place.mkdir(parents=True, exist_ok=True)
    np.savez(file, scores=made.scores, seconds=np.array(made.cpu_seconds))
    print(f"  {name}: {made.cpu_seconds:.1f} CPU s", file=sys.stderr, flush=True)
    return made


def costly(run: TrainingRun, asked: Sequence[Query], retrain: int, seed: int, place: Path) -> dict[str, Scored]:
    """The exact first order, and the posterior that has it and `retrain` retrainings, on few queries."""
    scorer = Scorer(run, asked, seed)
    out = {"metagradient": scored("metagradient", scorer, place)}
    if retrain:
        run.measure(retrain=retrain, queries=asked)
        out[f"posterior, {retrain} retrainings"] = scored("posterior", scorer, place)
    return out


def on_few(few: dict[str, Scored], all_methods: dict[str, Scored], chosen: np.ndarray, truth: Truth) -> list[Judged]:
    """LDS on some of the queries: costly methods, and all others on the same."""
    cut = {name: Scored(s.scores[chosen], s.cpu_seconds) for name, s in all_methods.items()}
    return [
        Judged(name, lds(s.scores, truth.removed, truth.values[chosen]), cpu_seconds=s.cpu_seconds)
        for name, s in {**cut, **few}.items()
    ]


def differences(report: Report, first: str, metric: Any) -> dict[str, dict[str, float]]:
    """First minus each other method, paired by query."""
    found = {other.method: report.difference(first, other.method, metric) for other in report.judged}
    return {name: interval._asdict() for name, interval in found.items() if interval is not None and name != first}


def parts_of_gradient(scorer: Scorer, truth: Truth) -> dict[str, dict[str, float]]:
    """LDS of the final gradient dot by kind of parameter, with its share of the squared gradient of the rows.

    Memory: the gradients of all rows and queries.
    """
    values = scorer.parameters("final")
    rows, queries = (
        torch.cat(list(example_gradients(scorer.task, values, some))) for some in (scorer.rows, scorer.query_rows)
    )
    ends = np.cumsum([0, *(values[name].numel() for name in scorer.task.trained)])
    parts: dict[str, list[slice]] = {}
    for i, name in enumerate(scorer.task.trained):
        kind = "norms and biases" if "norm" in name or "bias" in name else re.sub(r"\.\d+\.", ".*.", name)
        parts.setdefault(kind, []).append(slice(ends[i], ends[i + 1]))
    total = float(rows.square().sum())
    out = {}
    for kind, places in parts.items():
        scores = sum((queries[:, place] @ rows[:, place].T).numpy() for place in places)
        share = sum(float(rows[:, place].square().sum()) for place in places) / total
        out[kind] = {"lds": float(np.nanmean(lds(scores, truth.removed, truth.values))), "share": share}
    return out


def facts_of(bank: TruthBank, run: TrainingRun) -> dict[str, Any]:
    recipe = bank.recipe
    return {
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "rows": len(recipe.examples),
        "groups": list(bank.groups),
        "queries": len(bank.queries),
        "steps": len(recipe.batches()),
        "optimizer": recipe.optimizer.name,
        "pretraining_cpu_seconds": bank.pretraining_cpu_seconds,
        "mean_query_loss": float(run.bank.base([Query(q) for q in bank.queries]).mean()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bank", choices=("stories", "neox"), default="stories")
    parser.add_argument("--json", type=Path, help="the result file; default: by the bank, in --out")
    parser.add_argument("--work", type=Path, help="where truth and scores are kept; default: a temporary directory")
    parser.add_argument("--sizes", type=int, nargs=2, default=(20, 3), help="rows and queries of each group")
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--retrain", type=int, default=0, help="retrainings for the posterior; 0: leave it out")
    parser.add_argument("--no-costly", action="store_true", help="leave out the exact first order")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        name = "smoke" if args.smoke else args.bank
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            args.sizes, args.subsets = (8, 2), 6
        result = measured(args, name, work)
    out = args.json or (args.out or RESULTS) / f"readout_influence_{args.bank}.json"
    print(write_result(out.parent, out.name, result, args).name)
    return 0


def measured(args: Any, name: str, work: Path) -> dict[str, Any]:
    """All numbers of the result file."""
    bank = BANKS[name](work, tuple(args.sizes), args.seed)
    settings = EvaluationSettings(
        subsets=args.subsets, removal_queries=2 if args.smoke else 10, draws=2 if args.smoke else 8, seed=args.seed,
        measure=MeasureSettings(workers=args.workers),
    )  # fmt: skip
    run = TrainingRun.open(bank.recipe, work / "run")
    second = second_order(run)
    asked = [Query(q, name=q.id) for q in bank.queries]
    truth = subset_truth(run, asked, args.subsets, second=second, seed=args.seed, settings=settings.measure)
    place, scorer = work / "scores", Scorer(run, asked, args.seed)
    methods = {name: scored(name, scorer, place) for name in (*CHEAP, *variants())}
    report = judge(run, asked, methods, truth, replace(settings, removal_queries=0))
    show(report)
    removals = judge(run, asked, {name: methods[name] for name in REMOVED}, truth, settings)
    show(removals)
    chosen = removal_queries(len(asked), settings.removal_queries)
    few: dict[str, Any] = {}
    if not args.no_costly:
        found = costly(run, [asked[i] for i in chosen], args.retrain, args.seed, work / "few")
        small = Report(
            tuple(on_few(found, methods, chosen, truth)), tuple(asked[i].name for i in chosen), args.subsets, (), 0,
            seed=args.seed,
        )  # fmt: skip
        show(small)
        few = {"lines": list(small.lines()), "minus_default": differences(small, COMPARED, "lds")}
    assert truth.ceiling is not None
    seconds = run.bank.info()["cpu_seconds"] + second.bank.info()["cpu_seconds"]
    return {
        "question": (__doc__ or "").split("\n", 1)[0],
        "bank": {"name": name, **facts_of(bank, run)},
        "repeats": len(asked),
        "subsets": args.subsets,
        "removed_by_qld": removals.removed_units,
        "cpu_seconds": {"retraining": seconds, "scores": sum(s.cpu_seconds or 0 for s in methods.values())},
        "agreement_of_orders": truth.ceiling.agreement._asdict(),
        "ceiling": truth.ceiling.ceiling._asdict(),
        "lds": list(report.lines()),
        "default_minus_others_lds": differences(report, COMPARED, "lds"),
        "qld": list(removals.lines()),
        "default_minus_others_qld": differences(removals, COMPARED, "qld"),
        "on_removal_queries": few,
        "parts_of_gradient": parts_of_gradient(scorer, truth),
    }


def show(report: Report) -> None:
    _, rows = report.table()
    for row in rows:
        print("  ".join(f"{cell:28}" for cell in row).rstrip())
    print("\n".join(report.notes()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
