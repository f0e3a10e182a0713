"""A causal language model seen as a trunk (up to the last hidden state) and a head (hidden state to logits).

Conventions: hidden states [positions, hidden]; logits [positions, vocabulary]; a position predicts the token after it.
The head is `logits = cap * tanh(scale * (W h + b) / cap)`, where scale, cap and b are 1, none and none for most models.
Source: arXiv 2604.16197 for the readout; the head forms are those of the `transformers` model classes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models import (
    ROUNDING,
    LanguageModel,
    ModelOptions,
    evaluating,
    is_adapted,
    length_limit,
    load_model,
    plain_module,
    refuse_hooks,
    refuse_look_ahead,
    runs,
    settled_module,
)
from leaveout.readout.halves import multiplies_halves


@dataclass
class Readout(LanguageModel):
    """Trunk, head and tokenizer of one causal language model, without gradients.

    Made by `load_readout`, which has verified that the head reproduces the model's own logits.

    scale, cap  of the head's logits
    limit       tokens from which on a row is computed beside rows of its length only (see `length_limit`)
    """

    scale: float = 1.0
    cap: float | None = None
    limit: int | None = None

    @property
    def trunk(self) -> nn.Module:
        return self.lm.base_model  # type: ignore[return-value]

    @property
    def head(self) -> nn.Linear:
        return _head(self.lm)  # type: ignore[return-value]

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

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [batch, tokens, hidden], after the final norm, of token ids [batch, tokens].

        Rows are padded on the right and no mask is passed: attention is causal, so what stands right of a token
        cannot reach it, and the unmasked kernel is the faster one. Rows must be of one `batch_class`.
        """
        with evaluating(self.lm):
            return self.trunk(input_ids=ids, use_cache=False).last_hidden_state.to(self.device)

    @torch.no_grad()
    def hidden_of(self, many: Sequence[Tensor]) -> list[Tensor]:
        """Last hidden states of each of several inputs, as `hidden` gives them; streamed blocks are read once."""
        return [self.hidden(ids) for ids in many] if self.stream is None else list(self.stream.states(many))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [positions, vocabulary] of hidden states [positions, hidden], in the dtype of `hidden`.

        `out` is a buffer to write to. The product runs in `hidden`'s dtype.
        """
        weight = self.weight
        if weight.dtype == hidden.dtype:
            logits = torch.mm(hidden, weight.t(), out=out)
        elif hidden.dtype == torch.float32 and multiplies_halves(weight.device, weight.dtype):
            logits = hidden.new_empty(len(hidden), self.vocabulary) if out is None else out
            # Hidden states left the trunk in the type of its weights: nothing is lost.
            torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32, out=logits)
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

    def facts(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "hidden_size": self.hidden_size,
            "vocabulary": self.vocabulary,
            "dtype": str(self.weight.dtype).removeprefix("torch."),
        }

    def batch_class(self, length: int) -> int:
        """A number that the windows of one batch share, given the tokens of each: 0 below `limit`, then the length."""
        return 0 if self.limit is None or length < self.limit else length


def load_readout(
    model: str | Path | nn.Module | tuple[nn.Module, Any] | LanguageModel,
    tokenizer: Any = None,
    options: ModelOptions | None = None,
) -> Readout:
    """The readout of a model, which is given as `leaveout.models.load_model` takes it.

    Raises: UnsupportedError if head(hidden states) does not reproduce the model's logits to rounding, or if the model
            sees the tokens that it is to predict. MismatchError if the tokenizer cannot belong to the model;
            FormatError for a checkpoint that lacks weights.
    """
    if isinstance(model, Readout):
        return model
    loaded = load_model(model, tokenizer, options)
    return verify_readout(Readout(**{name: value for name, value in vars(loaded).items() if not name.startswith("_")}))


def _head(lm: Any) -> nn.Module | None:
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    return head if head is None else settled_module(head)


@torch.no_grad()
def verify_readout(readout: Readout) -> Readout:
    """The readout with the head's scale and cap found, after head(hidden states) has reproduced the model's logits.

    Raises: UnsupportedError naming the largest difference, MismatchError for a tokenizer of another model.
    """
    lm = readout.lm
    _refuse_head(lm)
    _check_tokenizer(readout)
    ids = torch.arange(2 * min(12, readout.context), device=readout.device).reshape(2, -1) * 7919 % readout.vocabulary
    with evaluating(lm), runs(lm), _watched(readout) as own:
        wanted = lm(input_ids=ids, use_cache=False).logits.flatten(0, 1).double().to(readout.device)
    largest = wanted.abs().max().item()
    if not math.isfinite(largest):
        raise UnsupportedError(
            f"The logits of {type(lm).__name__} are not finite: get its weights again, or load it with dtype float32."
        )
    refuse_hooks(lm, lambda ids: [readout.hidden(ids), lm(input_ids=ids, use_cache=False).logits], ids)
    hidden = wanted

    def states(many: list[Tensor]) -> list[Tensor]:
        nonlocal hidden
        hidden, *found = readout.hidden_of([ids, *many])  # with the others, as streamed blocks are read once for all
        if readout.stream is not None and not torch.equal(hidden, own[0] if own else readout.hidden(ids)):
            raise UnsupportedError(
                f"The blocks of {type(lm).__name__} give other states one by one than in the whole model, so that they can't "
                "be streamed: load it whole (offload none)."
            )
        return found

    refuse_look_ahead(lm, states, readout.vocabulary, readout.context, readout.device)
    readout.limit = length_limit(lm)
    config = lm.config.get_text_config()  # type: ignore[union-attr,operator]
    readout.cap = getattr(config, "final_logit_softcapping", None)
    hidden = hidden.flatten(0, 1)
    difference = math.inf
    for readout.scale in _scales(config):
        found = readout.logits(hidden.clone()).double()
        difference = min(difference, (wanted - found).abs().max().item() / max(largest, 1e-30))
        if difference <= ROUNDING.get(readout.weight.dtype, 1e-4):
            return readout
    raise UnsupportedError(
        f"The head of {type(lm).__name__} does not reproduce the model's logits from its last hidden states "
        f"(largest difference {difference:.2g} of the largest logit), so its readout gradient would be wrong: "
        "use a model whose logits are a linear head of the last hidden state."
    )


@contextmanager
def _watched(readout: Readout) -> Generator[list[Tensor]]:
    """The last hidden states of a streamed model, where it is called as a whole."""
    own: list[Tensor] = []
    if readout.stream is None:
        yield own
        return
    handle = readout.trunk.register_forward_hook(lambda module, args, found: own.append(found.last_hidden_state))
    try:
        yield own
    finally:
        handle.remove()


def _scales(config: Any) -> list[float]:
    """Factors of the logits that a config may mean, the likeliest first; not every model heeds its config."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if scale == "inv_sqrt_d_model":
        scale = config.d_model**-0.5
    found = [float(scale)] if isinstance(scale, (int, float)) else [1.0 / float(divisor)] if divisor else []
    return [*found, 1.0]


def _refuse_head(lm: Any) -> None:
    """Raises: UnsupportedError for a model without a trunk and a plain linear head."""
    head, kind = _head(lm), type(lm).__name__
    if head is not None and is_adapted(head):
        raise UnsupportedError(
            f"The output head of {kind} is adapted ({type(head).__name__} of peft), so that it is no single matrix: "
            "give model.merge_and_unload()."
        )
    if not isinstance(head, nn.Linear) or getattr(lm, "base_model", lm) is lm:
        raise UnsupportedError(
            f"{kind} has no linear output head on a trunk: give a causal language model of transformers."
        )
    if head.weight.is_meta:
        raise UnsupportedError(
            f"accelerate keeps the output head of {kind} elsewhere: give a device_map that leaves lm_head on a device."
        )
    if not head.weight.is_floating_point() or hasattr(head.weight.data, "__tensor_flatten__"):
        raise UnsupportedError(
            f"The output head of {kind} is quantised ({type(head).__name__}): give the model with a head in floating point "
            "(model.dequantize(), or load it without quantising lm_head)."
        )


def _check_tokenizer(readout: Readout) -> None:
    known = len(readout.tokenizer)
    rows: int = plain_module(readout.lm.get_input_embeddings()).weight.shape[0]  # type: ignore[operator,union-attr,index,assignment]
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
