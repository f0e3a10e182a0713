"""What do retrainings of adapters cost that share the frozen model below them?

    python benchmarks/adapter_retrainings.py --case all|last [--runs 32] [--rows 48] [--epochs 2] [--smoke]

SmolLM2-135M with LoRA (r 8) on all linear layers, of every block or of the last quarter of them, on rows of 128 tokens in
steps of four. A retraining leaves out 1 to 12 of 48 rows. CPU seconds of one thread, in plain trainings of the same recipe.
Each retraining is kept as it is done, in PARTS beside the result: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import leaveout as lo
from leaveout.deletion.directions import random_sets
from leaveout.deletion.measurements import RUNS_TOGETHER
from leaveout.training.loop import RunOptions
from leaveout.training.memory import runs_together
from leaveout.training.train import Retrainer, train_plain
from measuring import alpaca, arguments, made_rows, smollm2, tiny, write_result

NAME, PARTS = "adapter_retrainings.json", "adapter_retrainings_parts.json"
TOKENS, SIZES = 128, (1, 2, 4, 12)
LAYERS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def recipe_of(case: str, args: Namespace) -> lo.Recipe:
    """A recipe whose rows all have so many tokens, but in smoke runs."""
    start = tiny(args.seed) if args.smoke else smollm2()
    start.lm.is_quantized = start.lm.hf_quantizer = None  # the file's numbers were unpacked at load
    blocks = start.lm.config.num_hidden_layers
    first = 0 if case == "all" else blocks - math.ceil(blocks / 4)
    targets = [f"layers.{i}.{part}.{t}" for i in range(first, blocks) for part, names in LAYERS.items() for t in names]
    rows = made_rows(args.rows, args.seed) if args.smoke else alpaca(args.seed)
    texts = [f"{row['instruction']}\n{row['output']}" for row in rows]
    if not args.smoke:
        texts = [text for text in texts if len(start.tokenizer(text).input_ids) >= TOKENS]
    return lo.Recipe(
        "causal-lm", tuple(texts[: args.rows]), model=(start.lm, start.tokenizer), max_tokens=TOKENS, batch_size=4,
        trained={"lora": {"r": 8, "alpha": 16, "targets": targets}}, epochs=args.epochs, order="shuffled",
        optimizer=lo.OptimizerSettings("adamw", 2e-4), clip_norm=1.0,
    )  # fmt: skip


class Parts:
    """What was measured already, by name, in a file."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.all = path, json.loads(path.read_text()) if path.exists() else {}
        self.own: dict[str, Any] = self.all.setdefault(key, {})

    def put(self, name: str, value: Any) -> None:
        self.own[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.all))


def case_of(case: str, args: Namespace) -> dict[str, Any]:
    """One case: a plain training, then the retrainings, each kept."""
    recipe = recipe_of(case, args)
    parts = Parts(args.out / PARTS, f"{case} {args.rows} {args.epochs} {args.seed} {args.smoke}")
    weights = 1 - torch.from_numpy(
        random_sets(0, args.runs, args.rows, args.seed, tuple(min(s, args.rows // 2) for s in SIZES))
    )
    if "plain" not in parts.own:
        took, found = seconds(lambda: train_plain(recipe, weights[0].float()))
        parts.put("plain", took)
        if args.check:
            parts.put("distance", distance(recipe, found, weights))
    done: list[float] = parts.own.setdefault(f"runs {args.together}", [])
    if len(done) < args.runs:
        started, retrainer = seconds(lambda: Retrainer(recipe))
        absent = float(1 - weights.mean())
        together = args.together or runs_together(recipe, retrainer.task, RUNS_TOGETHER, absent=absent)
        while len(done) < args.runs:
            some = weights[len(done) : len(done) + together]
            took, _ = seconds(lambda some=some: retrainer.train(some, RunOptions(), together))
            # A start is counted once, and what each process computes anew of the lower blocks each time.
            done += [(took + started) / len(some)] * len(some)
            started = 0.0
            parts.put(f"runs {args.together}", done)
            print(f"{len(done)} retrainings: {sum(done) / parts.own['plain']:.2f} trainings", flush=True)
    runs = done[: args.runs]
    return {
        "together": args.together or "as measure does", "rows": args.rows, "epochs": args.epochs, "retrainings": args.runs,
        "rows_left_out": float(1 - weights.mean()), "plain_cpu_seconds": parts.own["plain"],
        "cost_in_trainings": sum(runs) / parts.own["plain"], "first_in_trainings": runs[0] / parts.own["plain"],
        "distance": parts.own.get("distance"),
    }  # fmt: skip


def distance(recipe: lo.Recipe, plain: dict[str, torch.Tensor], weights: torch.Tensor) -> float:
    """Of the first retraining from a plain training with its weights, as a part of the whole movement."""
    retrainer = Retrainer(recipe)
    start = {name: p.detach() for name, p in retrainer.task.parameters().items()}
    found = {name: p[0] for name, p in retrainer.train(weights[:1]).items()}
    one, other, base = (nn.utils.parameters_to_vector([p[name] for name in start]) for p in (found, plain, start))
    return float((one - other).norm() / (other - base).norm())


def seconds(task: Any) -> tuple[float, Any]:
    """CPU seconds of a task, and what it gives."""
    began = time.process_time()
    found = task()
    return time.process_time() - began, found


def main(given: list[str] | None = None) -> int:
    """Runs one case, and adds it to the result file."""
    parser = arguments(__doc__)
    parser.add_argument("--case", choices=("all", "last"), required=True)
    parser.add_argument("--runs", type=int, default=32)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--together", type=int, default=0, help="retrainings that share steps; 0: as measure does")
    parser.add_argument("--check", action="store_true", help="compare the first retraining with a plain one")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    path = args.out / NAME
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases[args.case] = case_of(args.case, args)
    print(json.dumps(cases[args.case], indent=1))
    write_result(args.out, NAME, {"cases": cases}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
