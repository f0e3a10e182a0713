"""Methods by gradients and losses against plain loops, and their sign and size against real retraining."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.methods import gradients
from leaveout.methods.embedding import EmbeddingCosine
from leaveout.methods.gradient_dot import GradientDot
from leaveout.methods.rapidin import RapidIn
from leaveout.methods.scorer import take_snapshots
from leaveout.methods.tracin import TracIn
from leaveout.methods.z0_inf import Z0Inf
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import train_batch, train_plain
from methods.slow import NAMES, RECIPES, SGD, points, slow_gradients, slow_losses, slow_product, tiny_lm
from tolerances import TOLERANCES

KINDS = list(RECIPES)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained():
    """Task, trained parameters and three snapshots of each recipe, made once."""
    made = {}
    for name, recipe in RECIPES.items():
        n = len(recipe.batches())
        snapshots = take_snapshots(recipe, [0, n // 2, n])
        made[name] = task_of(recipe), snapshots[-1].parameters, snapshots
    return made


def assert_close(found, wanted, kind):
    wanted = np.asarray(wanted)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCES[kind] * np.abs(wanted).max()


def close(name):
    """The kind of tolerance of a recipe's scores."""
    return "float32 gradients" if name == "causal-lm" else "float64 scores"


def slow_table(name, parameters, queries, rows, names=None):
    left, right = (slow_gradients(name, parameters, part) for part in (queries, rows))
    return [[slow_product(a, b, names) for b in right] for a in left]


@pytest.mark.parametrize("name", KINDS)
def test_gradient_dot_and_cosine_equal_plain_loops(name, trained):
    task, parameters, _ = trained[name]
    rows = RECIPES[name].examples
    every = np.array(slow_table(name, parameters, rows, rows))
    assert_close(GradientDot(task, parameters).score(rows[:3], rows), every[:3], close(name))
    length = np.sqrt(np.diag(every))
    cosines = every / length / length[:, None]
    assert_close(GradientDot(task, parameters, cosine=True).score(rows[:3], rows), cosines[:3], close(name))


@pytest.mark.parametrize(("memory", "passes"), [(1, 12 + 12 * 40), (20_000, 2 + 1 * 6), (2**30, 1 + 2)])
def test_scores_do_not_depend_on_memory(memory, passes, trained, monkeypatch):
    task, parameters, _ = trained["classifier"]
    rows = points(40, 5)
    wanted = GradientDot(task, parameters).score(rows[:12], rows)
    sizes = []
    vmapped = torch.vmap
    monkeypatch.setattr(
        torch, "vmap", lambda f, **how: lambda v, *e: sizes.append(len(e[0])) or vmapped(f, **how)(v, *e)
    )
    assert_close(GradientDot(task, parameters, memory=memory).score(rows[:12], rows), wanted, "float64 scores")
    one = 8 * sum(p.numel() for p in parameters.values())
    assert max(sizes) <= min(32, max(1, memory // 8 // one)) and len(sizes) == passes


def test_a_gradient_does_not_depend_on_its_companions(trained):
    """Rows of other lengths in the batch mean padding; it may not count."""
    task, parameters, _ = trained["causal-lm"]
    rows = RECIPES["causal-lm"].examples
    together = torch.cat(list(gradients.example_gradients(task, parameters, rows)))
    alone = torch.cat(list(gradients.example_gradients(task, parameters, rows, memory=1)))
    apart = (together - alone).norm(dim=1) / alone.norm(dim=1)
    assert float(apart.max()) <= TOLERANCES["float32 gradients"]


def test_many_parameters_lose_no_digits():
    """A float32 sum of a million products, one after the other, is off by 1e-4 or more; a length by half of that."""
    x = torch.rand(2, 2**20, generator=torch.Generator().manual_seed(0))
    wanted = (x.double() @ x.double().T).numpy()
    assert_close(gradients.products(x, x).float().numpy(), wanted, "float64 scores")
    length = gradients.unit_rows(x).double().square().sum(1)
    assert float((length - 1).abs().max()) <= TOLERANCES["float64 scores"]
    none = torch.zeros(2, 3)
    assert torch.equal(gradients.unit_rows(none), none)


@pytest.mark.parametrize("name", KINDS)
def test_tracin_equals_plain_loops(name, trained):
    task, _, snapshots = trained[name]
    rows = RECIPES[name].examples
    wanted = sum(s.rate * np.array(slow_table(name, s.parameters, rows[:2], rows)) for s in snapshots)
    assert_close(TracIn(task, snapshots).score(rows[:2], rows), wanted, close(name))


@pytest.mark.parametrize("name", KINDS)
def test_z0_inf_equals_plain_loops(name, trained):
    task, _, snapshots = trained[name]
    rows, n = RECIPES[name].examples, len(snapshots)
    losses = np.array([[float(x) for x in slow_losses(name, s.parameters, rows)] for s in snapshots])
    flat = [np.concatenate([p.double().numpy().ravel() for p in s.parameters.values()]) for s in snapshots]
    centred = losses - losses.mean(1, keepdims=True)
    wanted = np.zeros((2, len(rows)))
    for q in range(2):
        for i in range(len(rows)):
            for here in range(n):
                near = [other for other in range(n) if 0 < abs(other - here) <= 2]
                guesses = []
                for row in (q, i):
                    steps = [(centred[here, row] - centred[o, row], flat[here] - flat[o]) for o in near]
                    guesses.append(sum(change * d / (d @ d) for change, d in steps) / len(near))
                wanted[q, i] += guesses[0] @ guesses[1] / n
            wanted[q, i] *= stats.spearmanr(losses[:, q], losses[:, i]).statistic
    kind = "differences of losses" if name == "causal-lm" else "float64 scores"
    assert_close(Z0Inf(task, snapshots, correlated=True).score(rows[:2], rows), wanted, kind)


def test_z0_inf_is_the_gradient_product_along_one_short_step():
    """Along a short step d the loss differences are <gradient, d>; both slopes together are the product along d."""
    recipe = RECIPES["classifier"].with_(lr=1e-5, steps=1)
    task, snapshots = task_of(recipe), take_snapshots(recipe, [0, 1])
    start, end = (s.parameters for s in snapshots)
    d = {key: end[key] - start[key] for key in start}
    slopes = np.array([
        slow_product(g, d) / slow_product(d, d) ** 0.5 for g in slow_gradients("classifier", start, recipe.examples)
    ])  # fmt: skip
    slopes -= slopes.mean()
    scores = Z0Inf(task, snapshots).score(recipe.examples, recipe.examples)
    assert_close(scores, np.outer(slopes, slopes), "second order")


def test_z0_inf_of_one_query_is_that_of_many(trained):
    task, _, snapshots = trained["classifier"]
    rows, z0 = RECIPES["classifier"].examples, Z0Inf(task, snapshots)
    np.testing.assert_allclose(z0.score(rows[:1], rows), z0.score(rows, rows)[:1], rtol=1e-5)


def test_embeddings_are_mean_hidden_states(trained):
    task, parameters, _ = trained["causal-lm"]
    rows = RECIPES["causal-lm"].examples
    model, tokenizer = tiny_lm()
    model.load_state_dict(parameters, strict=False)
    wanted = []
    for row in rows:
        out = model(input_ids=torch.tensor([tokenizer(row.text).input_ids]), output_hidden_states=True)
        wanted.append(out.hidden_states[-1][0].mean(0).detach())  # after the final norm, as the head sees it
    found = EmbeddingCosine(task, parameters)
    torch.testing.assert_close(found.embeddings(rows), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    cosines = [[float(a @ b / a.norm() / b.norm()) for b in wanted] for a in wanted]
    assert_close(found.score(rows, rows), cosines, "float32 gradients")


def test_embeddings_of_a_classifier_and_of_microgpt(trained):
    task, p, _ = trained["classifier"]
    x = torch.stack([x for x, _ in RECIPES["classifier"].examples]).double()
    hidden = torch.nn.functional.gelu(x @ p["1.0.weight"].T + p["1.0.bias"])
    torch.testing.assert_close(EmbeddingCosine(task, p).embeddings(RECIPES["classifier"].examples), hidden)
    task, p, _ = trained["microgpt"]
    states = EmbeddingCosine(task, p).embeddings(NAMES)
    logits = [task.outputs(task.model, task.encode([name]))[0][0] for name in NAMES]
    head = dict(task.model.named_parameters())  # the task's model is at its start, and its head has no bias
    found = EmbeddingCosine(task, head).embeddings(NAMES) @ head["lm_head.weight"].T
    torch.testing.assert_close(found, torch.stack([x.mean(0) for x in logits]))
    assert states.shape == (6, 16)


# --- RapidIn -----------------------------------------------------------------------------------------------------


def test_rapidin_is_a_signed_sum_of_blocks_after_a_shuffle(trained):
    task, parameters, _ = trained["microgpt"]
    size, width = sum(p.numel() for p in parameters.values()), 64
    found = RapidIn(task, parameters, width=width)
    matrix = found.compress(torch.eye(size, dtype=torch.float64))
    assert ((matrix != 0).sum(1) == 1).all() and (matrix.abs().sum(1) == 1).all()
    block = -(-size // width)
    assert (matrix.abs().sum(0) <= block).all() and matrix.abs().sum() == size
    assert abs(float(matrix.sum())) < 5 * size**0.5
    bucket = matrix.abs().argmax(1).numpy()
    assert abs(stats.spearmanr(np.arange(size), bucket).statistic) < 5 / size**0.5
    x = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(found.compress(x), x @ matrix)
    rows = RECIPES["microgpt"].examples
    grads = torch.stack(
        [torch.cat([g[n].flatten() for n in task.trained]) for g in slow_gradients("microgpt", parameters, rows)]
    )
    small = (grads / grads.norm(dim=1, keepdim=True)) @ matrix
    assert_close(found.score(rows[:2], rows), (small[:2] @ small.T).numpy(), "float16 sketches")


def test_rapidin_keeps_inner_products_in_expectation(trained):
    """Over seeds, the mean of <Px, Py> is <x, y>; its variance is at most (|x|^2 |y|^2 + <x, y>^2) / width."""
    task, parameters, _ = trained["microgpt"]
    g = torch.Generator().manual_seed(1)
    size, width, seeds = sum(p.numel() for p in parameters.values()), 32, 60
    x, y = torch.randn(2, size, generator=g)
    y = y + 0.5 * x
    values = []
    for seed in range(seeds):
        a, b = RapidIn(task, parameters, width=width, seed=seed).compress(torch.stack([x, y]))
        values.append(float(a @ b))
    bound = float(((x @ x) * (y @ y) + (x @ y) ** 2) / width / seeds) ** 0.5
    assert abs(np.mean(values) - float(x @ y)) < 5 * bound
    assert np.std(values) > 0.1 * bound * seeds**0.5


def test_rapidin_of_a_small_model_is_the_cosine(trained):
    task, parameters, _ = trained["classifier"]
    rows = RECIPES["classifier"].examples
    cosine = GradientDot(task, parameters, cosine=True).score(rows, rows)
    assert_close(RapidIn(task, parameters).score(rows, rows), cosine, "float16 sketches")
    assert next(RapidIn(task, parameters).sketches(rows)).dtype == torch.float16


# --- snapshots ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_snapshots_are_the_run(name, trained):
    recipe, (task, _, snapshots) = RECIPES[name], trained[name]
    end = train_plain(recipe)
    assert all(torch.equal(end[key], p) for key, p in snapshots[-1].parameters.items())
    start = dict(task_of(recipe).model.named_parameters())
    assert all(torch.equal(start[key], snapshots[0].parameters[key]) for key in task.trained)


def test_snapshots_in_the_middle_and_their_rates():
    recipe = RECIPES["classifier"].with_(clip_norm=0.5)  # constant rate: shorter runs are beginnings of the long one
    for snapshot in take_snapshots(recipe, [1, 2, 5]):
        shorter = train_plain(recipe.with_(steps=snapshot.step))
        assert all(torch.equal(shorter[key], p) for key, p in snapshot.parameters.items())
    linear = RECIPES["classifier"].with_(schedule="linear", lr=0.6)
    rates = [s.rate for s in take_snapshots(linear, [0, 2, 3, 6])]
    assert rates == pytest.approx([0.6, 0.55, 0.4, 0.2])
    for wrong in ([], [2, 1], [1, 1], [-1], [7]):
        with pytest.raises(ValueError, match=r"ascending steps within 0 \.\.\. 6"):
            take_snapshots(linear, wrong)


# --- against retraining ------------------------------------------------------------------------------------------


def leave_one_out(recipe, queries):
    """Rise of each query's loss [query, train] when a row is left out, really retrained."""
    n = len(recipe.examples)
    without = query_losses(recipe, train_batch(recipe, 1 - torch.eye(n, dtype=torch.float64)), queries)
    return (without - query_losses(recipe, train_plain(recipe), queries)).numpy().T


def test_tracin_of_one_step_is_leave_one_out():
    """One small step over the whole batch: leaving a row out takes rate / batch * gradient away, sign and size."""
    recipe = Recipe("classifier", points(12, 0), batch_size=12, steps=1, optimizer=SGD, dtype="float64").with_(lr=1e-4)
    queries = points(5, 1)
    found = TracIn(task_of(recipe), take_snapshots(recipe, [0])).score(queries, recipe.examples)
    assert_close((found / 12).astype(np.float32), leave_one_out(recipe, queries), "second order")


def test_signs_agree_with_leave_one_out():
    """A regularised logistic regression, trained to its minimum with and without each row."""
    recipe = Recipe(
        "classifier", points(60, 0), model={"hidden": []}, batch_size=60, steps=150, dtype="float64",
        optimizer=OptimizerSettings("sgd", 0.3, weight_decay=0.01),
    )  # fmt: skip
    queries = points(9, 1)
    effects = leave_one_out(recipe, queries)
    snapshots = take_snapshots(recipe, [0, 1, 4, 16, 64, 150])
    task, parameters = task_of(recipe), snapshots[-1].parameters
    lowest = [
        (GradientDot(task, parameters), 0.6),
        (GradientDot(task, parameters, cosine=True), 0.6),
        (RapidIn(task, parameters), 0.6),
        (TracIn(task, snapshots), 0.5),
        (Z0Inf(task, snapshots), 0.1),
    ]
    for baseline, least in lowest:
        pairs = zip(baseline.score(queries, recipe.examples), effects, strict=True)
        assert np.mean([stats.spearmanr(*pair).statistic for pair in pairs]) > least


# --- messages ----------------------------------------------------------------------------------------------------


def test_no_queries_or_no_rows_give_empty_scores(trained):
    task, parameters, snapshots = trained["classifier"]
    rows = RECIPES["classifier"].examples
    several = [GradientDot(task, parameters), EmbeddingCosine(task, parameters), RapidIn(task, parameters)]
    for baseline in [*several, TracIn(task, snapshots), Z0Inf(task, snapshots)]:
        assert baseline.score([], rows).shape == (0, 9) and baseline.score(rows, []).shape == (9, 0)


def test_wrong_arguments_are_refused(trained):
    task, parameters, snapshots = trained["classifier"]
    rows = RECIPES["classifier"].examples
    other = trained["microgpt"][1]
    with pytest.raises(MismatchError, match=r"have no 1\.0\.weight of shape \(5, 4\)"):
        GradientDot(task, other).score(rows, rows)
    with pytest.raises(ValueError, match="at least one snapshot"):
        TracIn(task, [])
    with pytest.raises(ValueError, match="at least two snapshots"):
        Z0Inf(task, snapshots[:1])
    with pytest.raises(ValueError, match="near 6 steps are equal"):
        Z0Inf(task, [snapshots[-1], snapshots[-1]]).score(rows, rows)
    with pytest.raises(ValueError, match="width is 0"):
        RapidIn(task, parameters, width=0)


def test_an_embedding_needs_a_linear_layer():
    recipe = Recipe(
        "custom",
        tuple(torch.randn(4, 2)),
        model=lambda: torch.nn.LayerNorm(2),
        loss=lambda model, batch: model(batch[0]).sum(1),
    )
    task = task_of(recipe)
    with pytest.raises(UnsupportedError, match="runs no linear layer"):
        EmbeddingCosine(task, dict(task.model.named_parameters())).score(recipe.examples, recipe.examples)
