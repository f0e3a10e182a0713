"""Language models in memory: what is asked of them, and what tells one from another at each use."""

# Models and tokenizers of other packages: what they hold has no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models.checks import ROUNDING, evaluating, probe_ids
from leaveout.models.devices import find_device
from leaveout.models.identity import (
    Numbers,
    State,
    difference,
    glance,
    glance_at_tokenizer,
    hash_adapter,
    hash_config,
    hash_settings,
    hash_tensors,
    hash_tokenizer,
    kept_elsewhere,
    plain_module,
    state_of,
)
from leaveout.models.places import ModelOptions, context_of, load_place, load_stream
from leaveout.models.streaming import LayerStream


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, and what tells it from others.

    lm      the module, adapters inside its layers
    source  how to load it again (`name`, and `ModelOptions.source`); None for one in memory
    notes   what its user should know, one sentence each
    options how it was loaded; None for one in memory
    stream  its blocks, if they were left in their files
    """

    lm: nn.Module
    tokenizer: Any
    source: dict[str, Any] | None
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    options: ModelOptions | None = field(default=None, kw_only=True)
    stream: LayerStream | None = field(default=None, repr=False, kw_only=True)
    _identity: dict[str, Any] | None = field(default=None, repr=False, kw_only=True)
    _glance: Any = field(default=None, repr=False, kw_only=True)
    _outputs: dict[str, Tensor] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return next(parameter for parameter in self.lm.parameters() if not parameter.is_meta).device

    @property
    def family(self) -> str:
        return self.lm.config.model_type  # type: ignore[union-attr,return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    @property
    def context(self) -> int:
        """Longest input in tokens, from the model's config; 2**20 when it states none."""
        return context_of(self.lm.config)

    @property
    def embedded(self) -> int:
        """Tokens that the model embeds, those that its tokenizer does not know included."""
        return plain_module(self.lm.get_input_embeddings()).weight.shape[0]  # type: ignore[operator,union-attr,index,return-value]

    def facts(self) -> dict[str, Any]:
        """What the identity holds beside hashes."""
        return {"family": self.family, "dtype": str(self.dtype).removeprefix("torch.")}

    def identity(self, anew: bool = False) -> dict[str, Any]:
        """Hashes of adapters, weights, buffers, config, settings and tokenizer, with facts: equal only for the same model.

        `anew`: read everything once more, as where rows are written. Cost: one pass over the weights, about 0.2 s for
        500 MB; without `anew` only the first time.
        """
        if self._identity is None or anew:
            with evaluating(self.lm):
                state = state_of(self.lm)
            self._glance = self._look(state)
            self._outputs = self._probe() if self.stream is None else {}
            adapters = [hash_adapter(facts) for facts in state.adapters.values()]
            self._identity = {
                "adapters": adapters,
                "weights": hash_tensors(self._numbers(state.weights), adapters),
                "buffers": hash_tensors(state.buffers),
                "config": hash_config(self.lm),
                "settings": hash_settings(state),
                "tokenizer": hash_tokenizer(self.tokenizer),
                **self.facts(),
            }
        return self._identity

    def refuse_changes(self) -> None:
        """Refuses a model that is no longer what it was when its identity was taken.

        Facts, version counters, a sample of every tensor, config and tokenizer are compared, and the hidden states and
        logits of two dozen tokens, so that hooks and settings of modules count as well; where layers are streamed, size
        and time of their files instead. Where something moved, everything is hashed once more.
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
        for what, found in (self._probe() if wanted else {}).items():
            own = wanted[what]
            limit = 0.1 * ROUNDING.get(own.dtype, 1e-4) * float(own.abs().max())
            if found.shape != own.shape or not float((found - own).abs().max()) <= limit:
                raise MismatchError(
                    f"The model in memory gives other {what} than when it was opened, with the same weights (a forward hook, "
                    "a replaced method, or a changed setting of a module): give the model as it was."
                )

    def _look(self, state: State) -> tuple[Any, ...]:
        """What is cheap to compare."""
        files = [] if self.stream is None else self.stream.stamp()
        return *glance(state), files, hash_config(self.lm), glance_at_tokenizer(self.tokenizer)

    def _numbers(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights, those that are elsewhere read when they are looked at."""
        elsewhere = partial(kept_elsewhere, self.lm)
        return Numbers(weights, elsewhere if self.stream is None else self.stream.numbers)

    @torch.no_grad()
    def _probe(self) -> dict[str, Tensor]:
        """Hidden states and logits of two dozen tokens, by name; for a model without a trunk the logits."""
        ids = probe_ids(self.embedded, min(24, self.context), self.device)
        trunk: Any = getattr(self.lm, "base_model", self.lm)
        with evaluating(self.lm):
            logits = self.lm(input_ids=ids, use_cache=False).logits.clone()
            if trunk is self.lm:
                return {"logits": logits}
            return {"hidden states": trunk(input_ids=ids, use_cache=False).last_hidden_state.clone(), "logits": logits}


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
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer is of type {type(tokenizer).__name__}: give a loaded one (AutoTokenizer.from_pretrained)."
        )
    if isinstance(model, nn.Module):
        if options.offload == "layers" or options.max_memory is not None or options.device_map is not None:
            raise ValueError(
                "The model is in memory already: give its path or id to stream its layers or to share it out, or leave "
                "offload, max_memory and device_map out."
            )
        if tokenizer is None:
            raise ValueError("A model in memory needs its tokenizer: pass tokenizer=... beside it.")
        return LanguageModel(_whole(model), tokenizer, None)
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model is of type {type(model).__name__}: give a path or id, or a model with its tokenizer.")
    place, device = Path(model), find_device(options.device)
    source = {"name": str(place.resolve() if place.exists() else model), **options.source}
    if (found := load_stream(str(model), options, device)) is not None:
        stream, own = found
        return LanguageModel(stream.lm, tokenizer or own, source, options=options, stream=stream)
    lm, own, notes = load_place(str(model), options)
    lm = _whole(lm if options.device_map is not None else lm.to(device))
    return LanguageModel(lm, tokenizer or own, source, notes=notes, options=options)


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
        if tensor.is_meta and kept_elsewhere(lm, name) is None:
            raise UnsupportedError(
                f"{kind} has no numbers in {name}, which is on the meta device: load the whole model into memory, or give its "
                "path to stream its layers."
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
        try:
            outside = lm(input_ids=ids).logits.double()
        except (ValueError, TypeError, RuntimeError):  # X-LoRA asks for more than tokens
            outside = None
        inside = inner(input_ids=ids, use_cache=False).logits.double()
    limit = ROUNDING.get(next(inner.parameters()).dtype, 1e-4) * float(inside.abs().max())
    if outside is None or float((outside - inside).abs().max()) > limit:
        raise UnsupportedError(
            f"This adapter ({', '.join(str(config.peft_type) for config in configs)}) works outside of the model's layers, "
            "where an index does not see it: give merge_and_unload() of the model, or the model without it."
        )
    return inner


def _active(lm: Any) -> list[str]:
    found = getattr(lm, "active_adapters", None) or getattr(lm, "active_adapter", None) or []
    found = found() if callable(found) else found
    return [found] if isinstance(found, str) else list(found)
