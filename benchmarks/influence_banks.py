"""The training runs that attribution is judged on: rows of ten groups, held-out queries, and a recipe.

    stories   the public Llama of 260K parameters, fine-tuned with AdamW
    neox      a small GPT-NeoX with an untied head, first trained from scratch on other rows, then fine-tuned with SGD
    olmo      an OLMo-2 of hidden size 256 with 20,480 tokens and an untied head, first trained from scratch on other rows,
              then fine-tuned with AdamW; olmo-sgd: the same with SGD
    qwen      a Qwen3 of hidden size 128 with a tied head, other rows and orders than the banks above (seed + 1), two epochs
              of AdamW in batches of 8 at a constant rate
    gemma     a Gemma-2 of hidden size 160 with a tied head, again other rows and orders (seed + 2), four epochs of Adam in
              batches of 16, the rate falling in a line: a bank on which nothing was chosen

Every row is a prompt and a completion (see `public_rows`); the loss is that of the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corpora import data
from leaveout.corpus import Row
from leaveout.training.recipe import OptimizerSettings, Recipe
from measuring import tiny
from public_rows import LONGEST, Tokens, groups, made_groups, split_rows
from scratch_models import GEMMA, NEOX, OLMO, QWEN, Shape, pretrained, untrained_model


@dataclass(frozen=True)
class TruthBank:
    """A recipe to judge on, its queries, and the numbers of rows a group and of steps."""

    recipe: Recipe
    queries: list[Row]
    groups: tuple[str, ...]
    pretraining_cpu_seconds: float = 0.0


def stories_bank(work: Path, sizes: tuple[int, int], seed: int, chosen: Sequence[str] | None = None) -> TruthBank:
    """The 260K Llama, AdamW, three epochs in batches of 16, on all groups or the chosen ones."""
    place = str(data("stories260K/config.json").parent)
    found = {name: pairs for name, pairs in groups(seed).items() if chosen is None or name in chosen}
    rows, queries = split_rows(found, sizes, 0, _tokens(place), seed)
    recipe = Recipe(
        "causal-lm", tuple(rows), model=place, epochs=3, batch_size=16, order="shuffled", schedule="cosine", warmup=4,
        optimizer=OptimizerSettings("adamw", 1.5e-3, betas=(0.9, 0.99)), max_tokens=LONGEST, seed=seed,
    )  # fmt: skip
    return TruthBank(recipe, queries, tuple(found))


def neox_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """A GPT-NeoX of 0.9 million parameters trained on 2,000 other rows, then SGD for three epochs."""
    return scratch_bank(work, sizes, seed, NEOX, OptimizerSettings("sgd", 0.2))


def olmo_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """An OLMo-2 of 14.7 million parameters trained on 4,800 other rows, then AdamW for three epochs."""
    return scratch_bank(work, sizes, seed, OLMO, OptimizerSettings("adamw", 5e-4, betas=(0.9, 0.99)))


def olmo_sgd_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """The same OLMo-2, then SGD for three epochs."""
    return scratch_bank(work, sizes, seed, OLMO, OptimizerSettings("sgd", 0.2))


def qwen_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """A Qwen3 of 1.7 million parameters trained on 4,800 other rows, then AdamW for two epochs at a constant rate."""
    bank = scratch_bank(work, sizes, seed + 1, QWEN, OptimizerSettings("adamw", 5e-4, betas=(0.9, 0.95)))
    return replace(bank, recipe=replace(bank.recipe, epochs=2, batch_size=8, schedule="constant", warmup=0))


def gemma_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """A Gemma-2 of 2.2 million parameters trained on 4,800 other rows, then Adam for four epochs, the rate falling."""
    bank = scratch_bank(work, sizes, seed + 2, GEMMA, OptimizerSettings("adam", 5e-4, betas=(0.9, 0.99)))
    return replace(bank, recipe=replace(bank.recipe, epochs=4, schedule="linear", warmup=4))


def scratch_bank(
    work: Path, sizes: tuple[int, int], seed: int, shape: Shape, optimizer: OptimizerSettings
) -> TruthBank:
    """A model trained on other rows of the public groups, then fine-tuned for three epochs in batches of 16."""
    found = groups(seed)
    start = untrained_model(work, shape, seed)
    tokens = _tokens(str(start))
    before = {group: pairs for group, pairs in found.items() if group not in ("fact", "trigger")}
    first, _ = split_rows(before, (shape.rows, 0), 0, tokens, seed, shape.longest)
    place, seconds = pretrained(work, shape, first, seed)
    rows, queries = split_rows(found, sizes, 1000, tokens, seed, shape.longest)
    known = {row.text for row in first}
    if any(row.text in known for row in (*rows, *queries)):
        raise ValueError("A row to fine-tune on or a query was pretrained on: give fewer rows.")
    recipe = Recipe(
        "causal-lm", tuple(rows), model=str(place), epochs=3, batch_size=16, order="shuffled", schedule="cosine",
        warmup=4, optimizer=optimizer, max_tokens=shape.longest, seed=seed,
    )  # fmt: skip
    return TruthBank(recipe, queries, tuple(found), seconds)


def smoke_bank(work: Path, sizes: tuple[int, int], seed: int) -> TruthBank:
    """Made-up rows and a minute model, for smoke runs."""
    readout = tiny(seed)
    place = work / "tiny"
    if not place.exists():
        readout.lm.save_pretrained(place)  # type: ignore[operator]
        readout.tokenizer.save_pretrained(place)
    found = made_groups(seed)
    rows, queries = split_rows(found, sizes, 0, _tokens(str(place)), seed)
    recipe = Recipe(
        "causal-lm", tuple(rows), model=str(place), epochs=2, batch_size=4, order="shuffled", max_tokens=LONGEST,
        optimizer=OptimizerSettings("sgd", 0.5), seed=seed,
    )  # fmt: skip
    return TruthBank(recipe, queries, tuple(found))


def _tokens(model: str) -> Tokens:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text)["input_ids"])


BANKS = {
    "stories": stories_bank, "neox": neox_bank, "olmo": olmo_bank, "olmo-sgd": olmo_sgd_bank, "qwen": qwen_bank,
    "gemma": gemma_bank,
    "smoke": smoke_bank,
}  # fmt: skip
