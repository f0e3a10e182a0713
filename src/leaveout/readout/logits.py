"""From hidden states and targets to residuals r = softmax(s) - e_y, and their products with matrices.

Logits exist only for blocks of positions in one reused buffer; a residual is then either dense, in that buffer, or its
few surviving entries. r_y is computed as minus the sum of the others, because 1 - p_y has no digits left near 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leaveout.projection import CountSketch
from leaveout.readout.halves import halves, multiplies_halves, product_left
from leaveout.readout.limits import Limits
from leaveout.readout.model import Readout
from leaveout.readout.settings import SignatureSettings

GROUP = 16  # entries per group of the two-level search for the largest logits
REACH = 20.0  # entries below exp(-REACH) of the largest probability are beneath float32 rounding of the sum


Map = Tensor | CountSketch  # a matrix [vocabulary, width], or one with a single sign in each row


def map_width(by: Map) -> int:
    return by.width if isinstance(by, CountSketch) else by.shape[1]


class Residual(Protocol):
    """r [positions, vocabulary] in some form."""

    def __matmul__(self, by: Map) -> Tensor: ...


@dataclass
class DenseResidual:
    """r = (e - rest e_y) / total, where e [positions, vocabulary] has a zero at the target and carries the slope."""

    e: Tensor
    target: Tensor
    rest: Tensor  # [positions, 1], times the slope at the target
    total: Tensor  # [positions, 1]
    halved: dict[torch.dtype, Tensor] = field(default_factory=dict[torch.dtype, Tensor])  # e, for maps of these types

    def __matmul__(self, by: Map) -> Tensor:
        """r @ map [positions, width]."""
        if isinstance(by, CountSketch):
            bucket, sign = by.buckets[self.target, None], by.signs[self.target, None]
            return by(self.e).scatter_add_(1, bucket, -self.rest * sign) / self.total
        if multiplies_halves(by.device, by.dtype):
            if by.dtype not in self.halved:
                self.halved[by.dtype] = halves(self.e, by.dtype)
            product = product_left(self.halved[by.dtype], by)
        else:
            product = wide_product(self.e, by)
        return (product - self.rest * by[self.target].to(self.e.dtype)) / self.total


@dataclass
class SparseResidual:
    """The entries of r that survive: columns [positions, kept] of the vocabulary and their values."""

    index: Tensor
    value: Tensor

    def __matmul__(self, by: Map) -> Tensor:
        """r @ map [positions, width], touching only the rows of the map that survive."""
        if isinstance(by, CountSketch):
            result = self.value.new_zeros(len(self.value), by.width)
            return result.scatter_add_(1, by.buckets[self.index], self.value * by.signs[self.index])
        return F.embedding_bag(self.index, by.to(self.value.dtype), per_sample_weights=self.value, mode="sum")


def wide_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in the type of x."""
    if matrix.dtype == x.dtype:
        return x @ matrix
    result = x.new_zeros(len(x), matrix.shape[1])
    for start in range(0, len(matrix), 4096):
        result += x[:, start : start + 4096] @ matrix[start : start + 4096].to(x.dtype)
    return result


def transposed_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix.t() in the type of x."""
    if matrix.dtype == x.dtype:
        return x @ matrix.t()
    return torch.cat([x @ matrix[at : at + 4096].to(x.dtype).t() for at in range(0, len(matrix), 4096)], 1)


class Head:
    """Logit blocks of one readout in one reused buffer.

    Memory: the bytes of logits that the limits allow, and up to as much again while entries are searched.
    """

    def __init__(
        self, readout: Readout, settings: SignatureSettings | None, dtype: torch.dtype, limits: Limits | None = None
    ) -> None:
        limits = limits or Limits()
        self.readout = readout
        self._settings = settings
        self.padded = math.ceil(readout.vocabulary / GROUP) * GROUP
        self.rows = max(16, min(limits.logit_rows, limits.logit_bytes // (self.padded * dtype.itemsize)))
        self.buffer = torch.full((self.rows, self.padded), -math.inf, dtype=dtype, device=readout.device)

    @property
    def settings(self) -> SignatureSettings:
        """What residuals are made by; a head without any gives logits only."""
        assert self._settings is not None
        return self._settings

    def blocks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the positions with their logits [positions, vocabulary], which live until the next piece."""
        for start in range(0, len(hidden), self.rows):
            piece = slice(start, min(start + self.rows, len(hidden)))
            logits = self.buffer[: piece.stop - start, : self.readout.vocabulary]
            self.readout.logits(hidden[piece], out=logits)
            yield piece, logits

    def residuals(self, hidden: Tensor, target: Tensor) -> Iterator[tuple[slice, Residual]]:
        """Pieces of the positions with their residuals, which live until the next piece.

        Shapes: hidden [positions, hidden], target [positions] int64.
        """
        for piece, logits in self.blocks(hidden):
            if self.settings.support is None:
                yield piece, self._dense(logits, target[piece])
            else:
                yield piece, self._sparse(logits, target[piece])

    def _dense(self, logits: Tensor, target: Tensor) -> DenseResidual:
        slope = self.readout.slope(logits)
        column = target[:, None]
        scores = logits if self.settings.temperature == 1 else logits.div_(self.settings.temperature)
        e = scores.sub_(scores.amax(1, keepdim=True)).exp_()
        own = e.gather(1, column)
        e.scatter_(1, column, 0.0)
        rest = e.sum(1, keepdim=True)
        total = rest + own
        if isinstance(slope, Tensor):
            e.mul_(slope)
            rest = rest * slope.gather(1, column)
        elif slope != 1.0:
            e.mul_(slope)
            rest = rest * slope
        return DenseResidual(e, target, rest, total)

    def _sparse(self, logits: Tensor, target: Tensor) -> SparseResidual:
        settings = self.settings
        assert settings.support is not None
        column = target[:, None]
        own = logits.gather(1, column)
        grouped = self.buffer[: len(logits)]
        value, index = largest(grouped, settings.support, REACH * settings.temperature)
        index = index.masked_fill(value == -math.inf, -1)  # padding
        if value.shape[1] < settings.support:  # cut short by REACH: a slot more for the target
            value, index = F.pad(value, (0, 1), value=-math.inf), F.pad(index, (0, 1), value=-1)
        missing = ~(index == column).any(1, keepdim=True)
        value[:, -1:] = torch.where(missing, own, value[:, -1:])
        index[:, -1:] = torch.where(missing, column, index[:, -1:])
        p = torch.softmax(value / settings.temperature, 1)
        is_target = index == column
        kept = (p.cumsum(1) - p < settings.mass) | is_target
        kept[:, : settings.minimum] = True
        p *= kept
        rest = p.masked_fill(is_target, 0.0).sum(1, keepdim=True)
        r = torch.where(is_target, -rest, p) / p.sum(1, keepdim=True)
        r *= self.readout.slope(value.masked_fill(index < 0, 0.0))
        return _compact(index.clamp_(min=0), r, kept)


def _compact(index: Tensor, value: Tensor, kept: Tensor) -> SparseResidual:
    """The kept entries moved to the front of each row, and the columns that no row needs cut off: not on a device, which
    would have to say how many those are."""
    if kept.device.type != "cpu":
        return SparseResidual(index, value * kept)
    width = int(kept.sum(1).max())
    order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return SparseResidual(index.gather(1, order), (value * kept).gather(1, order))


def largest(scores: Tensor, count: int, reach: float) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row of scores [rows, columns], descending, with their columns.

    On a CPU fewer come back when in every row all further ones lie more than `reach` below the row's largest (but never fewer
    than 4 groups' worth). Columns are a multiple of GROUP. Exact up to the order of ties: the k largest entries lie in
    the k groups with the largest maxima, so that only these are searched. No row is sorted.
    """
    rows, columns = scores.shape
    count = min(count, columns)
    n_all = columns // GROUP
    groups = scores.view(rows, GROUP, n_all)  # group g holds columns g, g + n_all, ...: its maximum runs over rows
    peak = groups.amax(1)
    n_groups = min(count, n_all)
    if scores.device.type == "cpu":  # another device would have to be asked
        near = (peak >= peak.amax(1, keepdim=True) - reach).sum(1)
        n_groups = min(max(int(near.max()), 4), n_groups)
    chosen = _top_places(peak, n_groups)
    candidates = groups.gather(2, chosen[:, None, :].expand(-1, GROUP, -1)).view(rows, GROUP * n_groups)
    place = _top_places(candidates, min(count, candidates.shape[1]))
    value, order = candidates.gather(1, place).sort(dim=1, descending=True)
    place = place.gather(1, order)
    index = chosen.gather(1, place % n_groups) + torch.div(place, n_groups, rounding_mode="floor") * n_all
    return value, index


def _top_places(x: Tensor, count: int) -> Tensor:
    """Columns [rows, count] of the largest entries of each row, in any order.

    On a CPU by numpy, whose selection is vectorised where the processor allows it.
    """
    if count == x.shape[1]:
        return torch.arange(count, device=x.device).expand(len(x), -1)
    if x.device.type != "cpu":
        return x.topk(count, dim=1, sorted=False).indices
    return torch.from_numpy(np.argpartition(x.numpy(), x.shape[1] - count, axis=1)[:, x.shape[1] - count :].copy())
