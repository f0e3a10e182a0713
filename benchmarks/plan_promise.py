"""Does `plan` keep to its budget and to its promise? 60 retrainings' worth of time, on digits and on names.

    python benchmarks/plan_promise.py --case digits|names [--smoke]

A budget is 60 times what one plain training takes. What the planner spends is counted with what is then bought. Each case
is made three times, from a run of its own, and adds its part to one result file.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import leaveout as lo
from corpora import data
from leaveout.training.train import train_plain
from measuring import arguments, spread, write_result

NAME = "plan_promise.json"
BUDGET, REPEATS = 60, 3
SIZES = (0.003, 0.003, 0.01, 0.05, 0.05, 0.2, 0.2, 0.34)
"""Of the deletion sets that are asked about, as parts of all units."""


def digits(smoke: bool) -> tuple[lo.Recipe, list[Any]]:
    """A perceptron on 300 digits, SGD with momentum; ten digits that it has not seen."""
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    n = 40 if smoke else 300
    x, y = torch.tensor(loaded.data[: n + 10] / 16, dtype=torch.float32), loaded.target.tolist()
    recipe = lo.Recipe(
        "classifier", tuple((x[i], y[i]) for i in range(n)), model={"hidden": [32]}, batch_size=25, epochs=10, order="shuffled",
        optimizer=lo.OptimizerSettings("sgd", 0.2, momentum=0.9),
    )  # fmt: skip
    return recipe, [lo.Query((x[n + i], y[n + i]), name=str(i)) for i in range(10)]


def names(smoke: bool) -> tuple[lo.Recipe, list[Any]]:
    """microgpt on 100 names; ten that it has not seen."""
    known = ["anna", "bob", "eve", "kim", "lena", "max", "otto", "vera"] * 8
    known = known if smoke else data("names/names.txt").read_text().split()
    return lo.Recipe.microgpt(known, n=30 if smoke else 100), known[-10:]


def once(recipe: lo.Recipe, asked: list[Any], seed: int) -> dict[str, float]:
    """One plan, bought."""
    with tempfile.TemporaryDirectory() as place:
        run = lo.TrainingRun.train(recipe, Path(place) / "run")
        plain = min(_seconds(lambda: train_plain(recipe)) for _ in range(3))
        chance, ids = np.random.default_rng(seed), np.array(recipe.ids)
        sets = [chance.choice(ids, max(1, round(size * len(ids))), replace=False).tolist() for size in SIZES]
        found: list[lo.Plan] = []
        budget = lo.Budget(BUDGET * plain, examples=True)
        planning = _seconds(lambda: found.append(run.plan(asked, sets, budget)))
        buying = _seconds(lambda: run.measure(**found[0].best.arguments))
        return {
            "training": plain, "planning": planning / (BUDGET * plain), "probing": found[0].costs.probe / (BUDGET * plain),
            "total": (planning + buying) / (BUDGET * plain), "took_over_promised": buying / found[0].best.seconds,
        }  # fmt: skip


def _seconds(task: Any) -> float:
    began = time.process_time()
    task()
    return time.process_time() - began


def main(given: list[str] | None = None) -> int:
    """Runs one case, and adds it to the result file."""
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=("digits", "names"), required=True)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    recipe, asked = {"digits": digits, "names": names}[args.case](args.smoke)
    once(*{"digits": digits, "names": names}[args.case](True), args.seed)  # importing is no part of any figure
    times = [once(recipe, asked, args.seed + i) for i in range(1 if args.smoke else REPEATS)]
    path = args.out / NAME
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[args.case] = {key: spread([t[key] for t in times]) for key in times[0]} | {"repeats": times}
    print(json.dumps(cases[args.case], indent=1))
    write_result(args.out, NAME, {"budget_in_trainings": BUDGET, "cases": cases}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
