"""From a recipe to what a training loop needs: a fresh model, its batches, and the loss of each example."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.corpus import Row
from leaveout.corpus.chat import chosen_template
from leaveout.errors import FormatError, MismatchError, UnsupportedError, needs
from leaveout.models import (
    LanguageModel,
    ModelOptions,
    adapter_places,
    find_device,
    length_limit,
    load_model,
    refuse_hooks,
    refuse_look_ahead,
    sent,
)
from leaveout.models.identity import hash_tokenizer
from leaveout.training import microgpt
from leaveout.training.dropout import dropped
from leaveout.training.examples import IGNORED, Asked, RowEncoder, as_row, asked, check_pair, too_long, unmarked
from leaveout.training.formulas import slow_path
from leaveout.training.norms import by_batches, fewest_values, follow_statistics
from leaveout.training.recipe import Recipe
from leaveout.training.start import made_by, module_of, pair_of, refuse_another_start, tried_numbers, try_loss

Batch = tuple[Tensor, ...]
Parameters = dict[str, Tensor]
Outputs = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
WITH_FORMULAS = {"eager", "sdpa", None}
"""Forms of attention in transformers that are made of elementary operations, or have a backend that is; not flash or flex."""


@dataclass
class Task:
    """A model at its start, and how to feed it.

    encode   examples of the recipe, cut where they are too long, or `Asked` ones -> batch of tensors on the CPU, examples
             first; `batch` puts it where the model is
    loss     (model, batch) -> losses [examples], each the mean over its own tokens, in nats
    trained  names of the parameters that the optimizer changes; all others are constants
    outputs  (model, batch) -> logits [examples, positions, classes] and targets [examples, positions], IGNORED where
             nothing is learned; None for a custom recipe
    cut      example -> how many of its tokens `encode` cuts off; None where it cuts nothing
    packed   (model, batch) -> as `outputs`, with the examples in one sequence, where training has them so
    refer    gives what a reference model makes of the examples, while the model is at its start; None: there is none
    weighted whether the batch of examples ends with their weights [examples], by which `loss` multiplies
    smoothing   the part of each target that is spread over all classes where the task learns, and not where it is asked
    separate whether an example's loss is meant not to depend on the others of its batch, and uses all parameters
    sizes    batch -> learned tokens of each example [examples], where the loss of a step is per token; else None
    notes    what a user should know of the model, one sentence each
    given    whether module or loss are the user's own, which nobody has tried
    running  names of running statistics of norms (`norms`), which steps change as well; they are parameters too
    """

    model: nn.Module
    encode: Callable[[Sequence[Any]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    trained: tuple[str, ...]
    outputs: Outputs | None = None
    packed: Outputs | None = None
    refer: Callable[[], dict[str, float]] | None = None
    weighted: bool = False
    smoothing: float = 0.0
    separate: bool = False
    sizes: Callable[[Batch], Tensor] | None = None
    notes: tuple[str, ...] = ()
    given: bool = False
    cut: Callable[[Any], int] | None = None
    running: tuple[str, ...] = ()

    def parameters(self) -> dict[str, Any]:
        """The trained parameters by name, in the order of `trained`, and after them the running statistics."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for name in (*self.trained, *self.running)}

    def learned(self, model: nn.Module, batch: Batch) -> Tensor:
        """The losses [examples] that training lowers."""
        outputs = self.packed or self.outputs
        if outputs is None or not (self.packed or self.smoothing):
            return self.loss(model, batch)
        losses = token_losses(*outputs(model, batch), self.smoothing)
        return losses * batch[-1] if self.weighted else losses

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Examples encoded, on the model's device; the copy there is not waited for."""
        return tuple(sent(t, self.device) for t in self.encode(rows))

    def encode_queries(self, rows: Sequence[Any]) -> Batch:
        """Queries, in the form of the examples, as a batch on the model's device; they are never cut."""
        return self.batch(asked(rows))


class Bound(nn.Module):
    """A function of a task's model (and other tensors) as a module, so that parameters can be given by name."""

    def __init__(self, task: Task, values: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.values = task.model, values

    def forward(self, *inputs: Tensor) -> Tensor:
        """The values under the model's own parameters."""
        return self.values(self.model, *inputs)

    def under(self, parameters: Parameters, *inputs: Tensor) -> Tensor:
        """The values under these parameters."""
        return torch.func.functional_call(self, {f"model.{name}": p for name, p in parameters.items()}, inputs)


def losses_on(task: Task, batch: Batch) -> Bound:
    """The losses [examples] of a batch that training lowers."""
    return Bound(task, lambda model: task.learned(model, batch))


WEIGHTS = "weights of a batch's examples"
"""Their name among the parameters of a run, where norms need them."""


def weighted_losses(
    task: Task, batch: Batch, runs: Mapping[str, Tensor], weights: Tensor
) -> tuple[Callable[[Parameters], Tensor], Parameters]:
    """The losses [examples] of a batch that training lowers, as a function of a run's parameters, and those of runs [runs, ...].

    weights: [runs, examples], by which norms of batches have their statistics
    """
    bound = losses_on(task, batch)
    if not task.running:
        return bound.under, dict(runs)

    def losses(given: Parameters) -> Tensor:
        own = dict(given)
        with by_batches(task.model, own.pop(WEIGHTS)):
            return bound.under(own)

    return losses, {**runs, WEIGHTS: weights}


def example_loss(task: Task, loss: Callable[[nn.Module, Batch], Tensor] | None = None) -> Bound:
    """The loss of one example, the task's own or another, which is given as tensors without their batch axis."""
    asked = loss or task.loss
    return Bound(task, lambda model, *example: asked(model, tuple(t[None] for t in example)).squeeze(0))


def task_of(recipe: Recipe, device: str | torch.device = "cpu") -> Task:
    """The task of a recipe. The model is in evaluation form: no dropout, batch norm with its stored statistics.

    It is made on the CPU, so that it starts from the same numbers wherever it runs, and then moved.
    What the user made is tried once a recipe (see `start`). Raises: UnsupportedError if it fails.
    """
    place = find_device(device)
    with torch.random.fork_rng(devices=[]), slow_path():
        task = _made(recipe)
        if not _was_tried(recipe):
            if callable(recipe.model) and not isinstance(recipe.model, nn.Module):
                refuse_another_start(task.model, _made(recipe).model)
            if task.given:
                try_loss(task, recipe.examples, tried_numbers(recipe.batches(), len(recipe.examples)))
            if task.running:
                _try_statistics(recipe, task)
            if task.given and recipe.dropout is not None:
                _try_training_form(recipe, task)
            object.__setattr__(recipe, "_tried", True)
        if place.type != "cpu":
            task.model.to(place)
            _try_there(task, recipe)
        if task.refer is not None and not hasattr(recipe, "_references"):
            object.__setattr__(recipe, "_references", task.refer())
    return task


def _try_statistics(recipe: Recipe, task: Task) -> None:
    """Refuses what batch norm cannot make statistics of, in training or in retrainings; running ones stay as they are."""
    smallest = min((part for step in recipe.micro_batches() for part in step), key=len)
    ones = torch.ones(len(smallest), dtype=recipe.real_dtype)
    with torch.no_grad(), by_batches(task.model, ones, follows=False), fewest_values(task.model) as seen:
        task.loss(task.model, task.encode([recipe.examples[i] for i in smallest]))
    if alone := [name for name, values in seen.items() if values < 2]:
        raise UnsupportedError(
            f"A micro-batch has {len(smallest)} examples, and so one value a channel in the batch norm {alone[0]!r}, which has "
            "no variance: set drop_last, or another batch_size."
        )


def _try_training_form(recipe: Recipe, task: Task) -> None:
    """Refuses modules that keep a state of their own where dropout puts the model in training form."""
    before = {name: b.detach().clone() for name, b in task.model.named_buffers()}
    with torch.no_grad(), dropped(task.model, 0):
        task.loss(task.model, task.encode([recipe.examples[i] for i in recipe.micro_batches()[0][0]]))
    for name, buffer in task.model.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise UnsupportedError(
                f"The model changes its buffer {name} in training form, in which dropout puts it (spectral norm, moving "
                "averages): buffers are constants here, so keep that module in evaluation form, or leave dropout out."
            )


def references_of(recipe: Recipe) -> dict[str, float]:
    """What the reference model of a recipe makes of its preference rows, by their content: log p(chosen) - log p(rejected).

    It is found once, when the first task of the recipe is made, and kept with the recipe; {} where there are no such rows.
    """
    if recipe.kind != "causal-lm" or recipe.loss is None:
        return {}
    if not hasattr(recipe, "_references"):
        task_of(recipe)
    return recipe._references  # type: ignore[attr-defined]


def _try_there(task: Task, recipe: Recipe) -> None:
    """Refuses a model of the user's, or a loss, that holds tensors elsewhere than its model is."""
    if not task.given:
        return
    try:
        with torch.no_grad():
            task.loss(task.model, task.batch(recipe.examples[:1]))
    except RuntimeError as error:
        raise UnsupportedError(
            f"The loss fails on {task.device} ({' '.join(str(error).split())[:200]}): model and loss must make tensors on "
            "the device of their batch, and keep others as buffers of the module."
        ) from error


def _was_tried(recipe: Recipe) -> bool:
    """Whether a task of this recipe object was made before, in this process."""
    return getattr(recipe, "_tried", False)


def _made(recipe: Recipe) -> Task:
    torch.manual_seed(recipe.seed)
    task = _MAKERS[recipe.kind](recipe)
    if any(isinstance(row, Row) and row.weight != 1 for row in recipe.examples):
        task = _weighted(task, recipe.real_dtype)
    task.model.to(recipe.real_dtype).eval()
    task.smoothing = recipe.label_smoothing
    if recipe.batch_statistics:
        task.running = follow_statistics(task.model, recipe.real_dtype)
    if not task.trained:
        raise UnsupportedError(f"No parameter matches `trained: {recipe.trained}`.")
    for name, p in task.model.named_parameters():
        p.requires_grad_(name in task.trained)
    return task


def _weighted(task: Task, dtype: torch.dtype) -> Task:
    """A task whose examples' losses are multiplied by the weights of their rows; queries are asked without."""

    def encode(rows: Sequence[Any]) -> Batch:
        batch = task.encode(rows)
        if any(isinstance(row, Asked) for row in rows):
            return batch
        return *batch, torch.tensor([as_row(row).weight for row in rows], dtype=dtype)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        # Ids, labels, and of preference rows, whose ids have an axis more, the reference; the weights come after them.
        if len(batch) == batch[0].dim():
            return task.loss(model, batch)
        return task.loss(model, batch[:-1]) * batch[-1]

    return replace(task, encode=encode, loss=loss, weighted=True)


def rows_are_separate(recipe: Recipe, task: Task) -> bool:
    """Whether examples can be left out of a batch without changing the losses of the others.

    Tried, where the task means it so, with the shortest and the longest example, together and alone: an attention that
    sees padding, or positions that are scaled by the longest example, are found out. With dropout also with the masks that
    they have together.
    """
    if not task.separate or task.packed is not None or task.running:  # the batch is one sequence, has one mean
        return False
    pair = [pick(recipe.examples, key=text_length) for pick in (min, max)]
    near = functools.partial(torch.allclose, rtol=1e-7 if recipe.dtype == "float64" else 3e-5, atol=0.0)
    with torch.no_grad():
        together = task.loss(task.model, batch := task.batch(pair))
        alone = torch.cat([task.loss(task.model, task.batch([one])) for one in pair])
        return near(together, alone) and (recipe.dropout is None or _masks_are_separate(task, batch, near))


def _masks_are_separate(task: Task, pair: Batch, near: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether each of two examples alone can have the masks that it has in the batch of both."""
    with dropped(task.model, 0):
        together = task.learned(task.model, pair)
    try:
        for place in range(2):
            with dropped(task.model, 0, [place], 2):
                alone = task.learned(task.model, tuple(t[place : place + 1] for t in pair))
            if not near(together[place : place + 1], alone):
                return False
    except UnsupportedError:  # a tensor whose first axis is not that of the examples
        return False
    return True


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
        for row in rows:
            if isinstance(row, Asked) and (length := len(as_row(row).text) + 1) > model.context:
                raise too_long(as_row(row), f"{length} characters with its end", model.context)
        pairs = [
            _answers_only(as_row(row), *microgpt.encode(as_row(row).text, alphabet, model.context)) for row in rows
        ]
        longest = max(len(x) for x, _ in pairs)
        ids = torch.stack([F.pad(x, (0, longest - len(x))) for x, _ in pairs])
        targets = torch.stack([F.pad(y, (0, longest - len(y)), value=IGNORED) for _, y in pairs])
        return ids, targets

    def cut(row: Any) -> int:
        return max(0, len(as_row(row).text) + 1 - model.context)

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return m(batch[0]), batch[1]

    sizes = None if recipe.loss_per == "example" else _learned_tokens
    return Task(
        model,
        encode,
        _losses_of(outputs),
        _trained(model, recipe.trained),
        outputs,
        separate=True,
        sizes=sizes,
        cut=cut,
    )


def _answers_only(row: Row, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs, and targets [characters and end] that are IGNORED outside of what the row learns.

    Raises: FormatError if nothing of it is left.
    """
    places = range(len(targets))
    spans = [(start, end + (end == len(row.text))) for start, end in row.responses]  # the end belongs to an answer
    learned = torch.tensor([any(start <= place < end for start, end in spans) for place in places])
    if not learned.any():
        raise FormatError(
            f"Row {row.id!r} has nothing to learn in the {len(places)} characters that the model reads: shorten its "
            "prompt, or leave it out."
        )
    return inputs, targets.where(learned, IGNORED)


def _learned_tokens(batch: Batch) -> Tensor:
    return (batch[1] != IGNORED).sum(1)


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean loss over each example's tokens; a part of each target is spread over all classes."""
    how: Any = {"ignore_index": IGNORED, "label_smoothing": smoothing}
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if targets.shape[0] == 1:
        return F.cross_entropy(logits[0], targets[0], **how).unsqueeze(0)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", **how)
    return each.view(targets.shape).sum(-1) / (targets != IGNORED).sum(-1)


def _losses_of(outputs: Outputs) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: token_losses(*outputs(model, batch))


# --- language models ---------------------------------------------------------------------------------------------


def _causal_lm(recipe: Recipe) -> Task:
    loaded = _language_model(recipe.model, recipe.dtype)
    model, tokenizer = loaded.lm, loaded.tokenizer
    trained = _parts_to_train(model, recipe.trained)
    if isinstance(trained, dict):
        model, trained = _with_lora(model, trained["lora"]), ("*lora_*",)

    template = chosen_template(recipe.template, tokenizer)
    rows = RowEncoder(tokenizer, template, recipe.max_tokens, loaded.context)

    def logits(m: nn.Module, ids: Tensor) -> Tensor:
        # Padding stands at the end, where no token with a label can attend to it. The mask is looked at, which one that is
        # made of the ids could not be where these are a batch of torch.vmap.
        return m(input_ids=ids, attention_mask=torch.ones(ids.shape, dtype=ids.dtype, device=ids.device)).logits

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch[0].dim() == 3:
            raise UnsupportedError(
                "A preference row has no logits of its own, and this asks for them: ask for losses or their gradients."
            )
        return logits(m, batch[0])[:, :-1], batch[1][:, 1:]

    def packed(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, labels, lengths = batch
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        own = positions < lengths[:, None]
        found = m(input_ids=ids[own][None], position_ids=positions[own][None]).logits[0]
        places = (own.flatten().cumsum(0) - 1).view(ids.shape)  # of padding: some token's, whose label is ignored
        return found[places[:, :-1]], labels[:, 1:]

    def margins(m: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        predicted, targets = logits(m, ids.flatten(0, 1))[:, :-1], labels.flatten(0, 1)[:, 1:]
        own = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        chosen, rejected = own.view(targets.shape).sum(-1).view(-1, 2).unbind(1)
        return rejected - chosen

    def preferred(m: nn.Module, batch: Batch) -> Tensor:
        # Queries of a run are rows with one answer.
        if batch[0].dim() == 2:
            return token_losses(*outputs(m, batch))
        return -F.logsigmoid(recipe.loss.get("beta", 0.1) * (margins(m, *batch[:2]) - batch[2]))

    context = min(recipe.max_tokens, loaded.context)
    limit = length_limit(model)

    def encode(examples: Sequence[Any]) -> Batch:
        if limit is not None:
            _refuse_switch(rows, examples, limit)
        batch = rows.encode(examples)
        if masks:
            return *batch, torch.tensor([len(side.ids) for row in examples for side in rows.sides(row)])
        if batch[0].dim() == 2:
            return batch
        references = references_of(recipe)
        return *batch, torch.tensor([references[row.content_hash] for row in examples], dtype=recipe.real_dtype)

    masks = recipe.packed and recipe.dropout is not None  # else a packed batch gives the same numbers
    refuse_hooks(model, lambda ids: [logits(model, ids)], torch.arange(min(8, context), device=loaded.device)[None])
    if not _was_tried(recipe):
        refuse_look_ahead(
            model, lambda many: [logits(model, ids) for ids in many], loaded.embedded, context, loaded.device
        )
    sizes = None if recipe.loss_per == "example" else (lambda batch: _learned_tokens((batch[0], batch[1][:, 1:])))
    names = _trained(model, trained)
    if limit is not None and context > limit:
        _refuse_switch(rows, recipe.examples, limit)

    def refer() -> dict[str, float]:
        held, device = model, next(model.parameters()).device
        if (source := recipe.loss.get("reference")) is not None:
            other = _language_model(source, recipe.dtype)
            if hash_tokenizer(other.tokenizer) != hash_tokenizer(tokenizer):
                raise MismatchError(
                    "The reference has another tokenizer than the model: give the model that it was tuned from."
                )
            held = other.lm.to(device).eval()
        batches = ((row, [t.to(device) for t in rows.encode([row])]) for row in recipe.examples)
        with torch.no_grad():
            return {row.content_hash: float(margins(held, *batch)) for row, batch in batches}

    pairs = recipe.loss is not None
    return Task(
        model, encode, preferred if pairs else _losses_of(outputs), names, outputs, separate=True, sizes=sizes,
        notes=loaded.notes, cut=lambda row: sum(side.cut for side in rows.sides(row)), refer=refer if pairs else None,
        packed=packed if masks else None,
    )  # fmt: skip


def _refuse_switch(rows: RowEncoder, examples: Sequence[Any], limit: int) -> None:
    """Refuses rows on both sides of the length at which a model takes other positions: a batch would take those of the
    longest for all, so that a row's loss would depend on the others.
    """
    lengths = [len(side.ids) for row in examples for side in rows.sides(row)]
    if min(lengths) <= limit < max(lengths):
        raise UnsupportedError(
            f"Rows have {min(lengths)} to {max(lengths)} tokens, and this model takes other positions for all rows of a batch "
            f"whose longest has more than {limit} (rotary positions that are scaled by length): set max_tokens to {limit}, "
            "or give rows on one side of it."
        )


def _language_model(source: Any, dtype: str) -> LanguageModel:
    """The model that a recipe starts from, never the caller's own object: it is a place, a pair (module, tokenizer), or a
    function that makes such a pair.
    """
    if callable(source) or isinstance(source, tuple):
        source = pair_of(made_by(source))
    elif not isinstance(source, (str, Path)):
        raise FormatError(
            "A causal-lm recipe needs `model`: a directory, a .gguf file, an adapter or a name that transformers can load, "
            "or a pair (model, tokenizer)."
        )
    loaded = load_model(source, options=ModelOptions(dtype))
    if {getattr(getattr(m, "config", None), "_attn_implementation", None) for m in loaded.lm.modules()} - WITH_FORMULAS:
        loaded.lm.set_attn_implementation("eager")  # type: ignore[operator]
    if dtype == "float64" and getattr(loaded.lm.config, "_experts_implementation", None):
        loaded.lm.set_experts_implementation("eager")  # type: ignore[operator]  # their grouped product has no float64
    _uncompile(loaded.lm)
    loaded.lm.config.use_cache = False  # type: ignore[union-attr]
    for name, p in loaded.lm.named_parameters():
        if not p.is_floating_point() or hasattr(p, "__tensor_flatten__"):
            raise UnsupportedError(
                f"{type(loaded.lm).__name__} has quantised weights ({name}), which can't be trained: give "
                "model.dequantize(), or load it in floating point."
            )
    return loaded


def _uncompile(lm: nn.Module) -> None:
    """Puts modules that torch.compile wraps back as they are written: derivatives of all orders go through them."""
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(inner := child._modules.get("_orig_mod"), nn.Module):
                setattr(module, name, inner)


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
    peft = needs("peft", "LoRA", extra="peft")
    config = peft.LoraConfig(
        r=settings.get("r", 8), lora_alpha=settings.get("alpha", 16), target_modules=list(settings["targets"]),
        lora_dropout=settings.get("dropout", 0.0), task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        known = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise UnsupportedError(
            f"lora has targets that the model has no layers for ({', '.join(settings['targets'])}): give some of "
            f"{', '.join(known)}."
        ) from error


# --- classifiers and anything else -------------------------------------------------------------------------------


def _classifier(recipe: Recipe) -> Task:
    """`model`: a function that makes a module from features [examples, ...] to logits, or {"hidden": [...]} for an MLP."""
    first = torch.as_tensor(recipe.examples[0][0])
    n_classes = 1 + max(int(label) for _, label in recipe.examples)
    make: Any = recipe.model
    if callable(make):
        model: Any = module_of(made_by(make))
        n_classes = _classes_of(model.to(recipe.real_dtype).eval(), first.to(recipe.real_dtype), n_classes)
    else:
        sizes = [first.numel(), *(recipe.model or {}).get("hidden", [32])]
        layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], n_classes))

    def encode(rows: Sequence[Any]) -> Batch:
        for row in rows:
            if isinstance(row, Asked):  # the examples were checked with the recipe
                check_pair(row.row, "A query", first.shape, n_classes)
        features = torch.stack([torch.as_tensor(x) for x, _ in map(unmarked, rows)]).to(recipe.real_dtype)
        return features, torch.tensor([int(y) for _, y in map(unmarked, rows)])

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="none")

    def outputs(m: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return m(batch[0]).unsqueeze(1), batch[1].unsqueeze(1)

    # A module of the user's may look across its batch, or choose by the input which of its parts it uses.
    given = callable(make)
    return Task(model, encode, loss, _trained(model, recipe.trained), outputs, separate=not given, given=given)


def _classes_of(model: nn.Module, features: Tensor, wanted: int) -> int:
    """How many classes a module of the user's tells apart. Raises: FormatError if it gives no logits, or too few."""
    try:
        with torch.no_grad():
            logits = model(features[None])
    except Exception as error:
        raise FormatError(
            f"`model` fails for 1 example alone, whose features have the shape {list(features.shape)} ({error})."
        ) from None
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 1:
        raise FormatError(f"`model` gives {shape} for 1 example: a classifier gives logits, [1, classes].")
    if logits.shape[1] < wanted:
        raise FormatError(f"`model` gives {logits.shape[1]} logits, but the examples have labels up to {wanted - 1}.")
    return logits.shape[1]


def _custom(recipe: Recipe) -> Task:
    """`model` is or makes an nn.Module; `loss(model, batch)` gives [examples]; an example is a tensor or a tuple of them."""
    make: Any = recipe.model
    if not callable(make) or recipe.loss is None:
        raise ValueError("a custom recipe needs `model` (an nn.Module, or a function that makes one) and `loss`")
    model = module_of(made_by(make))

    def encode(rows: Sequence[Any]) -> Batch:
        columns = zip(*(row if isinstance(row, tuple) else (row,) for row in map(unmarked, rows)), strict=True)
        stacked = (torch.stack([torch.as_tensor(v) for v in column]) for column in columns)
        return tuple(t.to(recipe.real_dtype) if t.is_floating_point() else t for t in stacked)

    return Task(model, encode, recipe.loss, _trained(model, recipe.trained), given=True)


_MAKERS: dict[str, Callable[[Recipe], Task]] = {
    "microgpt": _microgpt,
    "causal-lm": _causal_lm,
    "classifier": _classifier,
    "custom": _custom,
}
