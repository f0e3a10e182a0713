"""The start of a run: the same model each time, and losses that are each example's own; what is off is said."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaveout.corpus import Corpus
from leaveout.deletion.run import TrainingRun
from leaveout.errors import FormatError, UnsupportedError
from leaveout.training.notes import notes_on
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles.agreement import assert_close

from .test_recipe import ROWS, points

SGD = OptimizerSettings("sgd", 0.3)


def squared(model, batch):
    return (model(batch[0]).mean(-1) - batch[1]) ** 2


def values(n=8):
    g = torch.Generator().manual_seed(3)
    return tuple((torch.randn(4, generator=g), torch.randn((), generator=g)) for _ in range(n))


def linear():
    return nn.Linear(4, 3)


def gpt2(**changes):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=128, n_positions=32, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3,
        **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.0, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config), letters()


def letters():
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({ch: i for i, ch in enumerate("_abcdefghijklmnopqrstuvwxyz :")}, unk_token="_")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="_")


def recipe_of(kind, model, **changes):
    changes = {"optimizer": SGD, "batch_size": 4, "epochs": 2, "dtype": "float32", **changes}
    if kind == "custom":
        return Recipe(kind, values(), model=model, **{"loss": squared, **changes})
    rows = points(8) if kind == "classifier" else tuple(Corpus.open(ROWS))
    return Recipe(kind, rows, model=model, **changes)


MADE = {"custom": linear, "classifier": linear, "causal-lm": gpt2}


def flat(params):
    return torch.cat([p.detach().flatten() for p in params.values()])


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("way", ["same object", "object", "list of one"])
@pytest.mark.parametrize("kind", MADE)
def test_an_object_given_again_and_again_is_never_the_trained_one(kind, way, dtype):
    torch.manual_seed(5)
    made = MADE[kind]()
    module = made[0] if kind == "causal-lm" else made
    before = copy.deepcopy(module.state_dict())
    held = [made]
    model = {"same object": lambda: made, "object": made, "list of one": lambda: held[0]}[way]
    recipe = recipe_of(kind, model, dtype=dtype)
    fresh = recipe_of(kind, lambda: copy.deepcopy(made), dtype=dtype)
    wanted = flat(train_plain(fresh))
    for _ in range(2):
        assert torch.equal(flat(train_plain(recipe)), wanted)
    ones = torch.ones(1, len(recipe.unit_names), dtype=torch.float64)
    assert_close(flat({n: p[0] for n, p in train_batch(recipe, ones).items()}), wanted, "single")
    run = train_jets(recipe, ones, JetSettings(1, recipe.real_dtype))
    assert_close(flat(run.constants), wanted, "single")
    assert all(
        torch.equal(v, before[name]) and v.dtype == before[name].dtype for name, v in module.state_dict().items()
    )


def by_numpy():
    made = linear()
    made.weight.data += torch.from_numpy(np.random.randn(3, 4)).float()
    return made


def by_python():
    made = linear()
    made.register_buffer("shift", torch.tensor(random.random()))
    return made


def by_turns(turns=[]):  # noqa: B006
    turns.append(0)
    return nn.Linear(4, 2 + len(turns))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (by_numpy, r"other numbers each time \(weight has .*, then"),
        (by_python, r"\(shift has"),
        (by_turns, "not alike"),
    ],
)
def test_a_function_that_gives_another_model_each_time_is_refused(model, message):
    recipe = recipe_of("custom", model)
    for start in (train_plain, task_of, lambda r: train_batch(r, torch.ones(2, 8))):
        with pytest.raises(UnsupportedError, match=message):
            start(recipe)


def test_a_function_that_draws_by_torch_depends_on_the_seed_alone():
    one = flat(train_plain(recipe_of("custom", linear)))
    torch.manual_seed(77)
    assert torch.equal(flat(train_plain(recipe_of("custom", linear))), one)
    assert not torch.equal(flat(train_plain(recipe_of("custom", linear, seed=1))), one)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("custom", lambda: 3, "it gives a builtins.int"),
        ("classifier", lambda: {"a": 1}, "it gives a builtins.dict"),
        ("causal-lm", lambda: linear(), r"pair \(model, tokenizer\), it gives a torch.nn"),  # noqa: PLW0108
    ],
)
def test_what_is_no_model_is_refused(kind, model, message):
    with pytest.raises(FormatError, match=message):
        task_of(recipe_of(kind, model))


# --- the loss ----------------------------------------------------------------------------------------------------


class TrainingNorm(nn.Module):
    """Batch norm that does not heed .eval()."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return F.batch_norm(self.linear(x), None, None, training=True)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class AlwaysDrops(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, training=True))


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


def noisy(model, batch):
    return squared(model, batch) + 0.01 * torch.randn(len(batch[0]))


def noisy_by_numpy(model, batch):
    return squared(model, batch) * float(np.random.rand())


def weighted(model, batch):
    weights = batch[1].abs()
    return squared(model, batch) * weights / weights.mean()


def of_a_training_norm(model, batch):
    return (F.batch_norm(model(batch[0]), None, None, training=True).mean(-1) - batch[1]) ** 2


def noisy_beside_a_huge_one(model, batch):
    losses = squared(model, batch) + 0.01 * torch.rand(len(batch[0]))
    return torch.cat([losses[:1].detach() * 0 + 1e8, losses[1:]])


def a_little_noisy(model, batch):
    return squared(model, batch) * (1 + 1e-4 * torch.rand(len(batch[0])))


MEAN = r"the shape \[\] for 4 examples: it must give one number for each, \[4\]"
WRONG_LOSSES = [
    (lambda m, b: squared(m, b).mean(), MEAN),
    (lambda m, b: squared(m, b)[:, None], r"the shape \[4, 1\] for 4"),
    (lambda m, b: (m(b[0]) - b[1][:, None]) ** 2, r"the shape \[4, 3\] for 4"),
    (lambda m, b: squared(m, b).mean().item(), "gives a float for 4"),
    (noisy, "and, asked again, .* must not draw random numbers"),
    (noisy_by_numpy, "and, asked again"),
    (noisy_beside_a_huge_one, "and, asked again"),
    (a_little_noisy, "and, asked again"),
    (F.mse_loss, r"The loss fails for 4 examples \(.*\): it is called as loss\(model, batch\)"),
    (weighted, r"The loss of example \d is .* in a batch of 4 and .* in one of"),
    (of_a_training_norm, "fails for 1 of the first 4|in a batch of 4 and"),
    (lambda m, b: b[1] ** 2, "does not depend on any trained parameter"),
    (lambda m, b: squared(m, b) / 0, "is (inf|nan) before the first step"),
    (lambda m, b: (squared(m, b) > 0).long(), "type torch.int64"),
]


@pytest.mark.parametrize(("loss", "message"), WRONG_LOSSES)
def test_a_loss_that_is_not_each_examples_own_is_refused_before_the_first_step(loss, message):
    recipe = recipe_of("custom", linear, loss=loss)
    for start in (train_plain, lambda r: train_batch(r, torch.ones(2, 8))):
        with pytest.raises(UnsupportedError, match=message):
            start(recipe)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: TrainingNorm(), "fails for 1|in a batch of 4 and"),  # noqa: PLW0108
        (Counting, "changes its buffer calls"),
        (lambda: AlwaysDrops(4, 3), "and, asked again"),
        (lambda: Centred(4, 3), r"The loss of example \d is .* in a batch of 4 and"),
        (
            lambda: nn.Sequential(linear(), nn.BatchNorm1d(3, track_running_stats=False)),
            "fails for 1|in a batch of 4",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["custom", "classifier"])
def test_a_model_that_mixes_examples_or_draws_is_refused(kind, model, message):
    with pytest.raises((UnsupportedError, FormatError), match=message):
        train_plain(recipe_of(kind, model))


def test_batches_of_one_are_tried_with_others_where_they_fit_together():
    """Queries are asked together, so that a loss must be each example's own even then."""
    with pytest.raises(UnsupportedError, match="in a batch of 4 and"):
        train_plain(recipe_of("custom", linear, loss=weighted, batch_size=1))
    rows = tuple((torch.randn(n, 4), torch.ones(())) for n in (2, 3, 5))

    def over_rows(model, batch):
        return (model(batch[0]).mean((1, 2)) - batch[1]) ** 2

    recipe = Recipe("custom", rows, model=linear, loss=over_rows, optimizer=SGD)
    assert len(train_plain(recipe)) == 2


def test_what_is_tried_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    with pytest.raises(UnsupportedError):
        train_plain(recipe_of("custom", linear, loss=noisy))
    assert torch.equal(torch.rand(3), wanted)


# --- what is off -------------------------------------------------------------------------------------------------


class Functional(nn.Linear):
    """Dropout without a module of its own."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Jittered(nn.Linear):
    """Augmentation in training form only."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


OFF = "Dropout is off, in training too: "
NOTES = [
    ("classifier", {"hidden": [4]}, []),
    ("classifier", linear, []),
    ("classifier", lambda: nn.Sequential(linear(), nn.Dropout(0.0)), []),
    ("classifier", lambda: nn.Sequential(linear(), nn.Dropout(0.25)), [OFF + "1 0.25."]),
    ("custom", lambda: nn.Sequential(linear(), nn.AlphaDropout(0.1), nn.Dropout1d(0.2)), [OFF + "1 0.1, 2 0.2."]),
    ("custom", lambda: nn.Sequential(linear(), nn.BatchNorm1d(3)), ["Batch norm is frozen: .*, in 1; `batch_stat.*it."]),
    ("classifier", lambda: nn.Sequential(linear(), nn.LayerNorm(3)), []),
    ("custom", lambda: Functional(4, 3), ["The model gives other losses in training form"]),
    ("classifier", lambda: Jittered(4, 3), ["The model gives other losses in training form"]),
    ("causal-lm", gpt2, []),
    ("causal-lm", functools.partial(gpt2, resid_pdrop=0.1), [OFF + ".*mlp.dropout 0.1.*"]),
    ("causal-lm", functools.partial(gpt2, summary_first_dropout=0.3), [OFF + "config.summary_first_dropout 0.3."]),
]


@pytest.mark.parametrize(("kind", "model", "wanted"), NOTES)
def test_what_evaluation_form_switches_off_is_said(kind, model, wanted):
    import re

    recipe = recipe_of(kind, model)
    found = notes_on(recipe, task_of(recipe))
    assert len(found) == len(wanted) and all(re.match(w, f) for w, f in zip(wanted, found, strict=True)), found


def test_notes_are_said_once_when_a_run_is_trained_and_kept(tmp_path, capsys):
    recipe = recipe_of("classifier", lambda: nn.Sequential(linear(), nn.Dropout(0.25)), drop_last=True, batch_size=3)
    run = TrainingRun.train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("Dropout is off, in training too: 1 0.25.") == 1
    assert "2 of 8 units are in no step, so that nothing changes without them: 6, 7." in said
    again = TrainingRun.train(recipe, tmp_path / "run")
    assert again.notes == run.notes and len(run.notes) == 2 and not capsys.readouterr().err


def test_examples_in_no_step_are_said_where_their_units_are_trained():
    recipe = recipe_of("classifier", linear, steps=1, units=tuple("aabbabab"))
    assert notes_on(recipe, task_of(recipe)) == ["4 of 8 examples are in no step: 4, 5, 6, 7."]
    many = recipe_of("classifier", linear, steps=1, batch_size=1)
    assert notes_on(many, task_of(many))[0].endswith("nothing changes without them: 1, 2, 3, 4, 5 and 2 more.")
