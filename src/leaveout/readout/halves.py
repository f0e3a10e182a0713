"""Products of float32 numbers on the units of a GPU that multiply numbers of 16 bits and add in float32.

A number x is x.to(half) and what is left, rounded to half again: two products in place of one that is ten times dearer.
Where one side is of 16 bits anyway, as weights and hidden states of a model in bfloat16 are, nothing else is lost.
Largest error of products with softmaxes over 3,000 tokens, relative to the product of the lengths, emulated on a CPU
(tests/readout/test_halves.py): 3e-7 in two halves of bfloat16, 2e-5 in TF32, 2e-4 in bfloat16 alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# What is left of a number is multiplied with this first, so that float16, which ends at 6e-8, still holds it.
RAISED = {torch.bfloat16: 1.0, torch.float16: 2.0**11}


@functools.lru_cache(16)
def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type with float32 sums are to be had on a device; on a CPU they would gain nothing."""
    if device.type == "cpu" or dtype not in HALVES:
        return False
    try:
        one = torch.ones(16, 16, dtype=dtype, device=device)
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [2, ...] whose sum is x, the second ones times `RAISED`."""
    both = x.new_empty(2, *x.shape, dtype=dtype)
    both[0].copy_(x)
    if RAISED[dtype] == 1.0:
        torch.sub(x, both[0], out=both[1])
    else:
        both[1].copy_((x - both[0]).mul_(RAISED[dtype]))
    return both


def product_left(both: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix [positions, width] float32 of the halves [2, positions, size] of x, and a matrix of 16 bits."""
    found = torch.mm(both.flatten(0, 1), matrix, out_dtype=torch.float32)
    return torch.add(*found.chunk(2), alpha=1 / RAISED[both.dtype])


def product_right(x: Tensor, both: Tensor) -> Tensor:
    """x @ matrix [positions, width] float32 of x [positions, size] of 16 bits, and the halves [2, size, width] of a matrix."""
    high, low = (torch.mm(x, half, out_dtype=torch.float32) for half in both)
    return high.add_(low, alpha=1 / RAISED[both.dtype])
