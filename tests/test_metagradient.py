"""Reverse mode through a training run against jets, real retrainings and itself; and the vectors of its updates."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leaveout.corpus import Corpus
from leaveout.errors import StabilityError, UnsupportedError
from leaveout.training.loop import RunOptions
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.flat_run import FlatRun
from leaveout.training.reverse.metagradient import metagradient, plan_reverse
from leaveout.training.reverse.states import Kept, walk_back
from leaveout.training.reverse.updates import (
    UnitVectors,
    first_order_error,
    influence,
    query_gradients,
    sketch_of,
    unit_vectors,
)
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from tolerances import TOLERANCES

NAMES = ["anna", "bob", "eve", "kim", "lena", "max", "otto", "vera"]
ROWS = [
    {"id": "1", "text": "the red fox ran", "unit": "a"},
    {"id": "2", "prompt": "two and two", "completion": " is four", "unit": "b"},
    {"id": "3", "text": "rain", "unit": "a"},
    {"id": "4", "text": "a blue jar fell over", "unit": "c"},
]
JETS, DIFFERENCES = TOLERANCES["float64 derivatives"], TOLERANCES["differences of retrainings"]

OPTIMIZERS = {
    "sgd": OptimizerSettings("sgd", 0.2),
    "sgd-decay": OptimizerSettings("sgd", 0.2, weight_decay=0.05),
    "momentum": OptimizerSettings("sgd", 0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": OptimizerSettings("sgd", 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": OptimizerSettings("adam", 0.02, eps=1e-2, weight_decay=0.05),
    "adamw": OptimizerSettings("adamw", 0.02, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.3),
    "paper-adam": OptimizerSettings("paper-adam", 0.02),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def points(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(4, generator=g), i % 3) for i in range(n))


def classifier(**changes):
    chosen = {"batch_size": 4, "epochs": 3, "dtype": "float64", "order": "shuffled", "model": {"hidden": [5]},
              "optimizer": OPTIMIZERS["paper-adam"], "schedule": "cosine", "warmup": 2}  # fmt: skip
    return Recipe("classifier", points(8), units=tuple("aabbccda"), **{**chosen, **changes})


def letters():
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<pad>", *"abcdefghijklmnopqrstuvwxyz "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), pad_token="<pad>")


def tiny_llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), letters()


def tiny_gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config), letters()


def language_model(model=tiny_llama, **changes):
    chosen = {"batch_size": 2, "steps": 4, "optimizer": OPTIMIZERS["adamw"], "dtype": "float64", "clip_norm": 1.0}
    rows = tuple(Corpus.open(ROWS, units="unit"))
    return Recipe("causal-lm", rows, model=model, **{**chosen, **changes})


class Attentive(nn.Module):
    """One fused attention, whose fast kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(2, 12), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        q, k, v = self.inner(x.view(-1, 1, 2, 2)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def attentive(**changes):
    return classifier(model=Attentive, optimizer=OPTIMIZERS["adamw"], **changes)


RECIPES = {
    **{name: lambda name=name: classifier(optimizer=OPTIMIZERS[name]) for name in OPTIMIZERS},
    "clipped": lambda: classifier(clip_norm=0.3, optimizer=OPTIMIZERS["momentum"]),
    "clipped-accumulated": lambda: classifier(clip_norm=0.3, accumulate=2, optimizer=OPTIMIZERS["adam"]),
    "microgpt": lambda: Recipe.microgpt(NAMES, n=8, dtype="float64"),
    "microgpt-batches": lambda: Recipe.microgpt(
        NAMES, n=8, dtype="float64", batch_size=4, accumulate=2, epochs=2, units=tuple("aabbccda")
    ),
    "llama": language_model,
    "llama-embedding": lambda: language_model(trained=("*embed_tokens*",)),
    "gpt2": lambda: language_model(tiny_gpt2),
    "gpt2-token": lambda: language_model(tiny_gpt2, loss_per="token", batch_size=4, accumulate=2),
}


def queries_of(recipe):
    if recipe.kind == "classifier":
        return points(3, seed=5)
    return ["mona", "bo"] if recipe.kind == "microgpt" else [ROWS[1], {"text": "a red jar"}]


def relative(actual, wanted):
    actual, wanted = (np.asarray(x, dtype=float) for x in (actual, wanted))
    assert actual.shape == wanted.shape
    return abs(actual - wanted).max() / abs(wanted).max()


def differences(recipe, queries, h=1e-4):
    """Central differences of real retrainings, one unit at a time: [queries, units]."""
    steps = torch.eye(len(recipe.unit_names), dtype=torch.float64) * h
    low, high = (query_losses(recipe, train_batch(recipe, 1 - sign * steps), queries) for sign in (-1, 1))
    return ((high - low) / (2 * h)).T


@pytest.mark.parametrize("name", RECIPES)
def test_metagradient_equals_jets_of_degree_one(name):
    recipe = RECIPES[name]()
    queries = queries_of(recipe)
    psi = torch.randn(5, len(recipe.unit_names), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = train_jets(recipe, psi, JetSettings(1, torch.float64), queries).losses
    found = metagradient(recipe, queries)
    assert losses is not None
    norms = name.startswith("llama")
    limit = TOLERANCES["derivatives through float32 norms"] if norms else JETS
    assert relative(psi.numpy() @ found.effects.T, losses.h[0]) < limit
    assert relative(found.base, losses.c) < (TOLERANCES["losses through float32 norms"] if norms else JETS)


@pytest.mark.parametrize("name", ["nesterov", "clipped-accumulated", "microgpt", "gpt2"])
def test_metagradient_equals_differences_of_retrainings(name):
    recipe = RECIPES[name]()
    queries = queries_of(recipe)
    assert relative(metagradient(recipe, queries).effects, differences(recipe, queries)) < DIFFERENCES


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_fused_attention_and_unused_parameters_are_handled():
    """The unused parameter must stay as it is, although AdamW would let it decay had it a gradient of zero."""
    recipe, plain = attentive(), train_plain(attentive())
    steps = torch.eye(4, dtype=torch.float64) * 1e-4
    runs = [[query_losses(recipe, train_plain(recipe, 1 - s * row), points(3)) for row in steps] for s in (1, -1)]
    wanted = (torch.stack(runs[0]) - torch.stack(runs[1])).T / 2e-4
    found = metagradient(recipe, points(3))
    assert relative(found.effects, wanted) < DIFFERENCES
    assert relative(found.base, query_losses(recipe, plain, points(3))) < JETS
    assert torch.equal(plain["unused"], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_run_is_the_plain_run_bit_for_bit(name):
    recipe = classifier(optimizer=OPTIMIZERS[name], dtype="float32")
    run = FlatRun(recipe)
    for step in range(run.steps):
        run.advance(step)
    for key, p in train_plain(recipe).items():
        assert torch.equal(run.parameters()[key], p)


def test_query_function_gives_the_effects_of_its_vector():
    recipe, rows = classifier(), points(3, seed=5)

    def function(model):
        x, y = torch.stack([x for x, _ in rows]).double(), torch.tensor([y for _, y in rows])
        return F.cross_entropy(model(x), y, reduction="none")

    assert relative(metagradient(recipe, function).effects, metagradient(recipe, rows).effects) < JETS
    with pytest.raises(ValueError, match="gives a vector"):
        metagradient(recipe, lambda model: next(model.parameters()).sum())


def test_little_memory_changes_no_number():
    recipe, queries = classifier(epochs=12, order="shuffled"), points(7, seed=5)
    run = FlatRun(recipe)
    whole = metagradient(recipe, queries)
    assert whole.checkpoints == run.steps + 1 and whole.memory.rounds == 1
    state, per_query, graphs = whole.memory.state, whole.memory.per_query, whole.memory.graphs
    limit = graphs + 2 * (2 * per_query) + 3
    small = metagradient(recipe, queries, memory=limit)
    assert small.memory.together == 2 and small.memory.rounds == 4 and small.memory.peak <= limit
    assert small.checkpoints == (limit - graphs - 2 * per_query) // state - 1 < run.steps
    assert relative(small.effects, whole.effects) < JETS and relative(small.base, whole.base) < JETS
    same = metagradient(recipe, queries, RunOptions(memory=limit))
    assert np.array_equal(same.effects, small.effects)


def test_too_little_memory_is_refused():
    with pytest.raises(UnsupportedError, match=r"Going back needs .* use a smaller batch"):
        metagradient(classifier(), points(2), memory=1000)


class Alive(weakref.WeakSet):
    """The copies of states that exist, and how many existed at most."""

    most = 0

    def add(self, item):
        super().add(item)
        self.most = max(self.most, len(self))


class Number:
    """A state that is only the number of its step."""

    def __init__(self, value, alive):
        self.value, self.alive = value, alive

    def clone(self):
        copy = Number(self.value, self.alive)
        self.alive.add(copy)
        return copy

    def copy_(self, other):
        self.value = other.value


class Counted:
    """A run of such states that counts the steps taken."""

    def __init__(self, steps):
        self.steps, self.state, self.taken = steps, Number(0, Alive()), 0

    def advance(self, step):
        assert self.state.value == step
        self.state.value += 1
        self.taken += 1


@given(steps=st.integers(0, 60), checkpoints=st.integers(2, 20))
@settings(deadline=None, max_examples=60)
def test_walk_back_visits_every_state_backwards(steps, checkpoints):
    run, seen = Counted(steps), []
    walk_back(run, Kept(checkpoints), lambda step: seen.append((step, run.state.value)))
    assert seen == [(step, step) for step in range(steps, -1, -1)]
    assert run.state.alive.most <= checkpoints
    if checkpoints > steps:
        assert run.taken == steps


def test_walk_back_repeats_few_steps():
    """12 places and 2 repetitions reach C(14, 2) = 91 states: no step is taken more than twice."""
    run = Counted(90)
    walk_back(run, Kept(12), lambda step: None)
    assert 90 < run.taken <= 2 * 90


def test_no_queries_and_no_steps():
    recipe = classifier()
    assert metagradient(recipe, []).effects.shape == (0, 4)
    assert query_gradients(recipe, train_plain(recipe), [], width=8).shape == (0, 8)
    with pytest.raises(ValueError, match="takes no step"):
        metagradient(recipe.with_(steps=0), points(2))


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_changing_use_of_parameters_is_refused(first):
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            low = x[:, :1] <= 0
            return self.a(x) + (low * self.b(x) if bool(low.any()) else 0.0)

    rows = tuple((torch.tensor([sign, 1.0, 0.0, 2.0]), label) for label, sign in enumerate((first, -first, first)))
    recipe = Recipe("classifier", rows, model=Switching, optimizer=OPTIMIZERS["sgd"])
    with pytest.raises(UnsupportedError, match="At step 1 the loss uses other parameters"):
        metagradient(recipe, rows[:1])


def test_overflow_is_told():
    recipe = classifier(optimizer=OptimizerSettings("sgd", 1e4), dtype="float32", epochs=40, schedule="constant")
    with pytest.raises(StabilityError, match="metagradient overflowed"):
        metagradient(recipe, points(2))


def test_single_precision_agrees_with_double():
    recipe = Recipe.microgpt(NAMES, n=8, epochs=5)
    single, double = (metagradient(recipe.with_(dtype=d), ["mona", "max"]).effects for d in ("float32", "float64"))
    assert relative(single, double) < 1e-4


def test_plan_states_what_is_kept():
    run = FlatRun(classifier(optimizer=OPTIMIZERS["adam"]))
    plan = plan_reverse(run, 3)
    n = sum(p.numel() for p in run.task.model.parameters())
    assert plan.state == 3 * 8 * n and plan.together == 3 and plan.checkpoints == run.steps + 1


# --- vectors of units --------------------------------------------------------------------------------------------

# The vectors are single precision, and so is the difference of two runs relative to its own size.
SINGLE = 1e-5
WITHOUT_MOMENTUM = {
    "sgd": OptimizerSettings("sgd", 0.2),
    "adam": OptimizerSettings("adam", 0.02, betas=(0.0, 0.9), eps=1e-2),
    "adamw": OptimizerSettings("adamw", 0.02, betas=(0.0, 0.9), eps=1e-2),
    "paper-adam": OptimizerSettings("paper-adam", 0.02, betas=(0.0, 0.9)),
}
RUNS = {
    **{name: lambda name=name: classifier(optimizer=WITHOUT_MOMENTUM[name]) for name in WITHOUT_MOMENTUM},
    "clipped-accumulated": lambda: classifier(optimizer=WITHOUT_MOMENTUM["adam"], clip_norm=0.3, accumulate=2),
    "clipped-sgd": lambda: classifier(optimizer=WITHOUT_MOMENTUM["sgd"], clip_norm=0.3, batch_size=1),
    "gpt2-token": lambda: language_model(
        tiny_gpt2, optimizer=WITHOUT_MOMENTUM["sgd"], loss_per="token", batch_size=4, accumulate=2
    ),
}


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params.values()]).double().numpy()


def start_of(recipe):
    return {name: p.detach().clone() for name, p in task_of(recipe).model.named_parameters()}


@pytest.mark.parametrize("name", RUNS)
def test_updates_of_all_units_add_up_to_the_way_of_the_parameters(name):
    """Without momentum and decay nothing but the examples' updates moves a parameter."""
    recipe = RUNS[name]()
    vectors = unit_vectors(recipe, width=10**6)
    assert relative(vectors.updates.sum(0), flat(vectors.params) - flat(start_of(recipe))) < SINGLE
    assert relative(flat(vectors.params), flat(train_plain(recipe))) < JETS
    one_by_one = unit_vectors(recipe, width=10**6, options=RunOptions(memory=1))
    assert relative(one_by_one.updates, vectors.updates) < SINGLE


@pytest.mark.parametrize("memory", [None, 1])
def test_update_of_a_unit_is_what_its_absence_leaves_out(memory):
    """One step of SGD on padded names, two of them of one unit, also with the gradient of one example at a time."""
    recipe = Recipe.microgpt(
        NAMES, n=8, dtype="float64", batch_size=8, units=tuple("aabbccda"), optimizer=OptimizerSettings("sgd", 0.5)
    )
    vectors = unit_vectors(recipe, width=10**6, options=RunOptions(memory=memory))
    without = 1 - torch.eye(4, dtype=torch.float64)
    wanted = [flat(train_plain(recipe)) - flat(train_plain(recipe, row)) for row in without]
    assert relative(vectors.updates, np.stack(wanted)) < SINGLE


def test_final_and_query_gradients_are_the_slopes_of_losses():
    recipe = language_model(tiny_gpt2, loss_per="token")
    vectors = unit_vectors(recipe, width=10**6)
    rng = torch.Generator().manual_seed(3)
    way = {n: torch.randn(p.shape, dtype=p.dtype, generator=rng) for n, p in vectors.params.items()}
    high, low = (
        query_losses(recipe, {n: p + h * way[n] for n, p in vectors.params.items()}, recipe.examples)
        for h in (1e-5, -1e-5)
    )
    slopes = ((high - low) / 2e-5).numpy()
    gradients = query_gradients(recipe, vectors.params, recipe.examples, width=10**6)
    assert relative(gradients @ flat(way), slopes) < SINGLE
    by_unit = np.zeros(len(recipe.unit_names))
    np.add.at(by_unit, recipe.unit_of.numpy(), slopes)
    assert relative(vectors.final @ flat(way), by_unit) < SINGLE


def test_sketch_is_the_product_with_its_matrix_and_keeps_dot_products():
    sketch, n = sketch_of(300, 40), 300
    matrix = torch.zeros(n, 40)
    matrix[torch.arange(n), sketch.buckets] = sketch.signs
    a, b = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    both = sketch(torch.stack([a, b]))
    assert relative(both, torch.stack([a, b]) @ matrix) < SINGLE
    # The variance of a CountSketch's dot product is at most (|a|^2 |b|^2 + (a.b)^2) / width.
    deviation = float((a.square().sum() * b.square().sum() + (a @ b) ** 2) / 40) ** 0.5
    assert abs(float(both[0] @ both[1] - a @ b)) < 5 * deviation
    assert abs(float(both[0] @ both[0] - a @ a)) < 5 * float(2 * (a @ a) ** 2 / 40) ** 0.5
    assert 0 < (sketch.signs > 0).sum() < n and len(sketch.buckets.unique()) > 30
    assert torch.equal(sketch_of(40, 40)(a[None, :40]), a[None, :40])
    with pytest.raises(ValueError, match="width of at least 1"):
        sketch_of(10, 0)


def test_unit_vectors_are_sketched_in_one_space():
    recipe = classifier()
    whole, small = unit_vectors(recipe, width=10**6), unit_vectors(recipe, width=16)
    sketch = sketch_of(whole.final.shape[1], 16)
    assert small.final.shape == (4, 16) and small.final.dtype == np.float32
    assert relative(small.updates, sketch(torch.from_numpy(whole.updates))) < SINGLE
    gradients = [query_gradients(recipe, whole.params, points(3), width) for width in (10**6, 16)]
    assert relative(gradients[1], sketch(torch.from_numpy(gradients[0]))) < SINGLE


def test_influence_is_the_damped_solve():
    rng = np.random.default_rng(0)
    final, queries = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    vectors = UnitVectors(final, final, {}, *np.zeros((2, 6)))
    fisher = sum(np.outer(g, g) for g in final.astype(float))
    inverse = np.linalg.inv(fisher + 0.3 * np.trace(fisher) / 4 * np.eye(4))
    wanted = [[q @ inverse @ g for g in final] for q in queries]
    assert relative(influence(vectors, queries, 0.3), wanted) < JETS
    with pytest.raises(ValueError, match="damping above 0"):
        influence(vectors, queries, 0.0)
    with pytest.raises(ValueError, match="use one width"):
        influence(vectors, queries[:, :3], 0.3)


def test_effects_and_influence_follow_leave_one_out_retrainings():
    """Positive = removing the unit raises the query's loss, for all three."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(["ka", "lo", "mi", "ren", "su", "to", "vi"], rng.integers(2, 5))) for _ in range(60)]
    recipe = Recipe.microgpt(names, n=60, epochs=3, units=tuple(map(str, range(60))))
    queries = ["karen", "tomi", "sulo", "viviren"]
    truth = query_losses(recipe, train_batch(recipe, 1 - torch.eye(60)), queries).T
    truth = (truth - query_losses(recipe, train_plain(recipe), queries)[:, None]).numpy()
    vectors = unit_vectors(recipe)
    scores = influence(vectors, query_gradients(recipe, vectors.params, queries))
    exact = metagradient(recipe, queries).effects
    for q in range(len(queries)):
        assert np.corrcoef(exact[q], truth[q])[0, 1] > 0.9
        assert np.corrcoef(scores[q], truth[q])[0, 1] > 0.3


def test_lengths_are_the_leverage_of_units():
    """One row a step, plain gradient steps on squares: a row's step lowers its own residual by rate * |x|^2."""
    rows = tuple(
        (torch.eye(3, dtype=torch.float64)[i] * (i + 1), torch.tensor(1.0, dtype=torch.float64)) for i in range(3)
    )
    recipe = Recipe(
        "custom", rows, model=lambda: nn.Linear(3, 1, bias=False), loss=squares, optimizer=OptimizerSettings("sgd", 0.01),
        batch_size=3, epochs=2, schedule="constant", dtype="float64", seed=1,
    )  # fmt: skip
    vectors = unit_vectors(recipe)
    weights = task_of(recipe).model.weight.detach()[0]
    wanted = np.zeros(3)
    for _ in range(2):
        gradients = torch.stack([2 * (x @ weights - y) * x for x, y in rows])
        wanted += 0.01 * (gradients.square().sum(1) / 3).numpy()
        weights = weights - 0.01 * gradients.mean(0)
    assert relative(vectors.lengths, wanted) < JETS
    # Orthogonal units make no other mistake together than alone: of two alike, the error is the mean.
    alone = first_order_error(vectors, np.eye(3))
    assert relative(alone, 0.2 * wanted) < 1e-6 and np.array_equal(vectors.owned, np.zeros(3))
    double = UnitVectors(vectors.updates[[0, 0]], vectors.final[:2], {}, wanted[[0, 0]], np.zeros(2))
    assert relative(first_order_error(double, np.ones((1, 2))), [2 * alone[0]]) < 1e-6


def test_owned_is_the_part_of_the_second_moment():
    """At a first step v / (1 - beta2) is the square of the gradient."""
    recipe = classifier(optimizer=OptimizerSettings("adamw", 0.02, eps=1e-12), steps=1, batch_size=3, warmup=0)
    recipe = recipe.with_(units=None)
    (batch,) = recipe.batches()
    task, rows = task_of(recipe), []
    for i in batch:
        loss = task.loss(task.model, task.batch([recipe.examples[i]])).sum()
        rows.append(flat(dict(enumerate(torch.autograd.grad(loss, list(task.model.parameters()))))) / 3)
    rows = np.stack(rows)
    whole = rows.sum(0)
    ways = abs(rows) / (abs(whole) + 1e-12)
    wanted = (ways * np.minimum(1, rows**2 / whole**2)).sum(1) / ways.sum(1)
    assert relative(unit_vectors(recipe).owned[recipe.unit_of[list(batch)]], wanted) < 1e-6


def squares(model, batch):
    return (model(batch[0])[:, 0] - batch[1]).square()


@pytest.mark.parametrize("rate", [0.002, 0.05, 0.8])
def test_told_error_grows_with_the_error_of_the_first_order(rate):
    """Over rates, of whole runs. What it is worth within a run stands in the how-to."""
    recipe = classifier(optimizer=OptimizerSettings("sgd", rate), epochs=8, schedule="constant")
    error, told = (relative_error(recipe.with_(optimizer=OptimizerSettings("sgd", rate * k))) for k in (1, 3))
    assert error[0] < told[0] and error[1] < told[1]


def relative_error(recipe):
    """Of leaving out each unit, and what is told of it."""
    queries, x = points(3, seed=5), torch.eye(4, dtype=torch.float64)
    base = query_losses(recipe, train_plain(recipe), queries)
    truth = (query_losses(recipe, train_batch(recipe, 1 - x), queries) - base).numpy().T
    off = metagradient(recipe, queries).effects - truth
    return np.sqrt((off**2).mean() / (truth**2).mean()), first_order_error(unit_vectors(recipe), x.numpy()).mean()
