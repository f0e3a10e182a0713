"""Retrainings share what the blocks below the lowest trained one make of an example, and train the same models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.training import below as below_module
from leaveout.training.below import below_of, lower_blocks
from leaveout.training.loop import RunOptions, Steps
from leaveout.training.queries import Query, query_function, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.repacking import new_run
from leaveout.training.tasks import rows_are_separate, task_of
from leaveout.training.train import Retrainer, train_plain
from readout.tiny import TEXTS, make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::FutureWarning:peft", "ignore::UserWarning:peft"
)
UPPER = ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
LORA = {"lora": {"r": 2, "alpha": 4, "targets": UPPER, "dropout": 0.2}}
WEIGHTS = torch.tensor([[1.0, 0, 1, 1, 1, 1], [1, 1, 0.5, 1, 1, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.float64)


def rows():
    """Texts of very different lengths, one of them with a weight."""
    texts = [text[: 12 + 15 * i] for i, text in enumerate(TEXTS[:6])]
    found = list(Corpus.open(texts))
    return tuple(replace(row, weight=2.0) if i == 1 else row for i, row in enumerate(found))


def recipe_of(family="llama", **changes):
    torch.manual_seed(0)
    fields = {
        "model": (make_model(family), make_tokenizer()), "trained": LORA, "batch_size": 3, "accumulate": 2, "epochs": 2,
        "order": "shuffled", "clip_norm": 0.5, "loss_per": "token", "max_tokens": 40, "dtype": "float64",
        "optimizer": OptimizerSettings("adamw", 0.01, eps=1e-4, weight_decay=0.1),
    }  # fmt: skip
    return Recipe("causal-lm", rows(), **{**fields, **changes})


def assert_equal(found, recipe, weights=WEIGHTS):
    for i, own in enumerate(weights):
        for name, p in train_plain(recipe, own).items():
            torch.testing.assert_close(
                found[name][i], p, rtol=1e-5, atol=1e-7
            )  # norms and softmax of this family are in float32


@pytest.mark.parametrize("changes", [
    {}, {"dropout": 3}, {"trained": ("*layers.1.*", "model.norm.weight", "lm_head*")},
    {"optimizer": OptimizerSettings("sgd", 0.1)},
    {"family": "gpt2", "trained": ("*h.1.*",), "dropout": 3}, {"family": "gpt2", "trained": ("*ln_f*",)},
], ids=["adapters", "adapters with dropout", "upper layers", "sgd", "dropout below", "last norm"])  # fmt: skip
def test_runs_equal_plain_ones(changes):
    recipe = recipe_of(**changes)
    retrainer = Retrainer(recipe)
    assert retrainer.below is not None and retrainer.below.draws == (
        changes.get("family") == "gpt2" and "dropout" in changes
    )
    together, alone = retrainer.train(WEIGHTS), retrainer.train(WEIGHTS, together=1)
    assert_equal(together, recipe)
    assert_equal(alone, recipe)
    assert len(retrainer.below.kept) == (8 if retrainer.below.draws else len(recipe.examples))


def test_lower_blocks_are_gone_through_once_an_example():
    retrainer = Retrainer(recipe_of())
    assert retrainer.below is not None and retrainer.batched  # tried before anything is counted
    retrainer.below.kept.clear()
    calls = []
    for block in retrainer.below.lower:
        block.forward = lambda *given, own=block.forward, **named: calls.append(1) or own(*given, **named)
    for _ in range(2):
        retrainer.train(torch.ones(2, 6, dtype=torch.float64))
    assert len(calls) == 6


def test_what_does_not_fit_is_in_files_that_workers_share(tmp_path):
    recipe = recipe_of()
    retrainer = Retrainer(recipe, RunOptions(tmp_path, memory=1))
    assert_equal(retrainer.train(WEIGHTS), recipe)
    below = retrainer.below
    assert below is not None and not below.kept and below.folder is not None
    files = {file: file.stat().st_mtime_ns for file in below.folder.iterdir()}
    assert len(files) == 6
    again = Retrainer(recipe, RunOptions(tmp_path, memory=1))
    assert_equal(again.train(WEIGHTS), recipe)
    assert again.below is not None and {file: file.stat().st_mtime_ns for file in below.folder.iterdir()} == files
    again.drop_files()
    assert not below.folder.exists()


class Bypass(nn.Module):
    """A perceptron whose head sees the first layer, too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        self.way = nn.Linear(4, 2)

    def forward(self, x):
        return self.layers(x) + self.way(self.layers[0](x))


@pytest.mark.parametrize(("model", "trained", "shared"), [
    (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), ("2.*",), True),
    (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), ("0.*",), False),
    (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "full", False),
    (Bypass(), ("layers.2.*",), False),
], ids=["upper layer", "lower layer", "nothing below", "a way around"])  # fmt: skip
def test_only_what_is_the_same_is_shared(model, trained, shared):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(
        "classifier", tuple((row, i % 2) for i, row in enumerate(x)), model=model, trained=trained, batch_size=2, epochs=2,
        optimizer=OptimizerSettings("sgd", 0.1), dtype="float64",
    )  # fmt: skip
    retrainer = Retrainer(recipe)
    assert (retrainer.below is not None) == shared
    assert_equal(retrainer.train(WEIGHTS), recipe)


def test_a_trained_embedding_leaves_nothing_to_share():
    recipe = recipe_of(trained=("*embed_tokens*", "*layers.1.*"))
    task = task_of(recipe)
    assert lower_blocks(task.model) and below_of(Steps(recipe, task)) is None
    assert_equal(Retrainer(recipe).train(WEIGHTS), recipe)


def test_measuring_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(below_module, "SHARE", 10**15)
    recipe = recipe_of(dtype="float32")
    run = TrainingRun.train(recipe, tmp_path / "run")
    sets = [[recipe.ids[0]], list(recipe.ids[1:3])]
    values = run.retrain(["The ferry left"], sets)
    assert not (tmp_path / "run" / "work").exists()
    monkeypatch.setattr("leaveout.training.train.below_of", lambda *_: None)
    other = TrainingRun.train(recipe, tmp_path / "other")
    assert abs(other.retrain(["The ferry left"], sets) - values).max() < 1e-4


@pytest.mark.parametrize("dropout", [None, 3])
def test_new_runs_begin_there_too(dropout):
    recipe = recipe_of(dropout=dropout)
    retrainer = Retrainer(recipe)
    x = np.array([0.0, 1, 0.5, 0, 0, 0])
    other = new_run(recipe, x, 4)
    shared = retrainer.in_order_of(other)
    assert shared is not None and shared.below is retrainer.below
    found = shared.train(torch.from_numpy(np.where(x == 1, 1.0, 1 - x))[None])
    assert_equal(found, other, torch.from_numpy(1 - x)[None])
    assert retrainer.recipe is recipe and retrainer.steps.recipe is recipe


@pytest.mark.parametrize(("family", "alone"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_rows_of_weight_0_are_left_out_with_dropout(family, alone):
    trained = LORA if family == "llama" else ("*h.1.*",)
    recipe = recipe_of(family, trained=trained, dropout=3, accumulate=1)
    weights = WEIGHTS.clone()
    weights[:, 1::2] = 0
    retrainer, seen = Retrainer(recipe), []
    assert retrainer.separate and retrainer.below is not None and retrainer.batched
    task = retrainer.task
    task.learned = lambda model, batch, own=task.learned: seen.append(len(batch[0])) or own(model, batch)
    found = retrainer.train(weights, together=1 if alone else 3)
    assert_equal(found, recipe, weights)
    below = 12 if retrainer.below.draws else 6  # the masks of each step, or the examples
    assert 0 < sum(seen) - below <= 7 * (3 if alone else 1)  # three of six examples, twice, or one where there is none


def test_masks_of_another_axis_are_not_left_out_of():
    class Turned(nn.Sequential):
        def forward(self, x):
            return self[1](nn.functional.dropout(self[0](x).T, 0.5, self.training).T)

    examples = tuple((torch.ones(3) * i, i % 2) for i in range(6))
    recipe = Recipe(
        "classifier", examples, model=lambda: Turned(nn.Linear(3, 4), nn.Linear(4, 2)), batch_size=3, dropout=1,
        optimizer=OptimizerSettings("sgd", 0.1), dtype="float64",
    )  # fmt: skip
    task = task_of(recipe)
    task.separate = True
    assert not rows_are_separate(recipe, task) and rows_are_separate(recipe.with_(dropout=None), task)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_queries_share_what_is_below(family, together):
    trained = LORA if family == "llama" else ("*h.1.*",)
    recipe = recipe_of(family, trained=trained, dropout=3)
    retrainer = Retrainer(recipe)
    runs = retrainer.train(WEIGHTS, together=together)
    total = lambda model: sum(p.sum() for p in model.parameters())  # noqa: E731
    queries = [Query("The ferry left"), Query("It was", measure="margin"), Query(total)]
    below, calls = retrainer.below, []
    assert below is not None
    shared, alone = (query_function(retrainer.task, queries, asking) for asking in (below.asking, None))
    state = torch.get_rng_state()
    wanted = query_losses(recipe, runs, alone, task=retrainer.task)
    block = below.lower[0]
    block.forward = lambda *given, own=block.forward, **named: calls.append(1) or own(*given, **named)
    for _ in range(2):
        found = query_losses(recipe, runs, shared, task=retrainer.task)
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)


def test_kept_parameters_are_asked_from_what_is_below(tmp_path, monkeypatch):
    recipe = recipe_of(dtype="float32")
    run, sets = TrainingRun.train(recipe, tmp_path / "run"), [[recipe.ids[0]], list(recipe.ids[1:3])]
    run.measure(without=sets)
    assert run.bank._below is not None
    found = run.bank.measurements(["The ferry left"]).retrainings.y
    assert sum(name.startswith("asked") for name in run.bank._below.kept) == 1
    other = TrainingRun.train(recipe, tmp_path / "other")
    other.measure(without=sets)
    other.bank._below = None
    assert np.array_equal(other.bank.measurements(["The ferry left"]).retrainings.y, found)
