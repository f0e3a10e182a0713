"""How long do 1,000 leave-one-out retrainings of microgpt take when many weightings train as one batch?

    python benchmarks/loo_retraining.py --data NAMES.txt [--runs 1000] [--json OUT]

Each run leaves one of the 1,000 documents out (weight 0) and takes 1,000 steps in float32. Checked against ordinary
single runs. Goal: 90 CPU seconds in all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from leaveout.training.loop import RunOptions
from leaveout.training.queries import query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.train import train_batch, train_plain
from provenance import provenance

QUERIES = ["max", "zoe", "emma"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--together", type=int, default=250, help="runs that share each step")
    parser.add_argument("--n", type=int, default=1000, help="documents, and steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe = Recipe.microgpt(args.data.read_text().split(), n=args.n)
    weights = torch.ones(args.runs, args.n)
    weights[torch.arange(args.runs), torch.arange(args.runs) % args.n] = 0.0
    start = time.process_time()
    trained = train_batch(recipe, weights, RunOptions(progress=True), args.together)
    seconds = time.process_time() - start
    losses = query_losses(recipe, trained, QUERIES)
    start = time.process_time()
    checked = [0, args.runs // 2]
    single = torch.stack([query_losses(recipe, train_plain(recipe, weights[i]), QUERIES) for i in checked])
    plain_seconds = (time.process_time() - start) / len(checked)
    base = query_losses(recipe, train_plain(recipe), QUERIES)
    result = {
        "runs": args.runs, "steps": args.n, "together": args.together, "dtype": recipe.dtype, "cpu_seconds": seconds,
        "us_per_step_per_run": seconds / args.runs / args.n * 1e6, "plain_cpu_seconds_per_run": plain_seconds,
        "largest_difference_from_single_runs": float((losses[checked] - single).abs().max()),
        "effect_deviation": (losses - base).std(0).tolist(), "queries": QUERIES, "recipe": recipe.hash(),
        **provenance(recipe.seed),
    }  # fmt: skip
    print(f"{args.runs} runs: {seconds:.1f} CPU seconds; one plain run: {plain_seconds:.2f}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
