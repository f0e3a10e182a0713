"""How well is a retrained model predicted from each kind of measurement, at equal cost?

    python benchmarks/deletion_accuracy.py --names NAMES.txt --json OUT [--seed 42] [--units documents|letters]

microgpt on names (arXiv 2604.07328), n = 1000 documents, 20 queries; truth: a model really retrained for each deletion set.
Costs are CPU seconds measured in this run, and retraining-equivalents: those over one retraining of the same run. Every
arm is a bank of its own, made by the public functions; a killed benchmark goes on where it was (--work keeps the banks).
Of the deletion sets, 16 spread over the kinds are held out: they calibrate the arms that buy them, and are not scored.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leaveout.deletion.directions import FEW
from leaveout.deletion.estimators import EstimatorSettings, fit
from leaveout.deletion.measurements import JetBlock, Measurements, MeasureSettings
from leaveout.deletion.plan import Budget
from leaveout.deletion.predict import Prediction, agreement
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.errors import UnsupportedError
from leaveout.training.recipe import Recipe
from provenance import provenance

BUDGETS = {"documents": (100, 368, 1103), "letters": (73, 370)}
HELDOUT = 16
TRIED = 32  # jets that say what one costs


@dataclass
class Setting:
    """The recipe, its queries, the deletion sets by kind, and the truth."""

    recipe: Recipe
    queries: list[str]
    kinds: list[str]
    sets: DeletionSets
    heldout: DeletionSets
    work: Path
    effects: np.ndarray = field(default_factory=lambda: np.zeros(0))
    retraining: float = 0.0  # CPU seconds

    def run(self, name: str) -> TrainingRun:
        return TrainingRun.train(self.recipe, self.work / name)


# --- deletion sets -----------------------------------------------------------------------------------------------


def document_sets(names: Sequence[str], rng: np.random.Generator) -> dict[str, list[list[int]]]:
    """Nine kinds: four sizes of random sets, single documents, and four kinds that a user could name."""
    n, letters = len(names), "abcdefghijklmnopqrstuvwxyz"
    kinds = {"1": [[int(i)] for i in rng.choice(n, 42, replace=False)]}
    for size in (size for size in (10, 50, 100, 300) if size < n / 2):
        kinds[str(size)] = [rng.choice(n, size, replace=False).tolist() for _ in range(32)]
    kinds["contains a letter"] = [[i for i, name in enumerate(names) if c in name] for c in letters]
    kinds["starts with a letter"] = [[i for i, name in enumerate(names) if name[0] == c] for c in letters]
    kinds["block of 50"] = [list(range(i, min(n, i + 50))) for i in range(0, n, 50)]
    endings = sorted({name[-2:] for name in names})
    by_ending = [[i for i, name in enumerate(names) if name[-2:] == e] for e in endings]
    kinds["ends with two letters"] = [s for s in by_ending if len(s) >= 8][:32]
    return kinds


def letter_sets(units: int, rng: np.random.Generator) -> dict[str, list[list[int]]]:
    return {
        str(k): [rng.choice(units, k, replace=False).tolist() for _ in range(34)] for k in (2, 4, 8)
    } | {"1": [[i] for i in range(units)]}  # fmt: skip


def make_setting(args: argparse.Namespace, work: Path) -> Setting:
    names = [line for line in args.names.read_text().split("\n") if line]
    recipe = Recipe.microgpt(names, n=args.n, seed=args.seed).with_(steps=args.n)
    random.Random(args.seed).shuffle(names)
    documents, queries = names[: args.n], names[args.n : args.n + 20]
    rng = np.random.default_rng(args.seed)
    if args.units == "letters":
        recipe = recipe.grouped([name[0] for name in documents])
        kinds = letter_sets(len(recipe.unit_names), rng)
    else:
        kinds = document_sets(documents, rng)
    members = [(kind, tuple(sorted(s))) for kind, sets in kinds.items() for s in sets if s]
    members = list(dict.fromkeys(members))
    # Held out: every so many-th, so that all kinds are among them.
    chosen = set(range(len(members) // HELDOUT // 2, len(members), max(1, len(members) // HELDOUT)))
    chosen = set(sorted(chosen)[:HELDOUT])
    scored = [m for i, m in enumerate(members) if i not in chosen]
    units = len(recipe.unit_names)
    return Setting(
        recipe, queries, [kind for kind, _ in scored], as_sets(scored, units),
        as_sets([m for i, m in enumerate(members) if i in chosen], units), work,
    )  # fmt: skip


def as_sets(members: Sequence[tuple[str, Sequence[int]]], units: int) -> DeletionSets:
    x = np.zeros((len(members), units))
    for row, (_, chosen) in zip(x, members, strict=True):
        row[list(chosen)] = 1
    return DeletionSets(x, tuple(f"{kind}: {i}" for i, (kind, _) in enumerate(members)))


# --- arms --------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What is written of each arm."""

    setting: Setting
    out: dict[str, Any] = field(default_factory=lambda: {k: {} for k in ("spearman", "pearson", "relative_error")})
    coverage: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Any] = field(default_factory=dict)

    def add(
        self, name: str, run: TrainingRun, estimator: str, cpu: float, m: int | None = None, **options: Any
    ) -> None:
        """Scores one estimator on a bank; with m, on its first m jet runs only."""
        began = time.process_time()
        if m is None:
            p = run.predict(self.setting.queries, self.setting.sets, EstimatorSettings(estimator, **options))
        else:
            p = limited(run, self.setting, estimator, m, **options)
        low, high = p.interval()
        actual = self.setting.effects + p.base
        inside = (low <= actual) & (actual <= high)
        kinds = np.array(self.setting.kinds)
        known = bool(np.isfinite(p.std).all())
        for key, table in self.out.items():
            table[name] = {
                k: agreement(p.effect[:, kinds == k], self.setting.effects[:, kinds == k])[key]
                for k in dict.fromkeys(kinds)
            }
            table[name]["mean"] = float(np.mean([v for v in table[name].values() if v is not None]))
        self.coverage[name] = {k: float(inside[:, kinds == k].mean()) if known else None for k in dict.fromkeys(kinds)}
        self.coverage[name]["mean"] = float(np.mean(list(self.coverage[name].values()))) if known else None
        self.arms[name] = {
            "estimator": estimator, "measurements": run.bank.info()["measurements"], "measuring_cpu_seconds": cpu,
            "retraining_equivalents": cpu / self.setting.retraining, "factor": float(np.median(p.factor)),
            "vectors_cpu_seconds": run.bank.store.state("vectors cpu_seconds"),  # not among the above
            "predicting_cpu_seconds": time.process_time() - began,
        }  # fmt: skip
        row = self.out
        print(
            f"{name:44s} {cpu / self.setting.retraining:7.0f} RE  {row['spearman'][name]['mean']:.3f} / "
            f"{row['relative_error'][name]['mean']:.3f} / {self.coverage[name]['mean']}",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def limited(run: TrainingRun, s: Setting, estimator: str, m: int, vectors: bool = False, **options: Any) -> Prediction:
    """The prediction from the first m jet runs of a bank."""
    data = run.bank.measurements(s.queries)
    psi = np.concatenate([b.psi for b in data.jets])[:m]
    c = np.concatenate([b.c for b in data.jets], 1)[:, :m]
    alone = Measurements(data.base, data.sizes, (JetBlock(psi, c),))
    if vectors:
        alone = replace(alone, features=data.features, scores=data.scores)
    effect, std = fit(alone, EstimatorSettings(estimator, **options))[0].predict(s.sets.x)
    return Prediction(
        tuple(s.queries), s.sets.labels, np.repeat(data.base[:, None], len(s.sets), 1), effect, std, estimator,
        np.ones_like(effect), np.zeros(effect.shape, bool),
    )  # fmt: skip


def spent(run: TrainingRun, *kinds: str) -> float:
    """CPU seconds of a bank's measurements, or of some kinds of them."""
    records = [r.meta for r in run.bank.store.iter_rows()]
    return float(sum(m["cpu_seconds"] for m in records if not kinds or m["kind"] in kinds))


def truth(s: Setting) -> None:
    """Retrains every set; the cost of one retraining is the reference of all budgets."""
    run = s.run("truth")
    values = run.retrain(s.queries, s.sets)
    s.effects = values - run.bank.base(_asked(s.queries))[:, None]
    s.retraining = spent(run) / len(run.bank)


def _asked(queries: Sequence[str]) -> Any:
    from leaveout.training.queries import as_queries

    return as_queries(queries)


def paper_arms(s: Setting, scores: Scores, sizes: Sequence[int], degree: int) -> dict[str, Any]:
    """The paper's stored sketch at several numbers of directions, read by the paper's estimators and by ours."""
    run = s.run("sketch")
    queries = [*s.queries, "max"] if all(c in _alphabet(s) for c in "max") else s.queries
    began, resumed = time.monotonic(), len(run.bank) > 0
    run.measure(max(sizes), degree, queries=queries, settings=MeasureSettings(workers=2, progress=True))
    if not resumed:  # of a run that was not killed
        run.bank.note("wall_seconds", time.monotonic() - began)
    wall, whole = run.bank.store.state("wall_seconds"), spent(run)
    run.measure_vectors()
    exact = 2 if len(s.recipe.unit_names) < 64 else 1
    for m in sizes:
        cpu = whole * m / max(sizes)
        scores.add(f"mean, {m} directions, degree 1", run, "mean", cpu, m, degree=1)
        scores.add(f"least squares, {m} directions", run, "least_squares", cpu, m, degree=min(degree, exact))
        scores.add(f"posterior without update vectors, {m} directions", run, "posterior", cpu, m)
    for r in range(2, degree + 1):
        scores.add(f"mean, {m} directions, degree {r}", run, "mean", cpu, m, degree=r)
    scores.add(f"median of means, {m} directions", run, "median_of_means", cpu, m, degree=1)
    return {"directions": m, "degree": degree, "wall_seconds": wall, "cpu_seconds": whole, "workers": 2}


def _alphabet(s: Setting) -> str:
    return str(s.recipe.model["alphabet"])


def figure3(s: Setting) -> dict[str, Any] | None:
    """The paper's Figure 3: the cumulative mean estimate for 'max' without the documents with an x."""
    if len(s.recipe.unit_names) < 100 or "x" not in _alphabet(s):
        return None
    ids = [i for i, row in zip(s.recipe.ids, s.recipe.examples, strict=True) if "x" in row.text]
    run = s.run("sketch")
    found = [run.predict(["max"], [ids], EstimatorSettings("mean", degree=r, calibrate=False)) for r in (1, 2, 3)]
    return {
        "base": float(found[0].base[0, 0]), "cumulative": [float(p.mean[0, 0]) for p in found],
        "standard_error": [float(p.std[0, 0]) for p in found], "documents": len(ids),
        "truth": float(run.retrain(["max"], [ids])[0, 0]),
    }  # fmt: skip


def vector_arms(s: Setting, scores: Scores, sizes: Sequence[int]) -> None:
    """The posterior on jets of degree 1 alone, with the units' update vectors as prior."""
    run = s.run("jets with vectors")
    vectors = _vectors(run)
    run.measure(max(sizes), 1, queries=s.queries, settings=MeasureSettings(check=False))
    for m in sizes:
        cpu = spent(run) * m / max(sizes) + vectors
        scores.add(f"posterior, {m} directions, degree 1", run, "posterior", cpu, m, vectors=True)


def first_order_check(s: Setting, directions: int) -> dict[str, float]:
    """Least squares on degree-1 jets against reverse mode, both in double precision; and least squares in single."""
    double = TrainingRun.train(s.recipe.with_(dtype="float64"), s.work / "double")
    settings = MeasureSettings(workers=2, check=False)
    double.measure(directions, 1, gradient=True, queries=s.queries, settings=settings)
    exact = double.predict(s.queries, s.sets, "first_order").effect
    found = double.predict(s.queries, s.sets, EstimatorSettings("least_squares", degree=1)).effect
    single = limited(s.run("sketch"), s, "least_squares", directions, degree=1).effect
    size = np.abs(exact).max()
    return {
        "directions": directions, "complex128": float(np.abs(found - exact).max() / size),
        "complex64": float(np.abs(single - exact).max() / size),
    }  # fmt: skip


def _vectors(run: TrainingRun) -> float:
    began = time.process_time()
    run.measure_vectors()
    return time.process_time() - began


def budget_arms(s: Setting, scores: Scores, budget: int) -> dict[str, Any]:
    """All that one budget can buy, at equal CPU seconds: what the planner chooses, and each competitor alone."""
    seconds, units = budget * s.retraining, len(s.recipe.unit_names)
    settings = MeasureSettings(sizes=(4,) if units < 64 else (), check=False)
    for arm in ("plan", "retrainings", "gradient"):  # what was bought by another plan must not help this one
        shutil.rmtree(s.work / f"{arm} {budget}", ignore_errors=True)
    n = min(HELDOUT, budget // 6)
    reserved = DeletionSets(s.heldout.x[:n], s.heldout.labels[:n])
    run = s.run(f"plan {budget}")
    try:
        plan = run.plan(s.queries, s.heldout, Budget(seconds, examples=True, repeats=0))
    except UnsupportedError as error:  # a plan begins with two retrainings alone, many times as dear as those of a batch
        plan, planned = None, {"refused": str(error)}
    if plan is not None:
        bought = {**plan.best.arguments, "settings": settings}
        bought["heldout"] = reserved if bought["heldout"] else None
        run.measure(**bought)
        name = f"posterior, plan, {budget}"
        scores.add(name, run, "posterior", spent(run))
        planned = {
            "choices": [{"name": c.name, "seconds": c.seconds, "error": c.error} for c in plan.choices],
            "costs": asdict(plan.costs), "bought": plan.best.name,
            "expected_error": plan.best.error, "found_error": scores.out["relative_error"][name]["mean"],
            "expected_cpu_seconds": plan.best.seconds, "found_cpu_seconds": spent(run),
        }  # fmt: skip

    run = s.run(f"retrainings {budget}")
    _vectors(run)
    run.measure(retrain=budget - n, heldout=reserved, queries=s.queries, settings=settings)
    scores.add(f"posterior, retrainings only, {budget}", run, "posterior", spent(run))
    design = "random" if units < 64 else "subsets"
    run = s.run(f"datamodels {budget}")
    run.measure(retrain=budget, design=design, queries=s.queries, settings=settings)
    scores.add(f"datamodels, {budget}", run, "datamodels", spent(run))
    if budget >= units:
        run = s.run(f"singles {budget}")
        run.measure(retrain=units, design="singles", queries=s.queries, settings=settings)
        scores.add(f"leave-one-out sums, {budget}", run, "leave_one_out", spent(run))
        if budget >= units * (units + 1) // 2:
            run.measure(retrain=units**2, design="pairs", queries=s.queries, settings=settings)
            scores.add(f"pairwise, {budget}", run, "pairwise", spent(run))
    run = s.run(f"jets {budget}")
    run.measure(TRIED, 1, queries=s.queries, settings=settings)
    m = int(seconds / spent(run) * TRIED)
    if m >= TRIED:
        run.measure(m, 1, queries=s.queries, settings=settings)
        cpu = spent(run) * m / len(run.bank)
        for estimator in ("least_squares", "mean"):
            scores.add(f"{estimator.replace('_', ' ')} on jets, {budget}", run, estimator, cpu, m)
    run = s.run(f"gradient {budget}")
    run.measure(gradient=True, queries=s.queries, settings=settings)
    if spent(run, "gradient") < seconds:
        scores.add(f"metagradient, {budget}", run, "first_order", spent(run, "gradient"))
        left = int((seconds - spent(run, "gradient")) / s.retraining) - n
        if left > 0:
            run.measure(retrain=left, heldout=reserved, queries=s.queries, settings=settings)
            scores.add(f"posterior with metagradient, {budget}", run, "posterior", spent(run))
            if units > FEW:  # few units' kernel knows their sets; what the steps take is in `predicting_cpu_seconds`
                scores.add(f"posterior with metagradient and steps, {budget}", run, "posterior", spent(run), steps=True)
    return planned


def timing(s: Setting) -> dict[str, float]:
    """1,000 sets for 100 queries from a finished bank of 400 retrainings."""
    run = s.run("timing")
    names = [row.text for row in s.recipe.examples[:100]]
    run.measure(retrain=400, queries=names, settings=MeasureSettings(check=False))
    rng = np.random.default_rng(0)
    x = (rng.random((1000, len(s.recipe.unit_names))) < 0.05).astype(float)
    began = time.monotonic()
    run.predict(names, DeletionSets(x, tuple(map(str, range(1000)))))
    return {"queries": 100, "sets": 1000, "wall_seconds": time.monotonic() - began}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--units", choices=sorted(BUDGETS), default="documents")
    parser.add_argument("--n", type=int, default=1000, help="documents, and steps")
    parser.add_argument("--work", type=Path, help="where banks are kept; default: a temporary directory")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a tiny form, to see that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args, args.work or Path(temporary))
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    s = make_setting(args, work)
    truth(s)
    scores = Scores(s)
    documents = args.units == "documents"
    sketch = paper_arms(s, scores, _sizes(args), 3 if documents else 2)
    if documents:
        vector_arms(s, scores, (16,) if args.smoke else (256, 400))
    budgets = (60,) if args.smoke else BUDGETS[args.units]
    steps: list[tuple[str, Callable[[], Any]]] = [(str(b), lambda b=b: budget_arms(s, scores, b)) for b in budgets]
    plans = {name: step() for name, step in steps}
    return {
        "question": "How well is a retrained model predicted from each kind of measurement, at equal cost?",
        "smoke": args.smoke, "units": args.units, "n": args.n, "sets": len(s.sets), "queries": s.queries,
        "retraining_cpu_seconds": s.retraining, **scores.out, "coverage": scores.coverage, "arms": scores.arms,
        "sketch": sketch, "first_order": first_order_check(s, max(_sizes(args))) if documents else None,
        "figure3": figure3(s), "plans": plans, "timing": None if args.smoke else timing(s),
        "recipe": s.recipe.hash(), **provenance(args.seed),
    }  # fmt: skip


def _sizes(args: argparse.Namespace) -> tuple[int, ...]:
    if args.smoke:
        return (16, 24)
    return (500, 512) if args.units == "documents" else (256,)


if __name__ == "__main__":
    sys.exit(main())
