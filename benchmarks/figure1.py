"""Figure 1 of arXiv 2604.07328: how fast do the coefficients of a training run decay along random directions?

    python benchmarks/figure1.py --data NAMES.txt --json OUT [--picture OUT.png] [--directions 12] [--degree 100]

Draws sqrt(C(G + k - 1, k)) |theta_k| and the same for the loss of a query, k = 0 .. degree, with the roots-of-unity
engine. A circle must lie where the run is analytic: then |theta_k| radius^k falls to rounding at the highest degree that
the points resolve, else it stays flat and every coefficient is wrong. So each direction takes the first of --radii that
falls below TAIL; the first direction also takes the next one, and their disagreement is reported. The dotted line is
what is left at the highest degrees (rounding, and aliasing) at that radius: a coefficient near it is not known, and not
drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.deletion.directions import complex_uniform
from leaveout.training.doctor import growth_scale
from leaveout.training.recipe import Recipe
from provenance import provenance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from oracles import roots

TAIL = 1e-9
"""Size of the last eighth of the coefficients at the circle, relative to degree 0, that shows a circle to be too wide."""


@dataclass(frozen=True)
class Sizes:
    """Of one direction, at one radius: |theta_k| and |c_k|, each [degree + 1], and what is left of theta at the end."""

    theta: Tensor
    loss: Tensor
    radius: float
    left: float  # |theta_k| radius^k

    @property
    def analytic(self) -> bool:
        return self.left < TAIL * float(self.theta[0])


def sizes(recipe: Recipe, psi: Tensor, radius: float, degree: int, query: str) -> Sizes:
    points = 1 << (degree + 1).bit_length()
    params, losses = roots.train_recipe(recipe, psi, roots.Circle(points, radius), [query])
    theta = torch.cat([roots.coefficients(p, radius, points - 1).flatten(1) for p in params.values()], 1)
    norm = theta.abs().square().sum(1).sqrt()
    at_circle = norm * radius ** torch.arange(points, dtype=torch.float64)
    loss = roots.coefficients(losses, radius, degree)[:, 0].abs()
    return Sizes(norm[: degree + 1], loss, radius, float(at_circle[-points // 8 :].max()))


def measure(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    degrees = torch.arange(args.degree + 1, dtype=torch.float64)
    scale = torch.tensor([growth_scale(1000, k) for k in range(args.degree + 1)], dtype=torch.float64)
    rows: dict[str, list[Any]] = {k: [] for k in ("theta", "loss", "floor", "radius", "left", "cpu_seconds")}
    rows["disagreement"] = []
    partial = args.json.with_suffix(".partial")
    if partial.exists():  # a killed run goes on; delete the file after changing an option
        rows = json.loads(partial.read_text())
    todo = torch.from_numpy(complex_uniform(len(rows["theta"]), args.directions, 1000, args.seed))
    for psi in tqdm(todo, desc="directions", file=sys.stderr):
        start, good = time.process_time(), []
        for radius in sorted(args.radii, reverse=True):
            found = sizes(recipe, psi, radius, args.degree, args.query)
            good += [found] if found.analytic else []
            if len(good) == (1 if rows["theta"] else 2):
                break
        if not good:
            sys.exit(f"direction {len(rows['theta'])}: no circle is narrow enough; give smaller --radii")
        if len(good) == 2:
            rows["disagreement"] = ((good[0].theta - good[1].theta).abs() / good[0].theta).tolist()
        best = good[0]
        rows["theta"].append((best.theta * scale).tolist())
        rows["loss"].append((best.loss * scale).tolist())
        rows["floor"].append((best.left * best.radius**-degrees * scale).tolist())
        rows["radius"].append(best.radius)
        rows["left"].append(best.left)
        rows["cpu_seconds"].append(time.process_time() - start)
        partial.write_text(json.dumps(rows))
    return rows


def known_to(rows: dict[str, Any]) -> list[int]:
    """The highest degree of each direction that stands twice above what is left at the end."""
    pairs = zip(rows["theta"], rows["floor"], strict=True)
    return [max(k for k, (size, left) in enumerate(zip(*pair, strict=True)) if size > 2 * left) for pair in pairs]


def draw(rows: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for panel, key, label in zip(axes, ("theta", "loss"), ("parameters", "loss of a query"), strict=True):
        for row, end in zip(rows[key], known_to(rows), strict=True):
            panel.semilogy(row[: end + 1], linewidth=0.8)
        if key == "theta":
            panel.semilogy(rows["floor"][0], "k:", linewidth=0.8)
        panel.set(xlabel="degree k", title=label)
    axes[0].set_ylabel("size of the degree-k part")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file with one name a line")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--directions", type=int, default=12)
    parser.add_argument("--degree", type=int, default=100)
    parser.add_argument("--radii", type=float, nargs="+", default=[10.0, 9.0, 8.0, 7.0])
    parser.add_argument("--query", default="max")
    parser.add_argument("--steps", type=int, help="a shorter run, to try things out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe = Recipe.microgpt(args.data.read_text().split(), n=1000, dtype="float64").with_(steps=args.steps)
    rows = measure(recipe, args)
    args.json.with_suffix(".partial").unlink()
    result = {
        "degree": args.degree, "radii": args.radii, "query": args.query, "units": 1000, **rows, "known_to": known_to(rows),
        "recipe": recipe.hash(), **provenance(args.seed),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.picture:
        draw(rows, args.picture)
    last = [row[end] for row, end in zip(rows["theta"], result["known_to"], strict=True)]
    seconds = sum(rows["cpu_seconds"])
    known = result["known_to"]
    print(
        f"{seconds:.0f} CPU seconds; known to degrees {min(known)} to {max(known)}, {min(last):.3g} to {max(last):.3g}"
    )
    if not all(math.isfinite(x) for x in last):
        print("a coefficient is not finite: use a smaller radius", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
