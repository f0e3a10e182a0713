"""Do signatures of the readout index tell the posterior which rows act alike?

    python benchmarks/influence_priors.py --bank stories --work WORK
    python benchmarks/influence_priors.py --smoke

The training runs of `influence.py`, and its retrainings on random halves (with the same --work they are read, not made
again). In four folds, the posterior is fitted to some of the other halves and predicts those of its fold; the LDS of a
prior is the rank correlation over all halves of predictions and mean values of two data orders, per query. All priors
see the same retrainings of one order, and how much orders differ. A prior is a similarity of rows (none, update vectors,
signatures), a mean (scores), or both; update vectors with their influence scores are what a bank uses by itself.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_banks import BANKS
from leaveout.deletion import directions
from leaveout.deletion.estimators import Datamodels
from leaveout.deletion.measurements import Measurements, Retrainings
from leaveout.deletion.posterior import Posterior
from leaveout.deletion.run import TrainingRun
from leaveout.evaluation.truth import Truth, second_order, subset_truth, values_without
from leaveout.methods.scorer import Scorer
from leaveout.methods.signatures import signature_scores
from leaveout.metrics import bootstrap_interval, difference_interval, lds, spearman
from leaveout.training.queries import Query
from measuring import RESULTS, arguments, write_result

FOLDS = 4
IDENTITY = "identity"
AT = "third"


def similarity(run: TrainingRun, preset: str) -> np.ndarray:
    """Features [row, row] whose products are those of the rows' stored signatures."""
    products = signature_scores(Scorer(run, [Query(row) for row in run.recipe.examples]), AT, preset)
    sizes, vectors = np.linalg.eigh((products + products.T) / 2)
    return vectors * np.sqrt(np.maximum(sizes, 0))


def priors(run: TrainingRun, asked: list[Query]) -> dict[str, dict[str, np.ndarray | None]]:
    """Fields of the measurements that make each prior."""
    run.measure_vectors()
    updates, scorer = run.bank.features(), Scorer(run, asked)
    presets = ("default", "residual")
    like = {preset: similarity(run, preset) for preset in presets}
    scores = {preset: signature_scores(scorer, AT, preset) for preset in presets}
    none = {"features": None, "scores": None}
    own = run.bank.measurements(asked).scores
    made = {
        IDENTITY: none, "update vectors": none | {"features": updates},
        "update vectors, influence scores as mean": {"features": updates, "scores": own},
    }  # fmt: skip
    for preset in presets:
        made[f"{preset} signatures"] = none | {"features": like[preset]}
        made[f"{preset} scores as mean"] = none | {"scores": scores[preset]}
        made[f"{preset} signatures, its scores as mean"] = {"features": like[preset], "scores": scores[preset]}
    return made


def predicted(known: Measurements, x: np.ndarray, fitted: int, estimator: Any, seed: int) -> np.ndarray:
    """Effects [query, set] of every set, from `fitted` sets of other folds."""
    order = np.random.default_rng(seed).permutation(len(x))
    out, y = np.zeros((len(known.base), len(x))), known.retrainings.y
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = np.setdiff1d(order, held, assume_unique=True)[:fitted]
        out[:, held] = estimator(replace(known, retrainings=Retrainings(x[rest], y[rest]))).predict(x[held])[0]
    return out


def measured(args: Any, name: str, work: Path) -> dict[str, Any]:
    bank = BANKS[name](work, tuple(args.sizes), args.seed)
    run = TrainingRun.train(bank.recipe, work / f"run-{name}")
    asked = [Query(q, name=q.id) for q in bank.queries]
    second = second_order(run)
    truth: Truth = subset_truth(run, asked, args.subsets, second=second, seed=args.seed)
    x = directions.subsets(0, args.subsets, len(bank.recipe.unit_names), args.seed)
    base = run.bank.base(asked)
    y = (values_without(run, asked, x) - base[:, None]).T
    other = (values_without(second, asked, x) - second.bank.base(asked)[:, None]).T
    noise = (y - other).std(0) / np.sqrt(2)  # of one order against another
    known = Measurements(base, run.bank.sizes, retrainings=Retrainings(x, y), noise=noise)
    began = time.process_time()
    made = priors(run, asked)
    seconds = time.process_time() - began
    found: dict[str, Any] = {}
    for fitted in sorted({args.subsets // 4, args.subsets // 2, args.subsets * 3 // 4}):
        by_query = {
            prior: spearman(predicted(replace(known, **fields), x, fitted, Posterior, args.seed), truth.values)
            for prior, fields in made.items()
        }
        by_query["datamodels"] = spearman(predicted(known, x, fitted, Datamodels, args.seed), truth.values)
        for prior, fields in made.items():
            if prior.endswith("scores as mean") and fields["scores"] is not None and "," not in prior:
                by_query[f"{prior.removesuffix(' as mean')} alone"] = lds(fields["scores"], truth.removed, truth.values)
        found[str(fitted)] = {
            prior: {
                "lds": bootstrap_interval(values, args.seed)._asdict(),
                "minus_identity": difference_interval(values, by_query[IDENTITY], args.seed)._asdict(),
            }
            for prior, values in by_query.items()
        }
        print(fitted, {p: round(float(np.nanmean(v)), 3) for p, v in by_query.items()}, file=sys.stderr, flush=True)
    assert truth.ceiling is not None
    return {
        "question": (__doc__ or "").split("\n", 1)[0], "bank": name, "rows": len(bank.recipe.examples),
        "repeats": len(asked), "subsets": args.subsets, "folds": FOLDS, "at": AT,
        "ceiling": truth.ceiling.ceiling._asdict(), "by_retrainings": found, "prior_cpu_seconds": seconds,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bank", choices=("stories", "neox"), default="stories")
    parser.add_argument("--json", type=Path, help="the result file; default: by the bank, in --out")
    parser.add_argument("--work", type=Path, help="the working directory of influence.py; default: a temporary one")
    parser.add_argument("--sizes", type=int, nargs=2, default=(20, 3), help="rows and queries of each group")
    parser.add_argument("--subsets", type=int, default=64)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        name, work = ("smoke" if args.smoke else args.bank), args.work or Path(scratch)
        if args.smoke:
            args.sizes, args.subsets = (8, 2), 16
        result = measured(args, name, work)
    out = args.json or (args.out or RESULTS) / f"readout_priors_{args.bank}.json"
    print(write_result(out.parent, out.name, result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
