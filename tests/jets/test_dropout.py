"""Dropout by seeds, autocast and given tokens, in every engine."""

import pytest
import torch

from leaveout.corpus import Corpus
from leaveout.errors import FormatError
from leaveout.training.dropout import dropped, seed_of
from leaveout.training.memory import kept_bytes
from leaveout.training.notes import notes_on
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.flat_run import FlatRun
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import rows_are_separate, task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles.agreement import assert_close

from .test_recipe import points
from .test_steps import flat, model, uneven  # noqa: F401  (a fixture)

SGD = OptimizerSettings("sgd", 0.05)
FIELDS = {"optimizer": SGD, "accumulate": 2, "dropout": 5, "loss_per": "token", "trained": ("*mlp*",)}


def natively(recipe, weights, autocast=False):
    """A loop of its own in training form, with torch's own dropout."""
    task = task_of(recipe)
    own = [p for p in task.model.parameters() if p.requires_grad]
    task.model.train(recipe.dropout is not None)
    for step, parts in enumerate(recipe.micro_batches()):
        counts = {i: int((task.encode([recipe.examples[i]])[1][:, 1:] != -100).sum()) for part in parts for i in part}
        grads = [torch.zeros_like(p) for p in own]
        for number, part in enumerate(parts):
            batch = task.encode([recipe.examples[i] for i in part])
            if recipe.dropout is not None:
                torch.manual_seed(seed_of(recipe.dropout, step, number))
            with torch.autocast("cpu", torch.bfloat16, autocast):
                logits = task.model(input_ids=batch[0]).logits[:, :-1]
            logits = logits.float() if autocast else logits
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1][:, 1:].flatten(), reduction="none")
            places = recipe.unit_of[list(part)]
            loss = (each.view(len(part), -1).sum(1) * weights[places]).sum() / sum(counts.values())
            grads = [a + b for a, b in zip(grads, torch.autograd.grad(loss, own), strict=True)]
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p -= SGD.lr * g
    return torch.cat([p.detach().flatten() for p in own])


def test_masks_are_torchs_own_and_every_engine_has_them(model):  # noqa: F811
    recipe = uneven(model, **FIELDS)
    units = len(recipe.unit_names)
    weights = torch.rand(3, units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0], weights[2, 0] = 1.0, 0.0
    wanted = [natively(recipe, w) for w in weights]
    assert_close(flat(train_plain(recipe)), wanted[0], "exact")
    assert not torch.allclose(wanted[0], natively(recipe.with_(dropout=6), weights[0]))
    both = train_batch(recipe, weights)
    for i in range(3):
        assert_close(flat({name: p[i] for name, p in both.items()}), wanted[i], "exact")
    run = FlatRun(recipe)
    for step in range(run.steps):
        run.advance(step)
    assert_close(flat(run.parameters()), wanted[0], "exact")
    psi = torch.eye(units, dtype=torch.float64)
    jets = train_jets(recipe, psi, JetSettings(1, torch.float64), ["ab abz"])
    assert_close(flat(jets.constants), wanted[0], "exact")
    runs = train_batch(recipe, torch.cat([1 + 1e-5 * psi, 1 - 1e-5 * psi]))
    for name, slope in jets.coefficients.items():
        differences = (runs[name][units:] - runs[name][:units]) / 2e-5
        assert (slope[0] - differences).abs().max() < 1e-5 * (1 + differences.abs().max()), name
    back = metagradient(recipe, ["ab abz"])
    assert_close(torch.from_numpy(back.effects)[0], jets.losses.h[0, :, 0], "exact")
    vectors = unit_vectors(recipe, width=10**6)
    start = flat(task_of(recipe).parameters())
    assert (torch.from_numpy(vectors.updates).sum(0) - (wanted[0] - start)).abs().max() < 1e-6


def test_dropout_is_said_and_counted(model):  # noqa: F811
    recipe = uneven(model, **FIELDS)
    off, task = recipe.with_(dropout=None), task_of(recipe)
    assert recipe.hash() != off.hash()
    assert "Dropout is off" in notes_on(off, task_of(off))[0] and not notes_on(recipe, task)
    assert rows_are_separate(off, task) and rows_are_separate(recipe, task)
    assert kept_bytes(recipe, task) > kept_bytes(off, task) and not task.model.training
    before = torch.random.get_rng_state()
    with dropped(task.model, 3):
        assert task.model.training
        torch.rand(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_of_a_users_model_leaves_its_batch_norm_frozen():
    def made():
        return torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 3)
        )

    recipe = Recipe("classifier", points(8), model=made, batch_size=4, dropout=1, dtype="float64")
    weights = torch.ones(2, 8, dtype=torch.float64)
    plain, both = train_plain(recipe), train_batch(recipe, weights)
    for name, p in plain.items():
        assert_close(both[name][1], p, "exact")
    assert not torch.allclose(plain["3.weight"], train_plain(recipe.with_(dropout=None))["3.weight"])


def test_autocast_is_of_plain_runs_and_derivatives_are_of_the_run_without(model):  # noqa: F811
    recipe = uneven(model, **{**FIELDS, "autocast": "bfloat16", "dropout": None, "dtype": "float32"})
    plain, exact = recipe.with_(autocast=None), torch.ones(3)
    wanted = natively(recipe, exact, autocast=True)
    whole = (flat(train_plain(plain)) - flat(task_of(plain).parameters())).norm()
    assert (flat(train_plain(recipe)) - wanted).norm() < 1e-3 * whole
    assert (flat(train_plain(plain)) - wanted).norm() > 2e-3 * whole
    both = train_batch(recipe, torch.ones(2, 3))
    together = flat({n: p[1] for n, p in both.items()})
    assert (together - wanted).norm() < 4e-3 * whole and (together - flat(train_plain(plain))).norm() > 1e-3 * whole
    psi = torch.eye(3)
    jets, other = (train_jets(r, psi, JetSettings(1, torch.float32)) for r in (recipe, plain))
    for name, p in jets.constants.items():
        assert torch.equal(p, other.constants[name])
    said = "compute in bfloat16; jets and the exact first order are derivatives of the run in float32"
    assert any(said in note for note in notes_on(recipe, task_of(recipe)))
    assert recipe.hash() != plain.hash()


def test_packed_rows_have_their_own_positions_and_the_masks_of_one_sequence(model):  # noqa: F811
    recipe = uneven(model, **{**FIELDS, "packed": True})
    alone = task_of(recipe.with_(dropout=None))
    assert alone.packed is None  # the same numbers
    task = task_of(recipe)
    batch = task.encode(recipe.examples)
    assert_close(task.learned(task.model, batch).detach(), task.loss(task.model, batch[:2]).detach(), "exact")
    wanted = flat(train_plain(recipe.with_(packed=False)))
    ours = flat(train_plain(recipe))
    assert (ours - wanted).abs().max() > 1e-3
    assert_close(
        flat({n: p[1] for n, p in train_batch(recipe, torch.ones(2, 3, dtype=torch.float64)).items()}), ours, "exact"
    )
    jets = train_jets(recipe, torch.eye(3, dtype=torch.float64), JetSettings(1, torch.float64), ["ab abz"])
    assert_close(flat(jets.constants), ours, "exact")
    back = metagradient(recipe, ["ab abz"])
    assert_close(torch.from_numpy(back.effects)[0], jets.losses.h[0, :, 0], "exact")


def test_rows_with_tokens_are_trained_on_as_those(model):  # noqa: F811
    given = [
        {"id": "a", "text": "ab", "input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"id": "b", "text": "cd", "input_ids": [5, 6, 7]},
    ]
    recipe = Recipe("causal-lm", tuple(given), model=model)
    ids, labels = task_of(recipe).encode(recipe.examples)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert labels.tolist() == [[-100, -100, 3, 4], [-100, 6, 7, -100]]
    cut = recipe.with_(max_tokens=3)
    assert task_of(cut).encode(cut.examples[:1])[0].tolist() == [[1, 2, 3]] and task_of(cut).cut(cut.examples[0]) == 1
    other = [{**given[0], "labels": [-100, 2, 3, 4]}, given[1]]
    assert Recipe("causal-lm", tuple(other), model=model).hash() != recipe.hash()
    for labels, message in (([1, 2, 3, 5], "not its `input_ids`"), ([1, -100, -100, -100], "no token to learn")):
        bad = Recipe("causal-lm", ({**given[0], "labels": labels},), model=model)
        with pytest.raises(FormatError, match=message):
            task_of(bad).encode(bad.examples)
    assert Corpus.open(given)
