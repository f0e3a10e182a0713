"""The file of a recipe: its fields with numbers as numbers, and its paths relative to its own directory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from leaveout.errors import FormatError, choices

WHOLE = ("n", "steps", "epochs", "batch_size", "accumulate", "warmup", "seed", "max_tokens")
REAL_OF_OPTIMIZER = ("lr", "momentum", "eps", "weight_decay")


def read_fields(path: Path, known: Collection[str], known_of_optimizer: Collection[str]) -> dict[str, Any]:
    """The fields of a YAML recipe. YAML reads 1e-3 as text, so that texts that are numbers become numbers.

    Raises: FormatError for unknown fields, for what must be a number and is none, and for `steps` beside `epochs`.
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
    if not isinstance(out["data"], str):
        raise FormatError(f"{path}: `data` must be the path of a file, got {out['data']!r}.")
    if not isinstance(out.get("units", ""), str):
        raise FormatError(f"{path}: `units` must be the name of a field of the rows, got {out['units']!r}.")
    for name in WHOLE:
        if name in out:
            out[name] = _number(path, name, out[name], whole=True)
    if not isinstance(out.get("drop_last", False), bool):
        raise FormatError(f"{path}: `drop_last` must be true or false, got {out['drop_last']!r}.")
    if out.get("clip_norm") is not None:
        out["clip_norm"] = _number(path, "clip_norm", out["clip_norm"])
    if "optimizer" in out:
        out["optimizer"] = _optimizer(path, out["optimizer"], known_of_optimizer)
    return out


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
    for name in REAL_OF_OPTIMIZER:
        if name in out and not (name == "eps" and out[name] is None):
            out[name] = _number(path, f"optimizer.{name}", out[name])
    if (betas := out.get("betas")) is not None:
        if not isinstance(betas, list) or len(betas) != 2:
            raise FormatError(f"{path}: `optimizer.betas` must be a list of two numbers, got {betas!r}.")
        out["betas"] = tuple(_number(path, "optimizer.betas", beta) for beta in betas)
    return out


def _number(path: Path, name: str, value: Any, whole: bool = False) -> int | float:
    """A number, or a text that is one; a number that YAML read stays as it is, because the hash tells 1 from 1.0."""
    number = value
    if isinstance(value, str):
        try:
            number = int(value) if whole else float(value)
        except ValueError:
            number = None
    kinds = int if whole else (int, float)
    if not isinstance(number, kinds) or isinstance(number, bool) or not math.isfinite(number):
        wanted = "a whole number" if whole else "a number such as 0.001 or 1.0e-3"
        raise FormatError(f"{path}: `{name}` must be {wanted}, got {value!r}.")
    return number
