"""Fused attention in every engine: transformers with sdpa against eager, and modules that call it themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaveout.corpus import Corpus
from leaveout.training.queries import query_losses
from leaveout.training.recipe import OptimizerSettings, Recipe
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.tasks import task_of
from leaveout.training.train import JetSettings, Retrainer, train_batch, train_jets, train_plain
from readout.tiny import make_model, make_tokenizer

TEXTS = ["rain falls", "the mill stands", "a blue ledger of debts", "salt"]
ROWS = tuple(Corpus.open([{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]))
SGD = OptimizerSettings("sgd", 0.1)
EYE = torch.eye(4, dtype=torch.float64)


LIMITS = {
    ("gpt2", "float64"): 1e-12, ("gpt2", "float32"): 5e-5,
    ("llama", "float64"): 1e-5, ("llama", "float32"): 5e-5,  # whose eager attention has its softmax in float32
}  # fmt: skip


def with_attention(kind, family="gpt2", dtype="float64"):
    """A model on rows of unlike length; a llama has grouped queries."""
    model = make_model(family, dtype=torch.float64)
    model.set_attn_implementation(kind)
    how = {"dtype": dtype, "optimizer": SGD, "batch_size": 2}
    return Recipe("causal-lm", ROWS, model=(model, make_tokenizer()), **how)


def every_engine(recipe, queries):
    """Trained losses, retrainings, first and second order, and the same by reverse mode; [some numbers]."""
    real = recipe.real_dtype
    jets = train_jets(recipe, EYE[:2].to(real), JetSettings(2, real), queries).losses
    runs = train_batch(recipe, 1 - EYE[:3])
    alone = train_batch(recipe, 1 - EYE[:1])
    return {
        "plain": query_losses(recipe, train_plain(recipe), queries), "jets": torch.cat([jets.c, *jets.h.flatten(1)]),
        "runs": query_losses(recipe, runs, queries), "alone": query_losses(recipe, alone, queries),
        "back": torch.from_numpy(metagradient(recipe, queries).effects),
    }  # fmt: skip


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize(("family", "dtype"), LIMITS)
def test_fused_attention_gives_what_its_parts_give(family, dtype):
    limit, queries = LIMITS[family, dtype], [TEXTS[1], "a red mill"]
    sdpa, eager = (every_engine(with_attention(kind, family, dtype), queries) for kind in ("sdpa", "eager"))
    retrainer = Retrainer(with_attention("sdpa", family, dtype))
    assert retrainer.batched and retrainer.task.model.config._attn_implementation == "sdpa"
    for name, wanted in eager.items():
        assert (sdpa[name] - wanted).abs().max() < limit * max(1, float(wanted.abs().max())), name
    assert (sdpa["runs"][0] - sdpa["alone"][0]).abs().max() < limit * 10
    assert (sdpa["runs"][0] - sdpa["plain"]).abs().max() > 1e-3


def test_other_forms_of_attention_are_taken_apart():
    recipe = with_attention("flex_attention", "llama")
    assert task_of(recipe).model.config._attn_implementation == "eager"
    assert recipe.model[0].config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_drops_by_the_masks_of_eager(family):
    def recipe(kind):
        model = make_model(family, dtype=torch.float64)
        model.config.attn_pdrop = 0.3
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.3
        model.set_attn_implementation(kind)
        how = {"dtype": "float64", "optimizer": SGD, "batch_size": 2, "dropout": 3}
        return Recipe("causal-lm", ROWS, model=(model, make_tokenizer()), **how)

    sdpa, eager = (every_engine(recipe(kind), [TEXTS[0]]) for kind in ("sdpa", "eager"))
    for name, wanted in eager.items():
        assert (sdpa[name] - wanted).abs().max() < LIMITS[family, "float64"] * max(1, float(wanted.abs().max())), name
    off = query_losses(recipe("sdpa").with_(dropout=None), train_plain(recipe("sdpa").with_(dropout=None)), [TEXTS[0]])
    assert (off - sdpa["plain"]).abs().max() > 1e-4


# --- modules that nobody has prepared -----------------------------------------------------------------------------


class Own(nn.Module):
    """Calls the fused function with what it allows."""

    def __init__(self, heads=4, groups=4, dropout=0.0, **how):
        super().__init__()
        self.sizes, self.how, self.dropout = (heads, groups), how, dropout
        self.q, self.kv, self.out = nn.Linear(4, heads * 3), nn.Linear(4, groups * 6), nn.Linear(heads * 3, 3)

    def forward(self, x):
        x = x.view(-1, 5, 4)
        q = self.q(x).unflatten(-1, (-1, 3)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, 6)).transpose(1, 2).chunk(2, -1)
        how = {**self.how, "enable_gqa": self.sizes[0] != self.sizes[1]}
        if how.get("attn_mask") == "padding":
            how["attn_mask"] = (x[..., 0] > -1)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, **how)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


class Flat(nn.Module):
    """Queries, keys and values of three axes."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(
            F.scaled_dot_product_attention(*self.inner(x.view(-1, 5, 4)).chunk(3, -1), is_causal=True).mean(1)
        )


class Several(nn.Module):
    """nn.MultiheadAttention, with and without its weights."""

    def __init__(self, weights, dropout=0.0):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(4, 2, dropout, batch_first=True), weights
        self.out = nn.Linear(9, 3)

    def forward(self, x):
        x = x.view(-1, 5, 4)
        y, seen = self.attention(x, x, x, key_padding_mask=x[..., 0] < -1, need_weights=self.weights)
        y = y.mean(1)
        seen = seen.square().mean(1) if self.weights else y.new_zeros(len(x), 5)
        return self.out(torch.cat([y, seen], -1))


class Encoder(nn.Module):
    def __init__(self, layers, first=True, dropout=0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout, "gelu", batch_first=first)
        self.first, self.layers = first, nn.TransformerEncoder(layer, layers) if layers > 1 else layer
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = x.view(-1, 5, 4)
        y = self.layers(x if self.first else x.transpose(0, 1), src_key_padding_mask=x[..., 0] < -1)
        return self.out(y.mean(1 if self.first else 0))  # padding too


MODULES = {
    "plain": Own,
    "causal": lambda: Own(is_causal=True),
    "scaled": lambda: Own(scale=0.3),
    "added": lambda: Own(attn_mask=torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)),
    "padded": lambda: Own(attn_mask="padding"),
    "grouped": lambda: Own(4, 2, is_causal=True),
    "dropped": lambda: Own(4, 2, dropout=0.4, attn_mask="padding"),
    "three axes": Flat,
    "several": lambda: Several(False),
    "several, weights": lambda: Several(True),
    "several, dropped": lambda: Several(False, 0.4),
    "layer": lambda: Encoder(1),
    "layers": lambda: Encoder(2),
    "layers, tokens first": lambda: Encoder(2, False),
    "layers, dropped": lambda: Encoder(2, True, 0.3),
}


def sequences(n, seed=0, blank=True):
    """Five tokens of four numbers as one vector; a row has padding in part, and one is nothing else (blank)."""
    drawn = torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[..., 0] = drawn[..., 0].abs()
    drawn[1, 3:, 0] = -2
    if blank:
        drawn[2, :, 0] = -2
    return tuple((row.flatten(), i % 3) for i, row in enumerate(drawn))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_a_user_are_derived_as_they_are(name):
    """Against central differences of real retrainings, one at a time."""
    blank = name != "several, weights"  # torch's own softmax of nothing is NaN there
    recipe = Recipe(
        "classifier", sequences(4, blank=blank), model=MODULES[name], dtype="float64", optimizer=SGD, batch_size=2, epochs=2,
        dropout=3 if "dropped" in name else None,
    )  # fmt: skip
    queries, h = sequences(3, 5, blank), 1e-4
    runs = [[query_losses(recipe, train_plain(recipe, 1 - s * row), queries) for row in h * EYE] for s in (1, -1)]
    wanted = (torch.stack(runs[0]) - torch.stack(runs[1])).T / (2 * h)
    jets = train_jets(recipe, EYE, JetSettings(1, torch.float64), queries).losses
    assert (jets.h[0].T - wanted).abs().max() < 1e-6 * wanted.abs().max()
    back = metagradient(recipe, queries)
    assert (torch.from_numpy(back.effects) - jets.h[0].T).abs().max() < 1e-9 * wanted.abs().max()
    together = query_losses(recipe, train_batch(recipe, 1 - EYE), queries)
    alone = torch.stack([query_losses(recipe, train_plain(recipe, w), queries) for w in 1 - EYE])
    assert (together - alone).abs().max() < 1e-12
