"""Runs share a batch only where that gives the numbers of each run alone: else they go one by one, and it is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.training.batching import batching_problem
from leaveout.training.loop import Loop
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.flat_run import FlatRun
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from readout.tiny import make_model, make_tokenizer

WEIGHTS = torch.ones(3, 6, dtype=torch.float64) - torch.eye(3, 6, dtype=torch.float64)


class NoRule(torch.autograd.Function):
    """A square in the old form, for which torch.vmap has no rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class OnceOnly(NoRule):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class NoBackward(NoRule):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the square has no derivative twice")
        return 2 * x * grad


class Forgetful(torch.autograd.Function):
    """A square that keeps a number of its own making: for its second derivative that is a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


class WrongProduct(torch.autograd.Function):
    """A product whose rule for batches gives all runs what the first one gets, without a word."""

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return WrongProduct.apply(grad, y), WrongProduct.apply(grad, x)

    @staticmethod
    def vmap(info, in_dims, x, y):
        found = (x if in_dims[0] is None else x[0]) * (y if in_dims[1] is None else y[0])
        return found.expand(info.batch_size, *found.shape), 0


def wrong_rule(x):
    return WrongProduct.apply(x, x)


def by_values(x):
    """A square whose course depends on its values."""
    return torch.zeros_like(x).index_put(tuple(x.nonzero().T), x[x != 0] * x[x != 0])


SQUARES = {"no rule": NoRule.apply, "by values": by_values, "wrong rule": wrong_rule, "plain": torch.square}


class Net(nn.Module):
    def __init__(self, square):
        super().__init__()
        self.first, self.second, self.square = nn.Linear(3, 4), nn.Linear(4, 2), square

    def forward(self, x):
        return self.second(self.square(self.first(x)))


def make_recipe(square, dtype="float64"):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    examples = tuple((row, i % 2) for i, row in enumerate(x))
    return Recipe(
        "classifier", examples, model=lambda: Net(square), batch_size=2, epochs=3, optimizer=OptimizerSettings("sgd", 0.1),
        dtype=dtype,
    )  # fmt: skip


def one_after_another(recipe, weights):
    found = [train_plain(recipe, row) for row in weights]
    return {name: torch.stack([f[name] for f in found]) for name in found[0]}


def close(found, wanted, limit=1e-9):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert float((value - wanted[name]).abs().max()) < limit, name


@pytest.mark.parametrize("name", SQUARES)
def test_runs_together_equal_each_alone(name):
    recipe = make_recipe(SQUARES[name])
    close(train_batch(recipe, WEIGHTS), one_after_another(recipe, WEIGHTS))


@pytest.mark.parametrize(
    ("name", "why"),
    [("no rule", "setup_context"), ("by values", "dynamic shape"), ("wrong rule", "other numbers than each alone")],
)
def test_what_cannot_be_batched_is_found_beforehand(name, why):
    recipe = make_recipe(SQUARES[name])
    found = batching_problem(recipe, task_of(recipe))
    assert found is not None and why in found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_can_be_batched_is_not_suspected(dtype):
    recipe = make_recipe(torch.square, dtype)
    assert batching_problem(recipe, task_of(recipe)) is None


@pytest.mark.parametrize("name", ["no rule", "wrong rule"])
def test_retrainings_one_by_one_are_said_once(name, tmp_path, capsys):
    recipe = make_recipe(SQUARES[name])
    run = TrainingRun.train(recipe, tmp_path / "run")
    queries = list(recipe.examples[:2])
    values = run.retrain(queries, [["0"], ["1"], ["2"]])
    truth = query_losses(recipe, one_after_another(recipe, WEIGHTS), queries).numpy().T
    assert abs(values - truth).max() < 1e-9
    run.retrain(queries, [["3"], ["4"]])
    run.measure(retrain=6, queries=queries)
    assert capsys.readouterr().err.count("Retrainings go one by one") == 1
    assert ["one by one" in note for note in run.bank.info()["notes"]] == [True]


def test_nothing_is_said_of_runs_that_share_batches(tmp_path, capsys):
    recipe = make_recipe(torch.square)
    run = TrainingRun.train(recipe, tmp_path / "run")
    run.retrain(list(recipe.examples[:2]), [["0"], ["1"]])
    assert not capsys.readouterr().err and "notes" not in run.bank.info()


@pytest.mark.parametrize("name", SQUARES)
def test_kept_parameters_of_many_runs_are_asked_like_each_alone(name, tmp_path):
    """The model is batched only when it is asked: training never puts these runs together."""
    recipe = make_recipe(torch.square)
    runs = one_after_another(recipe, WEIGHTS)
    asked = make_recipe(SQUARES[name])
    truth = torch.stack([query_losses(asked, {n: p[i] for n, p in runs.items()}, asked.examples) for i in range(3)])
    assert float((query_losses(asked, runs, asked.examples) - truth).abs().max()) < 1e-9

    def square_of_bias(model):
        return SQUARES[name](model.second.bias)

    truth = torch.stack([p * p for p in runs["second.bias"]])
    assert float((query_losses(recipe, runs, square_of_bias) - truth).abs().max()) < 1e-12


@pytest.mark.parametrize("name", SQUARES)
def test_reverse_mode_gives_the_same_for_many_queries_as_for_each(name):
    recipe = make_recipe(SQUARES[name])
    together = metagradient(recipe, recipe.examples[:4]).effects
    wanted = metagradient(make_recipe(torch.square), recipe.examples[:4]).effects
    assert abs(wanted).max() > 1e-3 and abs(together - wanted).max() < 1e-9


@pytest.mark.parametrize("name", SQUARES)
def test_gradients_of_many_examples_equal_each_alone(name):
    found, wanted = unit_vectors(make_recipe(SQUARES[name])), unit_vectors(make_recipe(torch.square))
    assert abs(found.final - wanted.final).max() < 1e-6 < abs(wanted.final).max()
    assert abs(found.updates - wanted.updates).max() < 1e-6 < abs(wanted.updates).max()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("square", "why"),
    [
        (NoBackward.apply, "no derivative"),
        (OnceOnly.apply, "not linear"),
        (Forgetful.apply, "how the gradient changes"),
    ],
)
def test_reverse_mode_without_second_derivatives_is_refused_before_the_first_step(square, why, batch_size, monkeypatch):
    """torch tells of the first only, and goes back through the others without a word."""
    recipe = make_recipe(square).with_(batch_size=batch_size)
    assert len(train_plain(recipe))
    monkeypatch.setattr(FlatRun, "advance", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UnsupportedError, match=rf"Reverse mode does not support .*{why}.* with retrainings"):
        metagradient(recipe, recipe.examples[:1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("square", [torch.relu, torch.abs, torch.tanh, lambda x: x * 1e-3, lambda x: 5 * x * x])
def test_reverse_mode_takes_kinks_and_all_sizes_for_what_they_are(square, dtype):
    recipe = make_recipe(square, dtype)
    assert abs(metagradient(recipe, recipe.examples[:3]).effects).max() > 0


def test_jets_without_a_rule_are_refused_before_the_first_step(monkeypatch):
    recipe = make_recipe(torch.square)
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UnsupportedError, match=r"aten.topk.default has no rule"):
        train_jets(
            recipe, torch.ones(1, 6, dtype=torch.float64), JetSettings(1), lambda m: m.second.bias.topk(1).values
        )


def mixture(experts="eager", **settings):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=523, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def bloom():
    import transformers

    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=523, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(bloom, "float32"), (bloom, "float64"), (mixture, "float32"), (lambda: mixture("grouped_mm"), "float64"),
     (lambda: mixture("grouped_mm"), "float32"), (lambda: make_model("llama", dtype=torch.float32), "float32")],
    ids=["bloom 32", "bloom 64", "eager experts", "experts 64", "experts 32", "llama"],
)  # fmt: skip
def test_language_models_are_retrained_whatever_torch_can_batch(make, dtype, tmp_path):
    tokenizer = make_tokenizer()
    texts = ["rain falls", "the mill stands", "a blue ledger of debts", "salt"]
    rows = tuple(Corpus.open([{"id": str(i), "text": text} for i, text in enumerate(texts)]))
    recipe = Recipe(
        "causal-lm", rows, model=lambda: (make(), tokenizer), batch_size=2, dtype=dtype,
        optimizer=OptimizerSettings("sgd", 0.1),
    )  # fmt: skip
    run = TrainingRun.train(recipe, tmp_path / "run")
    values = run.retrain([texts[0]], [["1"], ["2"], ["3"]])
    weights = 1 - torch.eye(4, dtype=torch.float64)[1:]
    wanted = query_losses(recipe, one_after_another(recipe, weights), list(rows[:1])).numpy().T
    assert abs(values - wanted).max() < (1e-4 if dtype == "float32" else 1e-9)
    assert abs(wanted - wanted.mean()).max() > 1e-3


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.embedding(ids.long()).sum(1))


def test_a_padding_index_is_honoured_for_every_run_and_example():
    """As a batch over weights and ids both, torch honours it for the first one only."""
    ids = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 2], [2, 0, 0], [3, 4, 0], [1, 1, 0]])
    recipe = Recipe(
        "classifier", tuple((row, i % 2) for i, row in enumerate(ids)), model=Bag, batch_size=2, epochs=3,
        optimizer=OptimizerSettings("sgd", 0.1), dtype="float64",
    )  # fmt: skip
    found = train_batch(recipe, WEIGHTS)
    close(found, one_after_another(recipe, WEIGHTS))
    start = dict(task_of(recipe).model.named_parameters())["embedding.weight"][0]
    assert torch.equal(found["embedding.weight"][:, 0], start.detach().expand(3, -1))
    vectors, final = unit_vectors(recipe), torch.zeros(6, 5, 4)
    for i in range(6):
        weight = vectors.params["embedding.weight"].clone().requires_grad_()
        model = task_of(recipe).model
        values = {**vectors.params, "embedding.weight": weight}
        loss = F.cross_entropy(torch.func.functional_call(model, values, (ids[i : i + 1],)), torch.tensor([i % 2]))
        final[i] = torch.autograd.grad(loss, weight)[0]
    assert abs(vectors.final[:, :20] - final.flatten(1).numpy()).max() < 1e-6
