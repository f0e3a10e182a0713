"""How long does a truth bank take: retrainings of a small language model on random halves of its rows?

    python benchmarks/truth_bank.py              # 100 halves of 300 rows, two workers; goal: 25 minutes
    python benchmarks/truth_bank.py --smoke

The bank is that of `influence.py --bank stories` with 50 rows of each of six public groups: the Llama of 260,032
parameters, AdamW, three epochs in batches of 16. Each half is retrained once; a second order, which tells the noise, is
as much again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from influence_banks import smoke_bank, stories_bank
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.evaluation.truth import subset_truth
from leaveout.training.queries import Query
from measuring import arguments, write_result

GOAL_MINUTES = 25
GROUPS = ("wiki", "story", "finance", "medical", "headline", "short")


def measured(args: Any, work: Path) -> dict[str, Any]:
    """Wall and CPU seconds of the retrainings, the model's own training left out."""
    bank = smoke_bank(work, (8, 2), args.seed) if args.smoke else stories_bank(work, (50, 5), args.seed, GROUPS)
    run = TrainingRun.train(bank.recipe, work / "run")
    asked = [Query(row, name=row.id) for row in bank.queries]
    before, began = run.bank.info()["cpu_seconds"], time.perf_counter()
    truth = subset_truth(run, asked, args.subsets, seed=args.seed, settings=MeasureSettings(workers=args.workers))
    minutes = (time.perf_counter() - began) / 60
    return {
        "question": (__doc__ or "").split("\n", 1)[0],
        "rows": len(bank.recipe.examples),
        "groups": len(bank.groups),
        "queries": len(asked),
        "steps": len(bank.recipe.batches()),
        "halves": len(truth.removed),
        "workers": args.workers,
        "repeats": 1,
        "minutes": minutes,
        "cpu_seconds": run.bank.info()["cpu_seconds"] - before,
        "deviation_of_query_losses": float(truth.values.std(1).mean()),
        "goal_minutes": GOAL_MINUTES,
        "reached": minutes <= GOAL_MINUTES,
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.smoke:
        args.subsets, args.workers = 3, 1
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(args, Path(scratch))
    print(f"{result['halves']} halves: {result['minutes']:.1f} minutes, {result['cpu_seconds']:.0f} CPU s")
    print(write_result(args.out, "truth_bank.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
