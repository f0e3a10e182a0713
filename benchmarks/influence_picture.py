"""Accuracy against bytes a row: LDS of the stored forms of each truth bank, from the result files of `influence`.

python benchmarks/influence_picture.py --picture docs/evidence/influence.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS

BANKS = ("stories", "neox", "qwen", "olmo")  # those with stored forms
FAMILIES = {
    "default": "o-",
    "head alone": "s-",
    "residual": "^-",
    "first default": "x",
    "paper-responses": "*",
}
FULL = {"bm25": ":", "gradient dot@final": "-.", "ek-fac@third": "--"}  # methods that store no rows, or all gradients


def families(forms: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Bytes and LDS of the forms by what they are forms of."""
    found: dict[str, list[tuple[int, float]]] = {}
    for form in forms:
        found.setdefault(form["form"].partition(",")[0], []).append((form["bytes"], form["lds"]["mean"]))
    return {kind: sorted(points) for kind, points in found.items()}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel a bank: forms as points, methods without rows as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), sharey=True, squeeze=False, figsize=(1 + 3.2 * len(results), 3.6))
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for kind, points in families(result["stored_forms"]).items():
            axis.plot(*zip(*points, strict=True), FAMILIES[kind], label=kind, markersize=4, linewidth=1)
        lds = {line["method"].replace(" blocks", ""): line["lds"] for line in result["lds"]}
        for method, style in FULL.items():
            axis.axhline(lds[method]["mean"], color="gray", linestyle=style, linewidth=1, label=method)
        axis.set(title=f"{name}, {result['bank']['optimizer']}", xscale="log", xlabel="bytes a row")
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("LDS")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args(argv)
    files = {name: args.results / f"readout_influence_{name}.json" for name in BANKS}
    draw({name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
