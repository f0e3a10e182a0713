"""Loading language models: from a directory, a hub's name, a .gguf file, a peft adapter, or an object in memory.

Nothing is said while a model loads; what the user should know of it stands in `LanguageModel.notes`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from leaveout.errors import FormatError, LeaveoutError, MismatchError, UnsupportedError
from leaveout.models.checks import evaluating, probe_ids
from leaveout.models.identity import (
    State,
    difference,
    glance,
    hash_adapter,
    hash_config,
    hash_tensors,
    hash_tokenizer,
    plain_module,
    state_of,
)

# Largest difference over the largest number that counts as rounding, by dtype of the model.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}

ADAPTER = "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
UNQUANTISED = ("F16", "F32", "F64", "BF16")  # types of GGUF tensors


@dataclass(frozen=True)
class ModelOptions:
    """How a model that is named by path or id is loaded. Remote code runs only with `trust_remote_code=True`.

    dtype   float32, bfloat16, float16, float64, or auto: as it is stored
    device  cpu, cuda, cuda:1, ..., or auto: cuda where there is one
    """

    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def named_dtype(self) -> torch.dtype | str:
        """Raises: ValueError for a dtype that no model has here."""
        found = "auto" if self.dtype == "auto" else getattr(torch, self.dtype, None)
        if found != "auto" and found not in ROUNDING:
            raise ValueError(f"dtype {self.dtype!r} is not one of float32, bfloat16, float16, float64, auto.")
        assert found is not None
        return found


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, and what tells it from others.

    lm      the module, adapters inside its layers
    source  how to load it again (`name`, and the fields of `ModelOptions` but for the device); None for one in memory
    notes   what its user should know, one sentence each
    """

    lm: nn.Module
    tokenizer: Any
    source: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    _identity: dict[str, Any] | None = field(default=None, repr=False)
    _glance: Any = field(default=None, repr=False)
    _outputs: Tensor | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def family(self) -> str:
        return self.lm.config.model_type  # type: ignore[union-attr,return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    @property
    def context(self) -> int:
        """Longest input in tokens, from the model's config; 2**20 when it states none."""
        config = self.lm.config.get_text_config()  # type: ignore[union-attr,operator]
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            length = getattr(config, name, None)
            if isinstance(length, int) and length > 0:
                return length
        return 2**20

    @property
    def embedded(self) -> int:
        """Tokens that the model embeds, those that its tokenizer does not know included."""
        return plain_module(self.lm.get_input_embeddings()).weight.shape[0]  # type: ignore[operator,union-attr,index,return-value]

    def facts(self) -> dict[str, Any]:
        """What the identity holds beside hashes."""
        return {"family": self.family, "dtype": str(self.dtype).removeprefix("torch.")}

    def identity(self, anew: bool = False) -> dict[str, Any]:
        """Hashes of adapters, weights, buffers, config and tokenizer, with facts: equal only for the same model.

        `anew`: read everything once more, as where rows are written. Cost: one pass over the weights, about 0.2 s for
        500 MB; without `anew` only the first time.
        """
        if self._identity is None or anew:
            with evaluating(self.lm):
                state = state_of(self.lm)
            self._glance, self._outputs = self._look(state), self._probe()
            adapters = [hash_adapter(facts) for facts in state.adapters.values()]
            self._identity = {
                "adapters": adapters,
                "weights": hash_tensors(state.weights, adapters),
                "buffers": hash_tensors(state.buffers),
                "config": hash_config(self.lm),
                "tokenizer": hash_tokenizer(self.tokenizer),
                **self.facts(),
            }
        return self._identity

    def refuse_changes(self) -> None:
        """Refuses a model that is no longer what it was when its identity was taken.

        Facts, version counters and a sample of every tensor are compared, and the hidden states of two dozen tokens, so
        that hooks and settings of modules count as well. Where only counters moved, everything is hashed once more.
        Raises: MismatchError.
        """
        if self._identity is None:
            self.identity()
            return
        before, seen, wanted = self._identity, self._glance, self._outputs
        with evaluating(self.lm):
            now = self._look(state_of(self.lm))
        if now != seen:
            other = difference(before, self.identity(anew=True))
            self._outputs = wanted
            if other:
                self._identity, self._glance = before, seen
                raise MismatchError(
                    f"The model in memory has {other} than when it was opened: give the model as it was."
                )
        found = self._probe()
        assert wanted is not None
        limit = 0.1 * ROUNDING.get(wanted.dtype, 1e-4) * float(wanted.abs().max())
        if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= limit:
            raise MismatchError(
                "The model in memory gives other hidden states than when it was opened, with the same weights (a forward "
                "hook, a replaced method, or a changed setting of a module): give the model as it was."
            )

    def _look(self, state: State) -> tuple[Any, ...]:
        """What is cheap to compare."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = (
            len(self.tokenizer),
            getattr(self.tokenizer, "chat_template", None),
            str(getattr(backend, "post_processor", "")),
        )
        return (*glance(state), words)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        trunk: Any = getattr(self.lm, "base_model", self.lm)
        with evaluating(self.lm):
            out = trunk(input_ids=probe_ids(self.embedded, min(24, self.context), self.device), use_cache=False)
        return (out.logits if trunk is self.lm else out.last_hidden_state).clone()


def load_model(model: Any, tokenizer: Any = None, options: ModelOptions | None = None) -> LanguageModel:
    """A causal language model by path or id of a directory, a .gguf file or a peft adapter; or the object itself.

    model: a place, a module (with `tokenizer`), a pair (module, tokenizer), or a LanguageModel, which comes back.
    An adapter's base model is the one that its adapter_config.json names; its tokenizer is its own, else the base's.

    Raises: UnsupportedError for what does not load or cannot be used; FormatError for a checkpoint that lacks weights,
            which would be random.
    """
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    options = options or ModelOptions()
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("A model in memory needs its tokenizer: pass tokenizer=... beside it.")
        return LanguageModel(_whole(model), tokenizer, None)
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model is of type {type(model).__name__}: give a path or id, or a model with its tokenizer.")
    place, device = Path(model), find_device(options.device)
    lm, own, notes = _load(str(model), options)
    settings = {name: value for name, value in vars(options).items() if name != "device"}
    source = {"name": str(place.resolve() if place.exists() else model), **settings}
    return LanguageModel(_whole(lm.to(device)), tokenizer or own, source, notes)


def find_device(name: str) -> torch.device:
    """The device of a name; auto: cuda where there is one. Raises: ValueError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}: give cpu, cuda, cuda:1, mps or auto.") from None
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no numbers: give cpu, cuda or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device here: give cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but the last one here is cuda:{torch.cuda.device_count() - 1}: give that."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no such device here: give cpu.")
    return device


# ---------------------------------------------------------------- objects


def _whole(lm: Any) -> nn.Module:
    """The module to work with: unwrapped of torch.compile and of peft's model, whose adapters live inside its layers.

    Raises: UnsupportedError for wrappers that hide the model, and for weights that are not here.
    """
    lm = getattr(lm, "_orig_mod", lm)
    kind = type(lm).__name__
    hidden = not hasattr(lm, "get_output_embeddings") and isinstance(getattr(lm, "module", None), nn.Module)
    if isinstance(lm, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hidden or "FullySharded" in kind:
        raise UnsupportedError(f"{kind} wraps the model: give the model inside it (model.module), with whole weights.")
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        if tensor.device.type == "meta":
            raise UnsupportedError(
                f"{kind} has no numbers in {name}, which is on the meta device: load the whole model into memory "
                "(from_pretrained without a device_map that offloads)."
            )
    for module in lm.modules():
        if ".quantized" in type(module).__module__:
            raise UnsupportedError(
                f"{kind} has layers that torch has quantised ({type(module).__name__}), whose weights can't be read: "
                "give the model as it was before."
            )
    return _without_peft(lm) if hasattr(lm, "peft_config") and hasattr(lm, "base_model") else lm


def _without_peft(lm: Any) -> nn.Module:
    """The base model inside peft's model, with the adapters in its layers."""
    if not hasattr(lm.base_model, "model") or type(lm).__module__.split(".")[0] != "peft":
        return lm  # transformers' own models hold adapters in their layers
    configs = [lm.peft_config[name] for name in _active(lm) if name in lm.peft_config]
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise UnsupportedError("Prompt and prefix tuning put tokens before the text: give the model without them.")
    inner = lm.get_base_model() if hasattr(lm, "get_base_model") else lm.base_model.model
    ids = probe_ids(LanguageModel(inner, None, None).embedded, 8, next(inner.parameters()).device)
    with torch.no_grad(), evaluating(lm):
        outside = lm(input_ids=ids, use_cache=False).logits.double()
        inside = inner(input_ids=ids, use_cache=False).logits.double()
    if float((outside - inside).abs().max()) > ROUNDING.get(inside.dtype, 1e-4) * float(inside.abs().max()):
        raise UnsupportedError(
            f"This adapter ({', '.join(str(config.peft_type) for config in configs)}) works outside of the model's layers, "
            "where an index does not see it: give merge_and_unload() of the model, or the model without it."
        )
    return inner


def _active(lm: Any) -> list[str]:
    found = getattr(lm, "active_adapters", None) or getattr(lm, "active_adapter", None) or []
    found = found() if callable(found) else found
    return [found] if isinstance(found, str) else list(found)


# ---------------------------------------------------------------- places


def _load(name: str, options: ModelOptions) -> tuple[Any, Any, tuple[str, ...]]:
    """Module, tokenizer and notes of a place."""
    place, own = _place(name, options)
    if "gguf_file" not in own and (adapter := _adapter(place, options)) is not None:
        return _load_adapter(name, place, adapter, options)
    lm = _load_whole(name, place, {**own, "dtype": options.named_dtype})
    notes = _notes_of_gguf(Path(name), options) if "gguf_file" in own else ()
    return lm, _load_tokenizer(name, place, own), notes


def _place(name: str, options: ModelOptions) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a directory or an id, and options but for the dtype."""
    own: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        own["revision"] = options.revision
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no GGUF file at {name}: give the path of an existing file.")
        return str(Path(name).parent), {**own, "gguf_file": Path(name).name}
    return (name if Path(name).exists() or hub_answers() else downloaded_before(name, options.revision)), own


def _load_whole(name: str, place: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    with _explained(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    lm, facts = loaded
    if absent := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in facts[kind]):
        raise FormatError(f"{name} lacks the weights {absent[0]!r}, which would be random: give a whole model.")
    return lm


def _load_tokenizer(name: str, place: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with _explained(name):
        return AutoTokenizer.from_pretrained(place, **options)


def load_tokenizer(name: str, options: ModelOptions | None = None) -> Any:
    """The tokenizer that `load_model` finds at a place, without the model."""
    options = options or ModelOptions()
    place, own = _place(name, options)
    if "gguf_file" in own or (adapter := _adapter(place, options)) is None:
        return _load_tokenizer(name, place, own)
    found = _own_tokenizer(place, own)
    return found if found is not None else load_tokenizer(base_of(place, adapter), options)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What `from_pretrained` raises, as one sentence."""
    try:
        with quiet_transformers():
            yield
    except ImportError as error:
        raise UnsupportedError(f"{name} needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"{name} does not load as a causal language model with its tokenizer: {_first_line(error)}"
        ) from error


def _notes_of_gguf(path: Path, options: ModelOptions) -> tuple[str, ...]:
    from gguf import GGUFReader

    kinds = sorted({tensor.tensor_type.name for tensor in GGUFReader(path).tensors} - set(UNQUANTISED))
    wanted = "float32" if options.dtype == "auto" else options.dtype
    return (f"{path.name} is dequantised from {', '.join(kinds)} to {wanted}.",) if kinds else ()


# ---------------------------------------------------------------- adapters


def _adapter(place: str, options: ModelOptions) -> dict[str, Any] | None:
    """The config of the adapter in a directory or behind an id; None where there is none.

    Raises: UnsupportedError where a whole model stands beside it, FormatError for a damaged file.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    with quiet_transformers():
        file = find_adapter_config_file(place, revision=options.revision)
    if file is None:
        return None
    directory = Path(place)
    if directory.is_dir() and any(next(directory.glob(pattern), None) for pattern in WEIGHTS):
        raise UnsupportedError(
            f"{place} holds a whole model and an adapter ({ADAPTER}): put one of them into a directory of its own."
        )
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"{file} is not JSON of an adapter: save the adapter again.")
    return found


def base_of(place: str, adapter: dict[str, Any]) -> str:
    """Path or id of the base model that an adapter's config names, a path also looked for beside the adapter.

    Raises: FormatError if it names none.
    """
    named = adapter.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise FormatError(
            f"{place} is an adapter of an unnamed model: write the base model's path or id into base_model_name_or_path "
            f"of its {ADAPTER}."
        )
    beside = Path(place) / named
    return str(beside.resolve()) if not Path(named).exists() and beside.exists() else named


def _load_adapter(
    name: str, place: str, adapter: dict[str, Any], options: ModelOptions
) -> tuple[Any, Any, tuple[str, ...]]:
    """The base model with the adapter in its layers."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise UnsupportedError(
            f"{name} is an adapter, which needs the package peft: pip install 'leaveout[peft]'."
        ) from None
    if adapter.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedError(f"{name} is an adapter for {adapter['task_type']}: give one of a causal language model.")
    base = base_of(place, adapter)
    inner = ModelOptions(options.dtype, options.device, adapter.get("revision"), options.trust_remote_code)
    try:
        if _adapter(_place(base, inner)[0], inner) is not None:
            raise UnsupportedError("it is an adapter itself: merge it into its own base first")
        lm, tokenizer, notes = _load(base, inner)
    except (LeaveoutError, OSError) as error:
        raise UnsupportedError(
            f"The base model of the adapter {name}, {base}, does not load ({str(error).rstrip('.')}): say where it is in "
            f"base_model_name_or_path of its {ADAPTER}."
        ) from error
    revision: dict[str, Any] = {} if options.revision is None else {"revision": options.revision}
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(place, **revision)
            if config.is_prompt_learning:
                raise UnsupportedError(
                    "Prompt and prefix tuning put tokens before the text: give the model without them."
                )
            adapted = PeftModel.from_pretrained(lm, place, config=config, **revision)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UnsupportedError(f"{name} does not load as an adapter of {base}: {_first_line(error)}") from error
    if lacking := [str(one.message) for one in said if "missing adapter keys" in str(one.message)]:
        raise FormatError(
            f"{name} lacks weights of the adapter, which would be random ({lacking[0]}): give a whole adapter."
        )
    if options.dtype == "float64":
        adapted.to(torch.float64)  # peft loads adapters in float32
    own = _own_tokenizer(place, {"trust_remote_code": options.trust_remote_code, **revision})
    return adapted.eval(), tokenizer if own is None else own, notes


def _own_tokenizer(place: str, options: dict[str, Any]) -> Any:
    """The tokenizer beside an adapter; None where there is none."""
    if Path(place).is_dir():
        there = any((Path(place) / file).exists() for file in TOKENIZER)
        return _load_tokenizer(place, place, options) if there else None
    try:
        return _load_tokenizer(place, place, options)
    except UnsupportedError:
        return None


# ---------------------------------------------------------------- what a recipe hashes


def source_digest(name: str) -> list[list[str]]:
    """Names and SHA-256 of the files of a model: of a .gguf file, a directory, an adapter with its base; else the id."""
    path = Path(name)
    if path.is_file():
        return [[path.name, _sha256(path)]]
    if not path.is_dir():
        return [[name]]
    files = [[file.name, _sha256(file)] for file in sorted(path.iterdir()) if file.is_file()]
    adapter = _adapter(name, ModelOptions())
    if adapter is None:
        return files
    return [*files, ["base model", *(part for file in source_digest(base_of(name, adapter)) for part in file)]]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------- the hub


def hub_answers() -> bool:
    """Whether the address of the model hub is known here; with a proxy, which looks it up itself, this is not asked."""
    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def downloaded_before(name: str, revision: str | None) -> str:
    """The directory of a model that was once loaded from the hub. Asking the hub without a connection takes a minute.

    Raises: UnsupportedError if there is none.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        raise UnsupportedError(
            f"{name} does not load: there is no such directory, it was not downloaded before, and the hub can't be reached; "
            "check the name or the connection."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice of transformers while a model loads: our own progress goes to stderr."""
    from transformers.utils import logging as transformers_logging

    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
