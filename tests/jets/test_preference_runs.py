"""Recipes of preference rows and of weighted rows, beside a DPO loop in plain torch that shares no code with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaveout import Contrast, FormatError, MismatchError, Recipe, TrainingRun, UnsupportedError, attribute
from leaveout.corpus import Corpus
from leaveout.methods.gradients import example_losses
from leaveout.methods.scorer import Scorer
from leaveout.methods.signatures import indexed, readout_of
from leaveout.readout.settings import Channel, SignatureSettings
from leaveout.training.queries import Query
from leaveout.training.recipe import OptimizerSettings
from leaveout.training.reverse.metagradient import metagradient
from leaveout.training.tasks import references_of, task_of
from leaveout.training.train import JetSettings, train_batch, train_jets, train_plain
from oracles.agreement import assert_close, taylor_by_fit

from .test_recipe import tiny_gpt2
from .test_steps import flat

WORDS = ("ann", "abe", "bob", "cy", "dee")
PAIRS = [
    {"prompt": f"say {w}: ", "chosen": f"{w} {w}", "rejected": "no" + "o" * n, "unit": w[0]}
    for n, w in enumerate(WORDS)
]
WEIGHTS = (1, 0.5, -2, 1, 3)
PLAIN = [{"prompt": p["prompt"], "completion": p["chosen"], "unit": p["unit"]} for p in PAIRS]
SIDES = {"prompt": "say ann: ", "response": "ann"}, {"prompt": "say ann: ", "response": "noo"}
QUERY = Contrast(*SIDES)
BETA, LR, EPOCHS = 0.7, 0.05, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_gpt2(tmp_path_factory.mktemp("preferences")))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reference of other weights."""
    place = tiny_gpt2(tmp_path_factory.mktemp("reference"))
    lm = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        lm.transformer.wte.weight.add_(0.3 * torch.randn(lm.transformer.wte.weight.shape))
    lm.save_pretrained(place)
    return str(place)


def recipe_of(rows, model, **changes):
    loss = {"kind": "dpo", "beta": BETA} if "chosen" in rows[0] else None
    settings = {"model": model, "dtype": "float64", "optimizer": OptimizerSettings("sgd", LR), "batch_size": 2,
                "epochs": EPOCHS, "loss": loss}  # fmt: skip
    return Recipe("causal-lm", tuple(Corpus.open(rows, units="unit")), **(settings | changes))


def log_p(lm, tokenizer, prompt, answer):
    """Log probabilities of the letters of an answer, each a token."""
    ids = tokenizer(prompt + answer).input_ids
    return torch.log_softmax(lm(torch.tensor([ids])).logits[0], -1)[
        range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]
    ]


def by_hand(rows, model, weights, reference=None, weighted=False):
    """Gradient descent on the mean over each batch of weight * loss; the model after it. weights: by unit name."""
    lm, held = (AutoModelForCausalLM.from_pretrained(m).double().eval() for m in (model, reference or model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for _ in range(EPOCHS):
        for start in range(0, len(rows), 2):
            batch, total = rows[start : start + 2], 0.0
            for number, row in enumerate(batch, start):
                own = WEIGHTS[number] if weighted else 1
                if "chosen" in row:
                    sides = (row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])
                    a, b = (
                        log_p(lm, tokenizer, *side).sum() - log_p(held, tokenizer, *side).sum().detach()
                        for side in sides
                    )
                    loss = -torch.log(1 / (1 + torch.exp(-BETA * (a - b))))
                else:
                    loss = -log_p(lm, tokenizer, row["prompt"], row["completion"]).mean()
                total = total + weights[row["unit"]] * own * loss
            grads = torch.autograd.grad(total / len(batch), [*lm.parameters()])
            with torch.no_grad():
                for p, g in zip(lm.parameters(), grads, strict=True):
                    p -= LR * g
    return lm, tokenizer


def asked(lm, tokenizer):
    """The query: the mean loss of one answer less that of the other."""
    a, b = (-log_p(lm, tokenizer, side["prompt"], side["response"]).mean() for side in SIDES)
    return a - b


CASES = {"dpo": (PAIRS, False), "weighted": (PLAIN, True), "weighted dpo": (PAIRS, True)}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_training_is_that_loop(case, model, other, tmp_path):
    rows, weighted = CASES[case]
    given = [row | ({"weight": w} if weighted else {}) for row, w in zip(rows, WEIGHTS, strict=True)]
    reference = other if case == "weighted dpo" else None
    recipe = recipe_of(given, model)
    if reference is not None:
        recipe = recipe.with_(loss={**recipe.loss, "reference": reference})
    names = recipe.unit_names
    choices = [torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.4, 1.0], dtype=torch.float64)]
    runs = train_batch(recipe, torch.stack(choices))
    for number, weights in enumerate(choices):
        lm, _ = by_hand(rows, model, dict(zip(names, weights.tolist(), strict=True)), reference, weighted)
        wanted = torch.cat([p.detach().flatten() for p in lm.parameters()])
        assert_close(flat(train_plain(recipe, weights)), wanted, "exact")
        assert_close(flat({name: p[number] for name, p in runs.items()}), wanted, "exact")

    def without(t):
        weights = dict.fromkeys(names, 1.0) | {"a": 1 - t}
        return asked(*by_hand(rows, model, weights, reference, weighted))

    wanted = taylor_by_fit(without, 2)
    run = TrainingRun.train(recipe, tmp_path / "run")
    psi = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    jets = train_jets(recipe, psi, JetSettings(2, torch.float64), [*SIDES]).losses
    assert jets is not None
    slopes = torch.stack([jets.c[0] - jets.c[1], *(jets.h[:, 0, 0] - jets.h[:, 0, 1])])
    np.testing.assert_allclose(slopes, wanted, atol=1e-6)
    first = metagradient(recipe, [*SIDES]).effects
    np.testing.assert_allclose(first[0, 0] - first[1, 0], wanted[1], atol=1e-7)
    run.measure(retrain=3, design="random")
    found = run.predict([QUERY], ["a"])
    retrained = float(without(1.0).detach() - without(0.0).detach())
    assert abs(found.effect[0, 0] - retrained) < 0.3 * abs(retrained), (found, retrained)


def test_scores_of_an_index_of_a_run_are_gradients_of_its_losses(model, tmp_path):
    """Factors by the run's own reference, here the start, at parameters that have moved away from it."""
    recipe = recipe_of(PAIRS, model, epochs=4, optimizer=OptimizerSettings("sgd", 0.03))
    scorer = Scorer(TrainingRun.train(recipe, tmp_path / "run"), [Query(QUERY)])
    head = SignatureSettings((Channel("rh"),), bytes_per_row=None, short_bytes=None, storage="float32")
    with indexed(scorer, readout_of(scorer, "final"), head) as index:
        lengths = index.lengths_of(index.live_numbers())
    lm = scorer.model("final")
    losses = example_losses(scorer.task, scorer.parameters("final"), recipe.examples)
    margins = -torch.log(torch.expm1(losses)) / BETA  # of softplus(-beta margin)
    factors = BETA * torch.sigmoid(-BETA * margins)
    assert np.ptp(factors.numpy()) > 0.01  # 0.35 at the start
    tokenizer = AutoTokenizer.from_pretrained(model)
    for pair, factor, length in zip(PAIRS, factors, lengths, strict=True):
        texts = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
        rows = 0.0
        for text, sign in zip(texts, (1, -1), strict=True):
            ids = torch.tensor(tokenizer(text).input_ids)
            places = range(len(pair["prompt"]) - 1, len(ids) - 1)
            hidden = lm.transformer(ids[None]).last_hidden_state[0][places]
            r = torch.softmax(lm.lm_head(hidden), -1) - F.one_hot(ids[len(pair["prompt"]) :], lm.config.vocab_size)
            rows = rows + sign * r.T @ hidden
        assert abs(length - float(factor * rows.detach().norm())) < 1e-3 * length


def test_a_recipe_file_names_the_loss_and_hashes_its_reference(model, other, tmp_path):
    import json

    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    fields = {"kind": "causal-lm", "data": "pairs.jsonl", "model": model, "dtype": "float64", "units": "unit"}

    def read(**loss):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields | ({"loss": loss} if loss else {})))
        return Recipe.from_yaml(tmp_path / "r.yaml")

    hashes = [read(**loss).hash() for loss in ({"kind": "dpo"}, {"kind": "dpo", "beta": "1e-1"},
              {"kind": "dpo", "reference": other}, {"kind": "dpo", "reference": model})]  # fmt: skip
    assert len(set(hashes)) == 4
    recipe = read(kind="dpo", reference=other)
    task = task_of(recipe)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(other).double(), AutoTokenizer.from_pretrained(other)
    for row, pair in zip(recipe.examples, PAIRS, strict=True):
        a, b = (log_p(lm, tokenizer, pair["prompt"], pair[side]).sum() for side in ("chosen", "rejected"))
        assert abs(references_of(recipe)[row.content_hash] - float((a - b).detach())) < 1e-10
    assert [t.shape[:2] for t in task.encode(recipe.examples[:3])][:2] == [(3, 2), (3, 2)]
    with pytest.raises(FormatError, match="' is a preference row: give a causal-lm recipe with loss"):
        read()
    with pytest.raises(
        FormatError, match=r"loss must be .kind: dpo, beta: 0\.1, reference: a model.*got .'kind': 'ipo'"
    ):
        read(kind="ipo")
    with pytest.raises(FormatError, match="beta of loss must be a number of at least 0"):
        read(kind="dpo", beta=-1)


def test_what_does_not_fit_is_refused(model, tmp_path):
    pairs = recipe_of(PAIRS, model)
    with pytest.raises(FormatError, match="has one answer, and DPO compares two: give `chosen` and `rejected`"):
        recipe_of([*PAIRS, *PLAIN[:1]], model)
    with pytest.raises(FormatError, match="is a preference row: give a causal-lm recipe"):
        Recipe.microgpt(list(Corpus.open(PAIRS)), n=4)
    with pytest.raises(ValueError, match="no mean over tokens: leave loss_per out"):
        pairs.with_(loss_per="token")
    with pytest.raises(ValueError, match="no mean over tokens: leave label_smoothing out"):
        pairs.with_(label_smoothing=0.1)
    with pytest.raises(ValueError, match="only a causal-lm or a custom recipe has a loss, not a microgpt recipe"):
        Recipe.microgpt(["ann", "bob"], n=2, loss={"kind": "dpo"})
    task = task_of(pairs)
    with pytest.raises(FormatError, match=r"A query is a preference row: ask .* Contrast\(chosen, rejected\)"):
        task.encode_queries(pairs.examples[:1])
    with pytest.raises(UnsupportedError, match="A preference row has no logits of its own"):
        assert task.outputs is not None
        task.outputs(task.model, task.encode(pairs.examples[:1]))
    with pytest.raises(FormatError, match=r"prefers nothing, as all tokens of both answers within 10 are the same"):
        task_of(
            recipe_of([{"prompt": "say ann: ", "chosen": "aa", "rejected": "ab", "unit": "a"}], model, max_tokens=10)
        )
    place = tiny_gpt2(tmp_path / "reference")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(place)
    with pytest.raises(MismatchError, match="The reference has another tokenizer than the model"):
        task_of(pairs.with_(loss={"kind": "dpo", "reference": str(place)}))


@pytest.mark.parametrize("rows", [PAIRS, [row | {"weight": 2} for row in PLAIN]], ids=["pairs", "weighted"])
def test_methods_that_know_losses_per_token_only_are_refused(rows, model, tmp_path):
    run = TrainingRun.train(recipe_of(rows, model, epochs=1), tmp_path / "run")
    for name in ("influence", "ek-fac", "trak", "trackstar"):
        with pytest.raises(UnsupportedError, match=r"has preference or weighted rows: leave it out|pip install"):
            attribute(run, [QUERY], name)
    for name in (
        "gradient dot",
        "default",
        "embedding",
        "bm25",
        "rapidin",
        "z0-inf",
        "length",
        "norm",
        "untrained",
        "tracin",
    ):
        assert np.isfinite(attribute(run, [QUERY], name).scores).all(), name


def test_smoothed_targets_keep_the_weights(model):
    plain, weighted = (recipe_of([row | w for row in PLAIN], model, label_smoothing=0.2, epochs=1, batch_size=5)
                       for w in ({}, {"weight": 0.5}))  # fmt: skip
    half = plain.with_(lr=LR / 2)
    assert_close(flat(train_plain(weighted)), flat(train_plain(half)), "exact")
    assert list(itertools.chain(*plain.batches())) == [0, 1, 2, 3, 4]
