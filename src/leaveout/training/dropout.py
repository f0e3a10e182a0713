"""Dropout whose masks are known: each micro-batch has a seed, and the same seed gives the same masks to every engine.

A mask multiplies, and is the same number for every weighting of the examples: retrainings share it, and derivatives go
through it as through any constant. On a CPU the masks are those that torch's own dropout draws from that seed; those of a
GPU are others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from leaveout.errors import UnsupportedError


def seed_of(seed: int, step: int, part: int) -> int:
    """The seed of the masks of a micro-batch, below 2^63; steps and their micro-batches are counted from 0."""
    digest = hashlib.sha256(f"dropout {seed} {step} {part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Masks(TorchFunctionMode):
    """Draws masks on plain ones of the same shape, so that copies and series are multiplied with one and the same.

    rows: the places of the examples that are here in a batch of `of`, whose masks they have
    """

    def __init__(self, rows: Sequence[int] = (), of: int = 0) -> None:
        super().__init__()
        self.rows, self.of = list(rows), of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is not F.dropout:
            return func(*args, **kwargs)
        x, p, training, _ = _arguments(*args, **kwargs)
        return x * self._mask(x.shape, p, x) if training and p > 0.0 else x

    def _mask(self, shape: Sequence[int], p: float, like: Any) -> Any:
        """Zeros, and 1 / (1 - p) elsewhere."""
        if not self.of:
            return F.dropout(torch.ones(shape, dtype=like.dtype, device=like.device), p, True)
        if shape[0] != len(self.rows):
            raise UnsupportedError(
                "The model drops from tensors whose first axis is not that of the examples, so that a part of a micro-batch "
                "has no masks of its own: go back through whole micro-batches (allow more memory)."
            )
        return F.dropout(torch.ones(self.of, *shape[1:], dtype=like.dtype, device=like.device), p, True)[self.rows]

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """As torch.nn.functional.scaled_dot_product_attention, whose fused kernels would draw masks of their own."""
        how: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if dropout_p == 0.0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **how)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        by_parts = torch.ops.aten._scaled_dot_product_attention_math
        weights = by_parts(query, key, value, attn_mask, **how)[1]
        if enable_gqa:
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        return (weights * self._mask(weights.shape, dropout_p, weights)) @ value


def _arguments(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Any, float, bool, bool]:
    """Those of torch.nn.functional.dropout."""
    return input, p, training, inplace


@contextmanager
def dropped(model: nn.Module, seed: int | None, rows: Sequence[int] = (), of: int = 0) -> Iterator[None]:
    """The model in training form, with the masks of a seed, but for norms of batches; nothing is done without a seed.

    rows: where the batch is a part of one of `of` examples, their places in it: they have the masks that they have there
    """
    if seed is None:
        yield
        return
    device = next(model.parameters()).device
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # but those that `norms.by_batches` puts there
            module.eval()
    try:
        with (
            torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_kind(device)),
            _Masks(rows, of),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        model.eval()


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
