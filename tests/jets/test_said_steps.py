"""What a recipe can say of its steps, as trainers take them: every engine against a loop written by hand."""

import pytest
import torch
from torch import nn

from leaveout.errors import UnsupportedError
from leaveout.training.recipe import OptimizerSettings
from leaveout.training.reverse.flat_run import FlatRun
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import IGNORED, task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles.agreement import assert_close

from .test_steps import flat, model, uneven  # noqa: F401  (a fixture)

MICRO = (((0, 1), (2,)), ((3, 4, 5),), ((6, 0), (1, 2)))
ADAMW = OptimizerSettings("adamw", 0.02, eps=1e-2, weight_decay=2.0, undecayed="vectors")
ADAM = OptimizerSettings("adam", 0.02, eps=1e-2, weight_decay=0.3, undecayed=("*bias", "*ln_*"))
SGD = OptimizerSettings("sgd", 0.2, momentum=0.8, weight_decay=0.3, undecayed="vectors")
CASES = {
    "hf": {"optimizer": ADAMW, "loss_per": "token", "warmup": 2, "warmup_from_zero": True, "schedule": "linear",
           "clip_norm": 1.0},
    "means": {"optimizer": ADAM, "loss_per": "micro-batch", "order": MICRO, "epochs": 1, "label_smoothing": 0.2},
    "given": {"optimizer": SGD, "loss_per": (9.0, 30.0, 11.0), "schedule": (0.5, 1.0, 0.25), "order": MICRO, "epochs": 1},
}  # fmt: skip


def by_hand(recipe, weights):
    """A loop of its own, with torch's optimizers and losses token by token."""
    task, s = task_of(recipe), recipe.optimizer
    own = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    spared = [n for n, p in own.items() if p.dim() == 1]
    groups = [
        {"params": [p for n, p in own.items() if n not in spared], "weight_decay": s.weight_decay},
        {"params": [own[n] for n in spared], "weight_decay": 0.0},
    ]
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.name]
    optimizer = made(groups, s.lr, **({"momentum": s.momentum} if s.name == "sgd" else {"eps": s.eps}))
    rates = {"hf": (0, 0.5, 1, 0.5), "means": (1, 1, 1), "given": (0.5, 1, 0.25)}
    case = next(name for name, fields in CASES.items() if fields["optimizer"] == s)
    steps = (((0, 1, 2, 3),), ((4, 5, 6),)) * 2 if case == "hf" else MICRO
    for number, (rate, parts) in enumerate(zip(rates[case], steps, strict=True)):
        optimizer.zero_grad()
        sums, counts = [], []
        for part in parts:
            each = [_tokens(task, recipe, i, weights) for i in part]
            sums.append(sum(loss.sum() for loss in each))
            counts.append(sum(map(len, each)))
        if case == "means":
            total = sum(s / n for s, n in zip(sums, counts, strict=True)) / len(parts)
        else:
            total = sum(sums) / (sum(counts) if case == "hf" else (9.0, 30.0, 11.0)[number])
        total.backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(own.values(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * rate
        optimizer.step()
    return flat(own)


def _tokens(task, recipe, number, weights):
    """Weighted losses of a row's learned tokens."""
    logits, targets = task.outputs(task.model, task.encode([recipe.examples[number]]))
    kept = targets[0] != IGNORED
    logs = torch.log_softmax(logits[0][kept], -1)
    right = logs.gather(1, targets[0][kept][:, None])[:, 0]
    eps = recipe.label_smoothing
    return -((1 - eps) * right + eps * logs.mean(1)) * weights[recipe.unit_of[number]]


@pytest.mark.parametrize("case", CASES)
def test_each_engine_takes_the_steps_that_the_recipe_says(model, case):  # noqa: F811
    recipe = uneven(model, **CASES[case])
    units = len(recipe.unit_names)
    weights = torch.rand(2, units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [by_hand(recipe, w) for w in (torch.ones(units, dtype=torch.float64), *weights)]
    assert_close(flat(train_plain(recipe)), wanted[0], "exact")
    both = train_batch(recipe, weights)
    for i in (0, 1):
        assert_close(flat({name: p[i] for name, p in both.items()}), wanted[1 + i], "exact")
    run = FlatRun(recipe)
    for step in range(run.steps):
        run.advance(step)
    own = run.parameters()
    assert_close(torch.cat([own[n].flatten() for n in run.task.trained]), wanted[0], "exact")
    psi = torch.eye(units, dtype=torch.float64)
    jets = train_jets(recipe, psi, JetSettings(1, torch.float64), ["ab abz"])
    step = 1e-5 * psi
    runs = train_batch(recipe, torch.cat([1 + step, 1 - step]))
    for name, slope in jets.coefficients.items():
        differences = (runs[name][units:] - runs[name][:units]) / 2e-5
        assert (slope[0] - differences).abs().max() < 1e-5 * (1 + differences.abs().max()), name
    back = metagradient(recipe, ["ab abz"])
    # Keys' biases have no gradient but rounding, of which Adam's root makes a number.
    assert (torch.from_numpy(back.effects)[0] - jets.losses.h[0, :, 0]).abs().max() < 1e-8
    assert unit_vectors(recipe).updates.shape[0] == units


def test_smoothing_is_not_in_what_queries_are_asked(model):  # noqa: F811
    recipe = uneven(model, label_smoothing=0.3)
    task = task_of(recipe)
    batch = task.encode(recipe.examples)
    assert not torch.allclose(task.loss(task.model, batch), task.learned(task.model, batch))
    plain = task_of(recipe.with_(label_smoothing=0.0))
    assert torch.equal(task.loss(task.model, batch), plain.loss(plain.model, batch))


def test_what_is_said_counts_for_the_hash_and_is_cut_with_the_run(model):  # noqa: F811
    one = uneven(model, **CASES["given"])
    changes = (
        {"schedule": (0.5, 1.0, 0.3)}, {"loss_per": (9.0, 30.0, 12.0)}, {"label_smoothing": 0.1},
        {"order": (((0,), (1, 2)), *MICRO[1:])}, {"optimizer": ADAMW},
    )  # fmt: skip
    assert len({one.hash(), *(one.with_(**change).hash() for change in changes)}) == 6
    hf = uneven(model, **CASES["hf"])
    assert hf.hash() != hf.with_(warmup_from_zero=False).hash()
    short = one.first_steps(2)
    assert short.batches() == ((0, 1, 2), (3, 4, 5)) and short.schedule == (0.5, 1.0) and len(short.loss_per) == 2
    assert len(hf.first_steps(1).batches()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": (1.0,)}, "schedule has 1 numbers and the run 3 steps: give one for each step"),
        ({"schedule": (1.0, -1.0, 0.0)}, "each of schedule must be a number of at least 0, got -1.0"),
        ({"warmup": 1}, "schedule has the rate of each step, the first ones too: leave warmup out"),
        ({"loss_per": (1.0, 0.0, 2.0)}, "loss_per has a 0, by which no loss can be divided"),
        ({"loss_per": "tokens"}, "loss_per is 'tokens': did you mean 'token'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ({"accumulate": 2}, "order has the micro-batches, and accumulate is 2: leave accumulate out"),
        ({"order": (((0,), ()), (1,), (2,))}, "batch 0 of order is empty"),
        ({"order": (((0, 7),), (1,), (2,))}, "batches of example numbers below 7"),
    ],
)
def test_steps_that_do_not_fit_are_refused(model, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        uneven(model, **{**CASES["given"], **changes})


def test_a_pattern_that_spares_nothing_is_refused_before_training(model):  # noqa: F811
    recipe = uneven(model, optimizer=OptimizerSettings("adamw", undecayed=("*.beta",)))
    for engine in (train_plain, FlatRun):
        with pytest.raises(UnsupportedError, match=r"No trained parameter matches '\*.beta' of `undecayed`"):
            engine(recipe)
    with pytest.raises(
        ValueError, match=r"optimizer\.undecayed must be vectors or a list of name patterns, got 'bias'"
    ):
        OptimizerSettings(undecayed="bias")
