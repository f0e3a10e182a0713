"""Tables of docs/how-to/connect-to-trainer.md: a recipe beside the trainers, and recorded runs replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables_tasks import table

LINES = [  # what, the Trainer, the SFTTrainer, the recipe, what of the benchmark leaves it out
    ("loss of a step", "mean over the tokens of all its micro-batches", "the same", "`loss_per: token`", "loss per example"),
    (
        "the same, of a model without a loss type (GPT-2)", "divided by one a row more", "the same",
        "`loss_per: [112, 98]`", "loss per token of the step",
    ),
    (
        "the same, of a model that takes no loss arguments", "mean of the micro-batches' means", "the same",
        "`loss_per: micro-batch`", "mean of micro-batches",
    ),
    ("order", "drawn anew each epoch from `seed`", "the same", "`order:` the micro-batches", "rows in the data's order"),
    ("last batch", "kept", "kept", "kept", "last batch of an epoch dropped"),
    ("warm-up", "begins with rate 0", "the same", "`warmup_from_zero: true`", "warm-up that starts above 0"),
    ("weight decay", "spares biases and norms", "the same", "`undecayed: vectors`", "decay of biases and norms"),
    ("clipping", "norm 1, by default", "the same", "`clip_norm: 1.0`", "no clipping"),
    ("dropout", "the model's own", "and the adapter's", "`dropout: SEED`, recorded", "no dropout"),
    ("dropout, masks of another seed", "", "", "", "dropout of another seed"),
    (
        "label smoothing", "off, by default", "the same", "`label_smoothing: 0.1`", "label smoothing .1 recorded, left out",
    ),
    ("precision", "float32; bf16=True", "bf16 by default", "`autocast: bfloat16`", "bfloat16 recorded, replayed in float32"),
    ("precision, said by the recipe", "", "", "", "bfloat16 recorded, replayed in bfloat16"),
    ("packing", "none", "packing=True", "`packed: true`", None),
    ("another seed of the Trainer", "", "", "", "another seed of the Trainer"),
]  # fmt: skip


def trainer_lines(result: dict[str, Any]) -> str:
    found = result["cases"]["settings"]
    head = ["", "transformers.Trainer", "trl's SFTTrainer", "a causal-lm recipe", "left out, apart by"]
    return table(head, [[*line, "" if key is None else f"{found[key]:.2g}"] for *line, key in LINES])


def recorded(result: dict[str, Any]) -> str:
    names = {
        "gpt2": "Trainer, tiny GPT-2, full training", "gpt2-sft": "SFTTrainer, tiny GPT-2, full training",
        "smollm2": "Trainer, SmolLM2-135M, LoRA", "smollm2-sft": "SFTTrainer, SmolLM2-135M, LoRA",
    }  # fmt: skip
    head = [
        "`benchmarks/recorded_runs.py`, one core", "rows", "steps", "trained parameters", "apart, of the whole movement",
        "beside it, where gradients are zero but for rounding", "CPU s: recorded / replayed",
    ]  # fmt: skip
    lines = [
        [
            label, str(case["rows"]), str(case["steps"]), f"{case['trained_parameters']:,}", f"{case['distance']:.1g}",
            f"{case['noise']:.1g}", f"{case['recorded_cpu_seconds']:.1f} / {case['replayed_cpu_seconds']:.1f}",
        ]
        for name, label in names.items()
        if (case := result["cases"].get(name))
    ]  # fmt: skip
    return table(head, lines)


PAGE = "docs/how-to/connect-to-trainer.md"
TABLES_OF_TRAINER: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "trainer_lines": (PAGE, "recorded_runs.json", trainer_lines),
    "recorded": (PAGE, "recorded_runs.json", recorded),
}
