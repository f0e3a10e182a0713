"""Trainings, retrainings, reverse mode and jets on another device: the CPU's numbers, and what a step costs there."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fake_device import DEVICE, counting
from jets.test_norms import recipe_of, rows
from leaveout.corpus import Corpus
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.errors import UnsupportedError
from leaveout.jets import Space
from leaveout.models import full_precision
from leaveout.training.doctor import probe_recipe
from leaveout.training.loop import Loop, RunOptions
from leaveout.training.memory import plan_memory, runs_together
from leaveout.training.queries import Query, jet_values, query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.reverse.updates import query_gradients, unit_vectors
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from test_metagradient import tiny_llama

NAMES = [a + b for a in ("an", "bo", "ci", "du") for b in ("na", "ri", "so", "tu")]
ROWS = [
    {"id": "1", "text": "the red fox ran", "unit": "a"},
    {"id": "2", "prompt": "two and two", "completion": " is four", "unit": "b"},
    {"id": "3", "text": "rain", "unit": "a"},
    {"id": "4", "text": "a blue jar fell over", "unit": "c"},
]
THERE = RunOptions(device=DEVICE)
AGREES = {"float32": 1e-4, "float64": 1e-12}
"""Of the largest number: operations come in another order there. Measured up to 3e-5 (degree 3 of a LoRA) and 1e-14."""
lora_warns = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:peft")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def microgpt(**changes):
    return Recipe.microgpt(NAMES, n=8, seed=1, **{"batch_size": 2, "dtype": "float64", **changes})


def lora(**changes):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model, tokenizer = tiny_llama()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    chosen = {"optimizer": OptimizerSettings("adamw", 0.02, eps=1e-2), "batch_size": 2, "epochs": 2, "clip_norm": 0.5,
              "trained": {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}, "loss_per": "token"}  # fmt: skip
    return Recipe("causal-lm", tuple(Corpus.open(ROWS)), model=(model, tokenizer), **{**chosen, **changes})


def classifier(**changes):
    g = torch.Generator().manual_seed(0)
    examples = tuple((torch.randn(4, generator=g), i % 3) for i in range(8))
    chosen = {"batch_size": 4, "epochs": 2, "optimizer": OptimizerSettings("sgd", 0.1, momentum=0.9),
              "model": {"hidden": [5]}}  # fmt: skip
    return Recipe("classifier", examples, units=tuple("aabbccda"), **{**chosen, **changes})


RECIPES = {"microgpt": microgpt, "lora": lora, "classifier": classifier}


def agree(found, wanted, recipe):
    """Tensors, arrays or tables of tensors, equal to rounding; all on the CPU."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for name in wanted:
            agree(found[name], wanted[name], recipe)
        return
    found, wanted = (torch.as_tensor(x) for x in (found, wanted))
    assert found.is_cpu and found.dtype == wanted.dtype
    assert float((found - wanted).abs().max()) <= AGREES[recipe.dtype] * float(wanted.abs().max())


@lora_warns
@pytest.mark.parametrize("name", RECIPES)
def test_trainings_agree_with_those_of_a_cpu(name):
    recipe = RECIPES[name]()
    weights = torch.rand(3, len(recipe.unit_names), generator=torch.Generator().manual_seed(0))
    weights[:, 0] = 0.0
    agree(train_plain(recipe, options=THERE), train_plain(recipe), recipe)
    agree(train_plain(recipe, weights[0], THERE), train_plain(recipe, weights[0]), recipe)
    found, wanted = train_batch(recipe, weights, THERE), train_batch(recipe, weights)
    agree(found, wanted, recipe)
    asked = recipe.examples[:2]
    agree(query_losses(recipe, wanted, asked, DEVICE), query_losses(recipe, wanted, asked), recipe)


@lora_warns
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("degree", [1, 3])
def test_jets_agree_with_those_of_a_cpu(name, degree):
    recipe = RECIPES[name]()
    psi = 0.5 * torch.randn(
        5, len(recipe.unit_names), dtype=torch.complex128, generator=torch.Generator().manual_seed(0)
    )
    asked = recipe.examples[:2]
    found = train_jets(recipe, psi, JetSettings(degree), asked, THERE)
    wanted = train_jets(recipe, psi, JetSettings(degree), asked)
    agree(found.constants, wanted.constants, recipe)
    for k in range(degree):
        agree(
            {n: h[k] for n, h in found.coefficients.items()}, {n: h[k] for n, h in wanted.coefficients.items()}, recipe
        )
        agree(found.losses.h[k], wanted.losses.h[k], recipe)
    again = jet_values(recipe, wanted.constants, wanted.coefficients, asked, DEVICE)
    agree(again.h, wanted.losses.h, recipe)


class TwoHeads(nn.Module):
    """One head for each sign of the first number: without an example of its sign a head has no gradient in a step."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        masks = (self.low, x[:, :1] <= 0), (self.high, x[:, :1] > 0)
        return sum(mask * head(x) for head, mask in masks if bool(mask.any()))


@pytest.mark.parametrize("optimizer", ["adamw", "paper-adam"])
def test_parameters_without_a_gradient_are_left_alone(optimizer):
    torch.manual_seed(0)
    decay = {"weight_decay": 0.1} if optimizer == "adamw" else {}
    settings = OptimizerSettings(optimizer, 0.05, eps=1e-2, **decay)
    recipe = classifier(model=TwoHeads, optimizer=settings, batch_size=1, epochs=1, dtype="float64")
    agree(train_plain(recipe, options=THERE), train_plain(recipe), recipe)
    psi = 0.5 * torch.ones(1, 4, dtype=torch.complex128)
    found, wanted = (train_jets(recipe, psi, JetSettings(2), options=at).coefficients for at in (THERE, RunOptions()))
    agree(found, wanted, recipe)


@lora_warns
@pytest.mark.parametrize("name", RECIPES)
def test_reverse_mode_agrees_with_that_of_a_cpu(name):
    recipe = RECIPES[name]()
    asked = recipe.examples[:3]
    found, wanted = metagradient(recipe, asked, THERE), metagradient(recipe, asked)
    agree(found.effects, wanted.effects, recipe)
    agree(found.base, wanted.base, recipe)
    vectors, own = unit_vectors(recipe, 16, THERE), unit_vectors(recipe, 16)
    single = dataclasses.replace(recipe, dtype="float32")  # whatever the run's, these are float32
    agree(vectors.updates, own.updates, single)
    agree(vectors.final, own.final, single)
    agree(
        query_gradients(recipe, own.params, asked, 16, DEVICE), query_gradients(recipe, own.params, asked, 16), single
    )


class Interrupted(Exception):
    """Stops a run after its first checkpoint."""


@pytest.mark.parametrize(("first", "then"), [("cpu", DEVICE), (DEVICE, "cpu")])
@pytest.mark.parametrize("optimizer", ["adam", "paper-adam", "sgd"])
@pytest.mark.parametrize("kind", ["plain", "batch", "jets"])
def test_a_checkpoint_is_resumed_on_another_device(first, then, optimizer, kind, tmp_path, monkeypatch):
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    recipe = classifier(optimizer=OptimizerSettings(optimizer, 0.05, **momentum), epochs=3, dtype="float64")
    weights = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(options):
        if kind == "plain":
            return train_plain(recipe, weights[0], options)
        if kind == "batch":
            return train_batch(recipe, weights, options)
        return train_jets(recipe, weights, JetSettings(2), options=options).coefficients

    step = Loop.step
    steps = iter(range(4))

    def stopped(loop, parts):
        if next(steps, None) is None:
            raise Interrupted
        step(loop, parts)

    monkeypatch.setattr(Loop, "step", stopped)
    with pytest.raises(Interrupted):
        run(RunOptions(directory=tmp_path, save_every=0.0, device=first))
    monkeypatch.setattr(Loop, "step", step)
    seen = []
    monkeypatch.setattr(Loop, "step", lambda loop, parts: seen.append(step(loop, parts)))
    found = run(RunOptions(directory=tmp_path, device=then))
    assert len(seen) == 2
    agree(found, run(RunOptions()), recipe)


# --- what a step costs there ------------------------------------------------------------------------------------------


def last_step(run):
    """Launches, waits and copies of the last step of a run; its batch was there before."""
    step, seen = Loop.step, []

    def counted(loop, parts):
        with counting() as counts:
            step(loop, parts)
        seen.append(counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", counted)
        run()
    return seen[-1].launches, seen[-1].waits, seen[-1].copies


def jets(recipe, degree, directions):
    psi = torch.ones(directions, len(recipe.unit_names), dtype=torch.complex128) / 8
    return lambda: train_jets(recipe, psi, JetSettings(degree), options=RunOptions(device=DEVICE, memory=10**9))


def test_a_step_of_microgpt_waits_for_nothing():
    recipe = Recipe.microgpt(NAMES, n=2, epochs=2)
    assert last_step(lambda: train_plain(recipe, options=THERE)) == (115, 0, 0)
    weights = torch.ones(5, len(recipe.unit_names))
    assert last_step(lambda: train_batch(recipe, weights, THERE)) == (148, 0, 0)
    for degree, launches in ((1, 483), (3, 753)):
        for directions in (2, 17):
            assert last_step(jets(recipe, degree, directions)) == (launches, 0, 0)


@lora_warns
def test_a_step_of_lora_waits_for_its_mask_alone():
    """With sdpa, transformers looks whether a mask hides anything."""
    recipe = lora(loss_per="example")
    assert last_step(lambda: train_plain(recipe, options=THERE)) == (173, 1, 0)
    for degree, launches in ((1, 592), (3, 803)):
        for directions in (2, 17):
            assert last_step(jets(recipe, degree, directions)) == (launches, 1, 0)


def test_a_step_back_waits_for_nothing():
    recipe = microgpt(dtype="float32", clip_norm=1.0)
    seen = []
    for steps in (2, 4):
        with counting() as counts:
            metagradient(recipe.with_(steps=steps), recipe.examples[:3], THERE)
        seen.append(counts.waits)
    assert seen[0] == seen[1]


def test_statistics_of_batches_are_those_of_a_cpu():
    recipe, psi = recipe_of("cumulative", optimizer=OptimizerSettings("sgd", 0.05)), torch.eye(9, dtype=torch.float64)
    both = [train_batch(recipe, 1 - psi[:3], options) for options in (None, THERE)]
    assert all((p - both[1][name]).abs().max() < 1e-12 for name, p in both[0].items())
    series = [train_jets(recipe, psi[:2], JetSettings(1, torch.float64), rows(2, 5), o).losses for o in (None, THERE)]
    assert (series[0].h - series[1].h).abs().max() < 1e-12
    effects = [metagradient(recipe, rows(2, 5), options).effects for options in (None, THERE)]
    assert abs(effects[0] - effects[1]).max() < 1e-12


# --- memory, products, refusals -------------------------------------------------------------------------------------


def test_a_plan_is_of_the_device(monkeypatch):
    recipe = microgpt(dtype="float32")
    asked = []
    monkeypatch.setattr("leaveout.training.memory.free_memory", lambda device: asked.append(device) or 8 * 10**9)
    there, here = (plan_memory(recipe, task_of(recipe, at), 1, 4096, torch.complex64) for at in (DEVICE, "cpu"))
    assert there.together == 4096 and here.together == 256 and here.rounds == 16
    assert runs_together(recipe, task_of(recipe, DEVICE), 4096) == 4096
    assert asked == [DEVICE, torch.device("cpu"), DEVICE]


FLAGS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def set_flags():
    """The newer flags, and the older ones where torch says them."""
    older = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            older.append(ask())
        except RuntimeError:
            older.append("says nothing")
    return [flag.fp32_precision for flag in FLAGS], older


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_in_full_precision_while_a_run_lasts(newer, monkeypatch):
    recipe, seen, step = classifier(), [], Loop.step
    monkeypatch.setattr(Loop, "step", lambda loop, parts: seen.append(set_flags()) or step(loop, parts))

    def query(model):
        seen.append(set_flags())
        return torch.stack([next(model.parameters()).sum()])

    with full_precision():  # which also puts back what is set here
        if newer:
            for flag in FLAGS:
                flag.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        before = set_flags()
        params = train_plain(recipe)
        query_losses(recipe, params, query)
        metagradient(recipe, query)
        assert seen and all(found == (["ieee"] * 3, ["highest", False]) for found in seen)
        assert set_flags() == before and before[0] == ["tf32"] * 3


def test_jets_take_operations_that_have_rules():
    recipe, seen = classifier(), []

    def query(model):
        seen.append(torch.backends.cudnn.enabled)
        return torch.stack([next(model.parameters()).sum()])

    train_jets(recipe, torch.ones(1, 4), JetSettings(1), query, THERE)
    assert seen == [False, False] and torch.backends.cudnn.enabled


class Stubborn(nn.Module):
    """A classifier that multiplies with a tensor that does not move with it."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(4, 3), torch.ones(4)

    def forward(self, x):
        return self.head(x * self.scale)


def test_what_stays_behind_is_refused():
    recipe = classifier(model=Stubborn)
    train_plain(recipe)
    with pytest.raises(UnsupportedError, match="keep others as buffers"):
        train_plain(recipe, options=THERE)
    with pytest.raises(ValueError, match="torch finds no CUDA device here"):
        train_plain(recipe, options=RunOptions(device="cuda"))


def test_a_model_given_on_a_device_starts_on_the_cpu():
    model = nn.Linear(4, 3).to(DEVICE)
    recipe = classifier(model=model)
    assert task_of(recipe).device.type == "cpu" and next(model.parameters()).device == DEVICE
    agree(train_plain(recipe, options=THERE), train_plain(recipe), recipe)


def test_jets_move_with_both_parts():
    space = Space(1, 2, torch.complex64)
    there = space.constant(torch.ones(3).to(DEVICE))
    assert there.device == DEVICE and there.cpu().device.type == there.cpu().h.device.type == "cpu"


def test_a_run_is_measured_on_a_device(tmp_path, monkeypatch):
    """Trained, measured, predicted, verified and planned there, as on a CPU."""
    settings, recipe = MeasureSettings(check=False), classifier(dtype="float64")
    asked, later = [Query(recipe.examples[0])], [Query(recipe.examples[1])]
    made = []
    for at in ("cpu", DEVICE):
        run = TrainingRun.train(recipe, tmp_path / torch.device(at).type, device=at)
        run.measure(4, 1, retrain=6, heldout=2, gradient=True, queries=asked, settings=settings)
        run.measure(3, 1, retrain=2, settings=settings)
        found, other = run.verify(asked, [["a"], ["b", "c"]], settings=settings), run.predict(later, ["a"])
        made.append([found.base, found.actual, found.effect, other.effect, run.bank.measurements(asked).gradient])
    for own, there in zip(*made, strict=True):
        np.testing.assert_allclose(there, own, rtol=0, atol=1e-9)
    monkeypatch.setattr("leaveout.deletion.plan.PROBE_STEPS", (1, 2))
    monkeypatch.setattr("leaveout.deletion.plan.PROBE_RUNS", (2, 3))
    assert run.plan(asked, ["a"], "1min").choices
    moved = TrainingRun.open(tmp_path / "cpu", recipe, device=DEVICE)
    np.testing.assert_allclose(moved.predict(later, ["a"]).effect, made[0][3], rtol=0, atol=1e-9)


def test_a_recipe_is_diagnosed_on_a_device():
    assert probe_recipe(classifier(), DEVICE).passed
