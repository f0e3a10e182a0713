"""Losses and gradients of single rows, written out plainly: one row at a time, no vmap, no padding, no recipe code."""

from __future__ import annotations

import torch

from leaveout.corpus import Corpus
from leaveout.training.microgpt import MicroGPT
from leaveout.training.recipe import OptimizerSettings, Recipe
from readout.tiny import TEXTS, make_model, make_tokenizer

NAMES = ["anna", "bo", "evelyn", "kim", "lena", "maximilian"]
PROMPTED = [
    {"id": "p0", "prompt": "Say yes.", "completion": " Yes."},
    {"id": "p1", "prompt": "What is the capital of France, and why?", "completion": " Paris, for reasons of history."},
]


def points(n, seed, noise=1.0):
    """Points around three corners in four dimensions, with their class."""
    g = torch.Generator().manual_seed(seed)
    return tuple((1.4 * torch.eye(4)[i % 3] + noise * torch.randn(4, generator=g), i % 3) for i in range(n))


def tiny_lm():
    torch.manual_seed(3)
    return make_model("llama").float(), make_tokenizer()


SGD = OptimizerSettings("sgd", 0.2)
RECIPES = {
    "classifier": Recipe(
        "classifier", points(9, 0), model={"hidden": [5]}, optimizer=SGD, batch_size=3, epochs=2, dtype="float64"
    ),
    "microgpt": Recipe.microgpt(NAMES, n=6, dtype="float64"),
    "causal-lm": Recipe(
        "causal-lm",
        tuple(Corpus.open([*PROMPTED, *({"id": str(i), "text": text} for i, text in enumerate(TEXTS[:4]))])),
        model=tiny_lm,
        optimizer=SGD,
        batch_size=2,
    ),
}


def slow_losses(name, parameters, rows):
    """One loss a row as a list of scalars that can be differentiated with respect to `parameters`."""
    return [LOSSES[name](parameters, row) for row in rows]


def slow_gradients(name, parameters, rows):
    """One dictionary of gradients a row."""
    found = []
    for row in rows:
        own = {key: p.detach().clone().requires_grad_() for key, p in parameters.items()}
        loss = LOSSES[name](own, row)
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        found.append({key: torch.zeros_like(own[key]) if g is None else g for key, g in zip(own, grads, strict=True)})
    return found


def slow_product(first, second, names=None):
    return sum(float((first[name] * second[name]).sum()) for name in names or first)


def classifier_loss(p, row):
    x, label = row
    if "2.weight" in p:
        hidden = p["1.0.weight"] @ x.to(p["1.0.weight"].dtype) + p["1.0.bias"]
        logits = p["2.weight"] @ (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) + p["2.bias"]
    else:
        logits = p["1.weight"] @ x.to(p["1.weight"].dtype) + p["1.bias"]
    return torch.logsumexp(logits, 0) - logits[label]


def microgpt_loss(p, name):
    text, alphabet = getattr(name, "text", name), "".join(sorted(set("".join(NAMES))))
    ids = [len(alphabet), *(alphabet.index(ch) for ch in text), len(alphabet)]
    model = MicroGPT(len(alphabet) + 1).double()
    logits = torch.func.functional_call(model, p, (torch.tensor([ids[:-1]]),))[0]
    return mean_surprise(logits, ids[1:], [True] * (len(ids) - 1))


def lm_loss(p, row):
    model, tokenizer = tiny_lm()
    out = tokenizer(row.text, return_offsets_mapping=True)
    first = min(start for start, _ in row.responses)
    learned = [end > first for _, end in out.offset_mapping]
    logits = torch.func.functional_call(model, p, (), {"input_ids": torch.tensor([out.input_ids])}).logits[0]
    return mean_surprise(logits[:-1], out.input_ids[1:], learned[1:])


def mean_surprise(logits, targets, learned):
    each = [torch.logsumexp(row, 0) - row[t] for row, t, keep in zip(logits, targets, learned, strict=True) if keep]
    return torch.stack(each).mean()


LOSSES = {"classifier": classifier_loss, "microgpt": microgpt_loss, "causal-lm": lm_loss}
