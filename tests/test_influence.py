"""Refined queries and scores by two forward passes, beside the matrices written out for a softmax regression with a kink."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leaveout.errors import FormatError
from leaveout.influence import (
    Along,
    Batch,
    Predictions,
    Run,
    WholeModel,
    adam_metric,
    gauss_newton,
    refined,
    row_scores,
    second_moments,
)

ROWS, LENGTH, INSIDE, WORDS = 7, 3, 4, 5
WIDE = 4  # inputs


@pytest.fixture(scope="module")
def data():
    chance = np.random.default_rng(3)
    return {
        "x": chance.normal(size=(ROWS, LENGTH, WIDE)), "y": chance.integers(WORDS, size=(ROWS, LENGTH)),
        "inner": chance.normal(size=(WIDE, INSIDE)), "outer": 0.7 * chance.normal(size=(INSIDE, WORDS)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(data):
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"])

    def predictions(named, rows):
        logits = torch.tanh(x[rows].flatten(0, 1) @ named["inner"]) @ named["outer"]
        row = torch.arange(len(rows)).repeat_interleave(LENGTH)
        return Predictions(logits, y[rows].flatten(), row, torch.full((len(row),), 1 / LENGTH, dtype=torch.float64))

    return WholeModel({name: torch.tensor(data[name]) for name in ("inner", "outer")}, predictions)


def batches(*groups):
    return [Batch(torch.tensor(group), len(group)) for group in groups]


def whole(data):
    """In numpy: Jacobians [rows, positions, words, parameters], probabilities, and the rows' gradients [rows, parameters]."""
    h = np.tanh(data["x"] @ data["inner"])
    logits = h @ data["outer"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_outer = np.einsum("rth,wv->rtwhv", h, np.eye(WORDS)).reshape(ROWS, LENGTH, WORDS, -1)
    slope = 1 - h**2
    by_inner = np.einsum("rti,rth,hw->rtwih", data["x"], slope, data["outer"]).reshape(ROWS, LENGTH, WORDS, -1)
    jacobian = np.concatenate([by_inner, by_outer], -1)
    r = p - np.eye(WORDS)[data["y"]]
    return jacobian, p, np.einsum("rtw,rtwp->rp", r, jacobian) / LENGTH


def curvature(data, rows):
    jacobian, p, _ = whole(data)
    total = 0
    for row in rows:
        for at in range(LENGTH):
            h = np.diag(p[row, at]) - np.outer(p[row, at], p[row, at])
            total = total + jacobian[row, at].T @ h @ jacobian[row, at] / LENGTH / len(rows)
    return total


def test_gradients_are_those_of_the_rows(data, model):
    wanted = whole(data)[2]
    np.testing.assert_allclose(model.gradient(batches([2])).numpy(), wanted[2], rtol=1e-10)
    np.testing.assert_allclose(model.gradient(batches([0, 1], [4])).numpy(), wanted[[0, 1, 4]].sum(0), rtol=1e-10)


def test_products_with_the_gauss_newton_matrix_are_exact_up_to_the_step(data, model):
    chance = torch.Generator().manual_seed(1)
    vectors = [s * torch.randn(len(model.theta), generator=chance, dtype=torch.float64) for s in (1, 1e-6, 1e5)]
    for vector, found in zip(vectors, gauss_newton(model, batches([0, 1, 2], [3, 5]), vectors), strict=True):
        wanted = curvature(data, [0, 1, 2, 3, 5]) @ vector.numpy()
        assert np.linalg.norm(found.numpy() - wanted) < 2e-4 * np.linalg.norm(wanted)


def test_curvature_is_the_mean_over_rows_not_over_their_pieces(data):
    """The model of `model`, whose batches hold single positions of rows, each with its share of its row's loss."""
    x, y = torch.tensor(data["x"]), torch.tensor(data["y"])

    def predictions(named, pieces):
        row, at = pieces.T
        logits = torch.tanh(x[row, at] @ named["inner"]) @ named["outer"]
        weight = torch.full((len(pieces),), 1 / LENGTH, dtype=torch.float64)
        return Predictions(logits, y[row, at], torch.arange(len(pieces)), weight)

    model = WholeModel({name: torch.tensor(data[name]) for name in ("inner", "outer")}, predictions)
    pieces = torch.tensor([(row, at) for row in (0, 1, 4) for at in range(LENGTH)])
    sample = [Batch(pieces[:4], 4), Batch(pieces[4:], 5)]
    vector = torch.randn(len(model.theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = curvature(data, [0, 1, 4]) @ vector.numpy()
    assert np.linalg.norm(gauss_newton(model, sample, [vector], 3)[0].numpy() - wanted) < 2e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("total", [0.3, 30.0])
def test_refined_is_the_function_of_the_whole_matrix(data, model, total):
    gradients = whole(data)[2]
    metric = np.random.default_rng(5).uniform(0.1, 3, len(model.theta))
    root = np.sqrt(metric)
    values, vectors = np.linalg.eigh(root[:, None] * curvature(data, range(ROWS)) * root)
    f = np.array([total if h < 1e-12 else -np.expm1(-total * h) / h for h in values])
    asked = [model.gradient(batches([row])) for row in (0, 3)]
    run = Run(total, torch.tensor(metric), steps=len(metric))
    for row, found in zip((0, 3), refined(model, batches([0, 1, 2, 3], [4, 5, 6]), asked, run), strict=True):
        wanted = root * (vectors @ (f * (vectors.T @ (root * gradients[row]))))
        assert np.linalg.norm(found.numpy() - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_few_steps_come_near_and_none_is_gradient_descent(data, model):
    asked = [model.gradient(batches([0]))]
    near, whole_space = (refined(model, batches(range(ROWS)), asked, Run(3.0, None, steps))[0] for steps in (6, 36))
    assert float((near - whole_space).norm() / whole_space.norm()) < 0.05
    small = refined(model, batches(range(ROWS)), asked, Run(1e-7, None, 3))[0]
    torch.testing.assert_close(small / 1e-7, asked[0], rtol=1e-4, atol=1e-6)


def test_rows_are_scored_as_by_their_gradients(data, model):
    gradients = whole(data)[2]
    x = torch.tensor(np.random.default_rng(2).normal(size=len(model.theta)))
    some = batches([0, 1, 2, 3], [4, 5, 6])
    for scale in (1e-7, 1, 1e6):
        along = Along.of(model, scale * x, some[0])
        assert along.error < 0.02
        found = torch.cat(list(row_scores(model, some, [along])), 1)[0].numpy()
        wanted = gradients @ (scale * x.numpy())
        assert np.linalg.norm(found - wanted) < max(2 * along.error, 1e-5) * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [1e-29, 1e-25, 1e25])
def test_lengths_that_float32_can_not_square_are_lengths(data, model, scale):
    narrow = WholeModel(
        {name: torch.tensor(data[name]).float() for name in ("inner", "outer")},
        lambda named, rows: model.predictions({name: p.double() for name, p in named.items()}, rows),
    )
    x = torch.tensor(np.random.default_rng(2).normal(size=len(model.theta)))
    some = batches([0, 1, 2, 3])
    along = Along.of(narrow, (scale * x).float(), some[0])
    wanted = whole(data)[2][:4] @ x.numpy()
    found = next(row_scores(narrow, some, [along]))[0].numpy() / scale
    assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)
    query = refined(narrow, some, [(scale * x).float()], Run(1e-7, None, 2))[0].double() / scale / 1e-7
    torch.testing.assert_close(query, x, rtol=1e-4, atol=1e-6)


def test_a_query_without_gradient_scores_nothing(model):
    nothing = refined(model, batches(range(ROWS)), [torch.zeros_like(model.theta)], Run(1.0))[0]
    along = Along.of(model, nothing, batches([0])[0])
    assert not next(row_scores(model, batches([1, 2]), [along])).any()


def test_second_moments_are_of_random_batches(data, model):
    gradients = whole(data)[2]
    found = second_moments(model, batches, ROWS, seed=1)
    every = gradients.mean(0) ** 2  # seven rows are one batch, whatever the order
    np.testing.assert_allclose(found.numpy(), every, rtol=1e-9)


def test_the_metric_is_adams_and_its_largest_are_cut():
    moments = torch.tensor([0.0, 1.0, 4.0, 16.0, 64.0, 256.0], dtype=torch.float64)
    assert adam_metric(moments, eps=0).tolist() == [0.25, 0.25, 0.25, 0.25, 0.125, 0.0625]  # the median of those not 0
    assert adam_metric(torch.tensor([1.0, 1.0]), eps=1.0).tolist() == [0.5, 0.5]
    for bad in (torch.zeros(3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(FormatError, match="second moments are zero or not finite: give the optimizer state"):
            adam_metric(bad)
