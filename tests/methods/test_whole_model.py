"""The method `influence` beside matrices that are written out, for classifiers whose curvature is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from leaveout.methods.influence import influence
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of

from .slow import points

OPTIMIZERS = {
    "sgd": OptimizerSettings("sgd", 0.05),
    "momentum": OptimizerSettings("sgd", 0.05, momentum=0.75),
    "paper-adam": OptimizerSettings("paper-adam", 0.01, eps=0.02),
    "adamw": OptimizerSettings("adamw", 0.01, eps=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_those_of_the_whole_matrix(name):
    """Softmax regression: its Gauss-Newton matrix is its Hessian, mean of (diag p - p p') x [x, 1] [x, 1]'."""
    rows, asked = points(9, 0), points(2, 7)
    recipe = Recipe(
        "classifier", rows, model={"hidden": []}, optimizer=OPTIMIZERS[name], batch_size=4, epochs=2, dtype="float64"
    )
    task = task_of(recipe)
    parameters = {key: 0.3 * torch.randn(p.shape, dtype=p.dtype) for key, p in task.parameters().items()}
    scorer = SimpleNamespace(
        task=task, rows=rows, query_rows=asked, seed=0, run=SimpleNamespace(recipe=recipe), parameters=lambda at: parameters
    )  # fmt: skip
    w, b = (parameters[key].numpy() for key in ("1.weight", "1.bias"))

    def of(row):
        x = np.append(row[0].numpy(), 1.0)
        z = np.column_stack([w, b]) @ x
        p = np.exp(z) / np.exp(z).sum()
        return (
            np.outer(p - np.eye(3)[row[1]], x).ravel(),
            np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x)),
        )

    gradients, queries = (np.array([of(row)[0] for row in some]) for some in (rows, asked))
    second = gradients.mean(0) ** 2  # nine rows are one batch, whatever the order
    settings, n_steps = OPTIMIZERS[name], len(recipe.batches())
    metric = np.ones(15)
    if name == "paper-adam":
        metric = 1 / np.sqrt(second + 0.02)
    if name == "adamw":
        metric = 1 / (np.sqrt(second) + 0.02)
        metric = np.minimum(metric, np.median(metric))
    total = n_steps * settings.lr / (1 - settings.momentum)
    root = np.sqrt(metric)
    h, vectors = np.linalg.eigh(root[:, None] * np.mean([of(row)[1] for row in rows], 0) * root)
    f = np.where(h < 1e-9, total, -np.expm1(-total * h) / np.where(h < 1e-9, 1, h))
    wanted = (gradients * root) @ (vectors * f) @ vectors.T @ (queries * root).T
    found = influence.score(scorer, "final")
    assert np.linalg.norm(found - wanted.T) < 3e-3 * np.linalg.norm(wanted)
