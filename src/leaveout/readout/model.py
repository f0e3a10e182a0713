"""A causal language model seen as a trunk (up to the last hidden state) and a head (hidden state to logits).

Conventions: hidden states [positions, hidden]; logits [positions, vocabulary]; a position predicts the token after it.
The head is `logits = cap * tanh(scale * (W h + b) / cap)`, where scale, cap and b are 1, none and none for most models.
Source: arXiv 2604.16197 for the readout; the head forms are those of the `transformers` model classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.loading import load_causal_lm

# Largest |logits - head(hidden)| over the largest |logit| that counts as rounding, by dtype of the model.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}

IDLE_CONFIG = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_hidden_states"}


@dataclass(frozen=True)
class ModelOptions:
    """How a model that is named by path or id is loaded. Remote code runs only with `trust_remote_code=True`."""

    dtype: str = "float32"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class Readout:
    """Trunk, head and tokenizer of one causal language model, in evaluation mode, without gradients.

    Made by `load_readout`, which has verified that the head reproduces the model's own logits.
    """

    lm: nn.Module
    tokenizer: Any
    source: dict[str, Any] | None  # how to load it again; None for a model given in memory
    scale: float = 1.0
    cap: float | None = None
    _identity: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def trunk(self) -> nn.Module:
        return self.lm.base_model  # type: ignore[return-value]

    @property
    def head(self) -> nn.Linear:
        return self.lm.get_output_embeddings()  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:
        """Head matrix W [vocabulary, hidden]."""
        return self.head.weight.detach()

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.weight.device

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
    def family(self) -> str:
        return self.lm.config.model_type  # type: ignore[union-attr,return-value]

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [batch, tokens, hidden], after the final norm, of token ids [batch, tokens].

        Rows are padded on the right and no mask is passed: attention is causal, so what stands right of a token
        cannot reach it, and the unmasked kernel is the faster one.
        """
        return self.trunk(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [positions, vocabulary] of hidden states [positions, hidden], in the dtype of `hidden`.

        `out` is a buffer to write to. The product runs in `hidden`'s dtype.
        """
        weight = self.weight
        if weight.dtype == hidden.dtype:
            logits = torch.mm(hidden, weight.t(), out=out)
        else:
            logits = hidden.new_empty(len(hidden), self.vocabulary) if out is None else out
            for start in range(0, self.vocabulary, 4096):  # a narrow head is widened piece by piece
                rows = slice(start, start + 4096)
                torch.mm(hidden, weight[rows].to(hidden.dtype).t(), out=logits[:, rows])
        if self.head.bias is not None:
            logits += self.head.bias.to(logits.dtype)
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (W h), elementwise: the factor between a gradient at the logits and one at W h."""
        if self.cap is None:
            return self.scale
        return self.scale * (1 - (logits / self.cap) ** 2)

    def identity(self) -> dict[str, Any]:
        """Hashes of all weights, the config and the tokenizer, with the shape facts: equal only for the same model.

        Cost: one pass over the weights, about 0.2 s for 500 MB.
        """
        if self._identity is None:
            self._identity = {
                "weights": hash_weights(self.lm),
                "config": hash_config(self.lm),
                "tokenizer": hash_tokenizer(self.tokenizer),
                "family": self.family,
                "hidden_size": self.hidden_size,
                "vocabulary": self.vocabulary,
                "dtype": str(self.weight.dtype).removeprefix("torch."),
            }
        return self._identity


def load_readout(
    model: str | Path | nn.Module | Readout, tokenizer: Any = None, options: ModelOptions | None = None
) -> Readout:
    """The readout of a model: a path or id of anything `AutoModelForCausalLM` loads, a GGUF file, or an object.

    Raises: UnsupportedError if head(hidden states) does not reproduce the model's logits to rounding.
            MismatchError if the tokenizer cannot belong to the model; FormatError for a checkpoint that lacks weights.
    """
    if isinstance(model, Readout):
        return model
    options = options or ModelOptions()
    source = None
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("A model in memory needs its tokenizer: pass tokenizer=... beside it.")
        lm = model
    else:
        place = Path(model)
        source = {"name": str(place.resolve() if place.exists() else model), **vars(options)}
        lm, own = _load(str(model), options)
        tokenizer = tokenizer or own
    if hasattr(lm, "get_base_model"):  # peft: adapters live inside the layers of the base model
        if any(config.is_prompt_learning for config in lm.peft_config.values()):  # type: ignore[union-attr,operator]
            raise UnsupportedError("Prompt and prefix tuning put tokens before the text: give the model without them.")
        lm = lm.get_base_model()  # type: ignore[operator]
    lm.eval()  # a model in memory stays so: dropout would change every signature
    return verify_readout(Readout(lm, tokenizer, source))


def _load(name: str, options: ModelOptions) -> tuple[nn.Module, Any]:
    dtype = getattr(torch, options.dtype, None)
    if dtype not in ROUNDING:
        raise ValueError(f"dtype {options.dtype!r} is not one of float32, bfloat16, float16, float64.")
    common: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        common["revision"] = options.revision
    place = name
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no GGUF file at {name}: give the path of an existing file.")
        place, common["gguf_file"] = str(Path(name).parent), Path(name).name
    lm, tokenizer = load_causal_lm(place, dtype=dtype, **common)
    return lm.to(options.device), tokenizer


def verify_readout(readout: Readout) -> Readout:
    """The readout with the head's scale and cap found, after head(hidden states) has reproduced the model's logits.

    Raises: UnsupportedError naming the largest difference, MismatchError for a tokenizer of another model.
    """
    lm = readout.lm
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or getattr(lm, "base_model", lm) is lm:
        raise UnsupportedError(
            f"{type(lm).__name__} has no linear output head on a trunk: give a causal language model of transformers."
        )
    _check_tokenizer(readout)
    config = lm.config.get_text_config()  # type: ignore[union-attr,operator]
    readout.cap = getattr(config, "final_logit_softcapping", None)
    if getattr(config, "logit_scale", None) is not None:
        readout.scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):
        readout.scale = 1.0 / float(config.logits_scaling)
    ids = torch.arange(2 * min(12, readout.context), device=readout.device).reshape(2, -1) * 7919 % readout.vocabulary
    with torch.inference_mode():
        wanted = lm(input_ids=ids, use_cache=False).logits.flatten(0, 1).double()
        hidden = readout.hidden(ids).flatten(0, 1)
        found = readout.logits(hidden.clone()).double()
    largest = wanted.abs().max().item()
    if not math.isfinite(largest):
        raise UnsupportedError(
            f"The logits of {type(lm).__name__} are not finite: get its weights again, or load it with dtype float32."
        )
    difference = (wanted - found).abs().max().item() / max(largest, 1e-30)
    if not difference <= ROUNDING.get(readout.weight.dtype, 1e-4):
        raise UnsupportedError(
            f"The head of {type(lm).__name__} does not reproduce the model's logits from its last hidden states "
            f"(largest difference {difference:.2g} of the largest logit), so its readout gradient would be wrong: "
            "use a model whose logits are a linear head of the last hidden state."
        )
    return readout


def _check_tokenizer(readout: Readout) -> None:
    known, rows = len(readout.tokenizer), readout.lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if known > rows:
        # Some tokenizers name a few tokens more than the model embeds; real text decides, so test real ids.
        probe = readout.tokenizer("The quick brown fox, 1234567890: ünïcödé and (punctuation)!").input_ids
        if max(probe) >= rows or known > 1.05 * rows:
            raise MismatchError(
                f"The tokenizer has {known} tokens, the model embeds {rows}: use the tokenizer that the model came with."
            )
    if known < rows / 2:
        raise MismatchError(
            f"The tokenizer has only {known} tokens for the model's {rows}: use the tokenizer that the model came with."
        )


def hash_weights(lm: nn.Module) -> str:
    """xxh3-128 over name, dtype, shape and bytes of every parameter and persistent buffer, in name order."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), 2**22):  # pieces, so that a model on a device needs no second copy here
            piece = flat[start : start + 2**22].contiguous().cpu()
            digest.update(memoryview(piece.view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_config(lm: nn.Module) -> str:
    """xxh3-128 of the model's config without what does not change its outputs (paths, versions, caches)."""
    config = lm.config.to_dict()  # type: ignore[union-attr,operator]
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in IDLE_CONFIG}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True, default=str).encode())


def hash_tokenizer(tokenizer: Any) -> str:
    """xxh3-128 of the whole fast tokenizer, or of vocabulary and class for a slow one, with its chat template."""
    digest = xxhash.xxh3_128()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
    else:
        digest.update((type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    digest.update(json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True).encode())
    return digest.hexdigest()
