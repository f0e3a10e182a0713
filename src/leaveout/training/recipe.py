"""A frozen description of a training run: all that the trained model depends on, with a content hash.

A recipe is written in Python (any model and loss) or as YAML for the kinds `microgpt`, `causal-lm` and `classifier`.
Examples belong to units (what is deleted together); the loss of a step is the mean over its batch of weight * loss,
and the weight of an example is that of its unit. A unit of weight 0 still takes its step and still counts in the mean:
batches are never re-packed, so that the trained model is a smooth function of the weights (docs/explanation/methods.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import reprlib
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version as installed
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from leaveout.corpus import Corpus, Row
from leaveout.corpus.chat import read_template
from leaveout.corpus.rows import asked_row, commonest, distinct
from leaveout.corpus.sources import Reading, is_hub_id
from leaveout.errors import (
    FormatError,
    MismatchError,
    UnsupportedError,
    choices,
    refuse_other_names,
    require_list,
    require_whole,
)
from leaveout.models import load_model, source_digest
from leaveout.training.arguments import optimizer_fields, run_fields
from leaveout.training.digest import digest_of
from leaveout.training.examples import check_examples, read_arrays, row_of_tokens

KINDS = ("microgpt", "causal-lm", "classifier", "custom")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("sgd", "adam", "adamw", "paper-adam")
ORDERS = ("given", "shuffled")
LOSS_PER = ("example", "token", "micro-batch")
DTYPES = ("float32", "float64")
AUTOCASTS = (None, "bfloat16")
LEAST = {"epochs": 1, "steps": 0, "batch_size": 1, "accumulate": 1, "warmup": 0, "max_tokens": 2, "seed": 0}
"""The smallest value of each whole number."""
LISTED = ("order", "schedule", "loss_per")
"""Fields that may be lists with an entry for each step."""
OF_LORA = ("r", "alpha", "targets", "dropout")
DIGEST = 4
"""Of the rules by which recipes are hashed: raised whenever they change, so that no old run passes for a new one."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer of torch.optim (or the paper's Adam), and its numbers; None means the optimizer's default.

    undecayed    trained parameters that weight_decay spares: "vectors" (those with fewer than two axes, such as biases and
                 norms), or name patterns
    """

    name: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    undecayed: Any = ()

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            _check_number(f"optimizer.{name}", getattr(self, name), (int, float), 0)
        if self.eps is not None:
            _check_number("optimizer.eps", self.eps, (int, float), 0)
        if self.betas is not None and not _are_betas(self.betas):
            raise ValueError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas!r}")
        if self.name not in OPTIMIZERS:
            raise UnsupportedError(f"There is no optimizer {self.name!r}: {choices(self.name, OPTIMIZERS)}.")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
        if self.undecayed != "vectors":
            if isinstance(self.undecayed, str) or not all(isinstance(name, str) for name in self.undecayed):
                raise ValueError(
                    f"optimizer.undecayed must be vectors or a list of name patterns, got {self.undecayed!r}"
                )
            object.__setattr__(self, "undecayed", tuple(self.undecayed))


@dataclass(frozen=True)
class Recipe:
    """All that a training run depends on.

    kind     microgpt, causal-lm, classifier, or custom (`model` is a function that makes an nn.Module)
    examples what is trained on, one entry an example: corpus rows (microgpt, causal-lm), or (features, label)
    units    the unit of each example; model, loss: see `tasks`; trained: "full", {"lora": {...}},
             "adapter", or name patterns
    template    how chats and instructions become text: see `corpus.chat`; a file is read here, so that its text counts
    schedule "constant", "linear", "cosine", or the rate of each step as a part of the optimizer's lr
    warmup_from_zero   the first of `warmup` steps has the rate 0, as in transformers; else one part of `warmup`
    order    "given", "shuffled" (anew each epoch, by the seed), or the batches themselves, of any sizes: each the numbers
             of its examples, or its micro-batches
    drop_last   leave out the last batch of an epoch if it is not full; else it is a step as the others are
    accumulate  micro-batches of a step; they change nothing but rounding and memory, where neither `loss_per` names them
    loss_per "example", "token" (of the whole step), "micro-batch" (the mean of their means over tokens), or what the sum
             over tokens is divided by, a number for each step
    loss     of a custom recipe a function; of causal-lm None, or that of preference rows: {"kind": "dpo", "beta": 0.1,
             "reference": a model}, whose reference is the model that training starts from unless another is given
    label_smoothing   the part of a learned target that is spread over all classes; queries are asked without it
    dropout  the seed of the masks, by which every micro-batch has one; None: no dropout
    packed   causal-lm: whether the rows of a micro-batch stand in one sequence, each with its own positions; it changes
             nothing but dropout masks
    batch_statistics   classifier and custom: batch norm in training form, by the mean and variance of each micro-batch, whose
             rows of weight 0 are as if they were not there; queries are asked with the running ones. False: by the stored ones
    autocast "bfloat16": plain runs and retrainings compute forward passes in it, as torch.autocast does; derivatives (jets
             and reverse mode) are those of the run in `dtype`
    version  stands for what of `model` and `loss` cannot be hashed: change it whenever that changes
    """

    kind: str
    examples: tuple[Any, ...]
    units: tuple[str, ...] = ()
    model: Any = None
    loss: Any = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: Any = "constant"
    warmup: int = 0
    warmup_from_zero: bool = False
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 1
    drop_last: bool = False
    order: Any = "given"
    accumulate: int = 1
    clip_norm: float | None = None
    trained: Any = "full"
    loss_per: Any = "example"
    label_smoothing: float = 0.0
    max_tokens: int = 256
    template: Any = None
    seed: int = 0
    dtype: str = "float32"
    dropout: int | None = None
    packed: bool = False
    batch_statistics: bool = False
    autocast: str | None = None
    version: str = ""

    def __post_init__(self) -> None:
        require_list("examples", self.examples, "examples")
        _check_fields(self)
        if self.kind not in KINDS:
            raise UnsupportedError(f"There is no recipe kind {self.kind!r}: {choices(self.kind, KINDS)}.")
        if self.kind == "custom" and (self.loss_per not in ("example", "micro-batch") or self.label_smoothing):
            name = "label_smoothing" if self.label_smoothing else "loss_per"
            raise ValueError(f"a custom loss is a number an example: leave {name} out, and scale the loss itself")
        largest = self.batch_size if isinstance(self.order, str) else math.inf
        if self.accumulate > largest:
            raise ValueError(f"accumulate must be from 1 to batch_size ({self.batch_size}), got {self.accumulate}")
        object.__setattr__(self, "order", _checked_order(self.order, len(self.examples)))
        if not isinstance(self.order, str) and self.steps not in (None, len(self.order)):
            raise ValueError(
                f"order has {len(self.order)} batches, which are all the steps, and steps is {self.steps}: leave steps out"
            )
        if self.accumulate > 1 and not isinstance(self.order, str) and any(isinstance(b[0], tuple) for b in self.order):
            raise ValueError(f"order has the micro-batches, and accumulate is {self.accumulate}: leave accumulate out")
        if self.drop_last and isinstance(self.order, str) and len(self.examples) < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the number of examples {len(self.examples)}, and drop_last "
                "leaves out what is not full: lower batch_size or leave drop_last out"
            )
        _check_given_steps(self)
        object.__setattr__(self, "template", read_template(self.template))
        if self.batch_statistics and self.kind not in ("classifier", "custom"):
            raise ValueError(f"a {self.kind} recipe has no batch_statistics: leave batch_statistics out")
        for name in ("template", "packed"):
            if getattr(self, name) and self.kind != "causal-lm":
                raise ValueError(f"only a causal-lm recipe has {name}, not a {self.kind} recipe: leave {name} out")
        object.__setattr__(self, "examples", distinct(self.examples))
        _check_trained(self.trained)
        if self.kind == "causal-lm" and isinstance(self.model, (str, Path)):
            model_place(str(self.model), Path())
        object.__setattr__(self, "examples", _rows(self.kind, tuple(self.examples)))
        if not self.examples:
            raise FormatError("A recipe needs at least one example.")
        if self.kind == "classifier":
            check_examples(self.examples)
        _check_preferences(self)
        if not self.units:
            object.__setattr__(self, "units", tuple(_own_unit(e, i) for i, e in enumerate(self.examples)))
        if len(self.units) != len(self.examples):
            raise ValueError(f"wanted one unit for each of {len(self.examples)} examples, got {len(self.units)}")

    @property
    def real_dtype(self) -> torch.dtype:
        """The precision of the plain run, as torch names it."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def __repr__(self) -> str:
        optimizer, steps = self.optimizer.name, len(self.batches())
        return f"Recipe({self.kind}: {len(self.examples)} examples, {len(self.unit_names)} units, {steps} steps of {optimizer})"

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The units in order of their first example; weights and directions follow this order."""
        return tuple(dict.fromkeys(self.units))

    @property
    def unit_of(self) -> torch.Tensor:
        """Position in `unit_names` of each example's unit, int64 [examples]."""
        place = {name: i for i, name in enumerate(self.unit_names)}
        return torch.tensor([place[u] for u in self.units])

    def batches(self) -> tuple[tuple[int, ...], ...]:
        """The example numbers of each step. The last batch of an epoch may be smaller; `drop_last` leaves it out."""
        if not isinstance(self.order, str):
            return tuple(sum(b, ()) if isinstance(b[0], tuple) else b for b in self.order)
        rng = random.Random(self.seed)
        out: list[tuple[int, ...]] = []
        numbers = list(range(len(self.examples)))
        ends = len(numbers) - len(numbers) % self.batch_size if self.drop_last else len(numbers)
        starts = range(0, ends, self.batch_size)
        wanted = self.steps if self.steps is not None else self.epochs * len(starts)
        while len(out) < wanted:
            if self.order == "shuffled":
                rng.shuffle(numbers)
            out += [tuple(numbers[i : i + self.batch_size]) for i in starts]
        return tuple(out[:wanted])

    def micro_batches(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The example numbers of the micro-batches of each step: as `order` has them, else `accumulate` a step."""
        if not isinstance(self.order, str) and any(isinstance(b[0], tuple) for b in self.order):
            return tuple(b if isinstance(b[0], tuple) else (b,) for b in self.order)
        return tuple(tuple(in_parts(batch, self.accumulate)) for batch in self.batches())

    def first_steps(self, n: int) -> Recipe:
        """The recipe with its first n steps only."""
        listed = {name: value[:n] for name in LISTED if not isinstance(value := getattr(self, name), str)}
        return self.with_(steps=min(n, len(self.batches())), **listed)

    def some_steps(self, n: int) -> Recipe:
        """The recipe with n of its steps only, from all along the run, for what a step takes."""
        batches = self.micro_batches()
        places = [i * len(batches) // n for i in range(min(n, len(batches)))]
        listed = {
            name: tuple(value[i] for i in places)
            for name in ("schedule", "loss_per")
            if not isinstance(value := getattr(self, name), str)
        }
        return self.with_(order=tuple(batches[i] for i in places), steps=None, accumulate=1, **listed)

    def untrained_units(self) -> tuple[str, ...]:
        """The units of which no example is in any step: their weight changes nothing, their effect is exactly 0."""
        seen = {self.units[i] for batch in self.batches() for i in batch}
        return tuple(name for name in self.unit_names if name not in seen)

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then constant, linear or cosine decay to 0; or as given."""
        lr = self.optimizer.lr
        if not isinstance(self.schedule, str):
            return lr * self.schedule[step]
        if step < self.warmup:
            return lr * (step + (not self.warmup_from_zero)) / self.warmup
        if self.schedule == "constant":
            return lr
        part = (step - self.warmup) / max(1, n_steps - self.warmup)
        return lr * (1 - part) if self.schedule == "linear" else lr * 0.5 * (1 + math.cos(math.pi * part))

    def hash(self) -> str:
        """Digest of the content: two recipes with the same hash train the same model."""
        return hash_of(self.digests())

    def digests(self) -> dict[str, str]:
        """A digest of each field, so that a mismatch can be named, and the `rules` by which they were made.

        Raises: UnsupportedError for functions and objects whose content cannot be read, unless there is a `version`.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.batch_statistics:  # a recipe without them has the hash that it had before there were any
            del values["batch_statistics"]
        if self.kind == "causal-lm":
            values["model"] = _model_facts(self.model)
            if self.loss is not None and self.loss.get("reference") is not None:
                values["loss"] = {**self.loss, "reference": _model_facts(self.loss["reference"])}
        values["optimizer"] = asdict(self.optimizer)
        values |= {name: _settled(values[name]) for name in ("model", "loss", "trained", "units")}
        found = {name: digest_of(value, f"`{name}` of the recipe", self.version) for name, value in values.items()}
        return {**found, "rules": str(DIGEST)}

    def difference(self, stored: Mapping[str, Any]) -> str:
        """The fields in which a recipe differs from another one's digests, in words; "" where they are equal."""
        if hash_of(own := self.digests()) == hash_of(stored):
            return ""
        if stored.get("rules") != own["rules"]:
            return "it is of another leaveout, which hashed recipes by other rules"
        names = [name for name in {**own, **stored} if own.get(name) != stored.get(name)]
        return f"it differs in {', '.join(f'`{name}`' for name in names)}"

    @property
    def ids(self) -> tuple[str, ...]:
        """The id of each example: that of its row, else its number."""
        return tuple(_own_id(e, i) for i, e in enumerate(self.examples))

    @property
    def forms(self) -> dict[str, int]:
        """How many examples have which form: text, prompt, instruction, messages."""
        return dict(Counter(e.form for e in self.examples if isinstance(e, Row)))

    def ask(self, prompt: str | None, answer: str, form: str | None = None) -> dict[str, Any]:
        """A row that asks for an answer after a prompt, in the commonest form of the examples, or in another."""
        return asked_row(answer, prompt, form if form or prompt is None else commonest(self.forms))

    def grouped(self, units: Any) -> Recipe:
        """A copy with other units.

        units: a field of the rows; one name for each example; id -> name; or the path of a JSON file with the latter.
        """
        if isinstance(units, Path) or (isinstance(units, str) and units.endswith(".json")):
            if not Path(units).is_file():
                raise FileNotFoundError(f"There is no file {units}: give JSON with the unit of each id.")
            units = json.loads(Path(units).read_text())
        if isinstance(units, str):
            return replace(self, units=tuple(_field(e, units) for e in self.examples))
        require_list("units", [] if isinstance(units, Mapping) else units, "a name for each example")
        if isinstance(units, Mapping):
            if missing := [i for i in self.ids if i not in units]:
                raise FormatError(f"The units name no unit for {len(missing)} examples, the first is {missing[0]!r}.")
            return replace(self, units=tuple(str(units[i]) for i in self.ids))
        return replace(self, units=tuple(str(u) for u in units))

    def with_(self, **changes: Any) -> Recipe:
        """A copy with other values; `lr`, `eps`, `momentum` change the optimizer."""
        inner = {k: changes.pop(k) for k in ("lr", "eps", "momentum") if k in changes}
        refuse_other_names("field of a recipe", changes, [f.name for f in fields(self)])
        optimizer = changes.pop("optimizer", self.optimizer)
        return replace(self, optimizer=replace(optimizer, **inner), **changes)

    @classmethod
    def microgpt(cls, documents: Sequence[str | Row], n: int = 1000, seed: int = 42, **changes: Any) -> Recipe:
        """The paper's run: documents shuffled, the first n trained on once, parameters drawn by the same generator.

        A document is a text, with the id `number:text`, or a row; of each the first 16 characters are read, and learned
        but for a prompt.
        """
        require_whole("n", n, 1)
        refuse_other_names("field of a recipe", changes, [f.name for f in fields(cls)])
        require_list("documents", documents, "texts or rows")
        rng = random.Random(seed)
        documents = list(documents)
        if wrong := [d for d in documents if not isinstance(d, (str, Row))]:
            raise TypeError(f"a document is {reprlib.repr(wrong[0])}: give texts or rows.")
        rng.shuffle(documents)
        texts = [d.text if isinstance(d, Row) else d for d in documents]
        start = {"alphabet": "".join(sorted(set("".join(texts)))), "start": _drawn_state(rng)}
        settings: dict[str, Any] = {
            "optimizer": OptimizerSettings("paper-adam", 0.01, betas=(0.85, 0.99), eps=1e-3), "schedule": "linear",
            "order": "given", "model": start, "seed": seed,
        }  # fmt: skip
        plain = Corpus.open([{"id": f"{i}:{d}", "text": d} for i, d in enumerate(texts[:n])])
        rows = tuple(d if isinstance(d, Row) else p for d, p in zip(documents, plain, strict=False))
        return cls("microgpt", rows, **{**settings, **changes})

    @classmethod
    def from_training_arguments(
        cls, args: Any, dataset: Sequence[Any], model: Any, tokenizer: Any = None, **changes: Any
    ) -> Recipe:
        """The run that transformers' Trainer (or trl's SFTTrainer) would make of these arguments on these rows.

        model      as in a recipe: a place, or a pair (module, tokenizer); tokenizer: of a place, for rows of tokens alone
        Guarantee: rows, batches and rates are the Trainer's, masks of dropout are not (record the run for those). Losses are
                   divided by learned tokens; for models to which transformers gives no loss type (GPT-2) it adds one a row.
        Raises: UnsupportedError, with one sentence for each thing that no recipe can say.
        """
        fields = run_fields(args, len(dataset))
        if isinstance(model, tuple):
            tokenizer = model[1]
        rows = [_row_of(row, str(number), tokenizer) for number, row in enumerate(dataset)]
        lengths = [len(row["input_ids"]) for row in rows if isinstance(row, Mapping) and "input_ids" in row]
        fields["max_tokens"] = getattr(args, "max_length", None) or max(lengths, default=256)
        optimizer = OptimizerSettings(**optimizer_fields(args))
        return cls("causal-lm", tuple(rows), model=model, **{"optimizer": optimizer, **fields, **changes})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe. Relative paths in it are relative to its directory. See docs/reference/recipe.md for the fields."""
        path = Path(path)
        known = {f.name for f in fields(cls)} - {"examples"} | {"data", "units", "n", "libraries"}
        raw = read_fields(path, known, [f.name for f in fields(OptimizerSettings)])
        _refuse_other_libraries(path, raw.pop("libraries", {}))
        try:
            recipe = cls._from_fields(path, raw)
            n_steps = len(recipe.batches())
        except ValueError as error:
            raise FormatError(f"{path}: {str(error).rstrip('.')}.") from None
        if not n_steps:
            raise FormatError(f"{path}: the run has no steps: set `steps` or `epochs` to at least 1.")
        if recipe.warmup >= n_steps:
            raise FormatError(f"{path}: `warmup` is {recipe.warmup}, but the run has {n_steps} steps: lower `warmup`.")
        return recipe

    @classmethod
    def _from_fields(cls, path: Path, raw: dict[str, Any]) -> Recipe:
        if "optimizer" in raw:
            raw["optimizer"] = OptimizerSettings(**raw["optimizer"])
        kind, units, reading = raw.pop("kind"), raw.pop("units", None), raw.pop("data")
        data = path.parent / (rows := reading.pop("rows"))
        place = data if data.exists() else rows
        if place == rows and not is_hub_id(rows):
            raise FormatError(f"{path} names the data {data}, which does not exist: correct `data`.")
        if isinstance(raw.get("trained"), list):
            raw["trained"] = tuple(raw["trained"])
        if kind == "microgpt":
            if reading or data.suffix == ".jsonl":
                return cls.microgpt(list(Corpus.open(place, units=units, **reading)), **raw)
            recipe = cls.microgpt([line for line in data.read_text().split("\n") if line], **raw)
            return recipe if units is None else recipe.grouped(path.parent / units)
        if kind == "classifier":
            if reading:
                raise FormatError(f"{path}: the data of a classifier is the path of a file of arrays, with no options.")
            return cls(kind, *read_arrays(data, units), **raw)
        raw["template"] = read_template(raw.get("template"), path.parent)
        if isinstance(raw.get("model"), str):
            raw["model"] = model_place(raw["model"], path.parent)
        if isinstance(loss := raw.get("loss"), Mapping):
            raw["loss"] = _with_numbers(loss)
            if isinstance(loss.get("reference"), str):
                raw["loss"]["reference"] = model_place(loss["reference"], path.parent)
        corpus = Corpus.open(place, units=units, **reading)
        for note in corpus.notes:
            warnings.warn(f"{path}: {note}")
        return cls(kind, tuple(corpus), **raw)


def libraries() -> dict[str, str]:
    """The versions of what decides the numbers of a language model's run."""
    return {name: installed(name) for name in ("torch", "transformers")}


def _refuse_other_libraries(path: Path, wanted: Mapping[str, str]) -> None:
    """Raises: MismatchError where a recorded run was made with other versions than those that are here."""
    if found := other_library(wanted):
        name, other, here = found
        raise MismatchError(
            f"{path} was recorded with {name} {other}, and here is {here}, which may train another model: install "
            f"{name}=={other}, or take `libraries` out of the recipe."
        )


def other_library(wanted: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first library that was of another version, with that version and the one that is here; None where all agree."""
    for name, here in libraries().items():
        if (other := wanted.get(name, here)) != here:
            return name, other, here
    return None


def hash_of(digests: Mapping[str, Any]) -> str:
    """The hash of a recipe with these digests."""
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()[:32]


def _rows(kind: str, examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """Examples as rows where the kind trains on text; texts and objects with fields are read as a corpus reads them."""
    if kind in ("microgpt", "causal-lm") and not all(isinstance(example, Row) for example in examples):
        return tuple(Corpus.open(list(examples)))
    return examples


def _row_of(row: Any, name: str, tokenizer: Any) -> Any:
    """A row of a data set, with a text where it has tokens only."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        return row
    if tokenizer is None:
        raise ValueError(
            "rows of tokens need their tokenizer: give a pair (model, tokenizer), or tokenizer beside a place"
        )
    return row_of_tokens(row, name, (row["input_ids"], row.get("labels", row["input_ids"])), tokenizer)


OF_LOSS = ("kind", "beta", "reference")


def _check_preferences(recipe: Recipe) -> None:
    """Raises: ValueError for a loss that the kind of recipe does not have, FormatError for rows that it does not fit."""
    if recipe.kind == "custom":
        return
    if (loss := recipe.loss) is not None:
        if recipe.kind != "causal-lm":
            raise ValueError(
                f"only a causal-lm or a custom recipe has a loss, not a {recipe.kind} recipe: leave loss out"
            )
        if not isinstance(loss, Mapping) or loss.get("kind") != "dpo" or not set(loss) <= set(OF_LOSS):
            raise ValueError(
                f"loss must be {{kind: dpo, beta: 0.1, reference: a model}}, the latter two as needed, got {loss!r}"
            )
        _check_number("beta of loss", loss.get("beta", 0.1), (int, float), 0)
        if recipe.loss_per != "example" or recipe.label_smoothing:
            name = "label_smoothing" if recipe.label_smoothing else "loss_per"
            raise ValueError(f"the loss of a preference row is one number, no mean over tokens: leave {name} out")
    if recipe.packed and recipe.dropout is not None and any(r.pair or r.weight != 1 for r in recipe.examples):
        raise ValueError("packed rows with dropout have no pairs and weights: leave packed or dropout out")
    for row in recipe.examples:
        if isinstance(row, Row) and (row.pair is not None) != (loss is not None):
            if loss is None:
                raise FormatError(
                    f"Row {row.id!r} is a preference row: give a causal-lm recipe with loss: {{kind: dpo, beta: 0.1}}."
                )
            raise FormatError(f"Row {row.id!r} has one answer, and DPO compares two: give `chosen` and `rejected`.")


def _check_fields(recipe: Recipe) -> None:
    """Raises: TypeError or ValueError for a field that is of another kind, or a number that is too small."""
    if not isinstance(recipe.optimizer, OptimizerSettings):
        name = recipe.optimizer if isinstance(recipe.optimizer, str) else "adamw"
        raise TypeError(f"optimizer is {recipe.optimizer!r}: give OptimizerSettings({name!r}, lr=...)")
    for name, least in LEAST.items():
        if name != "steps" or recipe.steps is not None:
            _check_number(name, getattr(recipe, name), int, least)
    if recipe.clip_norm is not None:
        _check_number("clip_norm", recipe.clip_norm, (int, float), 0)
    _check_number("label_smoothing", recipe.label_smoothing, (int, float), 0)
    if recipe.label_smoothing >= 1:
        raise ValueError(f"label_smoothing must be from 0 to below 1, got {recipe.label_smoothing!r}")
    for name in ("drop_last", "warmup_from_zero", "packed", "batch_statistics"):
        if not isinstance(value := getattr(recipe, name), bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
    if recipe.dropout is not None:
        _check_number("dropout", recipe.dropout, int, 0)
    listed: Any = (list, tuple)
    for name, known, kind in (
        ("schedule", SCHEDULES, UnsupportedError), ("loss_per", LOSS_PER, ValueError), ("dtype", DTYPES, UnsupportedError),
        ("autocast", AUTOCASTS, UnsupportedError),
    ):  # fmt: skip
        value = getattr(recipe, name)
        if value not in known and not (name in LISTED and isinstance(value, listed)):
            raise kind(f"{name} is {value!r}: {choices(value, [name for name in known if name is not None])}")
    _check_model(recipe.kind, recipe.model)


def _check_model(kind: str, model: Any) -> None:
    """Raises: FormatError for what the kind of recipe cannot make a model of."""
    of_kind = {"microgpt": ("alphabet", "start"), "classifier": ("hidden",)}
    if isinstance(model, Mapping) and kind in of_kind:
        for name in model:
            if name not in of_kind[kind]:
                raise FormatError(f"`model` of a {kind} recipe has no field {name!r}: {choices(name, of_kind[kind])}.")
        sizes = model.get("hidden", ())
        if isinstance(sizes, str) or not isinstance(sizes, Collection) or not all(_is_size(size) for size in sizes):
            raise FormatError(f"`hidden` must be a list of widths from 1, such as [32, 32], got {sizes!r}.")
    elif kind == "microgpt" and model is not None:
        raise FormatError(f"A microgpt recipe has a model of its own: leave `model` out, got {model!r}.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_number(name: str, value: Any, kinds: type | tuple[type, ...], least: int) -> None:
    fits = isinstance(value, (kinds, np.integer)) and not isinstance(value, bool) and least <= value < math.inf
    if not fits:
        kind = "a whole number" if kinds is int else "a number"
        raise ValueError(f"{name} must be {kind} of at least {least}, got {value!r}")


def _check_given_steps(recipe: Recipe) -> None:
    """Takes lists of a number for each step as tuples. Raises: ValueError where they are of another length or no numbers."""
    for name in ("schedule", "loss_per"):
        if isinstance(given := getattr(recipe, name), str):
            continue
        for value in given:
            _check_number(f"each of {name}", value, (int, float), 0)
        object.__setattr__(recipe, name, tuple(given))
        if len(given) != (n_steps := len(recipe.batches())):
            raise ValueError(f"{name} has {len(given)} numbers and the run {n_steps} steps: give one for each step")
    if not isinstance(recipe.schedule, str) and recipe.warmup:
        raise ValueError("schedule has the rate of each step, the first ones too: leave warmup out")
    if not isinstance(recipe.loss_per, str) and not all(recipe.loss_per):
        raise ValueError("loss_per has a 0, by which no loss can be divided: give the tokens of each step")


def _are_betas(betas: Any) -> bool:
    pair = isinstance(betas, Sequence) and len(betas) == 2
    return pair and all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in betas)


def _checked_order(order: Any, n_examples: int) -> str | tuple[tuple[int, ...], ...]:
    if isinstance(order, str) and order in ORDERS:
        return order
    try:
        batches = None if isinstance(order, str) else tuple(_numbers(batch) for batch in order)
    except TypeError:
        batches = None
    flat = [i for batch in batches or () for part in batch for i in (part if isinstance(part, tuple) else (part,))]
    if batches is None or not all(0 <= i < n_examples for i in flat):
        wanted = f"{', '.join(ORDERS)}, or batches of example numbers below {n_examples}"
        raise ValueError(f"order must be one of {wanted}, got {reprlib.repr(order)}")
    for number, batch in enumerate(batches):
        if not batch or () in batch:
            raise ValueError(f"batch {number} of order is empty: a step needs at least one example")
    return batches


def _numbers(batch: Any) -> tuple[Any, ...]:
    """The example numbers of a batch, or those of its micro-batches."""
    batch = tuple(batch)
    nested = bool(batch) and isinstance(batch[0], (list, tuple))
    return tuple(tuple(map(index, part)) for part in batch) if nested else tuple(map(index, batch))


def in_parts(batch: tuple[int, ...], n: int) -> Iterator[tuple[int, ...]]:
    """The parts of a step's example numbers whose gradients are accumulated: n, or as few as hold them at the same size.

    Each holds a n-th of the examples, rounded up, but the last, which holds what is left.
    """
    size = -(-len(batch) // n)
    return (batch[i : i + size] for i in range(0, len(batch), size))


def _check_trained(trained: Any) -> None:
    lora = trained.get("lora") if isinstance(trained, Mapping) and len(trained) == 1 else None
    if isinstance(lora, Mapping):
        if unknown := [str(name) for name in lora if name not in OF_LORA]:
            raise ValueError(f"lora has the unknown field {unknown[0]!r}: {choices(unknown[0], OF_LORA)}")
        for name in ("r", "alpha"):
            _check_number(f"{name} of lora", lora.get(name, 1), int if name == "r" else (int, float), 1)
        _check_number("dropout of lora", lora.get("dropout", 0.0), (int, float), 0)
        if "targets" not in lora:
            raise ValueError("lora needs the field targets: a list of module names such as [q_proj, v_proj]")
        if isinstance(lora["targets"], str) or not isinstance(lora["targets"], Collection) or not lora["targets"]:
            raise ValueError(f"targets of lora must be a list of module names, got {lora['targets']!r}")
    elif trained not in ("full", "adapter") and (
        isinstance(trained, (str, Mapping)) or not isinstance(trained, Collection)
    ):
        raise ValueError(
            f"trained must be full, a list of name patterns, adapter, or {{lora: {{...}}}}, got {trained!r}"
        )


def _own_id(example: Any, number: int) -> str:
    return example.id if isinstance(example, Row) else str(number)


def _field(example: Any, name: str) -> str:
    if not isinstance(example, Row) or name not in example.meta:
        raise FormatError(f"Not every example has the field {name!r}: name units by a field that all rows have.")
    return str(example.meta[name])


def _own_unit(example: Any, number: int) -> str:
    return example.unit if isinstance(example, Row) else str(number)


def _drawn_state(rng: random.Random) -> tuple[Any, ...]:
    """The state of the generator after the shuffle: parameters are drawn from here on."""
    return rng.getstate()


def _settled(value: Any) -> Any:
    """A setting as it counts, however a file or a call wrote it: the order of names and the kind of a list do not."""
    if isinstance(value, Mapping):
        return {name: _settled(value[name]) for name in sorted(value)}
    return tuple(map(_settled, value)) if isinstance(value, (list, tuple)) else value


def _model_facts(model: Any) -> Any:
    """What is hashed of a model: the files of a place, the identity of a pair (module, tokenizer), else itself."""
    if isinstance(model, (str, Path)):
        return source_digest(str(model))
    return load_model(model).identity() if isinstance(model, tuple) else model


# --- the file of a recipe: numbers as numbers, paths relative to its own directory -------------------------------------


NUMBERS: dict[str, type] = {
    **dict.fromkeys(("n", "dropout", *LEAST), int),
    **dict.fromkeys(("beta", "clip_norm", "lr", "momentum", "eps", "weight_decay", "label_smoothing"), float),
}


def read_fields(path: Path, known: Collection[str], known_of_optimizer: Collection[str]) -> dict[str, Any]:
    """The fields of a YAML recipe.

    Raises: FormatError for unknown fields, and for those that do not go together, such as `steps` beside `epochs`.
    """
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"There is no recipe in {path}, which {kind}: give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not a recipe in YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, Mapping) or "kind" not in raw or "data" not in raw:
        raise FormatError(f"{path} is not a recipe: it needs at least the fields `kind` and `data`.")
    out = dict(raw)
    if unknown := sorted(str(name) for name in set(out) - set(known)):
        name = unknown[0]
        raise FormatError(f"{path} has the field {name!r}, which no recipe has: {choices(name, sorted(known))}.")
    if "steps" in out and "epochs" in out:
        raise FormatError(f"{path} has both `steps` and `epochs`: leave one of them out.")
    if not isinstance(out.get("order", ""), str) and (given := [name for name in ("steps", "epochs") if name in out]):
        raise FormatError(f"{path}: `order` lists the batches, which are all the steps: leave out `{given[0]}`.")
    if "n" in out and out["kind"] != "microgpt":
        raise FormatError(f"{path}: only the kind microgpt has `n`: leave it out and shorten the data instead.")
    out["data"] = _data_of(path, out["data"])
    if not isinstance(out.get("units", ""), str):
        raise FormatError(f"{path}: `units` must be the name of a field of the rows, got {out['units']!r}.")
    if "optimizer" in out:
        out["optimizer"] = _optimizer(path, out["optimizer"], known_of_optimizer)
    return _with_numbers(out)


def _data_of(path: Path, given: Any) -> dict[str, Any]:
    """Where the `rows` are, and how they are read (see `Corpus.open`)."""
    found = {"rows": given} if isinstance(given, str) else given
    if not isinstance(found, Mapping) or not isinstance(found.get("rows"), str):
        raise FormatError(f"{path}: `data` must be the path of a file, or have it as `rows`, got {given!r}.")
    known = ["rows", *(field.name for field in fields(Reading))]
    if unknown := [str(name) for name in found if name not in known]:
        raise FormatError(f"{path}: `data` has the field {unknown[0]!r}, which is none: {choices(unknown[0], known)}.")
    return dict(found)


def model_place(model: str, directory: Path) -> str:
    """What is loaded: a directory or .gguf file, looked for relative to `directory` first, or else a name on a hub.

    Raises: FormatError if the text can only be a path, and there is no such directory or file.
    """
    place = directory / model
    if model.endswith(".gguf"):
        if not place.is_file():
            raise FormatError(f"There is no GGUF file {place}: correct `model`.")
        return str(place)
    only_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if only_path and not place.is_dir():
        raise FormatError(f"There is no directory {place}: correct `model`, or name a model on a hub (owner/name).")
    return str(place) if only_path or place.exists() else model


def _optimizer(path: Path, raw: Any, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise FormatError(f"{path}: `optimizer` must be a mapping with a name, such as {{name: adamw}}, got {raw!r}.")
    out = dict(raw)
    if unknown := [str(name) for name in out if name not in known]:
        name = unknown[0]
        raise FormatError(f"{path}: `optimizer` has the unknown field {name!r}: {choices(name, known)}.")
    return _with_numbers(out)


def _with_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Texts that are numbers as numbers: YAML reads 1e-3 as a text. A number stays, because the hash tells 1 from 1.0."""
    out = {name: _number(value, NUMBERS[name]) if name in NUMBERS else value for name, value in fields.items()}
    if isinstance(betas := out.get("betas"), list):
        out["betas"] = tuple(_number(beta, float) for beta in betas)
    return out


def _number(value: Any, kind: type) -> Any:
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value
