"""EK-FAC through kronfluence against its definition in NumPy, plain gradient products, and real retraining."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy import stats

from leaveout.errors import UnsupportedError
from leaveout.methods import ekfac
from leaveout.methods.ekfac import EkFac
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain
from methods.slow import RECIPES, classifier_loss, points, slow_gradients, slow_product
from methods.test_gradients import leave_one_out

pytest.importorskip("kronfluence")
LOGISTIC = Recipe(
    "classifier", points(60, 0), model={"hidden": []}, batch_size=60, steps=150, dtype="float64",
    optimizer=OptimizerSettings("sgd", 0.3, weight_decay=0.01),
)  # fmt: skip


def fill(parameters, generator):
    return {name: 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}


def test_ekfac_equals_its_definition(monkeypatch):
    """One layer, written out in NumPy; the drawn labels are replaced by the most probable ones, to know them."""
    task = task_of(LOGISTIC)
    parameters = fill(dict(task.model.named_parameters()), torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    rows, queries = points(20, 3), points(4, 4)
    weight, bias = (parameters[name].detach().numpy() for name in ("1.weight", "1.bias"))

    def parts(row, label=None):
        x = np.append(row[0].numpy(), 1.0)
        logits = weight @ x[:-1] + bias
        p = np.exp(logits) / np.exp(logits).sum()
        p[p.argmax() if label is None else label] -= 1
        return p, x

    drawn = [parts(row) for row in rows]
    _, a = np.linalg.eigh(sum(np.outer(x, x) for _, x in drawn) / 20)
    _, g = np.linalg.eigh(sum(np.outer(r, r) for r, _ in drawn) / 20)
    eigenvalues = sum((g.T @ np.outer(r, x) @ a) ** 2 for r, x in drawn) / 20
    damped = eigenvalues + 0.1 * eigenvalues.mean()
    turned = [[g.T @ np.outer(*parts(row, row[1])) @ a for row in part] for part in (queries, rows)]
    wanted = np.array([[(left * right / damped).sum() for right in turned[1]] for left in turned[0]])
    found = EkFac(task, parameters, together=3).score(queries, rows)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", RECIPES)
def test_ekfac_with_large_damping_is_the_gradient_product_of_its_layers(name):
    """(F + d)^-1 is 1 / d for large d: every kind of recipe, prompts and unequal lengths too."""
    recipe = RECIPES[name]
    task = task_of(recipe)
    parameters = {key: p.detach().clone() for key, p in task.model.named_parameters()}
    layers = {"causal-lm": ("*mlp*", "*q_proj")}.get(name, ("*",))
    linear = {
        f"{key}.{own}"
        for key, m in task.model.named_modules()
        if isinstance(m, torch.nn.Linear)
        for own in ("weight", "bias")
    }
    names = [key for key in parameters if key in linear and ("mlp" in key or "q_proj" in key or layers == ("*",))]
    assert len(names) > 3
    left, right = (slow_gradients(name, parameters, rows) for rows in (recipe.examples[:2], recipe.examples))
    wanted = np.array([[slow_product(a, b, names) for b in right] for a in left])
    found = EkFac(task, parameters, layers=layers, damping=1e8).score(recipe.examples[:2], recipe.examples) * 1e8
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_ekfac_estimates_leave_one_out_in_nats():
    """A regularised logistic regression at its minimum: the score over the number of rows is the rise of the loss."""
    recipe = LOGISTIC.with_(examples=points(120, 0), units=(), batch_size=120)
    queries, parameters = points(9, 1), train_plain(recipe)
    effects = leave_one_out(recipe, queries)
    scores = EkFac(task_of(recipe), parameters).score(queries, recipe.examples)
    assert np.mean([stats.spearmanr(a, b).statistic for a, b in zip(scores, effects, strict=True)]) > 0.8
    assert 0.7 < float((scores * effects).sum() / (scores**2).sum()) * 120 < 1.4


def test_drawn_labels_have_the_fisher_matrix_of_the_mean_loss():
    """E[gradient^2] of the drawn loss, over draws, is the curvature of the mean loss: here at the logits."""
    recipe = RECIPES["microgpt"]
    task = task_of(recipe)
    batch = task.encode(recipe.examples[:1])
    logits = task.outputs(task.model, batch)[0][0].detach()
    p = logits.softmax(-1)
    with torch.no_grad():
        wanted = float((p - p.square()).sum(1).mean())  # trace of diag(p) - p p^T, mean over the tokens
    values = []
    torch.manual_seed(0)
    for _ in range(400):
        shift = torch.zeros_like(logits, requires_grad=True)
        task.outputs = lambda model, batch, shift=shift: ((logits + shift)[None], batch[1])
        (grad,) = torch.autograd.grad(ekfac._drawn_loss(task, task.model, batch), shift)
        values.append(float(grad.square().sum()))
    assert abs(np.mean(values) - wanted) < 5 * np.std(values) / 20


def test_ekfac_leaves_task_and_random_state_alone():
    task = task_of(LOGISTIC)
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    parameters = fill(before, torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    rows = LOGISTIC.examples[:6]
    first = EkFac(task, parameters).score(rows[:2], rows)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in task.model.named_parameters())
    assert type(task.model[1]) is torch.nn.Linear
    np.testing.assert_array_equal(first, EkFac(task, parameters).score(rows[:2], rows))
    assert not np.array_equal(first, EkFac(task, parameters, seed=1).score(rows[:2], rows))
    assert EkFac(task, parameters).score([], rows).shape == (0, 6)


def test_ekfac_refusals(monkeypatch):
    task = task_of(LOGISTIC)
    parameters = dict(task.model.named_parameters())
    rows = LOGISTIC.examples[:3]
    with pytest.raises(UnsupportedError, match="No trained linear layer matches"):
        EkFac(task, parameters, layers=("block*",)).score(rows, rows)
    monkeypatch.setattr(ekfac, "WIDEST", 3)
    with pytest.raises(UnsupportedError, match=r"Layer 1 is 4 wide.*layers="):
        EkFac(task, parameters).score(rows, rows)
    monkeypatch.undo()
    task.outputs = None
    with pytest.raises(UnsupportedError, match="custom recipe"):
        EkFac(task, parameters).score(rows, rows)
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    with pytest.raises(
        UnsupportedError, match=r"pip install 'leaveout\[methods\]', then pip install --no-deps kronfluence"
    ):
        EkFac(task, parameters).score(rows, rows)


def test_slow_loss_is_the_recipes():
    task = task_of(LOGISTIC)
    parameters = dict(task.model.named_parameters())
    found = task.loss(task.model, task.encode(LOGISTIC.examples[:3]))
    torch.testing.assert_close(found, torch.stack([classifier_loss(parameters, row) for row in LOGISTIC.examples[:3]]))
