"""What tells one model from another: hashes of weights, config and tokenizer, and of what is no tensor of the state.

Adapters inside the layers (peft) are taken apart: `adapters` has one digest for each adapter that is at work, of its
tensors and numbers, and `weights` is the hash of the base model and of these. One that is disabled, merged or not chosen
does nothing, so that it does not count: a model in `disable_adapter()` is its base model, and a merged one has other
weights.
"""

# Modules, wrappers and tokenizers of other packages: what they hold has no types and no public names.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from leaveout.errors import UnsupportedError

IDLE_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_hidden_states"}
COMPILED = "_orig_mod"  # of a module that torch.compile wraps: the module
INNER = {"base_layer", "original_module", "token_adapter"}  # of a wrapper of peft: the module that it wraps
FLAGS = ("is_feedforward", "fan_in_fan_out", "lora_variant", "cast_input_dtype_enabled")  # beside `other_param_names`
SAMPLED = 64  # numbers of a tensor that the quick checksum reads; all of a tensor of up to four times as many
PROBE = "The quick brown fox, 1234567890:\n\tünïcödé  ICI & (漢字)!"

WORDS = {
    "adapters": "another adapter",
    "weights": "other weights",
    "buffers": "other buffers",
    "config": "another config",
    "settings": "other settings of modules",
    "tokenizer": "another tokenizer",
}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What a model with the identity `new` has that one with `old` has not, in words; None where they are the same."""
    for name, value in new.items():
        if old.get(name) != value:
            if name == "adapters" and not value:
                return "another adapter (none at work)"
            return WORDS.get(name, f"another {name} ({value})")
    return None


@dataclass
class State:
    """The tensors and facts that a model's outputs depend on, taken apart.

    weights   name -> tensor, of parameters and persistent buffers of the base model
    buffers   likewise, of buffers that no checkpoint has (rotary frequencies, masks)
    adapters  per adapter at work: name -> tensor, or number, text or list of such
    settings  name -> number, of attributes of modules that the config gave them and anybody may have changed since
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, float | str] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        inside = [value for facts in self.adapters.values() for value in facts.values() if isinstance(value, Tensor)]
        return [*self.weights.values(), *self.buffers.values(), *inside]

    def facts(self) -> str:
        """All that is no tensor, as text."""
        plain = {
            name: {key: value for key, value in facts.items() if not isinstance(value, Tensor)}
            for name, facts in self.adapters.items()
        }
        return json.dumps([list(self.weights), list(self.buffers), list(self.adapters), plain, self.settings])


def state_of(lm: nn.Module) -> State:
    """The state of a model. Raises: UnsupportedError for layers whose weights are no tensors (torch's quantised ones)."""
    state, wrappers = State(), {}
    for name, module in lm.named_modules(remove_duplicate=False):
        if is_adapted(module):
            wrappers[name] = module
            _add_facts(state, name, module)
        _add_settings(state, wrappers, name, module)
    kept = lm.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(f"{type(lm).__name__} has weights that can't be read ({name}): give it unquantised.")
        _file(state, state.weights, wrappers, name, tensor)
    for name, tensor in lm.named_buffers(remove_duplicate=False):
        if name not in kept and not _moves(lm, name):
            _file(state, state.buffers, wrappers, name, tensor)
    return state


def kept_elsewhere(lm: nn.Module, name: str) -> Tensor | None:
    """The numbers of a tensor on the meta device, where accelerate keeps them in memory or in a file; else None."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(lm.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None and leaf in weights:
            return weights[leaf]
    return None


class Numbers(Mapping[str, Tensor]):
    """Tensors by name, those on the meta device from where they are kept, when they are looked at."""

    def __init__(self, tensors: Mapping[str, Tensor], find: Callable[[str], Tensor | None]) -> None:
        self.tensors = tensors
        self.find = find

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if not tensor.is_meta:
            return tensor
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a wrapper of peft around one of the model; peft need not be installed to know."""
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled a module, as a wrapper around it or in its place."""
    return COMPILED in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def at_work(wrapper: Any) -> list[str]:
    """Names of the adapters that change what a wrapper computes."""
    if wrapper.disable_adapters or wrapper.merged_adapters:
        return []
    return list(wrapper.active_adapters)


def _file(state: State, base: dict[str, Tensor], wrappers: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Puts a tensor where it belongs, under the name that it has without wrappers."""
    parts, kept, place = name.split("."), [], ""
    for i, part in enumerate(parts):
        wrapper = wrappers.get(place)
        if wrapper is None or part not in INNER:
            if wrapper is not None and i + 1 < len(parts) and _has_adapter(wrapper, part, parts[i + 1]):
                if parts[i + 1] in at_work(wrapper):
                    inside = state.adapters.setdefault(parts[i + 1], {})
                    inside[".".join([*kept, part, *parts[i + 2 :]])] = tensor
                return
            if part != COMPILED:
                kept.append(part)
        place = f"{place}.{part}" if place else part
    base[".".join(kept)] = tensor


def _has_adapter(wrapper: nn.Module, container: str, adapter: str) -> bool:
    held = getattr(wrapper, container, None)
    return isinstance(held, nn.Module) and not is_adapted(held) and (adapter in held._modules or hasattr(held, adapter))


def _add_facts(state: State, name: str, wrapper: Any) -> None:
    """Numbers of the adapters at work in a wrapper: scalings, ranks, kinds; dropout does nothing in evaluation."""
    names, name = {*wrapper.other_param_names, *FLAGS}, name.replace(f"{COMPILED}.", "")
    for position, adapter in enumerate(at_work(wrapper)):
        for key in sorted(names):
            held = wrapper.__dict__.get(key)
            if "dropout" in key or held is None:
                continue
            if isinstance(held, Mapping):
                if adapter not in held:
                    continue
                held = held[adapter]
            inside = state.adapters.setdefault(adapter, {})
            inside[f"{name}.{key}"] = held if isinstance(held, Tensor) else _plain(held)
            inside[f"{name}.position"] = position


def _add_settings(state: State, wrappers: Mapping[str, Any], name: str, module: nn.Module) -> None:
    """Numbers among the attributes of a module of the model's own, and whether its `forward` was replaced."""
    plain = _plain_name(name, wrappers)
    wrapper = is_adapted(module) or COMPILED in module._modules
    if plain is None or wrapper or hasattr(module, "config_class") or scaled_by_length(module):
        return  # inside an adapter; a wrapper; a whole model, whose attributes say how it was loaded; what inputs change
    of_torch = type(module).__module__.startswith("torch.")
    for key, value in vars(module).items():
        replaced = key == "forward" and "_hf_hook" not in vars(module) and not hasattr(value, "comes_and_goes")
        if replaced or (isinstance(value, (bool, int, float)) and (key == "eps" if of_torch else _counts(key))):
            state.settings[f"{plain}.{key}"] = "replaced" if replaced else value


def _counts(attribute: str) -> bool:
    idle = (
        attribute in ("training", "gradient_checkpointing") or "dropout" in attribute or attribute.endswith("_cached")
    )
    return not idle and not attribute.startswith("_")


def _plain_name(name: str, wrappers: Mapping[str, Any]) -> str | None:
    """The name that a module has without wrappers; None for one that belongs to an adapter."""
    kept, place = [], ""
    for part in name.split("."):
        if place in wrappers and part not in INNER:
            return None
        if place not in wrappers and part != COMPILED:
            kept.append(part)
        place = f"{place}.{part}" if place else part
    return ".".join(kept)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__qualname__


def _moves(lm: nn.Module, name: str) -> bool:
    """Whether a buffer follows the length of the last input: rotary frequencies that are scaled by it."""
    owner, _, buffer = name.rpartition(".")
    moving = scaled_by_length(lm.get_submodule(owner))
    return moving and buffer.endswith("inv_freq") and not buffer.endswith("original_inv_freq")


def scaled_by_length(module: nn.Module) -> bool:
    """Whether a module computes rotary positions that depend on the longest row of a batch."""
    kinds = module.__dict__.get("rope_type", "")
    kinds = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)


def adapter_places(lm: nn.Module) -> list[str]:
    """Names under which the adapters at work have their parameters: a prefix for each wrapper, container and adapter."""
    return [
        f"{name}.{container}.{adapter}" if name else f"{container}.{adapter}"
        for name, wrapper in lm.named_modules()
        if is_adapted(wrapper)
        for container in wrapper._modules
        if container not in INNER
        for adapter in at_work(wrapper)
        if _has_adapter(wrapper, container, adapter)
    ]


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside peft's wrappers: of a copy in `modules_to_save` the one in use, of an adapted layer the layer."""
    while is_adapted(module):
        module = _inside(module)
    return module


def settled_module(module: nn.Module) -> nn.Module:
    """The module that computes what a wrapper gives; the wrapper itself where an adapter adds to it."""
    while is_adapted(module) and ("modules_to_save" in module._modules or hasattr(module, "token_adapter")):
        module = _inside(module)
    return plain_module(module) if is_adapted(module) and not at_work(module) else module


def _inside(wrapper: Any) -> nn.Module:
    saved = wrapper._modules.get("modules_to_save")
    if saved is not None:
        names = [name for name in at_work(wrapper) if name in saved]
        return saved[names[0]] if names else wrapper.original_module
    return wrapper._modules.get("token_adapter") or wrapper.base_layer


# ---------------------------------------------------------------- hashes


def hash_tensors(tensors: Mapping[str, Tensor], adapters: Sequence[str] = ()) -> str:
    """xxh3-128 over name, dtype, shape and bytes of every tensor, in name order, and over digests of adapters."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    for adapter in adapters:
        digest.update(adapter.encode())
    return digest.hexdigest()


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach()
    if hasattr(flat, "__tensor_flatten__"):  # a subclass made of several tensors, as torchao has
        names, _ = flat.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        for inner in names:
            _feed(digest, f"{name}.{inner}", getattr(flat, inner))
        return
    flat = flat.reshape(-1)
    for start in range(0, flat.numel(), 2**22):  # pieces, so that a model on a device needs no second copy here
        piece = flat[start : start + 2**22].contiguous().cpu()
        digest.update(memoryview(piece.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]


def hash_adapter(facts: Mapping[str, Any]) -> str:
    """xxh3-128 of an adapter's tensors and numbers. Its name does not count."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(facts.items()):
        if isinstance(value, Tensor):
            _feed(digest, name, value)
        else:
            digest.update(f"{name} = {json.dumps(value)}\n".encode())
    return digest.hexdigest()


def hash_settings(state: State) -> str:
    """xxh3-128 of the numbers that modules keep."""
    return xxhash.xxh3_128_hexdigest(json.dumps(state.settings, sort_keys=True).encode())


def hash_config(lm: nn.Module) -> str:
    """xxh3-128 of the model's config without what does not change its outputs (paths, versions, caches)."""
    config = lm.config.to_dict()  # type: ignore[union-attr,operator]
    if isinstance(how := config.get("quantization_config"), dict):  # a .gguf file may have another name tomorrow
        config = {**config, "quantization_config": {key: value for key, value in how.items() if key != "gguf_file"}}
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in IDLE_CONFIG}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True, default=str).encode())


def hash_tokenizer(tokenizer: Any) -> str:
    """xxh3-128 of the whole fast tokenizer, or of vocabulary and class for a slow one, with its chat template.

    So are the special tokens that templates name. Truncation and padding, which a fast tokenizer keeps from its last
    call, do not count, nor does the padding token.
    """
    digest = xxhash.xxh3_128()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.truncation is not None or backend.padding is not None:
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        digest.update(backend.to_str().encode())
    else:
        digest.update((type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    digest.update(json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True).encode())
    digest.update(json.dumps(_special_tokens(tokenizer), sort_keys=True).encode())
    if getattr(tokenizer, "split_special_tokens", False):
        digest.update(b"split special tokens")
    return digest.hexdigest()


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    named = getattr(tokenizer, "special_tokens_map", {})
    return {name: str(token) for name, token in named.items() if name != "pad_token"}


def glance_at_tokenizer(tokenizer: Any) -> tuple[Any, ...]:
    """What is cheap to compare of a tokenizer: its parts but for the vocabulary, and the ids of a text of many kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [str(getattr(backend, name, "")) for name in ("normalizer", "pre_tokenizer", "post_processor")]
    split, named = getattr(tokenizer, "split_special_tokens", False), _special_tokens(tokenizer)
    template, ids = getattr(tokenizer, "chat_template", None), list(tokenizer(PROBE).input_ids)
    return len(tokenizer), template, split, named, parts, ids


def _stride(tensor: Tensor) -> int:
    """Numbers from one to the next that the quick checksum reads, so that they come from columns all over the tensor."""
    if tensor.numel() <= 4 * SAMPLED:
        return 1
    step, width = tensor.numel() // SAMPLED, tensor.shape[-1]
    if step < width:
        return step | 1
    shift = next(shift for shift in range(int(0.618 * width), width + 1) if math.gcd(shift, width) == 1)
    return step // width * width + shift


def glance(state: State) -> tuple[str, tuple[int, ...], str]:
    """What is cheap to compare: facts, version counters, and a checksum of a sample of every tensor.

    Version counters miss what is written through `.data`; the sample sees every change that is spread over a tensor.
    """
    tensors = state.tensors()
    digest, groups = xxhash.xxh3_128(), {}
    for tensor in tensors:
        flat = tensor.detach()
        if hasattr(flat, "__tensor_flatten__") or flat.is_meta:  # what was left in files, they tell of themselves
            continue
        step, flat = _stride(flat), flat.reshape(-1)
        groups.setdefault((str(flat.device), str(flat.dtype)), []).append(flat[::step])
    for pieces in groups.values():
        sample = torch.cat(pieces).cpu().view(torch.uint8).numpy()
        digest.update(memoryview(sample))  # pyright: ignore[reportArgumentType]
    versions = tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)
    return state.facts(), versions, digest.hexdigest()
