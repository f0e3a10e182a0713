"""A training run that somebody else's loop makes, recorded as it comes, and the recipe that replays it.

A recording notes the rows of each micro-batch, rates, the optimizer's groups, clipping, what losses are divided by, and
precision; and it seeds dropout, a seed for each micro-batch, so that the masks are known. Nothing else of the run changes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from leaveout.corpus.rows import row_json
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models import load_model
from leaveout.training.arguments import common_fields, refusals
from leaveout.training.dropout import seed_of
from leaveout.training.examples import row_of_tokens
from leaveout.training.loop import Loop, Part, RunOptions, Steps
from leaveout.training.notes import dropout_of
from leaveout.training.recipe import OptimizerSettings, Recipe, libraries
from leaveout.training.tasks import Parameters, task_of

EQUAL = 1e-3
"""Distance of two trained models that counts as equal, as a part of the whole movement."""
NOISE = 1e-5
"""Of the usual size of a gradient, what counts as zero but for rounding. Adam makes whole steps of it: a key's bias in
attention, whose gradient is zero by theory, goes another way in each arrangement of the same sums."""
ALIKE = {None: 1e-3, "bfloat16": 0.02}
"""Relative difference of two losses, or lengths of gradients, that counts as rounding."""
KNOWN = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "num_items_in_batch"}
PACKED = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "shift_labels"}
"""What collators give beside: of packed batches, what position ids say, too."""


@dataclass
class Recording:
    """What is known of a run that is recorded.

    model    the module that is trained; start: a copy as it was before; fields: of the recipe, what is known before the run
    steps    the micro-batches of each step; rates: what the optimizer used at each
    losses, norms   of each step: what the loop summed up, and the gradient's length as the optimizer got it
    checkpoints     step -> directory, where the Trainer saved one
    problems        why the run cannot be replayed, one sentence each
    """

    model: nn.Module
    start: nn.Module
    fields: dict[str, Any]
    seed: int
    steps: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    checkpoints: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = _trained(self.model)
        self._open: list[tuple[int, ...]] = []
        self._loss, self._divisors = 0.0, []
        self._groups: tuple[dict[str, Any], ...] = ()
        self._hook: Any = None
        self.after: Parameters = {}

    # --- while it runs ---------------------------------------------------------------------------------------------

    def batch(self, numbers: Iterable[int]) -> None:
        """Say which examples the next forward pass is on; it seeds the dropout of that pass."""
        self._open.append(tuple(int(i) for i in numbers))
        torch.manual_seed(seed_of(self.seed, len(self.steps), len(self._open) - 1))

    def watch(self, optimizer: Any) -> None:
        """Note the steps of an optimizer from here on."""
        if self._hook is None:
            inner = getattr(optimizer, "optimizer", optimizer)
            if inner.state:
                self.problems.append("The run goes on from a checkpoint: record the whole run, from its start.")
            self._hook = inner.register_step_pre_hook(lambda optimizer, args, kwargs: self._step(optimizer))

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        groups = tuple(
            {k: v for k, v in g.items() if k not in ("params", "lr", "initial_lr")}
            | {"names": self._names(g["params"])}
            for g in optimizer.param_groups
        )
        if self._groups and groups != self._groups:
            self._problem("The optimizer's groups or numbers change while it runs, which no recipe says.")
        self._groups, self._kind = groups, type(optimizer)
        rates = {float(g["lr"]) for g in optimizer.param_groups if g["params"]}
        if len(rates) > 1:
            self._problem("The optimizer's groups have rates of their own: a recipe has one for all, so use one.")
        if not self._open:
            self._problem("A step came without a batch: call `batch` before each forward pass.")
        self.rates.append(max(rates))
        self.steps.append(tuple(self._open))
        self.losses.append(self._loss)
        self.norms.append(_length(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None))
        self._open, self._loss = [], 0.0

    def _names(self, params: Sequence[Any]) -> tuple[str, ...]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return tuple(names.get(id(p), "") for p in params if p.requires_grad)

    def _problem(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)

    def stop(self) -> None:
        """The run is over: the parameters are what it trained."""
        if self._hook is not None:
            self._hook.remove()
        self.after = _trained(self.model)
        if self._open:
            self._problem("The run ended within a step: let it end after one.")

    # --- what was recorded -----------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        """The recipe that replays the run.

        Raises: UnsupportedError, with what cannot be replayed.
        """
        if not self.steps:
            raise UnsupportedError("No step was recorded: train inside `with recording(...)`.")
        if self.problems:
            raise UnsupportedError(" ".join(self.problems))
        largest = max(self.rates) or 1.0
        flat = all(len(step) == 1 for step in self.steps)
        fields: dict[str, Any] = {
            "optimizer": self._optimizer(largest), "schedule": tuple(rate / largest for rate in self.rates),
            "order": tuple(step[0] for step in self.steps) if flat else tuple(self.steps),
            "trained": self._trained_names(), "dropout": self.seed if dropout_of(self.start) else None,
        }  # fmt: skip
        tokenizer = self.fields.get("tokenizer")
        given = {name: value for name, value in self.fields.items() if name != "tokenizer"}
        model = self.start if tokenizer is None else (self.start, tokenizer)
        recipe = Recipe(**{"model": model, **fields, **given})
        return recipe.with_(loss_per=self._loss_per(recipe)) if self._divisors else recipe

    def _optimizer(self, lr: float) -> OptimizerSettings:
        kinds = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
        if self._kind not in kinds:
            raise UnsupportedError(f"The optimizer is {self._kind.__name__}: use torch's AdamW, Adam or SGD.")
        groups: list[dict[str, Any]] = [g for g in self._groups if g["names"]]
        decays = {g["weight_decay"] for g in groups} - {0.0}
        same = ("betas", "eps", "momentum", "nesterov", "dampening", "amsgrad", "maximize")
        facts = [{name: g[name] for name in same if name in g} for g in groups]
        if len(decays) > 1 or any(fact != facts[0] for fact in facts):
            raise UnsupportedError(
                "The optimizer's groups differ in more than which of them decay: use one setting for all."
            )
        first = facts[0]
        if unlike := [name for name in ("dampening", "amsgrad", "maximize") if first.get(name)]:
            raise UnsupportedError(
                f"The optimizer has {unlike[0]}={first[unlike[0]]}, which no recipe has: leave it out."
            )
        spared = tuple(name for g in groups if decays and not g["weight_decay"] for name in g["names"])
        vectors = {name for g in groups for name in g["names"] if self._before[name].dim() < 2}
        fields = {name: first[name] for name in ("betas", "eps", "momentum", "nesterov") if name in first}
        undecayed: Any = "vectors" if spared and set(spared) == vectors else spared
        return OptimizerSettings(
            kinds[self._kind], lr, weight_decay=max(decays, default=0.0), undecayed=undecayed, **fields
        )

    def _trained_names(self) -> Any:
        names = [name for g in self._groups for name in g["names"]]
        own = [name for name, _ in self.model.named_parameters()]
        return "full" if set(names) == set(own) else tuple(name for name in own if name in set(names))

    def _loss_per(self, recipe: Recipe) -> Any:
        """How losses were divided: by the tokens of a step, by micro-batches, or by what was given."""
        if all(divisor is None for divisor in self._divisors):
            return "micro-batch"
        parts = [step[0].divisor for step in _all_parts(recipe.with_(loss_per="token"))]
        given = tuple(float(divisor or math.nan) for divisor in self._divisors)
        return "token" if list(given) == [float(d) for d in parts] else given

    def save(self, directory: str | Path) -> Path:
        """Writes the recipe as a YAML file, with its rows, the model at its start and its tokenizer; gives its path.

        `leaveout train` and `Recipe.from_yaml` take it, on a machine with the same versions of torch and transformers.
        Raises: UnsupportedError for a run without a tokenizer, or one that cannot be replayed.
        """
        recipe, place = self.recipe, Path(directory)
        if recipe.kind != "causal-lm":
            raise UnsupportedError("Only the run of a language model can be saved: keep the recipe in Python.")
        self.start.save_pretrained(place / "model")  # type: ignore[operator]
        self.fields["tokenizer"].save_pretrained(place / "model")
        (place / "rows.jsonl").write_text("".join(row_json(row) + "\n" for row in recipe.examples), encoding="utf-8")
        left = {"kind", "examples", "units", "model", "optimizer", "steps", "epochs"}
        default = Recipe("causal-lm", recipe.examples[:1])
        said = {f.name: getattr(recipe, f.name) for f in fields(Recipe) if f.name not in left}
        said = {name: value for name, value in said.items() if value != getattr(default, name)}
        written = {"kind": "causal-lm", "data": "rows.jsonl", "model": "./model", "libraries": libraries()}
        written |= {"optimizer": {k: v for k, v in asdict(recipe.optimizer).items() if v is not None}, **said}
        (place / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(written)), sort_keys=False))
        return place / "recipe.yaml"

    # --- the proof -------------------------------------------------------------------------------------------------

    def replay(self, options: RunOptions | None = None) -> Replay:
        """Trains the recipe, and compares with what the run trained, step by step. Cost: one training."""
        recipe, options = self.recipe, options or RunOptions(device=next(self.model.parameters()).device)
        steps = Steps(recipe, task_of(recipe, options.device))
        params, losses, norms = steps.task.parameters(), [0.0], []

        def backward(part: Part) -> None:
            loss = steps.loss(part)
            losses[-1] += float(loss.detach())
            loss.backward()

        def note(*_: Any) -> None:
            norms.append(_length(p.grad for p in params.values() if p.grad is not None))
            losses.append(0.0)
            for name, p in params.items():
                if (grad := p.grad) is not None:
                    largest[name] = torch.maximum(largest[name], grad.abs()) if name in largest else grad.abs()

        largest: Parameters = {}
        loop = Loop(steps, params, backward, fused=steps.task.device.type != "cpu")
        loop.optimizer.register_step_pre_hook(note)
        loop.run(None, "replay", options)
        mine = {name: p.detach().cpu() for name, p in params.items()}
        whole = _length(self.after[name] - self._before[name] for name in mine) or 1.0
        usual = math.sqrt(
            sum(float(g.square().sum()) for g in largest.values()) / sum(g.numel() for g in largest.values())
        )
        idle = {name: (g <= NOISE * usual).cpu() for name, g in largest.items()}
        gaps = {name: p - self.after[name] for name, p in mine.items()}
        noise = _length(gap[idle[name]] for name, gap in gaps.items() if name in idle)
        rest = {
            name: float(gap.masked_fill(idle.get(name, torch.zeros(())).bool(), 0.0).norm())
            for name, gap in gaps.items()
        }
        cause = _cause(self, losses, norms, max(rest, key=rest.__getitem__))
        return Replay(math.hypot(*rest.values()) / whole, noise / whole, len(norms), cause, mine)


@dataclass(frozen=True)
class Replay:
    """A recorded run and its replay.

    distance   of the trained parameters, as a part of the length of the run's whole movement
    noise      likewise, of those whose gradients are zero but for rounding, which are not counted in `distance`
    cause      where they part, in a sentence
    """

    distance: float
    noise: float
    steps: int
    cause: str
    parameters: Parameters = field(repr=False)

    @property
    def equal(self) -> bool:
        """Whether the replay trained the same model."""
        return self.distance <= EQUAL

    def __str__(self) -> str:
        word = "equal" if self.equal else "NOT equal"
        idle = (
            f" ({self.noise:.1g} more where gradients are zero but for rounding)" if self.noise > self.distance else ""
        )
        return (
            f"{self.steps} steps replayed: {word}, {self.distance:.2g} of the whole movement apart{idle}. {self.cause}"
        )

    def require(self) -> Replay:
        """Raises: MismatchError, with the cause, unless the replay trained the same model."""
        if not self.equal:
            raise MismatchError(str(self))
        return self


def _cause(run: Recording, losses: Sequence[float], norms: Sequence[float], farthest: str) -> str:
    alike = ALIKE[run.fields.get("autocast")]
    for step, pair in enumerate(zip(run.losses, losses, strict=False)):
        if run.losses[step] and abs(pair[0] - pair[1]) > alike * abs(pair[0]):
            return (
                f"The loss of step {step} was {pair[0]:.6g} and is {pair[1]:.6g}: the forward pass is another (dropout masks, "
                "precision, attention)."
            )
        if abs(run.norms[step] - norms[step]) > alike * run.norms[step]:
            return (
                f"The gradient of step {step} had the length {run.norms[step]:.6g} and has {norms[step]:.6g}, after equal "
                "losses: clipping, or something that changes gradients."
            )
    if run.fields.get("autocast"):
        return (
            "Losses and gradients are alike in all steps; the rest is bfloat16, which rounds attention otherwise here."
        )
    return f"Losses and gradients are alike in all steps; the rest is rounding, most in {farthest}."


# --- recording ----------------------------------------------------------------------------------------------------------


@contextmanager
def recording(
    trained: Any, examples: Sequence[Any] | None = None, optimizer: Any = None, seed: int = 0, **fields: Any
) -> Iterator[Recording]:
    """Record what is trained inside: by a Trainer of transformers (or SFTTrainer of trl), or by a loop of one's own.

    trained    the Trainer; or a module, or a pair (model, tokenizer), with what it is trained on and its optimizer. Such a
               loop calls `batch(numbers)` of the recording before each forward pass
    fields     of the recipe, for a loop of one's own: kind (default causal-lm), loss_per, clip_norm, loss, ...
    Raises: UnsupportedError, before anything is trained, for what no recipe can replay, one sentence each.
    """
    if hasattr(trained, "training_step"):
        with _of_trainer(trained) as run:
            yield run
        return
    if examples is None or optimizer is None:
        raise ValueError("a loop of your own needs `examples` and `optimizer` beside the model that it trains")
    module, tokenizer = trained if isinstance(trained, tuple) else (trained, None)
    start = _copied(module)
    if tokenizer is not None:
        module = load_model(trained).lm
    known = {"kind": "causal-lm", "examples": tuple(examples), "dtype": _dtype(module), **fields}
    run = Recording(module, start, known | ({} if tokenizer is None else {"tokenizer": tokenizer}), seed)
    run.watch(optimizer)
    try:
        yield run
    finally:
        run.stop()


@contextmanager
def _of_trainer(trainer: Any) -> Iterator[Recording]:
    problems = [*_refused_losses(trainer), *refusals(trainer.args)]
    if problems:
        raise UnsupportedError(" ".join(problems))
    tokenizer = trainer.processing_class
    with torch.random.fork_rng():
        loader = trainer.get_train_dataloader()
        rows = _Rows(loader.dataset, loader.collate_fn, trainer.train_dataset, tokenizer)
        model = load_model((trainer.model, tokenizer)).lm
    longest = max(len(row["input_ids"]) for row in rows.examples)
    fields = {
        **common_fields(trainer.args), "kind": "causal-lm", "examples": tuple(rows.examples), "max_tokens": max(2, longest),
        "dtype": _dtype(model), "tokenizer": tokenizer,
    }  # fmt: skip
    seed = fields.pop("dropout")
    run = Recording(model, _copied(trainer.model), fields, seed)
    inner, saved = trainer.training_step, trainer._save_checkpoint

    def training_step(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        run.watch(trainer.optimizer)
        with torch.random.fork_rng():
            if not run._open:
                run._divisors.append(None if num_items_in_batch is None else float(num_items_in_batch))
            run.batch(rows.numbers_of(inputs, run))
            loss = inner(model, inputs, num_items_in_batch)
        scaled = num_items_in_batch is not None
        run._loss += float(loss) if scaled else float(loss) / trainer.current_gradient_accumulation_steps
        return loss

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        saved(*args, **kwargs)
        run.checkpoints[trainer.state.global_step] = f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"

    trainer.training_step, trainer._save_checkpoint = training_step, save_checkpoint
    try:
        yield run
    finally:
        del trainer.training_step, trainer._save_checkpoint
        run.stop()


def _refused_losses(trainer: Any) -> list[str]:
    """Why a Trainer's losses and rows cannot be replayed, known before it trains."""
    found, kind = [], type(trainer)
    for name, what in (("compute_loss", "loss"), ("training_step", "step")):
        place = f"{getattr(kind, name).__module__}.{getattr(kind, name).__qualname__}"
        if place not in (f"transformers.trainer.Trainer.{name}", f"trl.trainer.sft_trainer.SFTTrainer.{name}"):
            found.append(
                f"{kind.__name__} has a {what} of its own ({name}): record a loop with a custom recipe instead."
            )
    function = getattr(getattr(trainer.model, "loss_function", None), "__name__", "ForCausalLMLoss")
    if trainer.compute_loss_func is not None or function != "ForCausalLMLoss":
        found.append("The loss is a custom one (compute_loss_func, or the model's loss_function): leave it out.")
    if getattr(trainer.args, "loss_type", "nll") != "nll":
        found.append(f"The loss is {trainer.args.loss_type}: use loss_type='nll'.")
    if getattr(getattr(trainer.model, "config", None), "output_router_logits", False):
        found.append("The router's auxiliary loss depends on the whole batch: set output_router_logits to False.")
    if not hasattr(trainer.processing_class, "get_vocab"):
        found.append("The Trainer has no tokenizer: give processing_class=tokenizer.")
    if not hasattr(trainer.train_dataset, "__len__"):
        found.append("The data set is a stream, whose rows are not known before: give one with a length.")
    types = {p.dtype for p in trainer.model.parameters()}
    if types - {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        found.append(f"The model's own numbers are {names}: load it in float32 (bf16=True computes in bfloat16).")
    return found


class _Rows:
    """The rows of a Trainer's data set as its collator gives them, found again in batches by their tokens and labels."""

    def __init__(self, dataset: Any, collate: Any, whole: Any, tokenizer: Any) -> None:
        self.examples: list[dict[str, Any]] = []
        self._places: dict[Any, list[int]] = {}
        self._uses: dict[Any, int] = {}
        for number in range(len(dataset)):
            pieces = _pieces(collate([dataset[number]]))
            for piece, (ids, labels) in enumerate(pieces):
                name = str(number) if len(pieces) == 1 else f"{number}.{piece}"
                own = whole[number] if isinstance(whole[number], Mapping) and len(pieces) == 1 else {}
                self._places.setdefault((ids, labels), []).append(len(self.examples))
                self.examples.append(row_of_tokens(own, name, (ids, labels), tokenizer))

    def numbers_of(self, inputs: Any, run: Recording) -> list[int]:
        """The examples of a batch, in its order; what cannot be replayed of it is noted."""
        if other := sorted(set(inputs) - KNOWN - PACKED):
            run._problem(
                f"Batches give the model {', '.join(other)}, too, which no recipe has: leave it out of the rows."
            )
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, 0].all()):
            run._problem(
                "Batches are padded on the left, which moves positions: set tokenizer.padding_side to 'right'."
            )
        packed, keys = mask is None and "position_ids" in inputs, _pieces(inputs)
        run.fields["packed"] = packed
        rows, width = inputs["input_ids"].shape
        if dropout_of(run.model) and (rows > 1 if packed else width > max(len(ids) for ids, _ in keys)):
            run._problem(
                "Batches are padded beyond their longest row, which changes dropout masks: pad to the longest."
            )
        found = []
        for key in keys:
            if key not in self._places:
                run._problem(
                    "A batch has rows that the data set did not have when the recording began (rows added during training, or "
                    "a collator that draws at random): fix the rows before."
                )
                continue
            places, used = self._places[key], self._uses.get(key, 0)
            self._uses[key] = used + 1
            found.append(places[used % len(places)])
        return found


def _pieces(inputs: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of the rows of a batch, without padding; of a packed batch, of each of its sequences."""
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    found = []
    for row in range(len(ids)):
        kept = slice(None) if mask is None else mask[row].bool().cpu()
        own, wanted = ids[row].cpu()[kept].tolist(), labels[row].cpu()[kept].tolist()
        starts = [0] if positions is None or mask is not None else (positions[row] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], len(own)]
        found += [(tuple(own[a:b]), tuple(wanted[a:b])) for a, b in zip(starts, ends, strict=True)]
    return found


def _copied(model: nn.Module) -> nn.Module:
    """The model before the run, without what trainers hang on it."""
    made: Any = copy.deepcopy(model).cpu()
    for module in made.modules():
        module.__dict__.pop("forward", None)
    if hasattr(made, "gradient_checkpointing_disable"):
        made.gradient_checkpointing_disable()
    return made


def _trained(model: nn.Module) -> Parameters:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _all_parts(recipe: Recipe) -> list[list[Part]]:
    steps = Steps(recipe, task_of(recipe))
    return [steps.parts(i) for i in range(len(steps))]
