"""A recipe drafted from an index: its rows, model, template and learned tokens, and what the user can say of the fine-tuning.

An index knows what a model was trained on, not how. Whoever can say how has a run that can be trained again and left out from,
so that `predict` is calibrated. Fields that nobody said are those of transformers' Trainer, and the file says so at each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leaveout.errors import FormatError, UnsupportedError, refuse_other_names
from leaveout.models import load_context
from leaveout.store import Record, Store
from leaveout.training.recipe import Recipe

TRAINER = "the default of transformers' Trainer"
DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.0, "schedule": "linear", "warmup": 0, "epochs": 3, "batch_size": 8,
    "accumulate": 1, "clip_norm": 1.0, "loss_per": "token", "order": "shuffled", "seed": 42,
}  # fmt: skip
SAID = ("model", "trained", "lora", "max_tokens", "units", *DEFAULTS)
"""What can be said of a fine-tuning: `model`, which it started from, and fields of a recipe and its optimizer."""
OF_OPTIMIZER = ("lr", "weight_decay")
UNSAID = "not said: "


@dataclass(frozen=True)
class Field:
    """A field of the file with what is written behind it; `note` is empty for what is known."""

    name: str
    value: Any
    note: str = ""

    def __str__(self) -> str:
        line = json.dumps(self.value, ensure_ascii=False)
        return f"{self.name}: {line}" + (f"  # {self.note}" if self.note else "")


def draft_recipe(index: str | Path, out: str | Path, **said: Any) -> Path:
    """Writes the recipe of the fine-tuning that an index's rows are of, with its rows beside it; gives its path.

    index   directory of an index with the rows that were trained on
    out     the YAML file; `rows.jsonl` and a template, where there is one, are written beside it
    said    what is known of the fine-tuning: `model` (a place, which it started from), lr, epochs, batch_size, optimizer,
            schedule, warmup, weight_decay, ..., and `trained` or `lora` ({"r": 8, "alpha": 16, "targets": [...]})
    Example: run = TrainingRun.train(draft_recipe("idx", "recipe.yaml", model="./base", lr=1e-4, epochs=2), "run")
    Raises: FormatError for what is no index, and for rows whose texts were not kept or can't be written; what `Recipe` raises
            for values that it does not take. Nothing is left behind then.
    """
    refuse_other_names("thing to say of a fine-tuning", said, SAID)
    index, out = Path(index), Path(out)
    for place in (out, out.parent / "rows.jsonl", out.parent / "template.jinja"):
        if place.exists():
            raise FileExistsError(f"{place} is there already: give --out a place in another directory.")
    with Store.open(index) as store:
        facts = store.settings
        if "signature" not in facts:
            raise FormatError(f"{index} is not an index: draft a recipe from the directory of one.")
        records = list(store.iter_rows())
    # Of the two texts of a preference row the prompt cancels: learned whole or not, their difference is the same.
    whole = facts["signature"]["targets"] == "all" and not _paired(records)
    rows = [_row(record, whole) for record in records]
    template = None if whole else _template(facts["signature"]["template"])
    fields = [*_known(facts, records, said), *_told({"loss_per": "example", **said} if _paired(records) else said)]
    written = [out.parent / "rows.jsonl", out]
    out.parent.mkdir(parents=True, exist_ok=True)
    written[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if whole:
        fields.append(Field("template", "none", "the rows are written as the texts that the template made"))
    elif template is not None and "{" in template:
        written.append(out.parent / "template.jinja")
        written[-1].write_text(template, encoding="utf-8")
        fields.append(Field("template", "template.jinja"))
    elif template is not None:
        fields.append(Field("template", template))
    head = f"# Drafted from the index {index.name}. Check what says 'not said' before you trust a prediction."
    out.write_text("\n".join([head, *map(str, fields)]) + "\n", encoding="utf-8")
    try:
        Recipe.from_yaml(out)
    except Exception:
        for place in written:
            place.unlink()
        raise
    return out


def _row(record: Record, whole: bool) -> dict[str, Any]:
    """A row as it came, or its text where all of it is learned. Raises: FormatError where neither was kept."""
    fields = {"id": record.id, **record.meta}
    if whole and record.text:
        return {**fields, "text": record.text}
    if not whole and record.raw:
        return {**json.loads(record.raw), "id": record.id}
    raise FormatError(
        f"The index has no text of the row {record.id!r}: build it again from the rows, or write the recipe by hand."
    )


def _paired(records: list[Record]) -> bool:
    return any("chosen" in record.extra for record in records)


def _template(kept: Any) -> str | None:
    """The template that the index's rows were written with. Raises: UnsupportedError for several by name."""
    if isinstance(kept, Mapping):
        if "default" not in kept:
            raise UnsupportedError("The index was built with several templates and none is the default: give it one.")
        return str(kept["default"])
    return None if kept is None else str(kept)


def _known(facts: Mapping[str, Any], records: list[Record], said: Mapping[str, Any]) -> Iterator[Field]:
    """Fields that the index decides, or that `said` says instead."""
    yield Field("kind", "causal-lm")
    yield Field("data", "rows.jsonl", f"the {len(records)} rows of the index")
    if (units := said.get("units", facts["units"])) is not None:
        yield Field("units", units)
    source = facts["source"]
    adapter = _adapter(source)
    if "model" in said:
        name = _place(said["model"])
        yield Field("model", name)
    elif adapter:
        name = _place(adapter["model"])
        yield Field("model", name, "under the index's adapter")
    elif source is None:
        raise UnsupportedError(
            "The index was built with a model in memory: say which model the fine-tuning began with."
        )
    else:
        name = _place(source["name"])
        yield Field(
            "model", name, UNSAID + "the index's own model, as if training went on from it; give the one before"
        )
    if "lora" in said or "trained" in said:
        yield Field("trained", {"lora": dict(said["lora"])} if "lora" in said else said["trained"])
    elif adapter:
        yield Field("trained", {"lora": adapter["lora"]}, "as the index's adapter; its numbers are drawn anew")
    else:
        yield Field("trained", "full", UNSAID + "all parameters")
    if "max_tokens" in said:
        yield Field("max_tokens", said["max_tokens"])
    else:
        yield _longest([int(record.extra["tokens"]) for record in records], name)
    if _paired(records):
        beta = (facts.get("preferences") or {}).get("beta", 0.1)
        yield Field(
            "loss", {"kind": "dpo", "beta": beta}, "of preference rows, against the model that training starts from"
        )


def _longest(lengths: list[int], model: str) -> Field:
    """The longest row in tokens, or what the model reads where that is less."""
    longest, read = max(lengths, default=2), load_context(model)
    if longest <= read:
        return Field("max_tokens", max(2, longest), UNSAID + "the longest row of the index")
    cut = sum(length > read for length in lengths)
    more = "1 row is longer, and is cut" if cut == 1 else f"{cut} rows are longer, and are cut"
    return Field("max_tokens", read, f"{UNSAID}what the model reads; {more}")


def _told(said: Mapping[str, Any]) -> Iterator[Field]:
    """How it was trained: what was said, and defaults that are named."""
    given = {name: said.get(name, default) for name, default in DEFAULTS.items()}
    unsaid = {name: "" if name in said else UNSAID + TRAINER for name in DEFAULTS}
    optimizer = {"name": given.pop("optimizer"), **{name: given.pop(name) for name in OF_OPTIMIZER}}
    if optimizer["weight_decay"]:
        optimizer["undecayed"] = "vectors"
    missing = [name for name in ("optimizer", *OF_OPTIMIZER) if unsaid[name]]
    yield Field("optimizer", optimizer, f"{', '.join(missing)} {UNSAID}{TRAINER}" if missing else "")
    if given["warmup"]:
        yield Field("warmup_from_zero", True, "as transformers warms up")
    for name, value in given.items():
        if name != "warmup" or value:
            yield Field(name, value, unsaid[name])


def _place(model: Any) -> str:
    """A place that does not depend on where the recipe's file is."""
    return str(Path(model).resolve()) if Path(str(model)).exists() else str(model)


def _adapter(source: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the configuration of the index's adapter says: the model under it, and its LoRA; {} where it has none."""
    file = Path(str((source or {}).get("name", ""))) / "adapter_config.json"
    if not file.is_file():
        return {}
    told = json.loads(file.read_text(encoding="utf-8"))
    if told.get("peft_type") != "LORA" or not isinstance(told.get("target_modules"), list):
        return {}
    lora = {"r": told["r"], "alpha": told["lora_alpha"], "targets": sorted(told["target_modules"])}
    return {"model": told["base_model_name_or_path"], "lora": lora}
