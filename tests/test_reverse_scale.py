"""Reverse mode where memory is short: by blocks, in pieces of micro-batches, with states on disk, after a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from leaveout.corpus import Corpus
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.training.loop import RunOptions, Steps
from leaveout.training.memory import LiveBytes, kept_bytes
from leaveout.training.queries import Query, as_queries
from leaveout.training.recipe import Recipe
from leaveout.training.reverse import metagradient as reverse
from leaveout.training.reverse.flat_run import FlatRun, passes
from leaveout.training.reverse.metagradient import ReverseSettings, metagradient, plan_reverse
from leaveout.training.tasks import task_of
from test_metagradient import OPTIMIZERS, ROWS, classifier, letters, points, relative
from tolerances import TOLERANCES

EXACT = TOLERANCES["float64 derivatives"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
QUERIES = [ROWS[1], {"text": "a red jar"}, {"text": "fox"}]
LORA = {"lora": {"r": 2, "targets": ["q_proj", "up_proj"]}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def llama(layers=2, hidden=8):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), letters()


def gpt2(dropout=0.0):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), letters()


def recipe_of(model, **changes):
    chosen = {"batch_size": 3, "steps": 3, "optimizer": OPTIMIZERS["adamw"], "dtype": "float64", "clip_norm": 1.0}
    return Recipe("causal-lm", tuple(Corpus.open(ROWS, units="unit")), model=model, **{**chosen, **changes})


RECIPES = {
    "llama": lambda: recipe_of(llama),
    "lora": lambda: recipe_of(llama, trained={"lora": {**LORA["lora"], "dropout": 0.3}}, dropout=5, loss_per="token"),
    "gpt2": lambda: recipe_of(lambda: gpt2(0.2), dropout=3, accumulate=2, batch_size=4),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", (None, True)), ("lora", (1, False)), ("lora", (2, True)), ("gpt2", (None, True)), ("gpt2", (1, False))],
)
def test_blocks_and_pieces_change_no_number(name, settings):
    """Also where parameters stand in and outside of blocks (tied embeddings), and with the masks of whole micro-batches."""
    recipe = RECIPES[name]()
    whole = metagradient(recipe, QUERIES[:2], settings=ReverseSettings(blocks=False))
    size, blocks = settings
    found = metagradient(recipe, QUERIES[:2], settings=ReverseSettings(size, blocks))
    assert found.memory.second_pass.blocks == blocks and found.memory.second_pass.micro_batch == (
        size or 3 - (name == "gpt2")
    )
    limit = EXACT if name == "gpt2" else TOLERANCES["derivatives through float32 norms"]
    assert relative(found.effects, whole.effects) < limit
    assert relative(found.base, whole.base) < TOLERANCES["losses through float32 norms"]


def test_pieces_of_a_micro_batch_have_its_masks():
    recipe = RECIPES["gpt2"]().with_(accumulate=1)
    task = task_of(recipe)
    steps = Steps(recipe, task)
    (whole,) = steps.parts(1)
    assert whole.seed is not None
    pieces = whole.pieces(3)
    assert [len(piece.numbers) for piece in pieces] == [3, 1]
    parts = [steps.loss(part) for part in (whole, *pieces)]
    assert relative(float(sum(parts[1:]).detach()), float(parts[0].detach())) < EXACT
    other = sum(steps.loss(replace(piece, whole=(), places=())) for piece in pieces)
    assert relative(float(other.detach()), float(parts[0].detach())) > 1e-4


def test_blocks_are_refused_where_they_do_not_hand_on():
    with pytest.raises(UnsupportedError, match="no blocks that could be gone through"):
        metagradient(classifier(), points(2), settings=ReverseSettings(blocks=True))
    run = FlatRun(RECIPES["llama"]())
    run.task.model.model.layers[0].register_forward_hook(lambda module, given, out: out * 1.5)
    run.go(None, True, False)
    with pytest.raises(UnsupportedError, match="more between its blocks than to hand their states on"):
        run.gradient(0)


@pytest.mark.parametrize("name", ["lora", "momentum"])
def test_states_on_disk_change_no_number(name, tmp_path):
    recipe = RECIPES["lora"]() if name == "lora" else classifier(optimizer=OPTIMIZERS["nesterov"], epochs=6)
    queries = QUERIES if name == "lora" else points(5, seed=5)
    whole = metagradient(recipe, queries)
    options = RunOptions(tmp_path / "work")
    found = metagradient(recipe, queries, options, settings=ReverseSettings(states="disk"))
    assert found.memory.on_disk and found.memory.disk >= found.memory.state * found.checkpoints
    assert np.array_equal(found.effects, whole.effects) and np.array_equal(found.base, whole.base)
    assert not list((tmp_path / "work").iterdir())


def test_few_places_on_disk_repeat_steps(tmp_path, monkeypatch):
    recipe, queries = classifier(epochs=12), points(5, seed=5)
    whole = metagradient(recipe, queries)
    state = whole.memory.state
    monkeypatch.setattr(reverse.shutil, "disk_usage", lambda place: type("Disk", (), {"free": 2 * 20 * state})())
    found = metagradient(recipe, queries, RunOptions(tmp_path), settings=ReverseSettings(states="disk"))
    assert found.checkpoints == 10 and found.memory.on_disk  # twice the root of 24 steps, and two
    assert relative(found.effects, whole.effects) < EXACT


class Killed(Exception):
    """What stands for a kill."""


@pytest.mark.parametrize("states", ["memory", "disk"])
def test_a_killed_walk_goes_on(states, tmp_path, monkeypatch):
    recipe, queries = classifier(epochs=6), points(7, seed=5)
    settings = ReverseSettings(states=states)
    limit = plan_reverse(FlatRun(recipe), 7).per_query * 4 + plan_reverse(FlatRun(recipe), 7).graphs + 9
    options = RunOptions(tmp_path, save_every=0.0)
    whole = metagradient(recipe, queries, memory=limit)
    assert whole.memory.rounds > 1
    back, left = reverse.Reverse._back, [17]

    def killed(self, step):
        if not left[0]:
            raise Killed
        left[0] -= 1
        back(self, step)

    monkeypatch.setattr(reverse.Reverse, "_back", killed)
    with pytest.raises(Killed):
        metagradient(recipe, queries, options, memory=limit, settings=settings)
    assert list((tmp_path / "reverse").glob("cotangents-*"))
    left[0] = 1000
    found = metagradient(recipe, queries, options, memory=limit, settings=settings)
    assert 1000 - left[0] == found.memory.rounds * 12 - 17
    assert relative(found.effects, whole.effects) < EXACT and relative(found.base, whole.base) < EXACT


def test_other_queries_of_equal_values_do_not_go_on_with_a_killed_walk(tmp_path, monkeypatch):
    recipe = classifier(epochs=2)

    def asked(times):  # zero wherever it is asked, with a slope
        return lambda model: torch.stack([times * sum((p - p.detach()).sum() for p in model.parameters())])

    options = RunOptions(tmp_path, save_every=0.0)
    save = reverse.Checkpoint.save

    def killed(self, step, tensors):
        save(self, step, tensors)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(reverse.Checkpoint, "save", killed)
        with pytest.raises(Killed):
            metagradient(recipe, asked(1.0), options)
    found = metagradient(recipe, asked(2.0), options)
    assert relative(found.effects, metagradient(recipe, asked(2.0)).effects) < EXACT


def test_files_of_another_run_are_refused(tmp_path):
    (tmp_path / "reverse").mkdir()
    run = FlatRun(classifier())
    reverse.Kept(3, tmp_path / "reverse", "another").put(0, run.state)
    with pytest.raises(MismatchError, match="belongs to another run"):
        metagradient(classifier(), points(2), RunOptions(tmp_path), settings=ReverseSettings(states="disk"))


def test_live_bytes_are_those_of_living_tensors():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view, other = a.view(10, 100), a + 1
        assert live.now == 8000
        del a, other
        assert live.now == 4000 and live.peak == 8000
        view.add_(1)
        del view
        assert live.now == 0


@pytest.mark.parametrize("settings", [(None, False), (1, False), (None, True)], ids=["whole", "single", "blocks"])
def test_memory_is_what_was_planned(settings):
    """The most that tensors take in the whole walk, over the plan's figure; its limit is kept."""
    recipe = recipe_of(lambda: llama(3, 32), trained=LORA, dtype="float32", steps=2, batch_size=4)
    with passes(torch.device("cpu")):
        plan = plan_reverse(FlatRun(recipe), 3, None, ReverseSettings(*settings))
        run = FlatRun(recipe)
        run.go(settings[0], bool(settings[1]), None if plan.second_pass.vectorised else False)
        effects = torch.zeros(3, 3, dtype=torch.float64)
        bar = type("Bar", (), {"update": lambda self, n=1: None})()
        with LiveBytes() as live:
            walk = reverse.Reverse(run, QUERIES, slice(0, 3), effects, torch.zeros(3, dtype=torch.float64), bar)
            reverse.walk_back(run, reverse.Kept(plan.checkpoints), walk.visit)
    assert plan.peak / 1.5 < live.peak < plan.peak * 1.5


def test_what_a_backward_pass_keeps_is_counted_and_given_back():
    """An operation that saves its own result would hold it, and all below it, for ever."""
    recipe = recipe_of(lambda: llama(3, 32), trained=LORA, dtype="float32", steps=2, batch_size=4)
    task = task_of(recipe)
    with LiveBytes() as live:
        kept = kept_bytes(recipe, task)
    assert live.now == 0 and kept <= live.peak < 2 * kept


def test_blocks_take_less_memory_and_are_taken_where_whole_graphs_do_not_fit():
    recipe = recipe_of(lambda: llama(5, 32), trained=LORA, dtype="float32", batch_size=4)
    with passes(torch.device("cpu")):
        run = FlatRun(recipe)
        whole, blocked = (plan_reverse(run, 3, None, ReverseSettings(4, by)).second_pass for by in (False, True))
        assert blocked.graphs + 3 * blocked.each < 0.5 * (whole.graphs + 3 * whole.each)
        taken = plan_reverse(run, 1, blocked.graphs + blocked.each + 2 * 10**5, ReverseSettings(4)).second_pass
        assert taken.blocks and run.blocks is not None
        with pytest.raises(UnsupportedError, match="Going back needs"):
            plan_reverse(run, 1, blocked.graphs // 8, ReverseSettings(4))


def test_a_run_spreads_its_queries_over_workers(tmp_path):
    recipe = Recipe.microgpt(["anna", "bob", "eve", "kim"], n=4)
    run = TrainingRun.train(recipe, tmp_path / "run")
    asked = ["mona", Query("bo", "probability"), "eve"]
    run.measure(gradient=True, queries=asked, settings=MeasureSettings(workers=2))
    found = run.predict(asked, "0:eve", "first_order").effect[:, 0]
    assert relative(found, metagradient(recipe, as_queries(asked)).effects[:, 0]) < 1e-5
