"""Random projections with seeds that mean the same numbers on every machine and in every later version.

All randomness comes from `random_bits`, a counter-based hash written out here, because the streams of torch and numpy
may change between versions and an index must outlive them. Each projection P keeps inner products in expectation:
E <P x, P y> = <x, y>.

Sources: CountSketch, Charikar, Chen, Farach-Colton 2002. Randomised Hadamard transform, Ailon and Chazelle
2006. Mixing function: splitmix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def random_bits(seed: int, stream: str, count: int) -> np.ndarray:
    """`count` uniform 64-bit integers [count] uint64, a pure function of seed, stream name and position."""
    key = seed & 0xFFFFFFFFFFFFFFFF
    for byte in stream.encode():
        key = int(_mix(np.array([key ^ byte], dtype=np.uint64))[0])
    return _mix(np.arange(count, dtype=np.uint64) + np.uint64(key))


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def random_signs(seed: int, stream: str, count: int) -> Tensor:
    """Independent signs [count] float32, each +1 or -1."""
    bits = random_bits(seed, stream, count) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32))


@dataclass(frozen=True)
class CountSketch:
    """Adds coordinate i, times a random sign, to a random bucket.

    Shapes: x [..., size] -> [..., width].
    """

    buckets: Tensor  # [size] int64
    signs: Tensor  # [size] float32
    width: int

    @classmethod
    def make(cls, size: int, width: int, seed: int, stream: str) -> CountSketch:
        # The sign is the top bit, the bucket a multiply-shift of the low 32: the two do not share bits.
        bits = random_bits(seed, stream, size)
        buckets = ((bits & np.uint64(0xFFFFFFFF)) * np.uint64(width)) >> np.uint64(32)
        signs = 1.0 - 2.0 * (bits >> np.uint64(63)).astype(np.float32)
        return cls(torch.from_numpy(buckets.astype(np.int64)), torch.from_numpy(signs), width)

    @classmethod
    def identity(cls, size: int) -> CountSketch:
        """Every coordinate in a bucket of its own."""
        return cls(torch.arange(size), torch.ones(size), size)

    def __call__(self, x: Tensor) -> Tensor:
        """x @ matrix() of x [rows, size], by one addition for each of its numbers."""
        signed = torch.where(self.signs > 0, self.buckets, self.buckets + self.width)  # no copy of x times the signs
        sums = x.new_zeros(len(x), 2 * self.width).scatter_add_(1, signed.expand(len(x), -1), x)
        return sums[:, : self.width] - sums[:, self.width :]

    def to(self, device: torch.device, dtype: torch.dtype) -> CountSketch:
        return CountSketch(self.buckets.to(device), self.signs.to(device, dtype), self.width)

    def matrix(self) -> Tensor:
        """The dense form [size, width], so that x @ matrix is the sketch."""
        dense = self.signs.new_zeros(len(self.buckets), self.width)
        dense.scatter_(1, self.buckets[:, None], self.signs[:, None])
        return dense


def orthogonal(size: int, width: int, seed: int, stream: str) -> Tensor:
    """A random matrix [size, width] with orthogonal columns of length sqrt(size / width), so that x @ matrix projects.

    Raises: ValueError if width > size.
    """
    if width > size:
        raise ValueError(f"An orthogonal projection of {size} numbers cannot be {width} wide: use at most {size}.")
    uniform = (random_bits(seed, stream, 2 * size * width).astype(np.float64) + 0.5) / 2.0**64
    radius, angle = uniform[: size * width], uniform[size * width :]
    normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    q, r = torch.linalg.qr(torch.from_numpy(normal.reshape(size, width)))
    return (q * torch.sign(torch.diagonal(r)) * math.sqrt(size / width)).float()


@dataclass(frozen=True)
class Rotation:
    """A randomised Hadamard transform of vectors of any size: twice random signs, then an orthogonal matrix that spreads
    every coordinate over all of them, so that what comes out is nearly normal whatever went in. Once does not do: of a vector
    of two coordinates come only four numbers.

    The matrix of a size m * 2**k, m odd, is the Kronecker product of the cosine transform of m and the Hadamard matrix of
    2**k. With a `width` only so many random outputs are kept.
    Shapes: x [rows, size] -> [rows, width].
    Error:  none at full width; else the standard deviation of <P x, P y> is at most about sqrt(2 / width) |x| |y|.
    """

    signs: Tensor  # [size]
    second: Tensor  # [size], the signs of the second round
    cosines: Tensor  # [m, m], orthonormal
    outputs: Tensor | None  # [width] int64, ascending; None: all

    @classmethod
    def make(cls, size: int, seed: int, stream: str, width: int | None = None) -> Rotation:
        """Raises: ValueError if width > size."""
        if width is not None and width > size:
            raise ValueError(f"A rotation of {size} numbers cannot be {width} wide: use at most {size}.")
        outputs = None
        if width is not None and width < size:
            keys = random_bits(seed, stream + "/outputs", size)
            outputs = torch.from_numpy(np.sort(np.argpartition(keys, width - 1)[:width]).astype(np.int64))
        odd = size // (size & -size)
        signs, second = (random_signs(seed, f"{stream}/{name}", size) for name in ("signs", "second"))
        return cls(signs, second, _cosines(odd), outputs)

    def to(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        outputs = None if self.outputs is None else self.outputs.to(device)
        signs, second, cosines = (x.to(device, dtype) for x in (self.signs, self.second, self.cosines))
        return Rotation(signs, second, cosines, outputs)

    @property
    def width(self) -> int:
        return len(self.signs if self.outputs is None else self.outputs)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._spread(self._spread(x * self.signs, self.cosines) * self.second, self.cosines)
        if self.outputs is None:
            return y
        return y.index_select(1, self.outputs).mul_(math.sqrt(y.shape[1] / len(self.outputs)))

    def back(self, y: Tensor) -> Tensor:
        """The transpose: what was turned, turned back; at less than full width, an estimate of it."""
        if self.outputs is not None:
            full = y.new_zeros(len(y), len(self.signs))
            y = full.index_copy_(1, self.outputs, y * math.sqrt(full.shape[1] / len(self.outputs)))
        return self._spread(self._spread(y, self.cosines.t()) * self.second, self.cosines.t()) * self.signs

    def _spread(self, x: Tensor, cosines: Tensor) -> Tensor:
        odd = len(cosines)
        power = x.shape[1] // odd
        y = hadamard_transform(x.reshape(-1, power)).div_(math.sqrt(power))
        return (cosines @ y.view(-1, odd, power)).view(x.shape) if odd > 1 else y.view(x.shape)


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [size, size]."""
    at = np.arange(size)
    table = np.cos(np.pi * (at[None, :] + 0.5) * at[:, None] / size) * math.sqrt(2 / size)
    table[0] = math.sqrt(1 / size)
    return torch.from_numpy(table).float()


def hadamard_transform(x: Tensor) -> Tensor:
    """Unnormalised Hadamard transform of each row of x [rows, 2**k], in natural (Sylvester) order.

    H of size 2**k is a Kronecker product of small ones, so that the transform is a few dense products, which are
    far faster here than 2**k log 2**k scattered additions.
    """
    rows, size = x.shape
    bits = size.bit_length() - 1
    steps = max(1, math.ceil(bits / 7))
    right = 1
    for step in range(steps):
        factor = 1 << (bits * (step + 1) // steps - bits * step // steps)
        small = _sylvester_on(factor, x.device, x.dtype)
        x = x.reshape(-1, factor, right)
        x = x.squeeze(-1) @ small if right == 1 else small @ x
        right *= factor
    return x.reshape(rows, size)


@functools.lru_cache(64)
def _sylvester_on(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return sylvester(size).to(device, dtype)


@functools.cache
def sylvester(size: int) -> Tensor:
    """The Hadamard matrix [size, size] of entries +-1, size a power of two: entry (i, j) is (-1)**popcount(i & j)."""
    index = torch.arange(size)
    both = index[:, None] & index[None, :]
    parity = torch.zeros_like(both)
    while both.any():
        parity ^= both & 1
        both = both >> 1
    return 1.0 - 2.0 * parity.float()
