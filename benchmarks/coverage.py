"""Do the 95 % intervals of the posterior cover deletions that were never measured, natural ones included?

    python benchmarks/coverage.py --case names|digits|lm --json OUT [--smoke]

A case is a recipe, its queries and deletion sets of several kinds. Sixteen sets, spread over the kinds, are reserved:
they calibrate the standard deviations. All other sets are the test, retrained and used for nothing else. Measured
twice, with retrainings alone and then with the exact first order too. An interval is good when 90 to 99 % of the test
lie inside. `names` and `lm` read public data (see corpora.py); `digits` comes with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from corpora import data, read_json
from leaveout.corpus import Corpus
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.predict import Verification, agreement
from leaveout.deletion.run import TrainingRun
from leaveout.metrics import bootstrap_interval
from leaveout.training.queries import Query
from leaveout.training.recipe import OptimizerSettings, Recipe
from provenance import provenance

RESERVED = 16
GOOD = (0.90, 0.99)
Sets = dict[str, list[list[str]]]
"""Kind -> deletion sets, each a list of ids."""


@dataclass(frozen=True)
class Case:
    """What is measured: `retrain` retrainings of the design auto, `queries` asked, `sets` predicted."""

    recipe: Recipe
    queries: list[Query]
    sets: Sets
    retrain: int


# --- cases -------------------------------------------------------------------------------------------------------


def names_case(smoke: bool, seed: int) -> Case:
    """microgpt on 1,000 names; 20 names that it has not seen."""
    known = data("names/names.txt").read_text().split()
    recipe = Recipe.microgpt(known, n=120 if smoke else 1000)
    rows = {row.id: row.text for row in recipe.examples}
    new = sorted(set(known) - set(rows.values()))
    queries = [Query(name) for name in random.Random(seed).sample(new, 3 if smoke else 20)]
    ids = list(rows)
    pairs = [pair for pair, _ in Counter(name[-2:] for name in rows.values()).most_common(20)]
    sets: Sets = {
        "single": random_sets(ids, [1], 40, seed),
        **{f"random {n}": random_sets(ids, [n], 12, seed) for n in (10, 50, *(() if smoke else (100, 300)))},
        "contains a letter": [[i for i in ids if letter in rows[i]] for letter in string.ascii_lowercase],
        "starts with a letter": [[i for i in ids if rows[i][0] == letter] for letter in string.ascii_lowercase],
        "ends with a pair": [[i for i in ids if rows[i].endswith(pair)] for pair in pairs],
        "block of 50": [ids[i : i + 50] for i in range(0, len(ids), 50)],
    }
    return Case(recipe, queries, sets, 24 if smoke else 352)


def digits_case(smoke: bool, seed: int) -> Case:
    """A classifier of 1,000 handwritten digits, in the order in which people wrote them; loss and margin of six others."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels, labels = found.data, found.target
    n, asked = (120, 2) if smoke else (1000, 6)
    images = torch.from_numpy(pixels / 16).float()
    examples = tuple(zip(images[:n], map(int, labels[:n]), strict=True))
    recipe = Recipe(
        "classifier", examples, model=perceptron, optimizer=OptimizerSettings("sgd", 0.2, momentum=0.5),
        schedule="linear", batch_size=20, epochs=3, order="shuffled", seed=seed,
    )  # fmt: skip
    chosen = random.Random(seed).sample(range(n, len(images)), asked)
    queries = [
        Query((images[i], int(labels[i])), measure, f"image {i}, a {labels[i]}: {measure}")
        for i in chosen
        for measure in ("loss", "margin")
    ]
    ids, width = [str(i) for i in range(n)], n // 20
    near = {i: (images[:n] - images[i]).norm(dim=1).argsort().tolist() for i in chosen}
    sets: Sets = {
        **{f"random {size}": random_sets(ids, [size], 12, seed) for size in (10, 50, *(() if smoke else (200,)))},
        "class": [[i for i in ids if labels[int(i)] == digit] for digit in range(10)],
        "half of a class": [
            [i for i in ids if labels[int(i)] == digit][half::2] for digit in range(10) for half in (0, 1)
        ],
        "block (writer)": [ids[i : i + width] for i in range(0, n, width)],
        "neighbours of a query": [[str(j) for j in order[:k]] for order in near.values() for k in (10, 30, 90)],
    }
    return Case(recipe, queries, sets, 24 if smoke else 352)


def perceptron() -> nn.Module:
    """64 pixels, 32 hidden units, 10 digits."""
    layers = {"hidden": nn.Linear(64, 32), "activation": nn.GELU(), "readout": nn.Linear(32, 10)}
    return nn.Sequential(OrderedDict(layers))


def lm_case(smoke: bool, seed: int) -> Case:
    """A pretrained language model fine-tuned on 240 rows of six sources; 16 completions that it has not seen."""
    per_source, size = (8, 4) if smoke else (40, 16)
    texts = {name: short(found, per_source + 3, seed) for name, found in sources().items()}
    rows = [
        {"id": f"{name} {i}", "text": text, "source": name}
        for name, found in texts.items()
        for i, text in enumerate(found[:per_source])
    ]
    later = [text for i in range(3) for text in (found[per_source + i] for found in texts.values())]
    queries = [
        Query({"prompt": text[: len(text) // 3], "completion": text[len(text) // 3 :]}, name=text[:40])
        for text in later[: 3 if smoke else 16]
    ]
    recipe = Recipe(
        "causal-lm", tuple(Corpus.open(rows)), model=str(data("stories260K")), max_tokens=32,
        optimizer=OptimizerSettings("paper-adam", 2e-3, betas=(0.9, 0.99), eps=1e-3), schedule="linear",
        batch_size=size, epochs=1 if smoke else 3, order="shuffled", seed=seed,
    )  # fmt: skip
    ids = list(recipe.ids)
    by_source = [[str(row["id"]) for row in rows if row["source"] == name] for name in texts]
    sets: Sets = {
        "source": by_source,
        "half of a source": [s for found in by_source for s in random_sets(found, [per_source // 2], 4, seed)],
        "random": random_sets(ids, [4, 8] if smoke else [5, 12, 24, 60], 10 if smoke else 32, seed),
    }
    return Case(recipe, queries, sets, 12 if smoke else 100)


def sources() -> dict[str, list[str]]:
    """Texts by source, in the order of their files."""
    return {
        "stories": read_json("tinystories/tinystories_1000.json.gz"),
        "answers": [row["output"] for row in read_json("alpaca/random_9k.json.gz")],
        "people": [str(row["output"]) for row in read_json("alpaca/dolly_3k.json.gz")],
        "medicine": [row["LONG_ANSWER"] for row in read_json("medical-pubmedqa/ori_pqal.json.gz").values()],
        "finance": [p["text"] for c in read_json("finance-tatqa/tatqa_dataset_dev.json.gz") for p in c["paragraphs"]],
        "instructions": [
            row["output"] for row in json.loads(data("instructions-small/instruction-data.json").read_text())
        ],
    }


def short(texts: Sequence[str], n: int, seed: int, letters: int = 90) -> list[str]:
    """Beginnings of n different texts that are long enough."""
    enough = sorted({" ".join(text.split())[:letters] for text in texts if len(text) >= 40})
    return random.Random(seed).sample(enough, n)


def random_sets(ids: Sequence[str], sizes: Sequence[int], n: int, seed: int) -> list[list[str]]:
    """n random sets of ids, of the sizes in turn."""
    chance = random.Random(f"{seed} {sizes} {ids[0]}")
    return [chance.sample(list(ids), sizes[i % len(sizes)]) for i in range(n)]


CASES = {"names": names_case, "digits": digits_case, "lm": lm_case}


# --- the measurement ---------------------------------------------------------------------------------------------


def reserve(sets: Sets, n: int, seed: int) -> tuple[list[list[str]], Sets]:
    """n sets, one of each kind and the rest in proportion to the kinds' sizes; and the others.

    A set that is in two kinds stays in the first of them.
    """
    seen: set[frozenset[str]] = {frozenset()}
    shuffled: Sets = {}
    for kind, found in sets.items():
        new = [ids for ids in dict.fromkeys(map(frozenset, found)) if ids not in seen]
        seen |= set(new)
        shuffled[kind] = random.Random(f"{seed} {kind}").sample([sorted(ids) for ids in new], len(new))
    places = sorted((i / len(found), kind, i) for kind, found in shuffled.items() for i in range(len(found)))
    chosen = {(kind, i) for _, kind, i in places[:n]}
    reserved = [shuffled[kind][i] for kind, i in sorted(chosen)]
    return reserved, {kind: [s for i, s in enumerate(f) if (kind, i) not in chosen] for kind, f in shuffled.items()}


def measure(case: Case, directory: Path, settings: MeasureSettings, seed: int) -> dict[str, Any]:
    """Measures, predicts and retrains a case: coverage and agreement by kind, with and without the exact first order."""
    began = time.process_time()
    reserved, test = reserve(case.sets, RESERVED, seed)
    kinds = [kind for kind, found in test.items() for _ in found]
    without = [ids for found in test.values() for ids in found]
    run = TrainingRun.train(case.recipe, directory / "retrainings")
    run.measure(retrain=case.retrain, heldout=reserved, queries=case.queries, settings=settings)
    predictions = {"retrainings": run.predict(case.queries, without)}
    exact = TrainingRun.train(case.recipe, directory / "exact")
    exact.bank.merge(run.bank.path)
    exact.measure(gradient=True, queries=case.queries, settings=settings)
    predictions["retrainings and the exact first order"] = exact.predict(case.queries, without)
    proof = {"actual": exact.retrain(case.queries, without, settings), "measured": np.zeros(len(without), bool)}
    verified = {name: Verification(**vars(p), **proof) for name, p in predictions.items()}
    seconds = {**measuring_seconds(exact), "this process": time.process_time() - began}
    return {
        "question": "Do the 95 % intervals of the posterior cover deletions that were never measured?",
        "recipe": case.recipe.hash(), "units": len(case.recipe.unit_names), "queries": len(case.queries),
        "steps": len(case.recipe.batches()), "retrainings": case.retrain, "reserved": RESERVED, "test_sets": len(without),
        "measurements": {name: judged(p, kinds) for name, p in verified.items()},
        "cpu_seconds": {name: round(value, 2) for name, value in seconds.items()},
    }  # fmt: skip


def measuring_seconds(run: TrainingRun) -> dict[str, float]:
    """CPU seconds of the bank's measurements by what they are for, those of earlier calls included."""
    out: dict[str, float] = {}
    for record in run.bank.store.iter_rows():
        name = str(record.meta.get("role", record.meta["kind"]))
        out[name] = out.get(name, 0.0) + float(str(record.meta["cpu_seconds"]))
    return out


def judged(p: Verification, kinds: Sequence[str]) -> dict[str, Any]:
    """Agreement and coverage, for all test sets, by kind and by query."""
    inside = p.inside
    by_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    interval = bootstrap_interval(inside.mean(0), seed=0)
    by_query = sorted(zip(inside.mean(1).tolist(), p.queries, strict=True))
    return {
        "calibration_factor": p.factor,
        "all": {**summary(p, list(range(len(kinds)))), "coverage_interval": [interval.low, interval.high]},
        "within_90_to_99": GOOD[0] <= float(inside.mean()) <= GOOD[1],
        "kinds": {kind: summary(p, columns) for kind, columns in by_kind.items()},
        "worst_queries": [{"query": name, "coverage": value} for value, name in by_query[:3]],
    }


def summary(p: Verification, columns: list[int]) -> dict[str, Any]:
    """Numbers of some sets. Widths and effects in the query's unit; spearman over the sets, mean over queries."""
    part = replace(p, base=p.base[:, columns], effect=p.effect[:, columns], std=p.std[:, columns],
                   without=tuple(p.without[i] for i in columns), actual=p.actual[:, columns],
                   measured=p.measured[columns])  # fmt: skip
    plain = replace(part, std=part.std / p.factor)
    actual = part.actual - part.base
    error, low_high = np.abs(part.effect - actual), part.interval()
    z = error / part.std
    found = agreement(part.effect, actual)
    return {
        "sets": len(columns),
        "coverage": float(part.inside.mean()),
        "coverage_before_calibration": float(plain.inside.mean()),
        "spearman": found["spearman"], "relative_error": found["relative_error"],
        "mean_width": float((low_high[1] - low_high[0]).mean()), "mean_effect": float(np.abs(actual).mean()),
        "mean_error": float(error.mean()),
        "z_95": float(np.quantile(z, 0.95)),
        "coverage_by_own_half": by_own_half(z),
    }  # fmt: skip


def by_own_half(z: np.ndarray) -> float | None:
    """Coverage if each half of the sets were calibrated by the other half, of the same kind; None below 4 sets.

    Says whether the one factor of all kinds is at fault, or the posterior itself. z [query, set]: error over deviation.
    """
    if z.shape[1] < 4:
        return None
    first, second = z[:, ::2], z[:, 1::2]
    inside = [a <= np.quantile(b, 0.95) for a, b in ((first, second), (second, first))]
    return float(np.concatenate(inside, axis=1).mean())


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for name, found in result["measurements"].items():
        lines.append(f"{name} (standard deviations times {found['calibration_factor']:.2f})")
        lines.append(
            f"{'kind':<24}{'sets':>5}{'cover':>8}{'before':>8}{'own':>8}{'rank':>7}{'rel.err':>9}{'width':>9}{'|effect|':>10}"
        )
        for kind, s in {**found["kinds"], "all": found["all"]}.items():
            own = "" if s["coverage_by_own_half"] is None else f"{s['coverage_by_own_half']:.1%}"
            rank = "" if s["spearman"] is None else f"{s['spearman']:.2f}"
            lines.append(
                f"{kind:<24}{s['sets']:>5}{s['coverage']:>8.1%}{s['coverage_before_calibration']:>8.1%}{own:>8}{rank:>7}"
                f"{s['relative_error']:>9.2f}{s['mean_width']:>9.3g}{s['mean_effect']:>10.3g}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="keep the run here: a repeated call measures nothing twice")
    parser.add_argument("--smoke", action="store_true", help="a tiny form: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    case = CASES[args.case](args.smoke, args.seed)
    settings = MeasureSettings(progress=True, check=False)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(case, args.run or Path(scratch), settings, args.seed)
    command = f"python benchmarks/coverage.py --case {args.case} --json {args.json.name}"
    facts = {"case": args.case, **result, "smoke": args.smoke, **provenance(args.seed), "command": command}
    args.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
