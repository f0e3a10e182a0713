"""Stages of a GPU run about training: plain runs, many weightings at once, reverse mode, jets."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from card import Card, distance
from leaveout.corpus import Corpus
from leaveout.training.loop import RunOptions
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain

SAME = 1e-3  # relative, of trained movements and effects in float32, against the CPU


def names(count: int) -> list[str]:
    """Made-up names, all different."""
    chance = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chance.choice(part) for part in ("bdfgklmnprst", "aeiou") * 2) + chance.choice("nrst")] = None
    return list(found)


def microgpt(card: Card, steps: int) -> Recipe:
    return Recipe.microgpt(names(max(steps, 24)), n=steps, dtype="float32")


def language_model(card: Card, place: str) -> Recipe:
    """A short fine-tuning of the small model: its MLPs, and no others."""
    readout = card.readout("cpu")
    readout.lm.save_pretrained(place)  # type: ignore[operator]
    readout.tokenizer.save_pretrained(place)
    rows = [{"text": f"Once upon a time {a} met {b} by the sea."} for a, b in zip(names(8), names(16)[8:], strict=True)]
    return Recipe(
        "causal-lm", tuple(Corpus.open(rows)), model=place, trained=("*.mlp.*",), batch_size=4, epochs=1,
        optimizer=OptimizerSettings("adamw", 1e-3), dtype="float32",
    )  # fmt: skip


def movement(recipe: Recipe, options: RunOptions, weights: Tensor | None = None) -> Tensor:
    trained = train_plain(recipe, weights, options)
    return torch.cat([p.flatten().cpu() for p in trained.values()])


def agreement(recipe: Recipe, query: str, device: str) -> dict[str, Any]:
    """What a device gives beside what the CPU gives, relative to how far training moves."""
    n_units = len(recipe.unit_names)
    here, there = RunOptions(), RunOptions(device=device)
    start = movement(recipe, here, torch.zeros(n_units))
    whole, found = movement(recipe, here), movement(recipe, there)
    weights = torch.ones(2, n_units)
    weights[0, 0], weights[1, -1] = 0, 0
    batched = [train_batch(recipe, weights, options) for options in (here, there)]
    effects = [torch.from_numpy(metagradient(recipe, [query], options).effects) for options in (here, there)]
    psi = torch.randn(3, n_units, generator=torch.Generator().manual_seed(0))
    jets = [
        train_jets(recipe, psi, JetSettings(1, torch.float32, False), [query], options).losses
        for options in (here, there)
    ]
    moved = (whole - start).norm()
    pairs = zip(*(one.values() for one in batched), strict=True)
    assert jets[0] is not None and jets[1] is not None
    out = {
        "plain": float((found - whole).norm() / moved),
        "batch": float(torch.stack([(a.cpu() - b.cpu()).norm() for a, b in pairs]).norm() / moved),
        "reverse": distance(effects[1], effects[0]),
        "jets": distance(jets[1].h, jets[0].h),
    }
    if max(out.values()) > SAME:
        raise ArithmeticError(f"training on {device} is off: {out}")
    return out


def training(card: Card) -> dict[str, Any]:
    """Is training on the device what it is on the CPU?"""
    with tempfile.TemporaryDirectory() as place:
        return {
            "microgpt": agreement(microgpt(card, 6), names(30)[-1], card.device),
            "language model": agreement(
                language_model(card, str(Path(place) / "model")), "Once upon a time", card.device
            ),
        }


def training_speed(card: Card) -> dict[str, Any]:
    """Seconds a step: jets of microgpt by directions and degree, reverse mode, retrainings together."""
    steps = 4 if card.dry else 20
    recipe = microgpt(card, steps)
    n_units, query = len(recipe.unit_names), [names(30)[-1]]
    there, here = RunOptions(device=card.device), RunOptions()
    chance = torch.Generator().manual_seed(0)

    def jets(directions: int, degree: int, options: RunOptions) -> float:
        psi = torch.randn(directions, n_units, generator=chance)
        return (
            card.seconds(lambda: train_jets(recipe, psi, JetSettings(degree, None, False), query, options), 1) / steps
        )

    out: dict[str, Any] = {"parameters": sum(p.numel() for p in train_plain(recipe, None, here).values())}
    core = {degree: jets(8 if card.dry else 64, degree, here) / (8 if card.dry else 64) for degree in (1, 3)}
    out["CPU seconds a direction and step"] = core
    for degree in (1, 3):
        for directions in (4, 8) if card.dry else (256, 1024, 4096):
            if card.left < 60 and not card.dry:
                break
            try:
                spent = jets(directions, degree, there)
            except torch.OutOfMemoryError:
                out[f"jets, degree {degree}, {directions}"] = "out of memory"
                card.free()
                continue
            faster = core[degree] * directions / spent
            out[f"jets, degree {degree}, {directions}"] = {"seconds a step": spent, "times one CPU core": faster}
    weights = (torch.rand(8 if card.dry else 512, n_units, generator=chance) < 0.5).float()
    for name, options in (("CPU", here), ("device", there)):
        some = weights if name == "device" or card.dry else weights[:64]
        together = card.seconds(lambda some=some, options=options: train_batch(recipe, some, options), 1)
        back = card.seconds(lambda options=options: metagradient(recipe, query * 8, options), 1)
        out[f"retrainings a second, {name}"] = len(some) / together
        out[f"first order of 8 queries, seconds a step, {name}"] = back / steps
    return out
