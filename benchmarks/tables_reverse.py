"""Tables of reverse mode in docs/how-to/big-models.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables_tasks import table

PAGE = "docs/how-to/big-models.md"
SETTINGS = {
    "names": "microgpt, 100 names, paper-adam",
    "digits, calm": "perceptron, 300 digits, SGD .05, momentum .5",
    "digits": "the same, SGD .2, momentum .9",
}
SCORES = ("exact first order", "AdamW-influence", "without curvature", "influence")


def reverse_scores(result: dict[str, Any]) -> str:
    """Agreement with retrainings; alone and as prior mean."""
    head = ["Spearman with retrainings: single / 5 % / 20 %", *SCORES]
    lines = []
    for name, label in SETTINGS.items():
        case = result["cases"][name]
        alone = [[kind[score] for kind in case["with_retrainings"].values()] for score in SCORES]
        believed = [case["as_prior_of_40_retrainings"][score].values() for score in SCORES]
        for what, found in ((label, alone), ("with 40 random retrainings, as prior mean", believed)):
            lines.append([what, *(" / ".join(f"{v:.2f}" for v in values) for values in found)])
        lines.append(["plain trainings that it took", *(f"{case['trainings'][score]:.1f}" for score in SCORES)])
    return table(head, lines)


def reverse_error(result: dict[str, Any]) -> str:
    """What is told of the first order's error, and what it was."""
    head = [
        "error of the first order, over the size of effects",
        "told: single / 5 % / 20 %",
        "found: single / 5 % / 20 %",
    ]

    def pair(found: dict[str, Any]) -> list[str]:
        return [" / ".join(f"{v:.2g}" for v in found[key].values()) for key in ("told", "error")]

    lines = [[label, *pair(result["cases"][name]["first_order_error"])] for name, label in SETTINGS.items()]
    rates = result["cases"]["rates"]
    for run in rates["runs"]:
        if run["epochs"] == 4:
            momentum = f", momentum {run['momentum']:g}" if run["momentum"] else ""
            lines.append([f"perceptron, 100 digits, {run['optimizer']} {run['lr']:g}{momentum}, 4 epochs", *pair(run)])
    spread = [" / ".join(f"{v:.2f}" for v in found) for found in rates["told_over_error"].values()]
    lines.append(
        [
            "told over found in all 27 runs on 100 digits: lowest tenth / median / highest, of single; 20 %",
            spread[0],
            spread[2],
        ]
    )
    ranks = list(rates["spearman_over_runs"].values())
    lines.append(["Spearman over these runs, of single; 20 %", f"{ranks[0]:.2f}", f"{ranks[2]:.2f}"])
    return table(head, lines)


def reverse_cost(result: dict[str, Any]) -> str:
    """Time and memory on SmolLM2; nothing before that case was run."""
    if (case := result["cases"].get("smollm2")) is None:
        return ""
    head = [
        f"SmolLM2-135M, LoRA, {case['rows']} rows of 128 tokens, 2 epochs, {case['queries']} queries",
        "exact",
        "AdamW-influence",
    ]
    both = [case[name] for name in ("metagradient", "adamw_influence")]
    lines = [
        [
            "plain trainings (set-up not counted)",
            *(f"{case['trainings'][name]:.1f}" for name in ("metagradient", "adamw_influence")),
        ],
        ["planned memory beside the model", *(f"{part['planned'] / 1e9:.2f} GB" for part in both)],
        ["largest resident memory, all told", *(f"{part['peak_bytes'] / 2**30:.2f} GiB" for part in both)],
        ["files while it works", *(f"{part['disk'] / 1e9:.2f} GB" for part in both)],
        ["Spearman with the exact first order, over rows", "", f"{case['spearman_with_exact']:.2f}"],
    ]
    return table(head, lines)


TABLES_OF_REVERSE: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "reverse_cost": (PAGE, "reverse_cost.json", reverse_cost),
    "reverse_scores": (PAGE, "reverse_cost.json", reverse_scores),
    "reverse_error": (PAGE, "reverse_cost.json", reverse_error),
}
