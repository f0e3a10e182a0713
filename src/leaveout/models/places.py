"""Where models are loaded from: a directory, a hub's name, a .gguf file, or a peft adapter with its base model.

Nothing is said while a model loads; what the user should know of it comes back as notes.
"""

# What transformers, peft, gguf and huggingface_hub give has no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import logging
import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError

from leaveout.errors import FormatError, LeaveoutError, UnsupportedError, choices, needs
from leaveout.models.checks import ROUNDING, first_line
from leaveout.models.devices import free_memory
from leaveout.models.streaming import Files, LayerStream, stream_layers, without_weights

ADAPTER = "adapter_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
Offload = Literal["auto", "layers", "none"]
UNQUANTISED = ("F16", "F32", "F64", "BF16")  # types of GGUF tensors


@dataclass(frozen=True)
class ModelOptions:
    """How a model that is named by path or id is loaded. Remote code runs only with `trust_remote_code=True`.

    dtype       float32, bfloat16, float16, float64, or auto: as it is stored
    device      cpu, cuda, cuda:1, ..., or auto: cuda where there is one (see `find_device`)
    offload     `layers`: blocks stay in their files and are read when they are needed (`streaming`); `none`; or `auto`:
                `layers` where the whole model does not fit
    max_memory  bytes for weights, and for what waits while layers are streamed; None: four fifths of what is free, half of
                it on a GPU
    device_map  `auto`, or any map of accelerate: how it shares a model out over several devices
    """

    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    offload: Offload = "none"
    max_memory: int | None = None
    device_map: Any = None

    def __post_init__(self) -> None:
        if self.offload not in get_args(Offload):
            raise ValueError(f"offload is {self.offload!r}: {choices(self.offload, get_args(Offload))}.")
        if self.offload == "none" and self.max_memory is not None:
            raise ValueError(
                "max_memory bounds layers that are streamed: leave it out, or give offload layers or auto."
            )
        if self.device_map is not None and self.device != "cpu":
            raise ValueError("device_map says where all of a model is: leave device out, or give device alone.")
        if self.device_map is not None and (self.offload == "layers" or self.max_memory is not None):
            raise ValueError("device_map is for a model that is loaded whole: leave it out to stream layers.")

    @property
    def source(self) -> dict[str, Any]:
        """What decides about the numbers: not where they are computed."""
        return {name: getattr(self, name) for name in ("dtype", "revision", "trust_remote_code")}

    @property
    def named_dtype(self) -> torch.dtype | str:
        """Raises: ValueError for a dtype that no model has here."""
        found = "auto" if self.dtype == "auto" else getattr(torch, str(self.dtype), None)
        if found != "auto" and found not in ROUNDING:
            raise ValueError(f"dtype {self.dtype!r} is not one of float32, bfloat16, float16, float64, auto.")
        assert found is not None
        return found


def load_place(name: str, options: ModelOptions) -> tuple[Any, Any, tuple[str, ...]]:
    """Module, tokenizer and notes of a place.

    Raises: UnsupportedError for what does not load; FormatError for a checkpoint that lacks weights.
    """
    place, own = _place(name, options)
    if "gguf_file" in own:
        needs("gguf", name, extra="gguf")
    if "gguf_file" not in own and Path(place).is_file():
        raise UnsupportedError(f"{name} is a file: give the directory of a model, or a .gguf file.")
    if "gguf_file" not in own and (adapter := _adapter(place, options)) is not None:
        return _load_adapter(name, place, adapter, options)
    mapped: dict[str, Any] = {}
    if options.device_map is not None:
        needs("accelerate", "device_map", extra="gpu")
        mapped["device_map"] = options.device_map
    lm = _load_whole(name, place, {**own, **mapped, "dtype": options.named_dtype})
    notes = _notes_of_gguf(Path(name), options) if "gguf_file" in own else ()
    return lm, _load_tokenizer(name, place, own), notes


FREE, FREE_ON_DEVICE = (
    0.8,
    0.5,
)  # of free memory that is used where nothing was said; on a device batches take much, too


def load_stream(name: str, options: ModelOptions, device: torch.device) -> tuple[LayerStream, Any] | None:
    """Stream and tokenizer of a place whose layers are to stay in their files; None for a model to load whole.

    Raises: UnsupportedError where `layers` are asked for and cannot be streamed; ValueError for too little memory.
    """
    if options.offload == "none" or options.device_map is not None:
        return None
    place, own = _place(name, options)
    directory, reason = _streamable(name, place, own, options)
    if directory is None:
        if options.offload == "layers" or options.max_memory is not None:
            raise UnsupportedError(f"{name} can't be streamed, as {reason}: load it whole (offload none).")
        return None
    files = Files(directory)
    free = int((FREE if device.type == "cpu" else FREE_ON_DEVICE) * free_memory(device))
    limit = free if options.max_memory is None else options.max_memory
    dtype = options.named_dtype
    if options.offload == "auto" and files.n_bytes(dtype if isinstance(dtype, torch.dtype) else None) <= limit:
        return None
    with _explained(name), without_weights():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised, and layers are streamed in floating point: load it whole (offload none)")
        if not isinstance(dtype, torch.dtype):
            stored = (one.dtype for one in files.tensors.values() if one.dtype.is_floating_point)
            dtype = config.dtype or next(stored)
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    stream = stream_layers(lm, name, files, device, limit)
    return stream, _load_tokenizer(name, place, own)


def _streamable(name: str, place: str, own: dict[str, Any], options: ModelOptions) -> tuple[Path | None, str]:
    """The directory with the weights of a place, or why there is none."""
    if "gguf_file" in own:
        return None, "it is a .gguf file"
    directory = Path(place)
    if not directory.is_dir():
        try:
            directory = Path(downloaded_before(name, options.revision))
        except UnsupportedError:
            return None, "it was not downloaded yet"
    if _adapter(str(directory), options) is not None:
        return None, "it is an adapter"
    return (directory, "") if Files.are_in(directory) else (None, "it has no safetensors files (save_pretrained)")


def _place(name: str, options: ModelOptions) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a directory or an id, and options but for the dtype."""
    if not name.strip():
        raise ValueError("The name of the model is empty: give a directory, a .gguf file or a hub's name.")
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


def load_context(name: str, options: ModelOptions | None = None) -> int:
    """The longest input in tokens of the model at a place, which is not loaded: see `context_of`."""
    from transformers import AutoConfig

    options = options or ModelOptions()
    place, own = _place(name, options)
    if "gguf_file" not in own and (adapter := _adapter(place, options)) is not None:
        return load_context(base_of(place, adapter), options)
    with _explained(name):
        return context_of(AutoConfig.from_pretrained(place, **own))


def context_of(config: Any) -> int:
    """Longest input in tokens of a model, from its config; 2**20 when it states none."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        try:
            length = getattr(config, name, None)
        except NotImplementedError:  # XLNet has a name for what it lacks
            length = None
        if isinstance(length, int) and length > 0:
            return length
    return 2**20


def load_tokenizer(name: str, options: ModelOptions | None = None) -> Any:
    """The tokenizer that `load_model` finds at a place, without the model."""
    options = options or ModelOptions()
    place, own = _place(name, options)
    if "gguf_file" in own or (adapter := _adapter(place, options)) is None:
        return _load_tokenizer(name, place, own)
    found = _own_tokenizer(place, own)
    return found if found is not None else load_tokenizer(base_of(place, adapter), options)


@contextmanager
def _explained(name: str) -> Generator[None]:
    """What `from_pretrained` raises, as one sentence."""
    try:
        with quiet_transformers():
            yield
    except ImportError as error:
        raise UnsupportedError(f"{name} needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnsupportedError(
            f"{name} does not load as a causal language model with its tokenizer: {first_line(error)}"
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
    peft = needs("peft", f"{name} is an adapter, which", extra="peft")
    if adapter.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedError(f"{name} is an adapter for {adapter['task_type']}: give one of a causal language model.")
    base = base_of(place, adapter)
    inner = replace(options, revision=adapter.get("revision"))
    try:
        if _adapter(_place(base, inner)[0], inner) is not None:
            raise UnsupportedError("it is an adapter itself: merge it into its own base first")
        lm, tokenizer, notes = load_place(base, inner)
    except (LeaveoutError, OSError) as error:
        raise UnsupportedError(
            f"The base model of the adapter {name}, {base}, does not load ({str(error).rstrip('.')}): say where it is in "
            f"base_model_name_or_path of its {ADAPTER}."
        ) from error
    revision: dict[str, Any] = {} if options.revision is None else {"revision": options.revision}
    try:
        with quiet_transformers(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = peft.PeftConfig.from_pretrained(place, **revision)
            if config.is_prompt_learning:
                raise UnsupportedError(
                    "Prompt and prefix tuning put tokens before the text: give the model without them."
                )
            adapted = peft.PeftModel.from_pretrained(lm, place, config=config, **revision)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UnsupportedError(f"{name} does not load as an adapter of {base}: {first_line(error)}") from error
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


@contextmanager
def quiet_transformers() -> Generator[None]:
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
