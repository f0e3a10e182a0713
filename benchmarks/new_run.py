"""Does a prediction foretell the run that people would do: rows gone, batches packed anew, another order?

    python benchmarks/new_run.py --case digits|names [--named] [--run DIR] [--smoke]

What is measured is what `plan` buys for a budget of 120 trainings: with some of the sets as examples of what is asked, or with
--named all of them as those that are asked. The truth is the mean of three new runs of each set.

Ceiling: how well the exact mean over orders would rank the means of three runs. Two runs agree by r, the mean of their
Spearman correlations over pairs of runs and queries; a mean of three has the reliability 3 r / (1 + 2 r) (Spearman and
Brown), and the exact mean agrees with it by the root of that.
"Fitted in": retrainings of the design `auto`, half as many as the budget has trainings, in the same run, or each in an order of
its own with its noise known; both without the exact first order, and predicted at what rows weigh in a new run.

A kind whose ceiling is below .6 is judged by the share of answers "not distinguishable from a new seed".
Coverage: the share of single runs (three a set) inside the 95 % interval of a new run, and of means of three inside theirs.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import leaveout as lo
from corpora import data
from leaveout.deletion.measurements import MeasureSettings, Retrainings
from leaveout.deletion.posterior import Posterior
from leaveout.deletion.predict import Prediction
from leaveout.deletion.sets import DeletionSets, deletion_sets
from leaveout.metrics import spearman
from leaveout.training.queries import as_queries
from leaveout.training.train import train_plain
from measuring import arguments, cpu_seconds, write_result

NAME = "new_run.json"
BUDGET, RUNS, LEAST_CEILING = 120, 3, 0.6
Sets = dict[str, list[list[str]]]


def sets_of(recipe: lo.Recipe, groups: list[str], few: int, seed: int) -> Sets:
    """Single rows, 5 % and 20 % of all at random, whole groups (classes, first letters), and blocks of 10 % in order.

    few     sets of each kind, at most
    """
    chance, ids = np.random.default_rng(seed), np.array(recipe.ids)
    n = len(ids)

    def drawn(share: float, count: int) -> list[list[str]]:
        return [chance.choice(ids, max(1, round(share * n)), replace=False).tolist() for _ in range(count)]

    whole = [ids[np.array(groups) == group].tolist() for group in sorted(set(groups))]
    blocks = [part.tolist() for part in np.array_split(ids, 10)]
    return {
        "single": drawn(0, few), "5 %": drawn(0.05, few), "20 %": drawn(0.2, few),
        "group": [ids for ids in whole if 1 < len(ids) < n / 2][:few], "block": blocks[:few],
    }  # fmt: skip


def digits(smoke: bool) -> tuple[lo.Recipe, list[Any], list[str]]:
    """A perceptron on 300 digits, SGD with momentum; loss and margin of 12 others. Groups are classes."""
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    n, asked = (60, 2) if smoke else (300, 12)
    x, y = torch.tensor(loaded.data / 16, dtype=torch.float32), loaded.target.tolist()
    recipe = lo.Recipe(
        "classifier", tuple((x[i], y[i]) for i in range(n)), model={"hidden": [32]}, batch_size=20,
        epochs=2 if smoke else 8, order="shuffled", schedule="linear", optimizer=lo.OptimizerSettings("sgd", 0.1, momentum=0.9),
    )  # fmt: skip
    queries = [lo.Query((x[n + i], y[n + i]), m, f"image {i}: {m}") for i in range(asked) for m in ("loss", "margin")]
    return recipe, queries, [str(label) for label in y[:n]]


def names(smoke: bool) -> tuple[lo.Recipe, list[Any], list[str]]:
    """microgpt on 300 names; 12 that it has not seen. Groups are first letters."""
    known = [a + b for a in ("an", "bo", "ci", "du") for b in ("na", "ri", "so", "tu", "la", "mi")]
    if not smoke:
        known = data("names/names.txt").read_text().split()
    recipe = lo.Recipe.microgpt(known, n=20 if smoke else 300)
    new = [name for name in known if name not in {row.text for row in recipe.examples}]
    return recipe, new[: 2 if smoke else 12], [row.text[0] for row in recipe.examples]


def ceiling(values: np.ndarray) -> float:
    """Spearman that the exact mean effect would have with the mean of runs [runs, queries, sets], mean over queries."""
    runs = len(values)
    pairs = [np.nanmean(spearman(values[i], values[j])) for i in range(runs) for j in range(i)]
    r = max(0.0, float(np.mean(pairs)))
    return float(np.sqrt(runs * r / (1 + (runs - 1) * r)))


def judged(p: Prediction, values: np.ndarray, columns: list[int]) -> dict[str, Any]:
    """What a kind of sets says; values [runs, queries, sets]."""
    own, effect, mean = values[:, :, columns], p.effect[:, columns], values[:, :, columns].mean(0)
    (low, high), (low_of_mean, high_of_mean) = (
        [end[:, columns] for end in p.interval(runs=n)] for n in (1, len(values))
    )
    most = ceiling(own)
    ranks = spearman(effect, mean - p.base[:, columns])
    rank = float(np.mean(np.nan_to_num(ranks)))  # effects that were shrunk to nothing rank nothing
    return {
        "sets": len(columns), "spearman": rank, "ceiling": most, "of_the_ceiling": rank / most if most else None,
        "judged_by_ranks": most >= LEAST_CEILING,
        "not_distinguishable": float(p.drowned[:, columns].mean()), "uncertain": float(p.uncertain[:, columns].mean()),
        "coverage": float(((low <= own) & (own <= high)).mean()),
        "coverage_of_means": float(((low_of_mean <= mean) & (mean <= high_of_mean)).mean()),
        "width": float((high - low).mean()), "run_std": float(np.sqrt(own.var(0, ddof=1).mean())),
        "rms_effect": float(np.sqrt(np.square(mean - p.base[:, columns]).mean())),
    }  # fmt: skip


def measured(recipe: lo.Recipe, asked: list[Any], sets: Sets, place: Path, budget: float, named: bool) -> dict[str, Any]:
    """Plans, buys, predicts, and trains the new runs that are the truth; named: `plan` is told all sets."""
    run = lo.TrainingRun.train(recipe, place / "run")
    listed = [ids for found in sets.values() for ids in found]
    path = place / "bought.json"
    one = min(cpu_seconds(lambda: train_plain(recipe)) for _ in range(3))
    if not path.exists():
        choice = run.plan(asked, listed if named else listed[::7], lo.Budget(budget * one, examples=not named)).best
        run.measure(**choice.arguments)
        numbers = {key: choice.arguments.get(key, 0) for key in ("retrain", "heldout", "repeats")}
        path.write_text(json.dumps({"name": choice.name} | numbers))
    p = run.predict(asked, listed)
    values = []
    for number in range(RUNS):  # a seed each, so that runs are told apart
        settings = MeasureSettings(seed=number + 1, progress=False)
        values.append(run.retrain(asked, listed, settings, meaning="new-run"))
    kinds = [kind for kind, found in sets.items() for _ in found]
    places = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in sets}
    means = np.mean(values, 0) - p.base[:, :1]
    ranks = {
        name: {kind: float(np.nanmean(spearman(effect[:, own], means[:, own]))) for kind, own in places.items()}
        for name, effect in fitted_in(run, asked, listed, min(BUDGET // 2, len(listed))).items()
    }
    return {
        "bought": json.loads(path.read_text()), "meaning": p.meaning, "freedom": p.freedom, "queries": len(asked),
        "kinds": {kind: judged(p, np.array(values), columns) for kind, columns in places.items()},
        "all": judged(p, np.array(values), list(range(len(kinds)))), "fitted in": ranks,
    }  # fmt: skip


def fitted_in(run: lo.TrainingRun, asked: list[Any], sets: list[list[str]], n: int) -> dict[str, np.ndarray]:
    """Effects [queries, sets] of a posterior on n retrainings in the same run, and on those in orders of their own."""
    queries = as_queries(asked)
    x = run.design("auto", n)
    design = DeletionSets(x, tuple(map(str, range(len(x)))))
    known, noise = run.bank.measurements(queries), run.bank.noise(queries)
    assert noise is not None
    bare = replace(
        known, gradient=None, scores=run.bank._scores(queries), heldout=Retrainings(x[:0], known.retrainings.y[:0])
    )
    point = run.bank.at_new_runs(deletion_sets(run.recipe, sets).x, lo.EstimatorSettings())
    same = run.retrain(asked, design).T - known.base
    new = run.retrain(asked, design, meaning="new-run").T - noise.mean
    given = {"the same run": (same, None), "orders of their own": (new, noise.std)}
    return {
        name: Posterior(replace(bare, retrainings=Retrainings(x, y), noise=std)).predict(point)[0]
        for name, (y, std) in given.items()
    }


def main(given: list[str] | None = None) -> int:
    """Runs one case, and adds it to the result file."""
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=("digits", "names"), required=True)
    parser.add_argument("--named", action="store_true", help="the sets themselves are named to `plan`")
    parser.add_argument("--run", type=Path, help="keep runs here: a repeated call trains nothing twice")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    recipe, asked, groups = {"digits": digits, "names": names}[args.case](args.smoke)
    with tempfile.TemporaryDirectory() as scratch:
        few = 4 if args.smoke else {"digits": 20, "names": 10}[args.case]
        sets, place = sets_of(recipe, groups, few, args.seed), args.run or Path(scratch)
        budget = 4 * BUDGET if args.smoke else BUDGET  # a start is no part of a run
        found = measured(recipe, asked, sets, place, budget, args.named)
    path = args.out / NAME
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[f"{args.case}, sets named" if args.named else args.case] = found
    for kind, one in found["kinds"].items():
        print(kind, {key: round(value, 3) if isinstance(value, float) else value for key, value in one.items()})
    write_result(args.out, NAME, {"budget_in_trainings": BUDGET, "runs": RUNS, "cases": cases}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
