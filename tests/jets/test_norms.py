"""Batch norm in training form, against a loop of torch alone that takes the rows out of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.training.loop import Loop, RunOptions
from leaveout.training.memory import kept_bytes
from leaveout.training.norms import WeightedNorm
from leaveout.training.notes import notes_on
from leaveout.training.queries import jet_values, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.adamw_influence import adamw_influence
from leaveout.training.reverse.metagradient import ReverseSettings, metagradient
from leaveout.training.reverse.updates import unit_vectors
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles.agreement import assert_close

UNITS = 9
EYE = torch.eye(UNITS, dtype=torch.float64)


def flat(momentum=0.1, affine=True):
    """On vectors."""
    norm = nn.BatchNorm1d(5, momentum=momentum, affine=affine)
    return nn.Sequential(nn.Linear(16, 5), norm, nn.SiLU(), nn.Dropout(0.3), nn.Linear(5, 3))


def images(momentum=0.1, affine=True):
    """On images, and in the end on vectors."""
    norms = [kind(2, momentum=momentum, affine=affine) for kind in (nn.BatchNorm2d, nn.BatchNorm1d)]
    view = nn.Unflatten(1, (1, 4, 4))
    return nn.Sequential(
        view, nn.Conv2d(1, 2, 2), norms[0], nn.GELU(), nn.Flatten(), nn.Linear(18, 2), norms[1], nn.Linear(2, 3)
    )


def sequences():
    """On vectors with time behind the channels."""
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Unflatten(1, (4, 4)), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


class Shared(nn.Module):
    """Goes twice through one norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16, momentum=None)
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.norm(self.inner(self.norm(x)) / 4))


MODELS = {
    "flat": flat, "shared": Shared, "images": images, "sequences": sequences, "cumulative": lambda: images(None),
    "not affine": lambda: flat(0.3, False),
}  # fmt: skip
OPTIMIZERS = {
    "sgd": OptimizerSettings("sgd", 0.2, momentum=0.9), "adamw": OptimizerSettings("adamw", 0.02, weight_decay=0.1, eps=1e-3),
}  # fmt: skip


def rows(n=UNITS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(16, generator=g, dtype=torch.float64), i % 3) for i in range(n))


def recipe_of(name="flat", **changes):
    how = {
        "batch_size": 3, "epochs": 2, "dtype": "float64", "optimizer": OPTIMIZERS["sgd"], "batch_statistics": True,
        **changes,
    }  # fmt: skip
    return Recipe("classifier", rows(), model=MODELS.get(name, name), **how)


def by_hand(recipe, kept):
    """Trains on the rows that are kept, in the same batches; [parameters and running statistics] by name.

    The loss is divided by the whole batch. A row that is alone is its own mean, of which torch makes no variance.
    """
    torch.manual_seed(recipe.seed)
    model = recipe.model().double()
    decay = {"weight_decay": recipe.optimizer.weight_decay}
    if recipe.optimizer.name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), recipe.optimizer.lr, momentum=recipe.optimizer.momentum)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), recipe.optimizer.lr, eps=recipe.optimizer.eps, **decay)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for step in recipe.micro_batches():
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for part in step:
            here = [i for i in part if i in kept]
            if not here:
                continue
            x, y = (
                torch.stack([recipe.examples[i][0] for i in here]),
                torch.tensor([recipe.examples[i][1] for i in here]),
            )
            for norm in norms:
                norm.train()
            forward = F.batch_norm
            if len(here) == 1:
                nn.functional.batch_norm = alone(forward, norms)
            try:
                losses = F.cross_entropy(model(x), y, reduction="none")
            finally:
                nn.functional.batch_norm = forward
            (losses.sum() / sum(map(len, step))).backward()
        optimizer.step()
    own = dict(model.named_parameters())
    return {**own, **{n: b for n, b in model.named_buffers() if "running" in n}}


def alone(forward, norms):
    """torch's batch norm, but for one value a channel."""

    def normed(x, mean, var, weight, bias, training, momentum, eps):
        if x.numel() > x.shape[1]:
            return forward(x, mean, var, weight, bias, training, momentum, eps)
        for norm in norms:
            if norm.running_mean is mean:
                norm.num_batches_tracked -= 1
        return torch.zeros_like(x) if bias is None else bias.expand_as(x)

    return normed


def agree(found, wanted, kind="exact"):
    assert {name for name in found if "tracked" not in name} == set(wanted)
    for name, p in wanted.items():
        assert_close(found[name].detach(), p.detach(), kind)


REMOVED = [(), (1,), (4, 5), (3, 4, 5), (0, 1, 2, 7, 8), tuple(range(UNITS))]
"""Batches left with two rows, one, and none."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_weight_0_are_not_in_the_batch(name, optimizer):
    recipe = recipe_of(name, optimizer=OPTIMIZERS[optimizer], accumulate=1 if optimizer == "sgd" else 3, batch_size=9)
    if optimizer == "sgd":
        recipe = recipe.with_(batch_size=3)
    weights = torch.ones(len(REMOVED), UNITS, dtype=torch.float64)
    for row, gone in zip(weights, REMOVED, strict=True):
        row[list(gone)] = 0
    wanted = [by_hand(recipe, set(range(UNITS)) - set(gone)) for gone in REMOVED]
    plain = train_plain(recipe)
    assert all(torch.equal(plain[name], p) for name, p in wanted[0].items())  # bit for bit
    both = train_batch(recipe, weights)
    for i, one in enumerate(wanted):
        agree({name: p[i] for name, p in both.items()}, one)
        agree(train_plain(recipe, weights[i]), one)
    losses = query_losses(recipe, both, rows(2, 5))
    model = recipe.model().double().eval()
    for i, one in enumerate(wanted):
        model.load_state_dict(one, strict=False)
        x, y = (torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*rows(2, 5), strict=True))
        assert_close(losses[i], F.cross_entropy(model(x), y, reduction="none").detach(), "exact")
    assert not torch.allclose(losses[1], query_losses(recipe, train_plain(recipe_of(name)), rows(2, 5)), atol=1e-3)


STEPS = {
    "plain": {"optimizer": OptimizerSettings("sgd", 0.1, momentum=0.5)},
    "in parts": {"optimizer": OptimizerSettings("sgd", 0.1), "batch_size": 9, "accumulate": 3, "clip_norm": 0.1},
    "dropped": {"optimizer": OPTIMIZERS["adamw"], "dropout": 3},
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["flat", "shared", "images", "cumulative"])
def test_reverse_mode_goes_through_the_statistics(name, steps, tmp_path):
    recipe, queries = recipe_of(name, **STEPS[steps]), rows(4, 5)
    wanted = train_jets(recipe, EYE, JetSettings(1, torch.float64), queries).losses
    found = metagradient(recipe, queries, RunOptions(tmp_path, save_every=0.0), settings=ReverseSettings(states="disk"))
    assert_close(torch.from_numpy(found.effects), wanted.h[0].T, "exact")
    assert_close(torch.from_numpy(found.base), wanted.c, "exact")
    plain = train_plain(recipe)
    vectors = unit_vectors(recipe, width=10**6)
    for key, p in vectors.params.items():
        assert_close(p, plain[key], "exact")


@pytest.mark.parametrize("name", ["flat", "images", "cumulative"])
def test_series_follow_the_statistics(name):
    recipe, queries, h = recipe_of(name, optimizer=OptimizerSettings("sgd", 0.1)), rows(2, 5), 1e-4
    run = train_jets(recipe, EYE, JetSettings(2, torch.float64), queries)
    agree(run.constants, by_hand(recipe, set(range(UNITS))))
    values = [query_losses(recipe, train_batch(recipe, 1 - s * h * EYE), queries) for s in (1, 0, -1)]
    first, second = (values[0] - values[2]) / (2 * h), (values[0] - 2 * values[1] + values[2]) / (2 * h**2)
    assert (run.losses.h[0] - first).abs().max() < 1e-6 * first.abs().max()
    assert (run.losses.h[1] - second).abs().max() < 1e-4 * second.abs().max()
    again = jet_values(recipe, run.constants, run.coefficients, queries)
    assert_close(again.h, run.losses.h, "exact")


def test_dropout_and_checkpoints_go_with_them(tmp_path, monkeypatch):
    recipe = recipe_of("flat", dropout=3)
    weights = torch.ones(2, UNITS, dtype=torch.float64)
    weights[1, 4] = 0
    both = train_batch(recipe, weights)
    for i in range(2):
        agree({n: p[i] for n, p in both.items()}, train_plain(recipe, weights[i]))
    assert not torch.allclose(both["1.running_mean"][0], train_plain(recipe.with_(dropout=None))["1.running_mean"])
    options = RunOptions(tmp_path, save_every=0.0)
    half, whole = recipe_of("cumulative"), train_plain(recipe_of("cumulative"))
    taken, left = Loop.step, iter(range(2))

    def stop(self, parts):
        next(left)
        taken(self, parts)

    with monkeypatch.context() as changed, pytest.raises(StopIteration):
        changed.setattr(Loop, "step", stop)
        train_plain(half, options=options)
    found = train_plain(half, options=options)
    assert all(torch.equal(found[name], p) for name, p in whole.items())


def test_a_run_keeps_and_asks_them(tmp_path):
    recipe = recipe_of("images")
    run = TrainingRun.train(recipe, tmp_path / "run")
    assert any("training form" in note for note in run.notes)
    again = TrainingRun.open(tmp_path / "run", recipe)
    agree(again.parameters, by_hand(recipe, set(range(UNITS))))
    values = again.retrain(list(rows(2, 5)), [["3"], ["3", "4", "5"]])
    wanted = [by_hand(recipe, set(range(UNITS)) - gone) for gone in ({3}, {3, 4, 5})]
    for column, one in zip(values.T, wanted, strict=True):
        model = recipe.model().double().eval()
        model.load_state_dict(one, strict=False)
        x, y = (torch.stack([torch.as_tensor(part) for part in pair]) for pair in zip(*rows(2, 5), strict=True))
        assert_close(torch.from_numpy(column), F.cross_entropy(model(x), y, reduction="none").detach(), "exact")
    new = again.retrain(
        list(rows(2, 5)), [[str(i) for i in range(5)]], meaning="new-run", runs=2
    )  # one row is left over
    assert torch.from_numpy(new).isfinite().all()


class Own(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input).relu()


class Turned(nn.Module):
    """Gives its norm tokens as rows."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.norm(x.view(-1, 4)).view(-1, 16))


class Frozen(nn.Module):
    """Keeps its norm as it is, whatever it is asked."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.out(self.norm(x))


def with_norm(norm):
    return lambda: nn.Sequential(nn.Linear(16, 4), norm(), nn.Linear(4, 3))


REFUSED = {
    "own": (with_norm(lambda: Own(4)), "1 is of the class Own, whose statistics are not followed"),
    "none": (with_norm(nn.Identity), "has no batch norm in training form"),
    "frozen": (Frozen, "has no batch norm in training form"),
    "synchronised": (with_norm(lambda: nn.SyncBatchNorm(4)), "1 is of the class SyncBatchNorm"),
    "untracked": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(),
                              nn.Linear(16, 3)),
        "1 is of the class batch norm without running statistics",
    ),
    "instance": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(),
                              nn.Linear(16, 3)),
        "1 is of the class InstanceNorm1d",
    ),
    "turned": (Turned, "sees 12 rows of 3 examples"),
}  # fmt: skip


class Spectral(nn.Module):
    """Has vectors of its own that go on in training form."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 5))
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.drop(self.inner(x)))


def test_states_of_other_modules_are_constants():
    recipe, queries, h = recipe_of(Spectral, batch_statistics=False), rows(2, 5), 1e-4
    losses = train_jets(recipe, EYE, JetSettings(1, torch.float64), queries).losses
    low, high = (query_losses(recipe, train_batch(recipe, 1 + s * h * EYE), queries) for s in (1, -1))
    assert (losses.h[0] - (high - low) / (2 * h)).abs().max() < 1e-6 * losses.h.abs().max()
    with pytest.raises(UnsupportedError, match=r"changes its buffer inner\.\S+_u in training form"):
        task_of(recipe.with_(dropout=1))


def test_autocast_keeps_statistics_in_single_precision():
    recipe = recipe_of("images", dtype="float32", autocast="bfloat16", optimizer=OptimizerSettings("sgd", 0.01))
    weights = torch.ones(2, UNITS)
    weights[1, 4] = 0
    both, plain = train_batch(recipe, weights), train_plain(recipe)
    for i, w in enumerate(weights):
        for name, p in train_plain(recipe, w).items():
            assert (both[name][i] - p).abs().max() < 0.01 * (1 + p.abs().max()), name
    assert all((both[name][0] - p).abs().max() < 0.01 * (1 + p.abs().max()) for name, p in plain.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        task_of(recipe_of(make))


def test_a_norm_alone_with_a_row_is_refused_and_others_are_said():
    with pytest.raises(UnsupportedError, match=r"A micro-batch has 1 examples, and so one value a channel in .*'1'"):
        task_of(recipe_of(batch_size=4))
    task_of(recipe_of(batch_size=4, drop_last=True))
    recipe = recipe_of()
    off = recipe.with_(batch_statistics=False)
    assert "is frozen" in "".join(notes_on(off, task_of(off))) and recipe.hash() != off.hash()
    assert recipe.hash() == recipe_of().hash()
    task = task_of(recipe)
    assert kept_bytes(recipe, task) > kept_bytes(off, task_of(off)) and task.model[1].made == []
    assert isinstance(task.model[1], WeightedNorm) and task.running == ("1.running_mean", "1.running_var")
    assert torch.equal(task.model[1].running_mean, torch.zeros(5, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="Stored gradients of rows know nothing of batch norm"):
        adamw_influence(recipe, rows(1, 5))
    with pytest.raises(ValueError, match="a microgpt recipe has no batch_statistics"):
        Recipe.microgpt(["anna", "bob"], batch_statistics=True)
