"""Figure 1 of arXiv 2604.07328: how fast do the coefficients of a training run decay along random directions?

    python benchmarks/figure1.py --data NAMES.txt --json OUT [--picture OUT.png] [--directions 12] [--degree 100]

Draws sqrt(C(G + k - 1, k)) |theta_k| and the same for the loss of a query, k = 0 .. degree, with the roots-of-unity
engine. Two radii give the same coefficients by different runs; their disagreement on the first direction is reported.
A coefficient near `rounding_floor` (dotted) is rounding, not the run: it needs a larger radius.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.deletion.directions import complex_uniform
from leaveout.jets import roots
from leaveout.training.complex_copies import train_roots
from leaveout.training.provenance import provenance
from leaveout.training.recipe import Recipe
from leaveout.training.stability import growth_scale


def coefficients(recipe: Recipe, psi: Tensor, radius: float, degree: int, query: str) -> tuple[Tensor, Tensor]:
    """|theta_k| and |c_k|, each [degree + 1]."""
    points = 1 << (degree + 1).bit_length()
    params, losses = train_roots(recipe, psi, roots.Circle(points, radius), [query])
    theta = torch.cat([roots.coefficients(p, radius, degree).flatten(1) for p in params.values()], 1)
    return theta.abs().square().sum(1).sqrt(), roots.coefficients(losses, radius, degree)[:, 0].abs()


def measure(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    scale = torch.tensor([growth_scale(1000, k) for k in range(args.degree + 1)], dtype=torch.float64)
    rows: dict[str, list[Any]] = {"theta": [], "loss": [], "disagreement": [], "rounding_floor": []}
    partial = args.json.with_suffix(".partial")
    if partial.exists():  # a killed run goes on; delete the file after changing an option
        rows = json.loads(partial.read_text())
    todo = torch.from_numpy(complex_uniform(len(rows["theta"]), args.directions, 1000, args.seed))
    for psi in tqdm(todo, desc="directions", file=sys.stderr):
        radii = args.radii if not rows["theta"] else args.radii[-1:]
        found = [coefficients(recipe, psi, radius, args.degree, args.query) for radius in radii]
        theta, loss = found[-1]
        rows["theta"].append((theta * scale).tolist())
        shrinking = args.radii[-1] ** -torch.arange(args.degree + 1, dtype=torch.float64)
        rows["rounding_floor"].append((torch.finfo(torch.float64).eps * theta[0] * shrinking * scale).tolist())
        rows["loss"].append((loss * scale).tolist())
        if len(found) > 1:
            rows["disagreement"].append(((found[0][0] - theta).abs() / theta).tolist())
        partial.write_text(json.dumps(rows))
    return rows


def draw(rows: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for panel, key, label in zip(axes, ("theta", "loss"), ("parameters", "loss of a query"), strict=True):
        for row in rows[key]:
            panel.semilogy(row, linewidth=0.8)
        if key == "theta":
            panel.semilogy(rows["rounding_floor"][0], "k:", linewidth=0.8)
        panel.set(xlabel="degree k", title=label)
    axes[0].set_ylabel("size of the degree-k part")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--directions", type=int, default=12)
    parser.add_argument("--degree", type=int, default=100)
    parser.add_argument("--radii", type=float, nargs="+", default=[8.0])
    parser.add_argument("--query", default="max")
    parser.add_argument("--steps", type=int, help="a shorter run, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.microgpt(args.data.read_text().split(), n=1000, dtype="float64").with_(steps=args.steps)
    start = time.process_time()
    rows = measure(recipe, args)
    args.json.with_suffix(".partial").unlink()
    seconds = time.process_time() - start
    result = {
        "degree": args.degree, "radii": args.radii, "query": args.query, "units": 1000, **rows, "cpu_seconds": seconds,
        "recipe": recipe.hash(), **provenance(args.seed),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(rows, args.picture)
    last = [row[-1] for row in rows["theta"]]
    print(f"{seconds:.0f} CPU seconds; degree {args.degree}: {min(last):.3g} to {max(last):.3g} of the start's scale")
    if not all(math.isfinite(x) for x in last):
        sys.exit("a coefficient is not finite: use a smaller radius")


if __name__ == "__main__":
    main()
