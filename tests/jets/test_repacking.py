"""New runs: rows gone, batches packed anew, another order; against a loop that knows nothing of recipes."""

import random

import numpy as np
import pytest
import torch

from leaveout.errors import UnsupportedError
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.repacking import new_run
from leaveout.training.tasks import task_of
from leaveout.training.train import train_plain

from .test_recipe import points


def shuffled(**changes):
    settings = {
        "batch_size": 4,
        "epochs": 3,
        "order": "shuffled",
        "optimizer": OptimizerSettings("sgd", 0.1, momentum=0.9),
    }
    return Recipe(
        "classifier", points(14), units=tuple("aabbbccddeefgh"), model={"hidden": [5]}, **{**settings, **changes}
    )


def without(recipe, *units):
    return np.array([float(name in units) for name in recipe.unit_names])


def sizes(recipe):
    return [[len(part) for part in step] for step in recipe.micro_batches()]


def test_a_new_run_is_that_of_a_plain_loop():
    recipe = shuffled(schedule="linear")
    chance, rest, batches = random.Random("new run 5"), [i for i in range(14) if recipe.units[i] not in "bd"], []
    for _ in range(3):
        chance.shuffle(rest)
        batches += [rest[i : i + 4] for i in range(0, len(rest), 4)]
    model = task_of(recipe).model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / len(batches))
        optimizer.zero_grad()
        x, y = (torch.stack([torch.as_tensor(recipe.examples[i][part]) for i in batch]) for part in (0, 1))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = train_plain(new_run(recipe, without(recipe, "b", "d"), 5))
    for (name, p), wanted in zip(found.items(), model.parameters(), strict=True):
        torch.testing.assert_close(p, wanted.detach(), rtol=0, atol=1e-6, msg=name)


def test_orders_differ_by_seed_and_nothing_else_does():
    recipe = shuffled()
    a, again, b = (new_run(recipe, without(recipe), seed) for seed in (1, 1, 2))
    assert a.batches() == again.batches() != b.batches()
    assert sizes(a) == sizes(recipe) and a.unit_names == recipe.unit_names
    starts = [dict(task_of(r).model.named_parameters()) for r in (recipe, a)]
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())


def test_packing_follows_the_recipe():
    few = without(shuffled(), "a", "b")
    assert sizes(new_run(shuffled(), few, 0)) == [[4], [4], [1]] * 3
    assert sizes(new_run(shuffled(drop_last=True), few, 0)) == [[4], [4]] * 3
    assert sizes(new_run(shuffled(steps=5), few, 0)) == [[4], [4], [1], [4], [4]]
    assert sizes(new_run(shuffled(accumulate=2), few, 0)) == [[2, 2], [2, 2], [1]] * 3
    given = new_run(shuffled(order="given"), few, 0).batches()
    assert given[:3] == given[3:6] and sorted(sum(given[:3], ())) == list(range(5, 14)) != list(sum(given[:3], ()))
    with pytest.raises(UnsupportedError, match="too few rows for one batch"):
        new_run(shuffled(drop_last=True), without(shuffled(), *"abcdef"), 0)


def test_a_part_of_a_row_stays_in_its_batches():
    recipe = shuffled()
    half = without(recipe, "a") / 2
    assert sizes(new_run(recipe, half, 0)) == sizes(recipe)


def recorded(epochs, **changes):
    return shuffled(order=[step for epoch in epochs for step in epoch], **changes)


def test_recorded_batches_are_packed_by_their_own_sizes():
    def epoch(seed, n=14):
        rows = random.Random(seed).sample(range(14), 14)[:n]
        micro = [rows[i : i + 3] for i in range(0, n, 3)]
        return [micro[i : i + 2] for i in range(0, len(micro), 2)]

    recipe = recorded([epoch(0), epoch(1)], dropout=7, schedule=(0.0, 0.5, 1.0, 0.8, 0.4, 0.0))
    whole, few = new_run(recipe, without(recipe), 1), new_run(recipe, without(recipe, "a", "b"), 1)
    assert sizes(whole) == sizes(recipe) and whole.schedule == recipe.schedule and whole.dropout == 1
    assert sizes(few) == [[3, 3], [3]] * 2 and len(few.schedule) == 4 and max(few.schedule) == 0.8
    assert sorted(sum(few.batches()[:2], ())) == list(range(5, 14))
    dropping = recorded([epoch(0, 12), epoch(1, 12)])  # one row is in no step: eight others are left
    assert sizes(new_run(dropping, without(recipe, "a", "b"), 1)) == [[3, 3]] * 2
    cut = recorded([epoch(0), epoch(1)[:2]])
    assert sizes(new_run(cut, without(recipe, "a", "b"), 1)) == [[3, 3], [3], [3, 3], [3], [3, 3]]


def test_what_cannot_be_packed_is_refused():
    x = without(shuffled())
    with pytest.raises(UnsupportedError, match="cannot be packed anew: ask for the same run"):
        new_run(recorded([[[0, 1, 2], [3], [4, 5]]]), x, 0)
    for often in ([[0], [1], [0], [2], [0]], [[0, 1], [2, 0], [3, 0], [4, 5], [1, 1]]):  # drawn with replacement
        with pytest.raises(UnsupportedError, match="no epochs of equal batches with each row once"):
            new_run(shuffled(order=[tuple(batch) for batch in often]), x, 0)
    with pytest.raises(UnsupportedError, match="says nothing of other batches"):
        new_run(shuffled(order=((0, 1), (2, 3)), loss_per=(2.0, 3.0)), x, 0)
