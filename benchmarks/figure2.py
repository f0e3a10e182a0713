"""Figure 2 of arXiv 2604.07328: does the series along one deletion set converge to the really retrained model?

    python benchmarks/figure2.py --data NAMES.txt --json OUT [--picture OUT.png]

Deletes the documents with an 'x' among the first 1,000 (18 of them), and asks for the loss of the query 'max'.
`PUBLISHED` holds the numbers that the paper's reference code gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leaveout.training.loop import RunOptions
from leaveout.training.queries import query_losses
from leaveout.training.recipe import Recipe
from leaveout.training.train import JetSettings, train_jets, train_plain
from provenance import provenance

DEGREE = 6
PUBLISHED = {
    "f_0": 3.09132388, "f_without": 3.57676026,
    "series": [0.25965845, 0.11163513, 0.0679756, 0.03205921, 0.01356983, 0.00655163],
}  # fmt: skip
"""By the reference code of the paper, in nats per token."""


def measure(names: list[str], query: str, letter: str, n: int) -> dict[str, Any]:
    """Series and truths of the deletion, in nats per token of the query."""
    recipe = Recipe.microgpt(names, n=n, dtype="float64")
    deleted = torch.tensor([[float(letter in row.text) for row in recipe.examples]], dtype=torch.float64)
    start = time.process_time()
    run = train_jets(recipe, deleted, JetSettings(DEGREE, torch.float64), [query], RunOptions(progress=True))
    seconds = time.process_time() - start
    assert run.losses is not None
    before = query_losses(recipe, train_plain(recipe), [query]).item()
    after = query_losses(recipe, train_plain(recipe, 1 - deleted[0]), [query]).item()
    series = run.losses.h[:, 0, 0].tolist()
    sums = [before + sum(series[: k + 1]) for k in range(DEGREE)]
    return {
        "query": query, "letter": letter, "n_deleted": int(deleted.sum()), "f_0": before, "f_without": after,
        "series": series, "errors": [abs(after - s) for s in sums], "cpu_seconds": seconds, "recipe": recipe.hash(),
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sums = [result["f_0"]]
    for term in result["series"]:
        sums.append(sums[-1] + term)
    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    axes.plot(range(len(sums)), sums, "o-", label="series up to this degree")
    axes.axhline(result["f_without"], color="black", linestyle="--", label="retrained without the documents")
    axes.set(xlabel="degree", ylabel=f"loss of '{result['query']}' (nats per token)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--n", type=int, default=1000, help="documents, and steps; 1000 is the paper's")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = measure(args.data.read_text().split(), "max", "x", args.n)
    pairs = zip([result["f_0"], result["f_without"], *result["series"]],
                [PUBLISHED["f_0"], PUBLISHED["f_without"], *PUBLISHED["series"]], strict=True)  # fmt: skip
    result["largest_difference_from_published"] = max(abs(a - b) for a, b in pairs)
    args.json.write_text(json.dumps({**result, **provenance(42)}, indent=1) + "\n")
    if args.picture:
        draw(result, args.picture)
    print(f"{result['f_0']:.8f} -> {result['f_without']:.8f}")
    for k, (term, error) in enumerate(zip(result["series"], result["errors"], strict=True), 1):
        print(f"degree {k}: term {term:.8f}, error of the sum {error:.5f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
