"""The first order with stored gradients in the place of Hessians, against the exact one and a dense recursion."""

import numpy as np
import pytest
import torch
from torch import nn

from leaveout.deletion.estimators import EstimatorSettings
from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.methods.registry import attribute
from leaveout.training.loop import RunOptions
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse import adamw_influence as stored
from leaveout.training.reverse.adamw_influence import adamw_influence
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import first_order_error, unit_vectors
from test_metagradient import OPTIMIZERS, classifier, points, relative
from test_reverse_scale import QUERIES, gpt2, recipe_of
from tolerances import TOLERANCES

EXACT = TOLERANCES["float64 derivatives"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Mixture(nn.Module):
    """A probability that is linear in the parameters, so that the Hessian of -log p is g g^T."""

    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.linspace(1.0, 2.0, 4, dtype=torch.float64))

    def forward(self, x):
        return x @ self.part


def surprise(model, batch):
    return -model(batch[0]).log()


def mixture(**changes):
    draw = torch.Generator().manual_seed(3)
    rows = tuple((torch.rand(4, generator=draw, dtype=torch.float64) + 0.2,) for _ in range(7))
    chosen = {"batch_size": 3, "epochs": 4, "dtype": "float64", "order": "shuffled", "schedule": "cosine"}
    return Recipe("custom", rows, model=Mixture, loss=surprise, units=tuple("aabbcda"), **{**chosen, **changes})


def one_gradient(model):
    x = torch.tensor([[1.0, 0.2, 0.4, 0.1], [0.3, 0.9, 0.2, 0.8]], dtype=torch.float64)
    return surprise(model, (x,))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_exact_first_order_where_hessians_are_products_of_gradients(name):
    recipe = mixture(optimizer=OPTIMIZERS[name], clip_norm=0.5 if name == "momentum" else None)
    found, exact = adamw_influence(recipe, one_gradient), metagradient(recipe, one_gradient)
    assert relative(found.effects, exact.effects) < EXACT and relative(found.base, exact.base) < EXACT
    assert relative(adamw_influence(recipe, one_gradient, curvature=0.0).effects, exact.effects) > 1e-3


def dense(rows, labels, batches, query, settings):
    """Forward and backward by matrices [3 * parameters, 3 * parameters], for logistic regression under AdamW."""
    rate, (beta1, beta2), eps, decay = settings
    n, eye = rows.shape[1], np.eye(rows.shape[1])
    theta, m, v = np.zeros(n), np.zeros(n), np.zeros(n)
    maps, pushes = [], []
    for t, batch in enumerate(batches, 1):
        p = 1 / (1 + np.exp(-rows[batch] @ theta))
        grads = (p - labels[batch])[:, None] * rows[batch]
        g, hessian = grads.mean(0), grads.T @ grads / len(batch)
        m1, v1 = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        root = np.sqrt(v1 / c2) + eps
        by_m, by_v = -rate / c1 / root, rate / c1 * m1 / root**2 * 0.5 / c2 / np.sqrt(v1 / c2)
        by_g = np.concatenate([
            np.diag(by_m * (1 - beta1) + by_v * 2 * (1 - beta2) * g),
            (1 - beta1) * eye, np.diag(2 * (1 - beta2) * g),
        ])  # fmt: skip
        zero = np.zeros((n, n))
        step = np.block([
            [(1 - rate * decay) * eye, np.diag(by_m * beta1), np.diag(by_v * beta2)],
            [zero, beta1 * eye, zero], [zero, zero, beta2 * eye],
        ])  # fmt: skip
        step[:, :n] += by_g @ hessian
        maps.append(step)
        pushes.append(by_g @ grads.T / len(batch))
        theta, m, v = (1 - rate * decay) * theta + -rate / c1 * m1 / root, m1, v1
    x, y = query
    p = 1 / (1 + np.exp(-x @ theta))
    back = np.concatenate([(p - y) * x, np.zeros(2 * n)])
    effects = np.zeros(len(rows))
    for batch, step, push in zip(batches[::-1], maps[::-1], pushes[::-1], strict=True):
        np.add.at(effects, batch, -(back @ push))
        back = back @ step
    return effects


def logistic(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1], reduction="none")


def straight():
    layer = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def test_equals_a_dense_recursion_under_adamw():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(6, 3)), rng.integers(0, 2, 6).astype(float)
    examples = tuple((torch.tensor(x), torch.tensor(y)) for x, y in zip(rows, labels, strict=True))
    optimizer = OptimizerSettings("adamw", 0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.3)
    recipe = Recipe(
        "custom", examples, model=straight, loss=logistic, optimizer=optimizer, batch_size=3, epochs=4,
        schedule="constant", dtype="float64", order="shuffled",
    )  # fmt: skip
    query = (np.array([0.5, -1.0, 0.3]), 1.0)
    batches = [list(batch) for batch in recipe.batches()]
    wanted = dense(rows, labels, batches, query, (0.05, (0.8, 0.9), 1e-2, 0.3))
    asked = [(torch.tensor(query[0]), torch.tensor(query[1]))]
    assert relative(adamw_influence(recipe, asked).effects[0], wanted) < EXACT
    assert relative(metagradient(recipe, asked).effects[0], wanted) > 5e-3  # the exact Hessian is another


@pytest.mark.parametrize("dropout", [None, 4])
def test_one_step_of_a_language_model_is_exact(dropout):
    """Before the first Hessian nothing is approximated: shares, masks, token counts and units are those of training."""
    recipe = recipe_of(lambda: gpt2(0.2), steps=1, batch_size=4, accumulate=2, loss_per="token", dropout=dropout)
    assert relative(adamw_influence(recipe, QUERIES).effects, metagradient(recipe, QUERIES).effects) < EXACT


def test_files_rounds_and_a_kill_change_no_number(tmp_path, monkeypatch):
    recipe, queries = classifier(epochs=5), points(6, seed=5)
    whole = adamw_influence(recipe, queries)
    vector = 8 * 43  # weights and biases of 4 -> 5 -> 3
    assert whole.plan.stored == 8 * 5 * vector and not whole.plan.on_disk
    advance, left = stored.Stored.advance, [7]

    def killed(self, step):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        advance(self, step)

    monkeypatch.setattr(stored.Stored, "advance", killed)
    options = RunOptions(tmp_path, memory=40 * vector)
    with pytest.raises(KeyboardInterrupt):
        adamw_influence(recipe, queries, options)
    left[0] = 10**6
    computed = []
    shares = stored.example_shares
    monkeypatch.setattr(stored, "example_shares", lambda *given: computed.append(1) or shares(*given))
    found = adamw_influence(recipe, queries, options)
    assert len(computed) == 10 - 7 and found.plan.together < 6 and found.plan.on_disk
    assert relative(found.effects, whole.effects) < EXACT
    assert not list(tmp_path.iterdir())


def test_what_finds_no_place_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedError, match="give a directory for the gradients"):
        adamw_influence(classifier(), points(2), RunOptions(memory=1000))
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda place: type("Disk", (), {"free": 1000})())
    with pytest.raises(UnsupportedError, match="of disk and 1 kB are free"):
        adamw_influence(classifier(), points(2), RunOptions(tmp_path))


def test_as_a_method_and_as_a_prior_mean(tmp_path):
    names = ["anna", "bob", "eve", "kim", "lena", "max"]
    run = TrainingRun.train(Recipe.microgpt(names, n=6, epochs=2), tmp_path / "run")
    scores = attribute(run, ["mona"], "adamw-influence").scores
    assert relative(scores, adamw_influence(run.recipe, ["mona"]).effects) < 1e-5
    run.measure(retrain=3, queries=["mona"])
    found = run.predict(["mona"], "0:" + run.recipe.examples[0].text, EstimatorSettings("posterior", scores=scores))
    assert np.isfinite(found.effect).all()


def test_a_bank_tells_the_error_of_the_first_order(tmp_path):
    run = TrainingRun.train(classifier(epochs=2, dtype="float32"), tmp_path / "run")
    x = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.0]])
    assert run.bank.first_order_error(x) is None
    run.measure_vectors()
    found = run.bank.first_order_error(x)
    assert found is not None and np.allclose(found, first_order_error(unit_vectors(run.recipe, 8192), x))
