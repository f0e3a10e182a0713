"""What does attention cost where it is taken apart, against transformers' own eager form, and what a plain run saves without?

    python benchmarks/attention_forms.py [--smoke]

stories260K on stories, two steps of 4 rows. Both forms are timed in turn (CPU seconds, the median), and the most bytes of
tensors that live at a time are counted. Every figure is that of sdpa over that of eager.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import leaveout as lo
from corpora import data, read_json
from leaveout.training.memory import LiveBytes
from leaveout.training.reverse.metagradient import ReverseSettings, metagradient
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from measuring import arguments, made_rows, tiny, write_result

NAME = "attention_forms.json"
ROWS, RUNS, DIRECTIONS, REPEATS = 8, 8, 4, 3


def engines(recipe: lo.Recipe) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    units = len(recipe.unit_names)
    weights = 1 - torch.eye(units)[torch.arange(RUNS) % units]
    settings, query = JetSettings(1, torch.float32), [recipe.examples[0]]
    return {
        "plain": lambda: train_plain(recipe),
        "retrainings": lambda: train_batch(recipe, weights),
        "jets": lambda: train_jets(recipe, torch.eye(units)[:DIRECTIONS], settings, query),
        "reverse": lambda: metagradient(recipe.first_steps(1), query, settings=ReverseSettings(ROWS // 2, False)),
    }


def recipe_of(kind: str, tokens: int, small: bool) -> lo.Recipe:
    """Two steps of the model with a form of attention."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if small:
        lm, tokenizer = tiny(0).lm, tiny(0).tokenizer
        texts = [row["output"] for row in made_rows(ROWS, 0)]
    else:
        place = str(data("stories260K"))
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        texts = [text for text in read_json("tinystories/tinystories_1000.json.gz") if len(text) > 4 * tokens]
    lm.set_attn_implementation(kind)
    rows = [{"id": str(i), "text": text} for i, text in enumerate(texts[:ROWS])]
    return lo.Recipe(
        "causal-lm", tuple(lo.Corpus.open(rows)), model=(lm, tokenizer), max_tokens=tokens, batch_size=ROWS // 2,
        optimizer=lo.OptimizerSettings("adamw", 1e-3),
    )  # fmt: skip


def measured(tokens: int, small: bool) -> dict[str, Any]:
    """Time and memory of sdpa over those of eager, by engine."""
    forms = {kind: engines(recipe_of(kind, tokens, small)) for kind in ("eager", "sdpa")}
    found = {}
    for name in forms["eager"]:
        bytes_, seconds = {}, {kind: [] for kind in forms}
        for kind, made in forms.items():
            if name != "reverse":  # which counts them itself
                with LiveBytes() as live:
                    made[name]()
                bytes_[kind] = live.peak
        for _ in range(1 if small else 2 if name == "reverse" else REPEATS):
            for kind, made in forms.items():
                began = time.process_time()
                found_there = made[name]()
                seconds[kind].append(time.process_time() - began)
                if name == "reverse":
                    bytes_[kind] = found_there.memory.graphs + found_there.memory.per_query
        typical = {kind: statistics.median(times) for kind, times in seconds.items()}
        found[name] = {
            "time": typical["sdpa"] / typical["eager"], "memory": bytes_["sdpa"] / bytes_["eager"],
            "eager_seconds": typical["eager"], "eager_bytes": bytes_["eager"],
        }  # fmt: skip
        print(tokens, name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    return found


def main(given: list[str] | None = None) -> int:
    """Measures, at each length."""
    args = arguments(__doc__).parse_args(given)
    torch.set_num_threads(1)
    lengths = {str(tokens): measured(tokens, args.smoke) for tokens in ((16,) if args.smoke else (128,))}
    write_result(args.out, NAME, {"tokens": lengths}, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
