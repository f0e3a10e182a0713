"""From a recipe to what a training loop needs: a fresh model, its batches, and the loss of each example."""

from __future__ import annotations

import copy
import fnmatch
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.corpus import Corpus, Row
from leaveout.errors import FormatError, UnsupportedError
from leaveout.models import LanguageModel, ModelOptions, adapter_places, load_model, refuse_look_ahead
from leaveout.training import microgpt
from leaveout.training.recipe import Recipe

Batch = tuple[Tensor, ...]
IGNORED = -100


@dataclass
class Task:
    """A model at its start, and how to feed it.

    encode   examples of the recipe, or queries in the same form -> batch of tensors with the examples as first axis
    loss     (model, batch) -> losses [examples], each the mean over its own tokens, in nats
    trained  names of the parameters that the optimizer changes; all others are constants
    outputs  (model, batch) -> logits [examples, positions, classes] and targets [examples, positions], IGNORED where
             nothing is learned; None for a custom recipe
    separate whether an example's loss is meant not to depend on the others of its batch, and uses all parameters
    sizes    batch -> learned tokens of each example [examples], where the loss of a step is per token; else None
    notes    what a user should know of the model, one sentence each
    """

    model: nn.Module
    encode: Callable[[Sequence[Any]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    trained: tuple[str, ...]
    outputs: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] | None = None
    separate: bool = False
    sizes: Callable[[Batch], Tensor] | None = None
    notes: tuple[str, ...] = ()


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe. The model is in evaluation form: no dropout, batch norm with its stored statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = _MAKERS[recipe.kind](recipe)
    task.model.to(recipe.real_dtype).eval()
    if not task.trained:
        raise UnsupportedError(f"No parameter matches `trained: {recipe.trained}`.")
    for name, p in task.model.named_parameters():
        p.requires_grad_(name in task.trained)
    return task


def rows_are_separate(recipe: Recipe, task: Task) -> bool:
    """Whether examples can be left out of a batch without changing the losses of the others.

    Tried, where the task means it so, with the shortest and the longest example, together and alone: an attention that
    sees padding, or positions that are scaled by the longest example, are found out.
    """
    if not task.separate:
        return False
    pair = [pick(recipe.examples, key=text_length) for pick in (min, max)]
    with torch.no_grad():
        together = task.loss(task.model, task.encode(pair))
        alone = torch.cat([task.loss(task.model, task.encode([one])) for one in pair])
    return torch.allclose(together, alone, rtol=1e-7 if recipe.dtype == "float64" else 3e-5, atol=0.0)


def text_length(example: object) -> int:
    """Characters of a row; 1 for an example without text."""
    return len(getattr(example, "text", "")) or 1


def _trained(model: nn.Module, wanted: Any) -> tuple[str, ...]:
    """Parameter names that match "full", or one of several patterns such as "*.attn.*"."""
    names = [name for name, _ in model.named_parameters()]
    if wanted == "full":
        return tuple(names)
    return tuple(n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in wanted))


# --- microgpt ----------------------------------------------------------------------------------------------------


def _microgpt(recipe: Recipe) -> Task:
    about = recipe.model or {}
    alphabet = about.get("alphabet") or "".join(sorted({ch for row in recipe.examples for ch in row.text}))
    model = microgpt.MicroGPT(vocabulary=len(alphabet) + 1).to(recipe.real_dtype)
    if "start" in about:
        rng = random.Random()
        rng.setstate(about["start"])
        n = sum(p.numel() for p in model.parameters())
        microgpt.load_flat(model, torch.tensor([rng.gauss(0, 0.08) for _ in range(n)], dtype=torch.float64))

    def encode(rows: Sequence[Any]) -> Batch:
        pairs = [microgpt.encode(_text(row), alphabet, model.context) for row in rows]
        longest = max(len(x) for x, _ in pairs)
        ids = torch.stack([F.pad(x, (0, longest - len(x))) for x, _ in pairs])
        targets = torch.stack([F.pad(y, (0, longest - len(y)), value=IGNORED) for _, y in pairs])
        return ids, targets

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return m(batch[0]), batch[1]

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return token_losses(*outputs(m, batch))

    sizes = _learned_tokens if recipe.loss_per == "token" else None
    return Task(model, encode, loss, _trained(model, recipe.trained), outputs, separate=True, sizes=sizes)


def _learned_tokens(batch: Batch) -> Tensor:
    return (batch[1] != IGNORED).sum(1)


def _text(row: Any) -> str:
    if isinstance(row, dict):
        row = next(iter(Corpus.open([row])))
    return row.text if isinstance(row, Row) else str(row)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over each example's tokens."""
    if targets.shape[0] == 1:
        return F.cross_entropy(logits[0], targets[0], ignore_index=IGNORED).unsqueeze(0)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(targets.shape).sum(-1) / (targets != IGNORED).sum(-1)


# --- language models ---------------------------------------------------------------------------------------------


def _causal_lm(recipe: Recipe) -> Task:
    loaded = _language_model(recipe)
    model, tokenizer = loaded.lm, loaded.tokenizer
    trained = _parts_to_train(model, recipe.trained)
    if isinstance(trained, dict):
        model, trained = _with_lora(model, trained["lora"]), ("*lora_*",)

    def encode(rows: Sequence[Any]) -> Batch:
        return _encode_rows(rows, tokenizer, recipe.max_tokens)

    def logits(m: nn.Module, ids: Tensor) -> Tensor:
        # Padding stands at the end, where no token with a label can attend to it.
        return m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return logits(m, batch[0])[:, :-1], batch[1][:, 1:]

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return token_losses(*outputs(m, batch))

    context = min(recipe.max_tokens, loaded.context)
    refuse_look_ahead(model, functools.partial(logits, model), loaded.embedded, context, loaded.device)
    sizes = (lambda batch: _learned_tokens((batch[0], batch[1][:, 1:]))) if recipe.loss_per == "token" else None
    names = _trained(model, trained)
    return Task(model, encode, loss, names, outputs, separate=True, sizes=sizes, notes=loaded.notes)


def _language_model(recipe: Recipe) -> LanguageModel:
    """The model that a recipe starts from, never the caller's own object: `model` is a place, a pair (module, tokenizer),
    or a function that makes such a pair.
    """
    source: Any = recipe.model() if callable(recipe.model) else recipe.model  # type: ignore[operator]
    if not isinstance(source, (str, Path, tuple)):
        raise FormatError(
            "A causal-lm recipe needs `model`: a directory, a .gguf file, an adapter or a name that transformers can load, "
            "or a pair (model, tokenizer)."
        )
    if isinstance(source, tuple) and not callable(recipe.model):
        source = copy.deepcopy(source)
    loaded = load_model(source, options=ModelOptions(recipe.dtype))
    loaded.lm.set_attn_implementation("eager")  # type: ignore[operator]
    loaded.lm.config.use_cache = False  # type: ignore[union-attr]
    for name, p in loaded.lm.named_parameters():
        if not p.is_floating_point() or hasattr(p, "__tensor_flatten__"):
            raise UnsupportedError(
                f"{type(loaded.lm).__name__} has quantised weights ({name}), which can't be trained: give "
                "model.dequantize(), or load it in floating point."
            )
    return loaded


def _parts_to_train(model: nn.Module, wanted: Any) -> Any:
    """`trained` of a recipe, as patterns or settings of new adapters; "adapter" means those that the model has.

    Raises: FormatError where a model with an adapter leaves open what is trained.
    """
    names = [f"{place}.*" for place in adapter_places(model)]
    if wanted == "adapter":
        if not names:
            raise FormatError("`trained: adapter` goes on with an adapter that is at work, and the model has none.")
        return tuple(names)
    if names and (wanted == "full" or isinstance(wanted, dict)):
        raise FormatError(
            "The model has an adapter, which leaves open what is trained: give `trained: adapter` to go on with it, a list "
            "of name patterns, or a model that it was merged into (merge_and_unload)."
        )
    return wanted


def _with_lora(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Adapters on a frozen base: {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}."""
    try:
        import peft
    except ImportError:
        raise UnsupportedError("LoRA needs the package peft: pip install 'leaveout[peft]'.") from None
    config = peft.LoraConfig(
        r=settings.get("r", 8), lora_alpha=settings.get("alpha", 16), target_modules=list(settings["targets"]),
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def _encode_rows(rows: Sequence[Any], tokenizer: Any, limit: int) -> Batch:
    """Token ids and labels [examples, tokens]; labels only where a row's response is (everywhere for plain text)."""
    encoded = [_encode_row(row, tokenizer, limit) for row in rows]
    longest = max(len(ids) for ids, _ in encoded)
    fill = tokenizer.pad_token_id or 0
    ids = torch.tensor([ids + [fill] * (longest - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in encoded])
    return ids, labels


def _encode_row(row: Any, tokenizer: Any, limit: int) -> tuple[list[int], list[int]]:
    row = row if isinstance(row, Row) else next(iter(Corpus.open([row if isinstance(row, dict) else {"text": row}])))
    if row.messages is not None:
        raise UnsupportedError("Chat rows are not supported in recipes: render them to text or prompt and completion.")
    out = tokenizer(row.text, return_offsets_mapping=True, truncation=True, max_length=limit)
    ids, offsets = list(out["input_ids"]), out["offset_mapping"]
    learned = [any(a < end and b > start for start, end in row.responses) for a, b in offsets]
    labels = [i if keep else IGNORED for i, keep in zip(ids, learned, strict=True)]
    if not any(keep for keep in learned[1:]):
        raise FormatError(f"Row {row.id} has no token to learn within max_tokens = {limit}.")
    return ids, labels


# --- classifiers and anything else -------------------------------------------------------------------------------


def _classifier(recipe: Recipe) -> Task:
    """`model`: a function that makes a module from features [examples, ...] to logits, or {"hidden": [...]} for an MLP."""
    first = torch.as_tensor(recipe.examples[0][0])
    n_classes = 1 + max(int(label) for _, label in recipe.examples)
    make: Any = recipe.model
    if callable(make):
        model: Any = make()
    else:
        sizes = [first.numel(), *(recipe.model or {}).get("hidden", [32])]
        layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], n_classes))

    def encode(rows: Sequence[Any]) -> Batch:
        features = torch.stack([torch.as_tensor(x) for x, _ in rows]).to(recipe.real_dtype)
        return features, torch.tensor([int(y) for _, y in rows])

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="none")

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return m(batch[0]).unsqueeze(1), batch[1].unsqueeze(1)

    # A module of the user's may look across its batch, or choose by the input which of its parts it uses.
    return Task(model, encode, loss, _trained(model, recipe.trained), outputs, separate=not callable(make))


def _custom(recipe: Recipe) -> Task:
    """`model` makes an nn.Module; `loss(model, batch)` gives [examples]; an example is a tensor or a tuple of tensors."""
    make: Any = recipe.model
    if not callable(make) or recipe.loss is None:
        raise ValueError("a custom recipe needs `model` (a function that makes an nn.Module) and `loss`")
    model: Any = make()

    def encode(rows: Sequence[Any]) -> Batch:
        columns = zip(*(row if isinstance(row, tuple) else (row,) for row in rows), strict=True)
        stacked = (torch.stack([torch.as_tensor(v) for v in column]) for column in columns)
        return tuple(t.to(recipe.real_dtype) if t.is_floating_point() else t for t in stacked)

    return Task(model, encode, recipe.loss, _trained(model, recipe.trained))


_MAKERS: dict[str, Callable[[Recipe], Task]] = {
    "microgpt": _microgpt,
    "causal-lm": _causal_lm,
    "classifier": _classifier,
    "custom": _custom,
}
