"""The stored forms of rows: how the numbers of a row are rounded and packed, and how stored rows are scored.

A *codec* has a name, by which an index finds it again (`CODECS`, kept in the settings of the index with the numbers that it
needs). It encodes rows of its form (see `forms`) to arrays whose first axis is the row, and scores them:

    whole      a vector, as float32, float16 or int8 with a scale
    planes     a vector, turned at random (`projection.Rotation`) and rounded to a few bits
    filled     singular triples: those of all parts with the most energy for their bytes, until the row's bytes are full,
               each side turned and rounded to 1, 2 or 4 bits

A turned vector y has nearly normal coordinates, whatever the vector was, so that one scale and evenly spaced levels suit
all of it: nothing is learned from data, indexes merge, and any query is alike. Its code s is the odd integers
2 k - (2**bits - 1), k the level of each coordinate; the factor f = |y|^2 / <y, s> makes f <a, s> an estimate of <a, y> that
is unbiased over rotations, for any a. Queries are rounded to 7 bits, and the sums are integers: equal on every machine.
Source: the asymmetric estimate of RaBitQ, arXiv 2405.12497; levels of the evenly spaced quantiser of a normal number.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from leaveout.errors import MismatchError
from leaveout.models import full_precision, sent
from leaveout.projection import Rotation
from leaveout.readout.forms import Form, Triples, Vectors
from leaveout.readout.settings import SignatureSettings

Arrays = Mapping[str, np.ndarray]
Tensors = Mapping[str, Tensor]  # arrays of a block of rows, on a device
Score = Callable[[Arrays, "slice | np.ndarray"], np.ndarray]

# A matrix product of floats sums the last few rows and columns in another order than the others. Rows and queries that come
# in multiples of these have no last few, so that the same stored numbers get the same score wherever they stand.
ROWS, QUERIES = 16, 16
BUFFER = 2 * 2**20  # bytes of widened float rows: small enough to stay in cache
PACKED = 4 * 2**20  # bytes of packed rows that are unpacked and multiplied together
# Of a rounded query: bytes of a row and a query never overflow 16 bits, in which some processors add pairs of products.
LARGEST = 63
SEGMENTS = 2**18  # products of codes and queries that exist at once, for each side
SEGMENTS_THERE = 2**24  # on a device other than the CPU: its kernels need thousands of rows
BITS = (1, 2, 4)  # that a coordinate of a triple can have
STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352}  # between levels, in units of the root mean square
LOSS = {1: 0.3634, 2: 0.1188, 4: 0.01154}  # mean squared error of a normal number that is rounded so


# ---------------------------------------------------------------- bits


def levels(turned: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels [..., size] uint8 of turned vectors, and the factor [...] that makes their products unbiased."""
    unit = turned.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) * STEP[bits]
    top = 2**bits - 1
    found = ((turned / unit).floor() + 2 ** (bits - 1)).clamp_(0, top)
    with_code = (turned * (2 * found - top)).sum(-1)
    factor = torch.where(with_code > 0, turned.square().sum(-1) / with_code.clamp_min(1e-30), 0.0)
    return found.to(torch.uint8), factor


def packed(found: Tensor, bits: int) -> Tensor:
    """Levels [..., size] as bytes [..., bits * size / 8 rounded up]: the highest bit of all, then the next."""
    found = torch.nn.functional.pad(found, (0, -found.shape[-1] % 8))
    planes = torch.stack([(found >> bit) & 1 for bit in reversed(range(bits))], -2).unflatten(-1, (-1, 8))
    return (planes * _eighths(found.device)).sum(-1, dtype=torch.uint8).flatten(-2)


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """The levels [rows, size] uint8 of bytes [rows, bits * size / 8]."""
    by_plane = codes.reshape(len(codes), bits, codes.shape[1] // bits)
    if codes.device.type == "cpu":  # where numpy takes two thirds of torch's time
        planes: Any = np.unpackbits(by_plane.numpy(), axis=2)
    else:
        planes = (by_plane[..., None] & _eighths(codes.device)).ne(0).view(torch.uint8).flatten(2)
    found = planes[:, 0]
    for plane in range(1, bits):
        found = 2 * found + planes[:, plane]
    return torch.as_tensor(found)


@functools.lru_cache(8)
def _eighths(device: torch.device) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8).to(device)


@dataclass(frozen=True)
class Rounded:
    """Turned vectors of queries, rounded so that their products with codes are sums of integers."""

    numbers: Tensor  # [size rounded up to 8, vectors] int8; on a device vectors of zeros make them a multiple of 8
    scale: Tensor  # [vectors]

    @classmethod
    def of(cls, vectors: Tensor) -> Rounded:
        """Of turned vectors [vectors, size]."""
        scale = vectors.abs().amax(1) / LARGEST
        numbers = (vectors / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8)
        padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8, 0, 0))
        return cls(padded.t().contiguous(), scale)

    @cached_property
    def half_sums(self) -> Tensor:
        return self.numbers.sum(0, dtype=torch.int32).float() / 2

    def to(self, device: torch.device) -> Rounded:
        """On a device, in the order of memory that its products of integers are made for: the rounding is the CPU's."""
        if device.type == "cpu":
            return self
        padded = torch.nn.functional.pad(self.numbers.t(), (0, 0, 0, -len(self.scale) % 8)).contiguous()
        return Rounded(sent(padded, device).t(), sent(self.scale, device))

    def products(self, codes: Tensor, bits: int) -> Tensor:
        """<s, vector> / (2 scale) [rows, vectors] float32 of packed codes [rows, bytes]: halves of integers, so exact."""
        n_rows = len(codes)
        if codes.device.type != "cpu":
            codes = torch.nn.functional.pad(codes, (0, 0, 0, -n_rows % 32))  # a GPU refuses fewer than 17 rows
        found = unpacked(codes, bits).view(torch.int8)
        exact = torch._int_mm(found, self.numbers)  # pyright: ignore[reportPrivateImportUsage]: no other is as fast
        return exact.float().sub_((2**bits - 1) * self.half_sums)[:n_rows, : len(self.scale)]


# ---------------------------------------------------------------- codecs


@dataclass(frozen=True)
class Codec(ABC):
    """A stored form of rows."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def form(self) -> Form:
        """What rows mean before they are encoded, and after they are decoded."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What `read_codec` makes it of, in JSON types."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a stored row."""

    def encode(self, rows: Tensor) -> dict[str, np.ndarray]:
        """The arrays, each [rows, ...], that stand for rows [rows, width] of the form."""
        return {name: x.cpu().numpy() for name, x in self.coded(rows).items()}

    @abstractmethod
    def coded(self, rows: Tensor) -> dict[str, Tensor]:
        """As `encode`, on the device of the rows."""

    @abstractmethod
    def decode(self, arrays: Arrays, at: slice | np.ndarray = slice(None)) -> Tensor:
        """Rows [rows, width] float32 of the form."""

    @abstractmethod
    def scorer(self, queries: Tensor) -> Score:
        """A function from arrays and positions to scores [rows, queries] float32 with queries [queries, width]."""

    @abstractmethod
    def scorer_on(self, queries: Tensor, device: torch.device) -> Callable[[Tensors], Tensor]:
        """As `scorer`, of arrays on a device to scores there; `queries` lie on the CPU, where they are rounded."""

    def blocks(self, n_rows: int, n_bytes: int | None = None) -> Iterator[slice]:
        """Slices of so many rows that are scored together: of `n_bytes`, or of what suits a CPU's cache."""
        step = max(ROWS, (n_bytes or PACKED) // self.row_bytes // ROWS * ROWS)
        return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


_WHOLE = {"float32": (torch.float32, None), "float16": (torch.float16, 1.0), "int8": (torch.int8, 127.0)}


@dataclass(frozen=True)
class Whole(Codec):
    """Vectors of `width` numbers of a type, each row with a float32 `scale`: float16 to at most 1, int8 to at most 127."""

    width: int
    numbers: str

    name: ClassVar[str] = "whole"

    @property
    def form(self) -> Vectors:
        return Vectors(self.width)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "numbers": self.numbers}

    @property
    def row_bytes(self) -> int:
        return self.width * _WHOLE[self.numbers][0].itemsize + 4

    def coded(self, rows: Tensor) -> dict[str, Tensor]:
        dtype, top = _WHOLE[self.numbers]
        if top is None:
            return {"signature": rows.float(), "scale": rows.new_ones(len(rows), dtype=torch.float32)}
        scale = (rows.abs().amax(1) / top).float()
        scaled = rows / torch.where(scale > 0, scale, 1.0)[:, None].to(rows.dtype)
        if not dtype.is_floating_point:
            scaled = scaled.round().clamp_(-top, top)
        return {"signature": scaled.to(dtype), "scale": scale}

    def decode(self, arrays: Arrays, at: slice | np.ndarray = slice(None)) -> Tensor:
        stored = tensor_on(arrays["signature"][at]).float()
        return stored * tensor_on(np.asarray(arrays["scale"][at]))[:, None]

    def scorer(self, queries: Tensor) -> Score:
        transposed = evened(queries).t().contiguous()
        step = multiple(max(1, BUFFER // (4 * self.width)), ROWS)

        def score(arrays: Arrays, at: slice | np.ndarray) -> np.ndarray:
            stored, scale = arrays["signature"][at], arrays["scale"][at]
            buffer = torch.zeros(min(step, multiple(len(stored), ROWS)), self.width)  # of this thread alone
            scores = np.empty((len(stored), len(queries)), np.float32)
            for start in range(0, len(stored), step):
                rows = tensor_on(stored[start : start + step])
                buffer[: len(rows)].copy_(rows)
                found = buffer[: multiple(len(rows), ROWS)] @ transposed  # what is left of an earlier block is cut off
                scores[start : start + step] = found[: len(rows), : len(queries)].numpy()
            return scores * scale[:, None]

        return score

    def scorer_on(self, queries: Tensor, device: torch.device) -> Callable[[Tensors], Tensor]:
        transposed = sent(queries, device).t()

        def score(arrays: Tensors) -> Tensor:
            with full_precision():
                return (arrays["signature"].float() @ transposed) * arrays["scale"][:, None]

        return score


@dataclass(frozen=True)
class Planes(Codec):
    """Vectors of `width` numbers, turned at random, of which `kept` are stored in `bits` each: `codes` and `scale`."""

    width: int
    kept: int
    bits: int
    seed: int

    name: ClassVar[str] = "planes"

    @property
    def form(self) -> Vectors:
        return Vectors(self.width)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "kept": self.kept, "bits": self.bits, "seed": self.seed}

    @property
    def row_bytes(self) -> int:
        return self.bits * multiple(self.kept, 8) // 8 + 4

    @cached_property
    def rotation(self) -> Rotation:
        return Rotation.make(self.width, self.seed, "code", self.kept)

    def coded(self, rows: Tensor) -> dict[str, Tensor]:
        found, factor = levels(_rotation(self, rows.device, rows.dtype)(rows), self.bits)
        return {"codes": packed(found, self.bits), "scale": factor.float()}

    def decode(self, arrays: Arrays, at: slice | np.ndarray = slice(None)) -> Tensor:
        found = unpacked(tensor_on(arrays["codes"][at]), self.bits)[:, : self.kept].float()
        turned = (2 * found - (2**self.bits - 1)) * tensor_on(np.asarray(arrays["scale"][at]))[:, None]
        return self.rotation.back(turned)

    def scorer(self, queries: Tensor) -> Score:
        score = self.scorer_on(queries, queries.device)
        return lambda arrays, at: score(tensors(arrays, at)).numpy()

    def scorer_on(self, queries: Tensor, device: torch.device) -> Callable[[Tensors], Tensor]:
        rounded = Rounded.of(self.rotation(queries)).to(device)

        def score(arrays: Tensors) -> Tensor:
            return rounded.products(arrays["codes"], self.bits).mul_(2 * rounded.scale).mul_(arrays["scale"][:, None])

        return score


@dataclass(frozen=True)
class Filled(Codec):
    """Singular triples of parts of `sizes`, in at most `n_bytes` a row; of each side the first numbers, as `kept` says.

    `counts` [rows, parts, 3] uint8: how many triples of a part have at least 1, 2 and 4 bits a coordinate; the first ones
    have the most. `codes` [rows, bytes] uint8: part after part and triple after triple, the left side and the right.
    `weights` [rows, triples] float16: what the product of both sides' codes is multiplied with, relative to `scale` [rows].
    """

    sizes: tuple[tuple[int, int], ...]
    kept: tuple[tuple[int, int], ...]
    n_bytes: int
    seed: int
    query_triples: int  # of each part that take part in a score: those that weigh most

    name: ClassVar[str] = "filled"

    def __post_init__(self) -> None:  # from JSON they are lists
        for name in ("sizes", "kept"):
            object.__setattr__(self, name, tuple((left, right) for left, right in getattr(self, name)))
        if self.code_bytes < max(self.plane_bytes):
            least = next(n for n in itertools.count(self.n_bytes) if self._room(n)[1] >= max(self.plane_bytes))
            raise ValueError(f"{self.n_bytes} bytes a row hold not one triple of this model: give at least {least}.")

    @property
    def form(self) -> Triples:
        return Triples(self.sizes)

    def to_dict(self) -> dict[str, Any]:
        sizes, kept = ([list(size) for size in pairs] for pairs in (self.sizes, self.kept))
        return {
            "name": self.name, "sizes": sizes, "kept": kept, "n_bytes": self.n_bytes, "seed": self.seed,
            "query_triples": self.query_triples,
        }  # fmt: skip

    @property
    def row_bytes(self) -> int:
        return self.n_bytes

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes of one bit of all coordinates of a triple, by part."""
        return tuple(-(-left // 8) - (-right // 8) for left, right in self.kept)

    def _room(self, n_bytes: int) -> tuple[int, int]:
        """The most triples that so many bytes have room for, and the bytes of their codes."""
        left = n_bytes - 4 - 3 * len(self.sizes)  # without the scale and the counts
        n_triples = max(1, -(-left // (min(self.plane_bytes) + 2)))
        return n_triples, left - 2 * n_triples

    def bytes_for(self, rank: int) -> int:
        """Bytes that have room for so many triples of every part at one bit."""
        wanted = rank * sum(self.plane_bytes)
        return next(n for n in itertools.count(wanted) if self._room(n)[1] >= wanted)

    @cached_property
    def n_triples(self) -> int:
        """Triples that a row has room for."""
        return self._room(self.n_bytes)[0]

    @cached_property
    def code_bytes(self) -> int:
        return self._room(self.n_bytes)[1]

    @cached_property
    def rotations(self) -> list[tuple[Rotation, Rotation]]:
        return [
            (Rotation.make(left, self.seed, f"code/{part}/left"), Rotation.make(right, self.seed, f"code/{part}/right"))
            for part, (left, right) in enumerate(self.kept)
        ]

    def factors(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per part, what is kept of u [rows, rank, left] and v [rows, rank, right]."""
        found = zip(self.form.factors(rows), self.kept, strict=True)
        return [(u[:, :, :left], v[:, :, :right]) for (u, v), (left, right) in found]

    # ---------------------------------------------------------------- encoding

    def coded(self, rows: Tensor) -> dict[str, Tensor]:
        if rows.device.type != "cpu":
            return self._coded_together(rows)
        factors = self.factors(rows)
        energy = torch.stack([u.square().sum(2) * v.square().sum(2) for u, v in factors], 1)
        energy, order = torch.sort(energy, dim=2, descending=True, stable=True)  # a part of a side is in another order
        factors = [
            tuple(x.gather(1, order[:, part, :, None].expand(x.shape)) for x in both)
            for part, both in enumerate(factors)
        ]
        bits = self.shared_bits(energy)
        codes = torch.zeros(len(rows), self.code_bytes, dtype=torch.uint8)
        weights = torch.zeros(len(rows), self.n_triples)
        first_byte, first_weight = (torch.zeros(len(rows), 1, dtype=torch.int64) for _ in range(2))
        for part, both in enumerate(factors):
            given = bits[:, part]
            n_bytes = given * self.plane_bytes[part]
            starts = first_byte + torch.cumsum(n_bytes, 1) - n_bytes
            places = first_weight + torch.cumsum(given > 0, 1) - 1
            for b in BITS:
                row, triple = (given == b).nonzero(as_tuple=True)
                weight, at = torch.ones(len(row)), row * self.code_bytes + starts[row, triple]
                for x, rotation in zip(both, self.rotations[part], strict=True):
                    turned = rotation.to(x.device, x.dtype)(x[row.to(x.device), triple.to(x.device)])
                    found, factor = levels(turned, b)
                    code = packed(found, b).cpu()
                    codes.view(-1)[at[:, None] + torch.arange(code.shape[1])] = code
                    at = at + code.shape[1]
                    weight *= factor.float().cpu()
                weights[row, places[row, triple]] = weight
            first_byte += n_bytes.sum(1, keepdim=True)
            first_weight += (given > 0).sum(1, keepdim=True)
        scale = weights.amax(1)
        relative = weights / torch.where(scale > 0, scale, 1.0)[:, None]
        counts = torch.stack([(bits >= b).sum(2) for b in BITS], 2).to(torch.uint8)
        return {"codes": codes, "counts": counts, "weights": relative.half(), "scale": scale}

    def _coded_together(self, rows: Tensor) -> dict[str, Tensor]:
        """As `coded`, of all parts and triples at once and in shapes that follow from no number, so that nothing waits.

        Both sides of all triples are turned to vectors of one width, with zeros behind the shorter ones, and become bytes
        [parts, rows, rank, sides, planes, bytes]; each stored byte is then looked up among these.
        """
        const, rotations = _constants(self, rows.device, rows.dtype), _rotations(self, rows.device, rows.dtype)
        rank, n_rows, parts = self.form.rank(rows), len(rows), len(self.sizes)
        width = max(multiple(size, 8) for both in self.kept for size in both)
        turned = rows.new_zeros(parts, n_rows, rank, 2, width)
        for part, both in enumerate(self.factors(rows)):
            for side, (x, rotation) in enumerate(zip(both, rotations[part], strict=True)):
                into = turned[part, :, :, side, : x.shape[2]]
                if isinstance(rotation, Tensor):
                    torch.bmm(x, rotation.expand(n_rows, -1, -1), out=into)
                else:
                    into.copy_(rotation(x.flatten(0, 1)).view(x.shape))
        squares = turned.square().sum(4)
        energy, order = (squares[..., 0] * squares[..., 1]).transpose(0, 1).sort(dim=2, descending=True, stable=True)
        bits = self.shared_bits(energy)
        own = torch.zeros_like(bits).scatter_(2, order, bits).transpose(0, 1)[..., None]  # in the order of the triples
        top = const.tops[own]
        unit = (squares / const.widths).sqrt_().clamp_min_(1e-30).mul_(const.steps[own])[..., None]
        found = torch.div(turned, unit).floor_().add_((top[..., None] + 1) / 2).clamp_min_(0)
        found = torch.minimum(found, top[..., None])
        with_code = (turned * torch.add(-top[..., None], found, alpha=2)).sum(4)
        factor = torch.where(with_code > 0, squares / with_code.clamp_min(1e-30), 0.0).prod(3).transpose(0, 1)
        planes = ((found * const.there).to(torch.uint8)[..., None, :] >> const.shifts[own][..., None]) & 1
        codes = (planes.unflatten(-1, (-1, 8)) * const.eighths).sum(-1, dtype=torch.uint8)
        triple = (order + const.parts * rank).flatten(1)  # of each place in the order in which triples are stored
        return self._stored(codes, bits.flatten(1), triple, factor.flatten(1)) | {
            "counts": (bits[..., None] >= const.bits).sum(2).to(torch.uint8)
        }

    def _stored(self, codes: Tensor, bits: Tensor, triple: Tensor, factor: Tensor) -> dict[str, Tensor]:
        """The stored bytes and weights of triples with so many `bits`, each [rows, parts * rank] in the order of storage;
        `triple` says which they are among the codes [parts, rows, rank, sides, planes, bytes] and factors [rows, triples].
        """
        const = _constants(self, codes.device, factor.dtype)
        parts, n_rows, rank = codes.shape[:3]
        place = torch.arange(self.code_bytes, device=codes.device).expand(n_rows, -1).contiguous()
        part_of = torch.arange(parts * rank, device=codes.device).div_(rank, rounding_mode="floor")
        lefts, rights = const.sides[part_of].unbind(1)
        ends = (bits * (lefts + rights)).cumsum(1)
        at = torch.searchsorted(ends, place, right=True).clamp_max_(parts * rank - 1)
        left, right, given = lefts[at], rights[at], bits.gather(1, at)
        within = place - (ends - bits * (lefts + rights)).gather(1, at)
        second = (within >= given * left).long()
        within = within - second * given * left
        each = torch.where(second > 0, right, left)
        which = triple.gather(1, at)
        row = torch.arange(n_rows, device=codes.device)[:, None]
        source = ((which.div(rank, rounding_mode="floor") * n_rows + row) * rank + which % rank) * 2 + second
        source = (source * 4 + within.div(each, rounding_mode="floor")) * codes.shape[-1] + within % each
        known = place < ends[:, -1:]
        stored = torch.where(known, codes.flatten()[torch.where(known, source, 0)], 0)
        slot = torch.arange(self.n_triples, device=codes.device).expand(n_rows, -1).contiguous()
        many = (bits > 0).long().cumsum(1)
        at = torch.searchsorted(many, slot, right=True).clamp_max_(parts * rank - 1)
        weights = factor.gather(1, triple.gather(1, at)) * (slot < many[:, -1:])
        scale = weights.amax(1)
        relative = weights / torch.where(scale > 0, scale, 1.0)[:, None]
        return {"codes": stored, "weights": relative.half(), "scale": scale}

    def shared_bits(self, energy: Tensor) -> Tensor:
        """Bits [rows, parts, rank] of each triple, by their energies [rows, parts, rank]: the steps from 0 to 1, 1 to 2 and
        2 to 4 bits that gain most for their bytes, as long as they fit.

        A step gains what it takes off the squared error; noise counts `NOISE` of what a left out triple does, as it points
        nowhere in particular, and queries and rows point the same way.
        """
        parts, rank = energy.shape[1:]
        const = _constants(self, energy.device, energy.dtype)
        plane = const.planes[:, None].expand(parts, rank)
        steps = list(zip((0, *BITS), BITS, strict=False))
        gains = torch.cat([(energy * (_lost(a) - _lost(b)) / (plane * (b - a))).flatten(1) for a, b in steps], 1)
        costs = torch.cat([(plane * (b - a)).flatten() for a, b in steps])
        gains, order = torch.sort(gains, dim=1, descending=True, stable=True)
        costs = costs[order]
        waiting, left = gains > 0, costs.new_full((len(energy), 1), self.code_bytes)
        taken = torch.zeros_like(waiting)
        for _ in range(len({n * (b - a) for n in self.plane_bytes for a, b in steps})):
            # Once for each cost: the largest that waits no longer fits afterwards, and never will.
            if energy.device.type == "cpu" and not bool(waiting.any()):
                break
            fits = waiting & (torch.cumsum(costs * waiting, 1) <= left)
            taken |= fits
            left -= (costs * fits).sum(1, keepdim=True)
            waiting &= ~fits & (costs <= left)
        ends = const.widening[order // (parts * rank)] * taken
        bits = costs.new_zeros(len(energy), parts * rank)
        return bits.scatter_add_(1, order % (parts * rank), ends).view(energy.shape)

    # ---------------------------------------------------------------- decoding and scoring

    def decode(self, arrays: Arrays, at: slice | np.ndarray = slice(None)) -> Tensor:
        codes, counts = arrays["codes"][at], arrays["counts"][at]
        n_rows, rank = len(codes), max(1, int(counts[:, :, 0].max(initial=0)))
        factors = [(torch.zeros(n_rows, rank, left), torch.zeros(n_rows, rank, right)) for left, right in self.sizes]
        for part, bits, row, triple, weight, sides in self._groups(tensors(arrays, at)):
            for into, codes, rotation in zip(factors[part], sides, self.rotations[part], strict=True):
                found = unpacked(codes, bits)[:, : rotation.width].float()
                turned = (2 * found - (2**bits - 1)) * weight.sqrt()[:, None]
                into[row, triple, : rotation.width] = rotation.back(turned)
        return self.form.joined(factors)

    def scorer(self, queries: Tensor) -> Score:
        score = self.scorer_on(queries, queries.device)
        return lambda arrays, at: score(tensors(arrays, at)).numpy()

    def scorer_on(self, queries: Tensor, device: torch.device) -> Callable[[Tensors], Tensor]:
        tables = [
            tuple(
                Rounded.of(rotation(x)).to(device) for rotation, x in zip(rotations, self._heaviest(u, v), strict=True)
            )
            for (u, v), rotations in zip(self.factors(queries), self.rotations, strict=True)
        ]
        scales = [4 * left.scale * right.scale for left, right in tables]
        here = device.type == "cpu"
        step = max((SEGMENTS if here else SEGMENTS_THERE) // (len(queries) * self.query_triples), 1)

        def score(arrays: Tensors) -> Tensor:
            total = torch.zeros(len(arrays["scale"]), len(queries), device=device)
            for part, bits, row, _, weight, sides in self._groups(arrays):
                for start in range(0, len(row), step):
                    some = slice(start, start + step)
                    both = tables[part][0].products(sides[0][some], bits)
                    both.mul_(tables[part][1].products(sides[1][some], bits).mul_(scales[part]))
                    of_triples = both.unflatten(1, (len(queries), self.query_triples)).sum(2).mul_(weight[some, None])
                    if here:
                        total.index_add_(0, row[some], of_triples)
                    else:  # which adds in the order of the triples, whereas that one adds in any
                        total.index_put_((row[some],), of_triples, accumulate=True)
            return total

        return score

    def _heaviest(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The `query_triples` largest triples of each query [queries, rank, ...] of one part, one after the other, with
        empty ones behind them: always as many, so that a score does not depend on the other queries.
        """
        if u.shape[1] > self.query_triples:
            largest = (u.norm(dim=2) * v.norm(dim=2)).topk(self.query_triples, 1).indices[:, :, None]
            u, v = (x.gather(1, largest.expand(-1, -1, x.shape[2])) for x in (u, v))
        more = (0, 0, 0, self.query_triples - u.shape[1])
        return tuple(torch.nn.functional.pad(x, more).flatten(0, 1) for x in (u, v))  # type: ignore[return-value]

    def _groups(self, arrays: Tensors) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
        """Per part and number of bits: part, bits, and of all triples that have them: row, number in the part, weight with
        the row's scale, and the packed codes of both sides. A device is waited for once.
        """
        counts = arrays["counts"].long()
        weights = (arrays["weights"].float() * arrays["scale"][:, None]).view(-1)
        flat, rows = arrays["codes"].reshape(-1), torch.arange(len(counts), device=counts.device)
        first_byte, first_weight = rows * self.code_bytes, rows * self.n_triples
        sums = counts.sum(0).tolist()
        for part, (left, right) in enumerate(self.kept):
            done, n_done = torch.zeros_like(rows), 0
            for number in reversed(range(len(BITS))):
                bits, upto = BITS[number], counts[:, part, number]
                count, n_found = upto - done, sums[part][number] - n_done
                if n_found:
                    row = torch.repeat_interleave(rows, count, output_size=n_found)
                    within = torch.arange(n_found, device=rows.device) - (torch.cumsum(count, 0) - count)[row]
                    triple = within + done[row]
                    start = first_byte[row] + within * (bits * self.plane_bytes[part])
                    widths = (bits * -(-left // 8), bits * -(-right // 8))
                    sides = (_pieces(flat, start, widths[0]), _pieces(flat, start + widths[0], widths[1]))
                    yield part, bits, row, triple, weights[first_weight[row] + triple], sides
                first_byte += count * bits * self.plane_bytes[part]
                done, n_done = upto, sums[part][number]
            first_weight += done


@dataclass(frozen=True)
class _Constants:
    """What encoding looks up, on one device; by bits of a coordinate where nothing else is said.

    planes [parts], sides [parts, 2]    bytes of one bit of a triple, and of each of its sides
    widths [parts, 1, 1, 2]             numbers of each side
    there [parts, 1, 1, 2, width]       1 where a side has a number, else 0
    steps, tops [5]                     between levels, and the highest one
    shifts [5, planes]                  that bring a bit to the last place: the highest bit first
    parts [parts, 1]                    their numbers
    widening [3]                        bits that each step adds
    """

    planes: Tensor
    sides: Tensor
    widths: Tensor
    there: Tensor
    steps: Tensor
    tops: Tensor
    shifts: Tensor
    widening: Tensor
    bits: Tensor
    eighths: Tensor
    parts: Tensor


@functools.lru_cache(16)
def _constants(codec: Filled, device: torch.device, dtype: torch.dtype) -> _Constants:
    def there(numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device)

    most, numbers = max(BITS), range(max(BITS) + 1)
    width = max(multiple(size, 8) for both in codec.kept for size in both)
    return _Constants(
        planes=there(codec.plane_bytes),
        sides=there([[-(-left // 8), -(-right // 8)] for left, right in codec.kept]),
        widths=there(codec.kept, dtype)[:, None, None],
        there=there([[[n < size for n in range(width)] for size in both] for both in codec.kept], dtype)[:, None, None],
        steps=there([STEP.get(bits, 1.0) for bits in numbers], dtype),
        tops=there([2**bits - 1 for bits in numbers], dtype),
        shifts=there([[max(bits - 1 - plane, 0) for plane in range(most)] for bits in numbers], torch.uint8),
        widening=there([b - a for a, b in zip((0, *BITS), BITS, strict=False)]),
        bits=there(BITS),
        eighths=_eighths(device),
        parts=there([[part] for part in range(len(codec.kept))]),
    )


DENSE = 4096  # numbers of a side that are turned by a matrix on a device: one product in place of a dozen


@functools.lru_cache(16)
def _rotation(codec: Planes, device: torch.device, dtype: torch.dtype) -> Rotation:
    return codec.rotation.to(device, dtype)


@functools.lru_cache(16)
def _rotations(
    codec: Filled, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor | Rotation, Tensor | Rotation]]:
    """Those of both sides of each part, there, as matrices where they are small."""

    def there(rotation: Rotation) -> Tensor | Rotation:
        small = rotation.width <= DENSE
        return rotation(torch.eye(rotation.width)).to(device, dtype) if small else rotation.to(device, dtype)

    return [(there(left), there(right)) for left, right in codec.rotations]


NOISE = 0.1  # see `Filled.shared_bits`


def _lost(bits: int) -> float:
    """Squared error of a triple with so many bits, in units of its energy; both sides are rounded."""
    return 1.0 if bits == 0 else NOISE * ((1 - LOSS[bits]) ** -2 - 1)


def _pieces(flat: Tensor, start: Tensor, width: int) -> Tensor:
    """Pieces [pieces, width] of bytes that begin at `start`."""
    return flat.as_strided((len(flat) - width + 1, width), (1, 1)).index_select(0, start)


# ---------------------------------------------------------------- choices

FLAT_BITS = 4  # that a number of a vector has at least; triples keep more of a row where it would have fewer
SCORED, SCANNED = 64, 16  # triples of a query's part: where scores are exact, and where a short list is made
TRIPLES = 32  # that a row has room for, at one bit, where sides whose numbers have an order are cut
SHARE = 4  # a row has a short form where it has so many times its bytes in all

Sizes = tuple[tuple[int, int], ...]
Ordered = tuple[tuple[bool, bool], ...]


def chosen_codec(sizes: Sizes, ordered: Ordered, settings: SignatureSettings) -> Codec:
    """How the long form of rows with parts of these sizes is stored: see `bytes_per_row`.

    `ordered`: whether the first numbers of each side are those that matter most, as whitening leaves them.
    """
    width = sum(left * right for left, right in sizes)
    whole = Whole(width, settings.storage)
    if settings.bytes_per_row is None:
        return whole
    beside = settings.long == "stored" and _has_short(settings)
    n_bytes = settings.bytes_per_row - (settings.short_bytes or 0 if beside else 0)
    if whole.row_bytes <= n_bytes:
        return whole
    planes = Planes(width, width, FLAT_BITS, settings.seed)
    return planes if planes.row_bytes <= n_bytes else filled(sizes, ordered, n_bytes, settings.seed, SCORED)


def short_codec(sizes: Sizes, ordered: Ordered, settings: SignatureSettings, long: Codec) -> Codec | None:
    """How the short form is stored beside that long one; None where there is none, or it would save nothing."""
    if not _has_short(settings) or settings.short_bytes is None:
        return None
    n_bytes = min(settings.short_bytes, settings.bytes_per_row or settings.short_bytes)
    if isinstance(long, Filled):
        try:
            return filled(sizes, ordered, n_bytes, settings.seed, SCANNED)
        except ValueError:  # sides of a wide model that cannot be cut: then every search is exact
            if settings.long == "none":
                raise
            return None
    width = sum(left * right for left, right in sizes)
    short = Planes(width, min(width, 8 * (n_bytes - 4)), 1, settings.seed)
    return short if short.row_bytes * SHARE <= long.row_bytes or settings.long == "none" else None


def _has_short(settings: SignatureSettings) -> bool:
    """Whether rows have a short form: alone, or beside a long one that takes `SHARE` times its bytes."""
    if settings.short_bytes is None or settings.long == "none" or settings.bytes_per_row is None:
        return settings.short_bytes is not None
    return settings.bytes_per_row >= SHARE * settings.short_bytes


def filled(sizes: Sizes, ordered: Ordered, n_bytes: int, seed: int, query_triples: int) -> Filled:
    """A codec of so many bytes a row, its sides cut as `kept_sides` says."""
    sides = zip(sizes, ordered, strict=True)
    return Filled(sizes, tuple(kept_sides(size, order, n_bytes) for size, order in sides), n_bytes, seed, query_triples)


def kept_sides(size: tuple[int, int], ordered: tuple[bool, bool], n_bytes: int) -> tuple[int, int]:
    """How many numbers of both sides are stored, so that `TRIPLES` fit into so many bytes; all of a side without an order.

    In the ratio of the roots of the sizes, in steps of 32. On SmolLM2 82 % of the best ten rows stand in the best
    5 % by 2 KB that are cut so, 72 % by 2 KB of whole sides (benchmarks/codes.py); narrow models gain nothing at 2 KB.
    """
    bits = 8 * n_bytes / TRIPLES
    wanted = [bits * math.sqrt(own) / (math.sqrt(size[0]) + math.sqrt(size[1])) for own in size]
    for one, other in ((0, 1), (1, 0)):
        limit = size[one] if ordered[one] else 0
        if wanted[one] > limit:  # what one side does not need goes to the other
            wanted[other] += wanted[one] - limit
            wanted[one] = limit
    return tuple(
        min(own, max(32, 32 * round(want / 32))) if order and want < own else own
        for own, want, order in zip(size, wanted, ordered, strict=True)
    )  # type: ignore[return-value]


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Whole, Planes, Filled)}


def read_codec(facts: Mapping[str, Any]) -> Codec:
    """The codec that `Codec.to_dict` wrote into the settings of an index. Raises: MismatchError for an unknown name."""
    if facts["name"] not in CODECS:
        raise MismatchError(f"The rows of this index are stored as {facts['name']!r}: it needs another leaveout.")
    return CODECS[facts["name"]](**{name: value for name, value in facts.items() if name != "name"})


# ---------------------------------------------------------------- memory


def tensor_on(block: np.ndarray) -> Tensor:
    """A tensor on the memory of a read-only array; nothing writes to it.

    Made from the bare address because torch warns about read-only arrays and numpy's own widening of float16 takes
    twice as long as torch's.
    """
    if block.flags.writeable or not block.flags.c_contiguous or not block.size:
        return torch.from_numpy(block if block.flags.writeable else block.copy())
    memory = (ctypes.c_char * block.nbytes).from_address(block.__array_interface__["data"][0])
    return torch.frombuffer(memory, dtype=torch.from_numpy(np.empty(0, block.dtype)).dtype).view(block.shape)


def tensors(arrays: Arrays, at: slice | np.ndarray) -> dict[str, Tensor]:
    """Rows of arrays by position, as tensors; of slices, on the same memory."""
    return {name: tensor_on(np.asarray(array[at])) for name, array in arrays.items()}


def evened(queries: Tensor) -> Tensor:
    """Query vectors [queries, width] with zeros behind them, as many as products need (see `QUERIES`); one needs none."""
    missing = multiple(len(queries), QUERIES) - len(queries) if len(queries) > 1 else 0
    return torch.nn.functional.pad(queries, (0, 0, 0, missing))


def multiple(count: int, of: int) -> int:
    """The next multiple."""
    return -(-count // of) * of
