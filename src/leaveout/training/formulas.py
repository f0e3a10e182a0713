"""Attention and norms by elementary operations, where series, second derivatives or many runs at once go through them.

Fused kernels give the same numbers up to rounding, and have neither a rule for series nor, on a CPU, one for batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def slow_path() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoder as they train, also where no gradient is wanted.

    There they would take a kernel of their own, which leaves zeros where a padding mask is.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as products and a softmax."""
    with slow_path(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def plain_formulas(device: torch.device) -> Iterator[None]:
    """Attention, and on a GPU batch norm, by operations that have rules for jets, not by fused kernels or cuDNN."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled
    cudnn.enabled = before and device.type == "cpu"
    try:
        with plain_attention():
            yield
    finally:
        cudnn.enabled = before
