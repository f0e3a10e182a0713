"""Training: plain, many weightings, jets, all of one recipe; checkpoints, memory, stability."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaveout.corpus import Corpus
from leaveout.errors import FormatError, MismatchError, StabilityError, UnsupportedError
from leaveout.models import free_memory
from leaveout.training import doctor
from leaveout.training.doctor import Stability, check_stability, growth_scale, random_directions
from leaveout.training.loop import RunOptions, Steps, make_optimizer
from leaveout.training.memory import plan_memory, runs_together
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles import roots
from oracles.agreement import assert_close

from .test_recipe import NAMES, ROWS, lm_directory, points  # noqa: F401  (a fixture)

OPTIMIZERS = {
    "sgd": OptimizerSettings("sgd", 0.1, weight_decay=0.01), "momentum": OptimizerSettings("sgd", 0.05, 0.9, True),
    "adam": OptimizerSettings("adam", 0.01, eps=1e-2), "adamw": OptimizerSettings("adamw", 0.01, weight_decay=0.1, eps=1e-2),
    "paper-adam": OptimizerSettings("paper-adam", 0.01),
}  # fmt: skip


def classifier(**changes):
    settings = {"batch_size": 2, "epochs": 2, "dtype": "float64", "order": "shuffled", "model": {"hidden": [5]},
                "optimizer": OPTIMIZERS["paper-adam"], "schedule": "cosine", "warmup": 1}  # fmt: skip
    return Recipe("classifier", points(8), units=tuple("aabbccdd"), **{**settings, **changes})


def ordinary_loop(recipe):
    """What a user would write."""
    task = task_of(recipe)
    params = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(recipe, params)
    batches = recipe.batches()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, len(batches))
        x = torch.stack([recipe.examples[i][0] for i in batch]).to(recipe.real_dtype)
        y = torch.tensor([recipe.examples[i][1] for i in batch])
        optimizer.zero_grad()
        F.cross_entropy(task.model(x), y, reduction="none").mean().backward()
        optimizer.step()
    return dict(task.model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_is_an_ordinary_loop_bit_for_bit(name, dtype):
    recipe = classifier(optimizer=OPTIMIZERS[name], dtype=dtype)
    wanted = ordinary_loop(recipe)
    for name, p in train_plain(recipe).items():
        assert torch.equal(p, wanted[name].detach())


RECIPES = {
    "classifier": lambda where: classifier(clip_norm=0.5),
    "accumulated": lambda where: classifier(batch_size=4, accumulate=2),
    "microgpt": lambda where: Recipe.microgpt(NAMES, n=5, dtype="float64"),
    "causal-lm": lambda where: lm(where, loss_per="example"),
    "per-token": lambda where: lm(where, loss_per="token"),
    "lora": lambda where: lm(where, trained={"lora": {"r": 2, "alpha": 8, "targets": ["c_attn", "c_fc"]}}),
}


def lm(where, **changes):
    settings = {"batch_size": 2, "epochs": 2, "optimizer": OptimizerSettings("sgd", 0.2), "dtype": "float64"}
    return Recipe(
        "causal-lm", tuple(Corpus.open(ROWS, units="unit")), model=str(where / "model"), **settings, **changes
    )


def made(name, where):
    if name == "lora":
        pytest.importorskip("peft")
    return RECIPES[name](where)


peft_warns = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::FutureWarning:peft", "ignore::UserWarning:peft"
)


@peft_warns
@pytest.mark.parametrize("name", RECIPES)
def test_batch_of_weightings_equals_single_runs(name, lm_directory):  # noqa: F811
    recipe = made(name, lm_directory)
    weights = torch.rand(3, len(recipe.unit_names), dtype=torch.float64)
    weights[1, 1] = 0.0
    together = train_batch(recipe, weights, together=2)
    for run in range(3):
        alone = train_plain(recipe, weights[run])
        for key, p in alone.items():
            assert_close(together[key][run], p, "exact")
    losses = query_losses(recipe, together, recipe.examples[:2])
    assert_close(losses[1], query_losses(recipe, train_plain(recipe, weights[1]), recipe.examples[:2]), "exact")


@peft_warns
@pytest.mark.parametrize("name", RECIPES)
def test_examples_that_no_run_keeps_are_not_computed(name, lm_directory, monkeypatch):  # noqa: F811
    recipe = made(name, lm_directory)
    weights = torch.rand(2, len(recipe.unit_names), dtype=torch.float64) + 0.5
    weights[:, recipe.unit_of[list(recipe.batches()[0])]] = 0.0  # nothing is left of the first step
    weights[0, -1] = 0.0
    alone = [train_plain(recipe, row) for row in weights]
    seen = []

    def watched(steps, part):
        seen.append(part.numbers)
        return fed(steps, part)

    fed = Steps.fed
    monkeypatch.setattr(Steps, "fed", watched)
    together = train_batch(recipe, weights)
    for run in range(2):
        for key, p in alone[run].items():
            assert_close(together[key][run], p, "exact")
    parts = [part for step in recipe.micro_batches() for part in step]
    used = (weights[:, recipe.unit_of] != 0).any(0)
    kept = [tuple(i for i in part if used[i]) or part[:1] for part in parts]
    assert kept[0] == parts[0][:1] and seen == (kept if task_of(recipe).separate else parts)


class ByTheInput(nn.Module):
    """A head of its own for some inputs: without them it has no gradient, and its momentum stops."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        parts = [(self.low, x[:, :1] <= 0), (self.high, x[:, :1] > 0)]
        return sum(mask * head(x) for head, mask in parts if bool(mask.any()))


def test_examples_that_others_may_need_are_kept():
    torch.manual_seed(0)
    recipe = classifier(model=ByTheInput, optimizer=OPTIMIZERS["momentum"])
    weights = torch.ones(2, len(recipe.unit_names), dtype=torch.float64)
    weights[:, ::2] = 0.0
    together = train_batch(recipe, weights)
    for key, p in train_plain(recipe, weights[0]).items():
        assert_close(together[key][0], p, "exact")


def test_heavy_runs_without_much_of_their_data_go_alone(lm_directory, monkeypatch):  # noqa: F811
    """Each leaves out what it has lost; light runs, and those whose examples need each other, share their calls."""
    separate, coupled = lm(lm_directory, loss_per="token"), classifier(model=ByTheInput)

    def together(recipe, absent):
        return runs_together(recipe, task_of(recipe), 7, 2**30, absent)

    assert together(separate, 0.5) == 7
    monkeypatch.setattr("leaveout.training.memory.HEAVY", 1)
    assert [together(separate, absent) for absent in (0.0, 0.05, 0.5)] == [7, 7, 1]
    assert together(coupled, 0.5) == 7
    monkeypatch.setattr("leaveout.training.memory.HUGE", 1)
    assert together(separate, 0.0) == together(coupled, 0.0) == 1


@peft_warns
@pytest.mark.parametrize("name", RECIPES)
def test_jets_predict_small_changes_of_weights(name, lm_directory):  # noqa: F811
    """Along a real direction the series must meet real retrainings: error ratio 2^4 when z is halved, at degree 3."""
    recipe = made(name, lm_directory)
    psi = random_directions(1, len(recipe.unit_names), seed=1)
    run = train_jets(recipe, psi, JetSettings(3, torch.float64), recipe.examples[:2])
    errors = []
    for z in (0.1, 0.05):
        truth = train_plain(recipe, 1 - z * psi[0])
        worst = 0.0
        for key, c in run.constants.items():
            h = run.coefficients[key][:, 0]
            worst = max(worst, float((c + h[0] * z + h[1] * z**2 + h[2] * z**3 - truth[key]).abs().max()))
        errors.append(worst)
        series = run.losses.c + sum(run.losses.h[k, 0] * z ** (k + 1) for k in range(3))
        assert float((series - query_losses(recipe, truth, recipe.examples[:2])).abs().max()) < 1e-3
    assert errors[0] < 1e-3 and errors[1] < errors[0] / 10
    assert_close(run.losses.c, query_losses(recipe, train_plain(recipe), recipe.examples[:2]), "exact")


def test_jets_agree_with_complex_copies():
    recipe = Recipe.microgpt(NAMES, n=5, dtype="float64")
    psi = torch.randn(1, 5, dtype=torch.complex128)
    run = train_jets(recipe, psi, JetSettings(3), ["anna"])
    params, losses = roots.train_recipe(recipe, psi[0], roots.Circle(16, 0.05), ["anna"])
    for name, h in run.coefficients.items():
        assert_close(h[:, 0], roots.coefficients(params[name], 0.05, 3)[1:], "roots")
    assert_close(run.losses.h[:, 0], roots.coefficients(losses, 0.05, 3)[1:], "roots")


def test_jets_do_not_depend_on_how_directions_are_split():
    recipe = classifier()
    psi = torch.randn(5, 4, dtype=torch.complex128)
    whole = train_jets(recipe, psi, JetSettings(2), recipe.examples[:3])
    small = (whole.memory.state + whole.memory.activations) * 2
    split = train_jets(recipe, psi, JetSettings(2), recipe.examples[:3], RunOptions(memory=small))
    assert split.memory.rounds == 3 and split.memory.peak <= small
    assert_close(split.losses.h, whole.losses.h, "exact")
    for name, h in whole.coefficients.items():
        assert_close(split.coefficients[name], h, "exact")
    assert not train_jets(recipe, psi, JetSettings(2, keep_parameters=False), recipe.examples[:1]).coefficients


def test_outputs_can_be_any_function_of_the_model():
    recipe = classifier()
    psi = torch.randn(2, 4, dtype=torch.complex128)
    x = torch.ones(1, 4, dtype=torch.float64)
    run = train_jets(recipe, psi, JetSettings(1), lambda model: model(x)[0])
    assert run.losses.h.shape == (1, 2, 3)
    assert_close(run.losses.c, query_losses(recipe, train_plain(recipe), lambda model: model(x)[0]), "exact")


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", ["plain", "batch", "jets"])
@pytest.mark.parametrize("name", ["momentum", "adamw", "paper-adam"])
def test_killed_run_resumes_to_the_same_numbers(how, name, tmp_path, monkeypatch):
    recipe = classifier(optimizer=OPTIMIZERS[name])
    weights = torch.rand(2, 4, dtype=torch.float64)
    psi = torch.randn(2, 4, dtype=torch.complex128)

    def go(options):
        if how == "plain":
            return train_plain(recipe, weights[0], options)
        if how == "batch":
            return train_batch(recipe, weights, options)
        return train_jets(recipe, psi, JetSettings(2), options=options).coefficients

    wanted = go(None)
    options = RunOptions(directory=tmp_path, save_every=0.0)
    real, calls = torch.optim.Optimizer.zero_grad, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", dying)
    with pytest.raises(Killed):
        go(options)
    resumed = go(options)
    assert len(calls) == 6 + len(recipe.batches()) - 5  # the five finished steps were not done again
    for key, value in wanted.items():
        assert_close(resumed[key], value, "exact")
    again = go(options)
    assert len(calls) == 6 + len(recipe.batches()) - 5 and all(torch.equal(again[k], resumed[k]) for k in again)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    options = RunOptions(directory=tmp_path)
    train_plain(classifier(), options=options)
    with pytest.raises(MismatchError, match=r"plain.safetensors belongs to another run: delete it"):
        train_plain(classifier(seed=1), options=options)
    (tmp_path / "plain.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="is not a checkpoint"):
        train_plain(classifier(), options=options)


def test_memory_is_stated_before_the_run_and_follows_the_formula(capsys):
    recipe = classifier(dtype="float32")
    task = task_of(recipe)
    count = sum(p.numel() for p in task.model.parameters())
    plan = plan_memory(recipe, task, 3, 10, torch.complex64)
    assert plan.state == 32 * 3 * count and plan.activations > 0 and plan.rounds == 1
    train_jets(recipe, torch.randn(2, 4), JetSettings(1), options=RunOptions(progress=True))
    shown = capsys.readouterr().err
    assert shown.startswith("memory: 2 directions in 1 round(s) of 2:") and "step/s" in shown
    assert free_memory() > 1e6


GROWTH = """
import ctypes, gc, sys
from pathlib import Path
import torch
from leaveout.deletion.directions import complex_uniform
from leaveout.training.recipe import Recipe
from leaveout.training.train import JetSettings, train_jets

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

torch.set_num_threads(1)
names = [a + b + c for a in "abcdefgh" for b in ("an", "or", "il") for c in ("na", "tis", "rek")]
recipe, degree = Recipe.microgpt(names, n=72).with_(steps=3), int(sys.argv[1])
psi = torch.from_numpy(complex_uniform(0, 128, 72, 0))
train_jets(recipe, psi[:1], JetSettings(degree))  # what is loaded and set up once
gc.collect()
getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
run = train_jets(recipe, psi, JetSettings(degree))
print((kilobytes("VmHWM") - before) * 2**10 / run.memory.peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's account of memory")
@pytest.mark.parametrize("degree", [1, 3])
def test_process_grows_by_what_was_stated(degree):
    command = [sys.executable, "-c", GROWTH, str(degree)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 0.7 < float(ended.stdout) < 1.5


def test_direction_that_cannot_fit_is_refused():
    recipe = classifier()
    with pytest.raises(UnsupportedError, match="train fewer parameters"):
        plan_memory(recipe, task_of(recipe), 3, 10, torch.complex128, limit=100)


def relu_net():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))


def test_run_with_a_kink_says_so_from_degree_2():
    recipe = classifier(model=relu_net)
    psi = torch.randn(1, 4)
    assert train_jets(recipe, psi, JetSettings(1)).warnings == []
    run = train_jets(recipe, psi, JetSettings(2))
    assert run.nonsmooth["relu"] == 8 and "relu" in run.warnings[0] and "degree 1" in run.warnings[0]


def exploding(**changes):
    wild = OptimizerSettings("adamw", 0.3, eps=1e-12, weight_decay=0.0)
    return classifier(optimizer=wild, epochs=30, dtype="float32", **changes)


def test_overflowing_run_stops():
    with pytest.raises(StabilityError, match=r"overflowed at step \d+, degree \d.*leaveout doctor"):
        train_jets(exploding(), 1e6 * torch.randn(1, 4), JetSettings(6))


def test_stable_run_is_called_stable():
    found = check_stability(classifier(optimizer=OptimizerSettings("sgd", 0.05)))
    assert found.verdict == "stable" and found.ratio <= 1 and not found.advice and found.require() is found
    assert len(found.growth) == 5 and "degree" in str(found)


def test_unstable_run_gets_a_table_and_advice():
    found = check_stability(exploding(model=relu_net))
    assert found.verdict == "unstable" and found.ratio > 3
    text = str(found)
    assert "relu" in text and ("Epsilon" in text or "paper-adam" in text or "Learning rate" in text)
    with pytest.raises(StabilityError, match="no usable power series"):
        found.require()


def test_momentum_is_blamed_where_it_is_at_fault():
    recipe = classifier(optimizer=OptimizerSettings("sgd", 1.0, momentum=0.99), epochs=15)
    found = check_stability(recipe)
    assert found.verdict != "stable" and any("Momentum 0" in line for line in found.advice)


def test_growth_is_measured_by_real_retrainings():
    """Oracle of the table's degree 1: a central difference of ordinary runs."""
    recipe = classifier(optimizer=OptimizerSettings("sgd", 0.05))
    found = doctor._measure(recipe, None)
    psi = random_directions(4, 4, recipe.seed)
    step, sizes = 1e-4, []
    for row in psi:
        up, down = (train_plain(recipe, 1 - sign * step * row) for sign in (1, -1))
        sizes.append(math.sqrt(sum(float(((up[k] - down[k]) / (2 * step)).square().sum()) for k in up)))
    assert found.growth[1] == pytest.approx(sorted(sizes)[1] * math.sqrt(4), rel=1e-5)


def test_overflow_in_the_check_is_a_verdict_not_an_error(monkeypatch):
    def overflow(*args, **kwargs):
        raise StabilityError("overflowed")

    monkeypatch.setattr(doctor, "train_jets", overflow)
    found = check_stability(classifier())
    assert found.verdict == "unstable" and found.ratio == math.inf and "No single change" in found.advice[-1]


def test_growth_scale_is_the_root_of_a_binomial():
    assert growth_scale(5, 3) == pytest.approx(math.sqrt(math.comb(7, 3)))
    assert growth_scale(1000, 100) == pytest.approx(math.exp(0.5 * math.log(math.comb(1099, 100))))


def test_stability_prints_its_table():
    text = str(Stability([2.0, 1.0, 0.5], "stable", 10, 20, advice=["do this"]))
    assert text.splitlines()[0].startswith("degree") and text.splitlines()[-1] == "- do this" and "0.5 times" in text
