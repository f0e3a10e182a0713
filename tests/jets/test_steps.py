"""What a step divides by: the whole step's own examples or tokens, however it is cut and whoever runs it."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from leaveout.corpus import Corpus
from leaveout.methods.scorer import take_snapshots
from leaveout.training.loop import Steps
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe, in_parts
from leaveout.training.reverse.flat_run import FlatRun
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import IGNORED, task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles import roots
from oracles.agreement import assert_close

from .test_recipe import NAMES, points, tiny_gpt2
from .test_train import OPTIMIZERS

UNEVEN = [{"prompt": "say: ", "completion": "ab " * n + "z", "unit": str(n % 3)} for n in (1, 7, 2, 5, 1, 3, 6)]
SGD = OptimizerSettings("sgd", 0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_gpt2(tmp_path_factory.mktemp("uneven")))


def uneven(model, **changes):
    rows = tuple(Corpus.open(UNEVEN, units="unit"))
    settings = {"model": model, "dtype": "float64", "optimizer": SGD, "batch_size": 4, "epochs": 2, **changes}
    return Recipe("causal-lm", rows, **settings)


def flat(params):
    return torch.cat([p.detach().flatten() for p in params.values()])


def by_hand(recipe, weights):
    """A loop of its own: all tokens (or examples) of a step in one sum, divided by their number."""
    task = task_of(recipe)
    params = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, recipe.optimizer.lr)
    for batch in recipe.batches():
        optimizer.zero_grad()
        losses, counts = [], []
        for number in batch:
            logits, targets = task.outputs(task.model, task.encode([recipe.examples[number]]))
            each = nn.functional.cross_entropy(logits[0], targets[0], ignore_index=IGNORED, reduction="sum")
            counts.append(int((targets != IGNORED).sum()))
            losses.append(each * weights[recipe.unit_of[number]])
        if recipe.loss_per == "token":
            (sum(losses) / sum(counts)).backward()
        else:
            (sum(loss / n for loss, n in zip(losses, counts, strict=True)) / len(batch)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


CUTS = [("token", 1), ("token", 2), ("token", 3), ("token", 4), ("example", 3)]


@pytest.mark.parametrize(("per", "accumulate"), CUTS)
@pytest.mark.parametrize("kind", ["causal-lm", "microgpt"])
def test_every_way_of_training_divides_by_the_whole_step(per, accumulate, kind, model):
    """7 rows in steps of 4 and 3, cut into parts that do not divide either, with weights and one of them 0."""
    if kind == "causal-lm":
        recipe = uneven(model, loss_per=per, accumulate=accumulate)
    else:
        names = ["a", "annabella", "bo", "christopher", "di", "eve", "fredericka"]
        settings = {"batch_size": 4, "epochs": 2, "optimizer": SGD, "dtype": "float64", "units": tuple("aabbccc"),
                    "schedule": "constant"}  # fmt: skip
        recipe = Recipe.microgpt(names, n=7, loss_per=per, accumulate=accumulate, **settings)
    for weights in (torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)):
        wanted = by_hand(recipe, weights)
        assert_close(flat(train_plain(recipe, weights)), wanted, "exact")
        assert_close(flat({n: p[0] for n, p in train_batch(recipe, weights[None]).items()}), wanted, "exact")
    wanted = by_hand(recipe, torch.ones(3))
    run = FlatRun(recipe)
    for step in range(run.steps):
        run.advance(step)
    assert_close(flat(run.parameters()), wanted, "exact")
    assert_close(flat(take_snapshots(recipe, [len(recipe.batches())])[0].parameters), wanted, "exact")
    vectors = unit_vectors(recipe, width=10**6)
    start = torch.cat([p.detach().flatten() for p in task_of(recipe).model.parameters()])
    np.testing.assert_allclose(vectors.updates.sum(0), (wanted - start).numpy(), atol=1e-6)


@pytest.mark.parametrize(("per", "accumulate"), CUTS)
def test_jets_reverse_mode_and_copies_have_the_slopes_of_that_loop(per, accumulate, model):
    recipe = uneven(model, loss_per=per, accumulate=accumulate, trained=("*mlp*",))
    queries = [recipe.examples[1], recipe.examples[0]]
    psi = torch.eye(3, dtype=torch.float64)
    jets = train_jets(recipe, psi, JetSettings(1, torch.float64), queries).losses
    assert jets is not None
    assert_close(torch.from_numpy(metagradient(recipe, queries).effects), jets.h[0].T, "exact")
    circle = roots.Circle(8, 1e-2)
    _, values = roots.train_recipe(recipe, psi[1], circle, queries)
    assert_close(roots.coefficients(values, circle.radius, 1)[1].real, jets.h[0, 1], "roots")


@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_query_is_the_mean_over_its_own_tokens_whatever_it_is_asked_with(together, model):
    """Queries of 4 to 22 tokens in one batch, where the recipe's loss is per token."""
    recipe, one = uneven(model, loss_per="token", steps=1), torch.zeros(1, 3, dtype=torch.float64)
    rows = recipe.examples[:together]
    jets = train_jets(recipe, one, JetSettings(1, torch.float64), list(rows)).losses
    assert jets is not None
    wanted = torch.cat([query_losses(recipe, train_plain(recipe), [row]) for row in rows])
    assert_close(jets.c, wanted, "exact")


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_batches_of_different_sizes_divide_by_their_own(optimizer):
    """An order of batches of 3, 1 and 4, beside a `batch_size` that has nothing to say."""
    order = ((0, 1, 2), (3,), (4, 5, 6, 7))
    recipe = Recipe(
        "classifier", points(8), optimizer=OPTIMIZERS[optimizer], order=order, batch_size=2, dtype="float64"
    )
    task = task_of(recipe)
    from leaveout.training.loop import make_optimizer

    mine = make_optimizer(recipe, list(task.model.parameters()))
    for batch in order:
        mine.zero_grad()
        task.loss(task.model, task.encode([recipe.examples[i] for i in batch])).mean().backward()
        mine.step()
    wanted = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    for accumulate in (1, 2, 3):
        assert_close(flat(train_plain(recipe.with_(accumulate=accumulate))), wanted, "exact")


def test_the_last_batch_of_an_epoch_is_trained_on_as_a_loader_gives_it():
    recipe = Recipe("classifier", points(7), batch_size=3, epochs=2, optimizer=SGD)
    loader = torch.utils.data.DataLoader(range(7), batch_size=3)
    wanted = [tuple(batch.tolist()) for _ in range(2) for batch in loader]
    assert list(recipe.batches()) == wanted and recipe.untrained_units() == ()
    shuffled = recipe.with_(order="shuffled").batches()
    assert [sorted(itertools.chain(*shuffled[i : i + 3])) for i in (0, 3)] == [list(range(7))] * 2
    dropped = recipe.with_(drop_last=True)
    assert dropped.untrained_units() == ("6",) and recipe.with_(steps=1).untrained_units() == ("3", "4", "5", "6")
    assert recipe.with_(order=((1, 2), (2,)), units=tuple("aabbccc")).untrained_units() == ("c",)


@pytest.mark.parametrize(
    ("n", "parts", "wanted"), [(5, 2, [3, 2]), (7, 3, [3, 3, 1]), (6, 4, [2, 2, 2]), (2, 4, [1, 1])]
)
def test_micro_batches_are_of_one_size_but_the_last(n, parts, wanted):
    found = list(in_parts(tuple(range(n)), parts))
    assert [len(part) for part in found] == wanted and tuple(itertools.chain(*found)) == tuple(range(n))


def test_examples_of_weight_zero_keep_the_divisor():
    recipe = Recipe.microgpt(NAMES, n=4, batch_size=4, loss_per="token")
    (part,) = Steps(recipe, task_of(recipe)).parts(0)
    kept = part.only([part.numbers[2]])
    assert kept.divisor == part.divisor == float(part.sizes.sum())
    assert kept.numbers == part.numbers[2:3] and kept.sizes.tolist() == part.sizes[2:3].tolist()
