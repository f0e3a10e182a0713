"""The stored form of row vectors: float32, float16, int8 or int4, each with a float32 scale per row.

A stored row times its scale is the vector. int8 rounds to 1/127 of the row's largest number, int4 to 1/7 of the largest in
each block of 64 numbers; float16 is scaled by the row's largest number so that nothing overflows.

int4 in bytes: byte i of a block's 32 holds number i in its low half and number i + 32 in its high half, both as two's
complement from -7 to 7; -8 stands behind the end of a row whose width is no multiple of 64. The block's scale, float16, is
relative to the row's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from leaveout.readout.settings import Storage

Arrays = Mapping[str, np.ndarray]

BLOCK = 64  # int4 numbers that share a scale
PAD = -8
PIECE = 8  # rows encoded at a time
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def encode(vectors: Tensor, storage: Storage) -> dict[str, np.ndarray]:
    """Arrays `signature` [rows, stored width] and `scale` [rows] float32 of vectors [rows, width].

    int4 has stored width / 2 bytes a row, and `block_scale` [rows, blocks] float16.
    """
    if len(vectors) > PIECE:  # so that no second copy of all of them exists on the way
        parts = [encode(piece, storage) for piece in vectors.split(PIECE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    vectors = vectors.cpu()
    if storage == "float32":
        return {"signature": vectors.float().numpy(), "scale": np.ones(len(vectors), np.float32)}
    if storage == "int4":
        return _encode_int4(vectors.float())
    top = 127.0 if storage == "int8" else 1.0
    scale = (vectors.abs().amax(1) / top).float()
    scaled = vectors / torch.where(scale > 0, scale, 1.0)[:, None].to(vectors.dtype)
    stored = scaled.round().clamp_(-top, top).to(torch.int8) if storage == "int8" else scaled.half()
    return {"signature": stored.numpy(), "scale": scale.numpy()}


def _encode_int4(vectors: Tensor) -> dict[str, np.ndarray]:
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


def width(arrays: Arrays) -> int:
    """Numbers per row of the vectors that arrays stand for; without rows, up to the end of the last int4 block."""
    stored = arrays["signature"]
    if "block_scale" not in arrays or not len(stored):
        return buffer_width(arrays)
    last = stored[0, -BLOCK // 2 :].astype(np.int16)
    return 2 * stored.shape[1] - int((last >> 4 == PAD).sum()) - int((last & 15 == PAD & 15).sum())


def widen(arrays: Arrays, at: slice | np.ndarray, buffer: Tensor) -> Tensor:
    """The numbers [rows, width] float32 of rows `at`, without the rows' scales; a view of `buffer`.

    Shapes: buffer float32, one-dimensional, at least rows times `buffer_width`.
    """
    stored = _tensor(arrays["signature"][at])
    if "block_scale" not in arrays or not len(stored):
        return buffer[: stored.numel()].view(len(stored), -1 if len(stored) else width(arrays)).copy_(stored)
    blocks = stored.unflatten(1, (-1, BLOCK // 2))
    out = buffer[: 2 * stored.numel()].view(len(stored), -1, 2, BLOCK // 2)
    out[:, :, 0].copy_(blocks << 4)  # sixteen times the number, sign included
    out[:, :, 1].copy_(blocks & -16)
    out.mul_(_tensor(arrays["block_scale"][at]).float().div_(16.0)[:, :, None, None])
    return out.flatten(1)[:, : width(arrays)]


def buffer_width(arrays: Arrays) -> int:
    """Numbers of the buffer that `widen` needs for a row."""
    return arrays["signature"].shape[1] * (2 if "block_scale" in arrays else 1)


def decode(arrays: Arrays) -> Tensor:
    """Vectors [rows, width] float32 of stored arrays."""
    buffer = torch.empty(len(arrays["scale"]) * buffer_width(arrays))
    return widen(arrays, slice(None), buffer) * torch.from_numpy(np.array(arrays["scale"]))[:, None]


def blocks(arrays: Arrays, n_rows: int) -> Iterator[Tensor]:
    """The vectors of stored arrays, [at most n_rows, width] float32 at a time."""
    n_rows = max(1, n_rows)
    names = [name for name in ("signature", "scale", "block_scale") if name in arrays]
    for start in range(0, len(arrays["scale"]), n_rows):
        yield decode({name: arrays[name][start : start + n_rows] for name in names})


def _tensor(block: np.ndarray) -> Tensor:
    """A tensor on the memory of a read-only array; nothing writes to it.

    Made from the bare address because torch warns about read-only arrays and numpy's own widening of float16 takes
    twice as long as torch's.
    """
    if block.flags.writeable or not block.flags.c_contiguous or not block.size:
        return torch.from_numpy(block if block.flags.writeable else block.copy())
    memory = (ctypes.c_char * block.nbytes).from_address(block.__array_interface__["data"][0])
    return torch.frombuffer(memory, dtype=DTYPES[block.dtype.name]).view(block.shape)
