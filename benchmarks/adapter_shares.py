"""What do queries save that share the frozen blocks below, and retrainings with dropout that leave out the rows they lost?

    python benchmarks/adapter_shares.py [--repeats 5] [--smoke]

The Llama of 260,000 parameters with LoRA (r 4, dropout .1) on queries and values of the last of its five layers, 48 rows of
at most 64 tokens, 3 epochs, 16 queries, one run at a time. Ratios of CPU seconds in the same process, in turn, and how far the
numbers of both ways are apart.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

import leaveout as lo
from corpora import data
from coverage_cases import letters, short, sources
from leaveout.deletion.directions import random_sets
from leaveout.training.queries import as_queries, query_function, query_losses
from leaveout.training.train import Retrainer
from measuring import arguments, interleaved, made_rows, ratio, spread, write_result

NAME, LAYERS, GONE = "adapter_shares.json", 5, 0.5


def setting(args: Namespace) -> tuple[lo.Recipe, list[str]]:
    """The recipe, and its queries."""
    rows, asked = (8, 3) if args.smoke else (48, 16)
    if args.smoke:
        texts = [f"{row['instruction']} {row['output']}" for row in made_rows(rows + asked, args.seed)]
    else:
        texts = [text for found in sources().values() for text in short(found, 12, args.seed, 200)][: rows + asked]
    last = 1 if args.smoke else LAYERS - 1
    targets = [f"layers.{last}.self_attn.{name}" for name in ("q_proj", "v_proj")]
    recipe = lo.Recipe(
        "causal-lm", tuple(texts[:rows]), model=letters if args.smoke else str(data("stories260K")), max_tokens=64,
        trained={"lora": {"r": 4, "alpha": 8, "targets": targets, "dropout": 0.1}}, batch_size=8, epochs=3,
        order="shuffled", dropout=1, optimizer=lo.OptimizerSettings("adamw", 5e-3, eps=1e-4), seed=args.seed,
    )  # fmt: skip
    return recipe, texts[rows:]


def facts(args: Namespace) -> dict[str, Any]:
    recipe, texts = setting(args)
    units = len(recipe.unit_names)
    weights = 1 - torch.from_numpy(random_sets(0, 1, units, args.seed, (int(GONE * units),)))
    shared, whole = Retrainer(recipe), Retrainer(recipe)
    assert shared.below is not None and whole.below is not None and shared.separate
    whole.separate = False  # type: ignore[misc]
    task = shared.task
    ways = {"shared": shared.below.asking, "apart": None}
    asking = {name: query_function(task, as_queries(texts), way) for name, way in ways.items()}
    trained: dict[str, Any] = {}

    def train(name: str, retrainer: Retrainer) -> None:
        trained[name] = retrainer.train(weights)

    train("left out", shared)
    train("in the batch", whole)
    run = trained["left out"]
    values = {name: query_losses(recipe, run, ask, task=task) for name, ask in asking.items()}
    others = query_losses(recipe, trained["in the batch"], asking["apart"], task=task)
    took = interleaved(
        {
            "left out": lambda: train("left out", shared),
            "in the batch": lambda: train("in the batch", whole),
            **{name: lambda ask=ask: query_losses(recipe, run, ask, task=task) for name, ask in asking.items()},
        },
        args.repeats,
    )
    return {
        "rows": units, "rows_left_out": float(1 - weights.mean()), "queries": len(texts),
        "queries_shared_over_apart": ratio(took["shared"], took["apart"]),
        "queries_equal": bool(torch.equal(values["shared"], values["apart"])),
        "rows_left_out_over_in_the_batch": ratio(took["left out"], took["in the batch"]),
        "difference_in_nats": float((values["apart"] - others).abs().max()),
        "cpu_seconds": {name: spread(times) for name, times in took.items()},
    }  # fmt: skip


def main(given: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    result = {"question": (__doc__ or "").split("\n", 1)[0], "repeats": args.repeats, **facts(args)}
    print(write_result(args.out, NAME, result, args).read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
