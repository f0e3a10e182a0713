"""The stored forms of rows: how the numbers of a vector are rounded, and what rows of them mean.

A *codec* has a name, by which an index finds it again (`CODECS`, kept in the settings of the index with the sizes that it
needs): `flat-` or `triples-`, and the type of the numbers. A flat row is a vector, scored by inner products. A row of
triples is the largest singular triples of its outer products, part after part [U sqrt(s), V sqrt(s)]: `rank` left vectors,
then `rank` right ones. A random projection keeps inner products up to about sqrt(2 / width) of the lengths, which is far
more than whitened rows of a wide model have in common; the largest triples keep what a row consists of.

Every row has a float32 `scale`; a stored row times its scale is the vector. Another way of rounding is another `Numbers`,
another meaning of rows another `Codec`; each gets its names in `CODECS`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from leaveout.errors import MismatchError

Arrays = Mapping[str, np.ndarray]

BLOCK = 64  # int4 numbers that share a scale
PAD = -8
PIECE = 8  # rows encoded at a time
# A matrix product sums the last few rows and columns in another order than the others. Rows and queries that come in
# multiples of these have no last few, so that the same stored numbers get the same score wherever they stand. It is also
# faster: 2 to 8 queries took 0.6 ms for 2 MB of rows where 16 take 0.25 ms.
ROWS, QUERIES = 16, 16


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Numbers:
    """A type of stored numbers: arrays `signature` [rows, width] and `scale` [rows] float32.

    top     what the largest number of a row is scaled to, so that nothing overflows; None: numbers are kept as they are
    """

    name: str
    dtype: torch.dtype
    top: float | None

    def encode(self, vectors: Tensor) -> dict[str, np.ndarray]:
        """Arrays of vectors [rows, width]."""
        if self.top is None:
            return {"signature": vectors.float().numpy(), "scale": np.ones(len(vectors), np.float32)}
        scale = (vectors.abs().amax(1) / self.top).float()
        scaled = vectors / torch.where(scale > 0, scale, 1.0)[:, None].to(vectors.dtype)
        if not self.dtype.is_floating_point:
            scaled = scaled.round().clamp_(-self.top, self.top)
        return {"signature": scaled.to(self.dtype).numpy(), "scale": scale.numpy()}

    def widen(self, arrays: Arrays, at: slice | np.ndarray, buffer: Tensor, width: int) -> Tensor:
        """See `Codec.widen`."""
        stored = _tensor(arrays["signature"][at], self.dtype)
        return buffer[: stored.numel()].view(len(stored), width).copy_(stored)

    def buffer_width(self, width: int) -> int:
        """Numbers of the buffer that `widen` needs for a row."""
        return width


class Int4(Numbers):
    """Numbers from -7 to 7, with a float16 scale for each block of 64, relative to the row's: `block_scale` [rows, blocks].

    Byte i of a block's 32 holds number i in its low half and number i + 32 in its high half, both as two's complement; -8
    stands behind the end of a row whose width is no multiple of 64.
    """

    def encode(self, vectors: Tensor) -> dict[str, np.ndarray]:
        vectors = vectors.float()
        missing = -vectors.shape[1] % BLOCK
        blocks = torch.nn.functional.pad(vectors, (0, missing)).unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(2)
        scale = largest.amax(1) / 7.0
        relative = (largest / 7.0 / torch.where(scale > 0, scale, 1.0)[:, None]).half()
        unit = relative.float() * scale[:, None]  # as it will be read, so that rounding it costs nothing
        codes = (blocks / torch.where(unit > 0, unit, 1.0)[:, :, None]).round_().clamp_(-7, 7).to(torch.int8)
        if missing:
            codes[:, -1, BLOCK - missing :] = PAD
        low, high = codes[:, :, : BLOCK // 2], codes[:, :, BLOCK // 2 :]
        packed = (low & 15) | (high << 4)
        return {"signature": packed.flatten(1).numpy(), "scale": scale.numpy(), "block_scale": relative.numpy()}

    def widen(self, arrays: Arrays, at: slice | np.ndarray, buffer: Tensor, width: int) -> Tensor:
        blocks = _tensor(arrays["signature"][at], torch.int8).unflatten(1, (-1, BLOCK // 2))
        out = buffer[: 2 * blocks.numel()].view(*blocks.shape[:2], 2, BLOCK // 2)
        out[:, :, 0].copy_(blocks << 4)  # sixteen times the number, sign included
        out[:, :, 1].copy_(blocks & -16)
        out.mul_(_tensor(arrays["block_scale"][at], torch.float16).float().div_(16.0)[:, :, None, None])
        return out.flatten(1)[:, :width]

    def buffer_width(self, width: int) -> int:
        return width + -width % BLOCK


NUMBERS = {
    numbers.name: numbers
    for numbers in (
        Numbers("float32", torch.float32, None),
        Numbers("float16", torch.float16, 1.0),
        Numbers("int8", torch.int8, 127.0),
        Int4("int4", torch.int8, 7.0),
    )
}


def _tensor(block: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A tensor on the memory of a read-only array; nothing writes to it.

    Made from the bare address because torch warns about read-only arrays and numpy's own widening of float16 takes
    twice as long as torch's.
    """
    if block.flags.writeable or not block.flags.c_contiguous or not block.size:
        return torch.from_numpy(block if block.flags.writeable else block.copy())
    memory = (ctypes.c_char * block.nbytes).from_address(block.__array_interface__["data"][0])
    return torch.frombuffer(memory, dtype=dtype).view(block.shape)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Codec(ABC):
    """A stored form of rows of `width` numbers."""

    numbers: Numbers
    width: int

    form: ClassVar[str]
    degree: ClassVar[int]  # a row times s scores s ** degree times as much

    @property
    def name(self) -> str:
        """Its name in `CODECS`."""
        return f"{self.form}-{self.numbers.name}"

    def to_dict(self) -> dict[str, Any]:
        """What `read_codec` makes it of, in JSON types."""
        return {"name": self.name, "width": self.width}

    @property
    def parts(self) -> object:
        """What rows and queries must have in common, whatever their rank."""
        return self.width

    @abstractmethod
    def product(self, queries: Tensor) -> Product:
        """Scores of rows with queries [queries, width]."""

    @abstractmethod
    def lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows] of what rows [rows, width] stand for."""

    def divided(self, rows: Tensor, by: Tensor) -> Tensor:
        """Rows [rows, width] that stand for as much divided by numbers [rows]."""
        return rows / (by if self.degree == 1 else by.sqrt())[:, None]

    def encode(self, vectors: Tensor) -> dict[str, np.ndarray]:
        """The arrays, each [rows, ...], that stand for vectors [rows, width]."""
        if len(vectors) <= PIECE:
            return self.numbers.encode(vectors.cpu())
        parts = [
            self.encode(piece) for piece in vectors.split(PIECE)
        ]  # no second copy of all of them exists on the way
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def widen(self, arrays: Arrays, at: slice | np.ndarray, buffer: Tensor) -> Tensor:
        """The numbers [rows, width] float32 of rows `at`, without the rows' scales; a view of `buffer`.

        Shapes: buffer float32, one-dimensional, at least rows times `buffer_width`.
        """
        return self.numbers.widen(arrays, at, buffer, self.width)

    @property
    def buffer_width(self) -> int:
        """Numbers of the buffer that `widen` needs for a row."""
        return self.numbers.buffer_width(self.width)

    def decode(self, arrays: Arrays, at: slice | np.ndarray = slice(None)) -> Tensor:
        """Vectors [rows, width] float32 of stored rows."""
        scale = np.array(arrays["scale"][at])
        return self.widen(arrays, at, torch.empty(len(scale) * self.buffer_width)) * torch.from_numpy(scale)[:, None]

    def blocks(self, arrays: Arrays, n_rows: int) -> Iterator[Tensor]:
        """The vectors of stored arrays, [at most n_rows, width] float32 at a time."""
        n_rows = max(1, n_rows)
        for start in range(0, len(arrays["scale"]), n_rows):
            yield self.decode(arrays, slice(start, start + n_rows))


@dataclass(frozen=True)
class Product:
    """Scores of decoded rows: `of` takes rows [rows, width] to scores [rows, queries]."""

    codec: Codec
    of: Callable[[Tensor], Tensor]

    def __call__(self, rows: Tensor) -> Tensor:
        return self.of(rows)


@dataclass(frozen=True)
class Flat(Codec):
    """Rows are vectors."""

    form: ClassVar[str] = "flat"
    degree: ClassVar[int] = 1

    def product(self, queries: Tensor) -> Product:
        transposed = evened(queries).t().contiguous()
        return Product(self, lambda rows: (rows @ transposed)[:, : len(queries)])

    def lengths(self, rows: Tensor) -> Tensor:
        return rows.norm(dim=1)


@dataclass(frozen=True)
class Triples(Codec):
    """Rows are the singular triples of parts of `sizes` (left, right)."""

    sizes: tuple[tuple[int, int], ...]

    form: ClassVar[str] = "triples"
    degree: ClassVar[int] = 2

    def __post_init__(self) -> None:  # from JSON they are lists
        object.__setattr__(self, "sizes", tuple((left, right) for left, right in self.sizes))

    @classmethod
    def of_rank(cls, numbers: Numbers, sizes: tuple[tuple[int, int], ...], rank: int) -> Triples:
        """The codec of rows with so many triples of each part."""
        return cls(numbers, rank * sum(left + right for left, right in sizes), sizes)

    @property
    def rank(self) -> int:
        """Triples of each part of a stored row."""
        return self.width // sum(left + right for left, right in self.sizes)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "sizes": [list(size) for size in self.sizes]}

    @property
    def parts(self) -> object:
        return self.sizes

    def factors(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per part, u [rows, rank, left] and v [rows, rank, right]; the rank follows from the width of the rows."""
        rank, start = rows.shape[1] // sum(left + right for left, right in self.sizes), 0
        for left, right in self.sizes:
            middle, end = start + rank * left, start + rank * (left + right)
            yield rows[:, start:middle].unflatten(1, (rank, left)), rows[:, middle:end].unflatten(1, (rank, right))
            start = end

    def add(self, first: Tensor, second: Tensor) -> Tensor:
        """The sum of two rows [width], cut to the largest triples again."""
        both = self.factors(torch.stack([first, second]))
        return torch.cat([low_rank(u.flatten(0, 1), v.flatten(0, 1), self.rank) for u, v in both])

    def lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows] of the outer products that rows of any rank stand for."""
        square = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
        for u, v in self.factors(rows):
            square += ((u @ u.transpose(1, 2)) * (v @ v.transpose(1, 2))).sum((1, 2))
        return square.clamp_min(0).sqrt()

    def product(self, queries: Tensor) -> Product:
        """Scores of rows with queries of any rank; their empty triples cost nothing.

        Cost:   rank * (non-empty triples of all queries) * (left + right) multiply-adds per row and part.
        """
        tables = []
        for u, v in self.factors(queries):
            query, triple = (u.abs().sum(2) > 0).nonzero(as_tuple=True)
            left, right = (evened(x[query, triple]).t().contiguous() for x in (u, v))
            owner = torch.zeros(left.shape[1], len(evened(queries)))
            owner[torch.arange(len(query)), query] = 1.0
            tables.append((left, right, owner))

        def scores(rows: Tensor) -> Tensor:
            total = torch.zeros(len(rows), len(evened(queries)))
            for (u, v), (a, b, owner) in zip(self.factors(rows), tables, strict=True):
                both = (u.flatten(0, 1) @ a) * (v.flatten(0, 1) @ b)
                total += both.unflatten(0, (len(rows), u.shape[1])).sum(1) @ owner
            return total[:, : len(queries)]

        return Product(self, scores)


CODECS: dict[str, tuple[type[Codec], Numbers]] = {
    f"{codec.form}-{name}": (codec, numbers) for codec in (Flat, Triples) for name, numbers in NUMBERS.items()
}


def read_codec(facts: Mapping[str, Any] | None) -> Codec:
    """The codec that `Codec.to_dict` wrote into the settings of an index.

    Raises: MismatchError for a name that no codec has, or without one, as in indexes of development versions.
    """
    if facts is None:
        raise MismatchError("This index does not say how its rows are stored: build it anew.")
    if facts["name"] not in CODECS:
        raise MismatchError(f"The rows of this index are stored as {facts['name']!r}: it needs a newer leaveout.")
    codec, numbers = CODECS[facts["name"]]
    return codec(numbers, **{name: value for name, value in facts.items() if name != "name"})


# ---------------------------------------------------------------- arithmetic of outer products


def pairs(left_a: Tensor, left_b: Tensor, right_a: Tensor, right_b: Tensor) -> Tensor:
    """Inner products [a, b] of the outer products left (x) right of positions a and b."""
    return (left_a @ left_b.t()) * (right_a @ right_b.t())


def low_rank(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` form of left^T right, as [U sqrt(s), V sqrt(s)] flattened [rank * (left + right)].

    Shapes: left [positions, l], right [positions, r]. Fewer positions than `rank` leave zero columns. Factors that are not
    finite have no such form: all its numbers are nan.
    From the inner products of the positions alone, in float64, so that squaring costs no digit of float32 factors; what is
    below 1e-7 of the largest counts as zero.
    """
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        return left.new_full((rank * (left.shape[1] + right.shape[1]),), torch.nan)
    gram_left, gram_right = (x @ x.t() for x in (left.double(), right.double()))
    values, vectors = torch.linalg.eigh(gram_left)
    root = values.clamp_min(0).sqrt()  # gram_left = half half^T, and left^T = Q half^T with orthonormal Q
    half = vectors * root
    squares, turned = torch.linalg.eigh(half.t() @ gram_right @ half)
    s, turned = squares.flip(0)[:rank].clamp_min(0).sqrt(), turned.flip(1)[:, :rank]
    s = torch.where(s > 1e-7 * s.max(), s, 0.0)
    by_left = vectors * _inverse(root) @ turned * s.sqrt()  # U sqrt(s) = left^T by_left
    by_right = half @ turned * _inverse(s).sqrt()  # V sqrt(s) = right^T by_right
    u, v = by_left.t().to(left.dtype) @ left, by_right.t().to(right.dtype) @ right
    blank = max(rank - len(u), 0)
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, blank)).flatten() for x in (u, v)])


def _inverse(x: Tensor) -> Tensor:
    """1 / x where x is more than 1e-7 of the largest, else 0."""
    return torch.where(x > 1e-7 * x.max(), 1 / x.clamp_min(1e-300), 0.0)


def evened(queries: Tensor) -> Tensor:
    """Query vectors [queries, width] with zeros behind them, as many as products need (see `QUERIES`); one needs none."""
    missing = multiple(len(queries), QUERIES) - len(queries) if len(queries) > 1 else 0
    return torch.nn.functional.pad(queries, (0, 0, 0, missing))


def multiple(count: int, of: int) -> int:
    """The next multiple."""
    return -(-count // of) * of
