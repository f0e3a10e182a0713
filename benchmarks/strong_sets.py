"""How far are predictions of sets that remove most of what helps a query, without retraining them, and from their halves?

    python benchmarks/strong_sets.py --names NAMES.txt --json OUT [--cases names42 names43 letters42] [--work DIR]

microgpt on names, n = 1000, 20 queries, truth by retraining. Strong sets, by truth: the 80 units of largest own effect on each
of five queries (of letters, 6), and all documents with a letter (of letters, random sets of 8), where they hold at least STRONG
of what helps a query (the sum of positive effects of single units) and change it by at least .1 nats. Ways: sums of exact first
orders as they are, over 1 - leverage, and by Woodbury on the units' update vectors; the posterior with the exact first order and
64 retrainings of random sets; Gauss-Newton steps, which mend the posterior; and both with two halves of each set
retrained. The steps' number and the doubt in them were chosen on names42; names43 has other names, queries, sets and
parameters, letters42 other units.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deletion_accuracy as accuracy
from leaveout.deletion.directions import halved
from leaveout.deletion.measurements import Measurements, MeasureSettings, Retrainings
from leaveout.deletion.newton import STEPS, Newton
from leaveout.deletion.posterior import Posterior
from leaveout.deletion.run import TrainingRun
from leaveout.deletion.sets import DeletionSets
from leaveout.deletion.strong import DOUBT, STRONG, mended
from leaveout.readout.groups import CURVATURE
from leaveout.training.queries import query_function
from leaveout.training.tasks import task_of
from provenance import provenance

CASES = {"names42": ("documents", 42), "names43": ("documents", 43), "letters42": ("letters", 42)}
RUNS, LEAST = 64, 0.1
GOALS = {"without retraining": (1 / 1.5, 1.5), "halves": (0.8, 1.25)}


class Steps:
    """Effects by Gauss-Newton steps, kept in a directory, one file a set."""

    def __init__(self, run: TrainingRun, queries: Sequence[str], place: Path) -> None:
        self._ask = query_function(task_of(run.recipe), accuracy._asked(queries))
        self._run, self._place, self.seconds, self.made = run, place, 0.0, 0
        self._newton: Newton | None = None
        place.mkdir(parents=True, exist_ok=True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.stack([self._one(row) for row in x], 1)

    def _one(self, x: np.ndarray) -> np.ndarray:
        file = self._place / f"{hashlib.sha256(x.tobytes()).hexdigest()[:24]}.npy"
        if not file.exists():
            if self._newton is None:
                self._newton = Newton(self._run.recipe, self._run.parameters)
            began = time.process_time()
            np.save(file, self._newton.effects(x[None], self._ask)[:, 0])
            self.seconds, self.made = self.seconds + time.process_time() - began, self.made + 1
        return np.load(file)


def strong_sets(s: accuracy.Setting, effects: np.ndarray, most: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Sets [sets, units] of both kinds, their kinds, and which pairs of a query and a set are strong by single units' effects."""
    units = effects.shape[1]
    asked = range(0, len(effects), max(1, len(effects) // 5))
    own = np.zeros((len(asked), units))
    for row, query in zip(own, asked, strict=True):
        row[np.argsort(-effects[query])[: 80 if units > 64 else 6]] = 1
    other = "contains a letter" if units > 64 else "8"
    named = s.sets.x[[kind == other for kind in s.kinds]]
    named = named[np.argsort(-named.sum(1), kind="stable")][:most]
    kinds = ["own rows"] * len(own) + [other] * len(named)
    x = np.concatenate([own, named])
    helps = np.maximum(effects, 0)
    share = (helps @ x.T) / helps.sum(1, keepdims=True)
    of_its_own = np.ones_like(share, bool)
    of_its_own[:, : len(own)] = np.arange(len(effects))[:, None] == np.array(list(asked))[None]
    return x, kinds, (share >= STRONG) & of_its_own


def together(gradient: np.ndarray, vectors: np.ndarray, x: np.ndarray, how: str) -> np.ndarray:
    """First orders [queries, sets] of units that stand in for each other, as `readout/groups.py` has it for rows."""
    gram = vectors @ vectors.T
    scale = CURVATURE * float(np.linalg.eigvalsh(gram)[-1])
    out = np.empty((len(gradient), len(x)))
    for number, row in enumerate(x.astype(bool)):
        own = gram[np.ix_(row, row)] / scale
        if how == "leverage":
            weights = 1 / (1 - np.minimum(np.diag(own), 0.95))
        else:
            values, axes = np.linalg.eigh(own)
            weights = axes @ ((axes.T @ np.ones(len(own))) / (1 - np.minimum(values, 0.95)))
        out[:, number] = gradient[:, row] @ weights
    return out


def posterior_with(data: Measurements, more: Retrainings) -> tuple[Posterior, Retrainings]:
    """The posterior with more retrainings, and all that it is fitted to."""
    both = Retrainings(np.concatenate([data.retrainings.x, more.x]), np.concatenate([data.retrainings.y, more.y]))
    return Posterior(
        Measurements(data.base, data.sizes, (), both, gradient=data.gradient, features=data.features)
    ), both


def case(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    units, seed = CASES[name]
    options = argparse.Namespace(names=args.names, seed=seed, units=units, n=args.n)
    s = accuracy.make_setting(options, work)
    run = s.run("bank")
    asked, count = accuracy._asked(s.queries), len(s.recipe.unit_names)
    base = run.bank.base(asked)[:, None]

    def retrained(x: np.ndarray) -> np.ndarray:
        return run.retrain(s.queries, DeletionSets(x, tuple(map(str, range(len(x)))))) - base

    single = retrained(np.eye(count))
    x, kinds, strong = strong_sets(s, single, args.most)
    actual = retrained(x)
    strong &= np.abs(actual) >= LEAST
    cut = halved(x, seed)
    halves = Retrainings(cut, retrained(cut).T)
    run.measure(gradient=True, queries=s.queries)
    run.measure_vectors()
    run.measure(retrain=RUNS, design="random", queries=s.queries, settings=MeasureSettings(check=False))
    data = run.bank.measurements(s.queries, features=None)
    gradient, features = data.gradient, data.features
    assert gradient is not None and features is not None
    steps = Steps(run, s.queries, work / "steps")
    nothing = Retrainings(np.zeros((0, count)), np.zeros((0, len(base))))
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        "exact first order": (gradient @ x.T, None),
        "over 1 - leverage": (together(gradient, features, x, "leverage"), None),
        "Woodbury": (together(gradient, features, x, "Woodbury"), None),
    }
    for label, more in (("posterior", nothing), ("posterior, halves", halves)):
        fitted, known = posterior_with(data, more)
        found[label] = predicted = fitted.predict(x)
        mending = mended(predicted, fitted.predict_unbent(x), x, np.ones_like(strong), known, steps)
        found[f"{label}, and steps"] = mending
    found["sum of halves"] = (np.stack([halves.y[2 * i : 2 * i + 2].sum(0) for i in range(len(x))], 1), None)
    return {
        "case": name, "sets": len(x), "pairs": int(strong.sum()), "share": STRONG, "steps": STEPS, "doubt": DOUBT,
        "seconds_of_a_set": steps.seconds / max(1, steps.made),
        "ways": [
            {"way": way, "halves": "halves" in way, **_facts(*found[way], actual, strong, np.array(kinds))} for way in found
        ],
    }  # fmt: skip


def _facts(
    mean: np.ndarray, std: np.ndarray | None, actual: np.ndarray, strong: np.ndarray, kinds: np.ndarray
) -> dict[str, Any]:
    """Actual over predicted of strong pairs by kind of set: median, and where 80 % of pairs lie; and coverage."""
    out: dict[str, Any] = {}
    for kind in dict.fromkeys(kinds.tolist()):
        chosen = strong & (kinds == kind)[None]
        if not chosen.any():
            continue
        ratio = actual[chosen] / mean[chosen]
        low, middle, high = np.quantile(ratio, (0.1, 0.5, 0.9)).tolist()
        inside = None if std is None else float((np.abs(actual - mean) <= 1.96 * std)[chosen].mean())
        out[kind] = {
            "pairs": int(chosen.sum()), "actual_over_predicted": middle, "low": low, "high": high, "inside": inside,
            "correlation": float(np.corrcoef(actual[chosen], mean[chosen])[0, 1]) if chosen.sum() > 2 else None,
        }  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--most", type=int, default=3, help="sets of the second kind, the largest first")
    parser.add_argument("--n", type=int, default=1000, help="documents, and steps")
    parser.add_argument("--work", type=Path, help="where banks and steps are kept; default: a temporary directory")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        cases = [case(name, args, (args.work or Path(temporary)) / name) for name in args.cases]
    result = {
        "question": (__doc__ or "").split("\n", 1)[0], "goals": GOALS, "chosen_on": "names42", "cases": cases,
        "cpu_seconds": time.process_time() - began, **provenance(42),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
