"""The stored form of row vectors: float32, float16 or int8, each with a float32 scale per row.

A stored row times its scale is the vector. int8 rounds to 1/127 of the row's largest number; float16 is scaled the same
way so that nothing overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from leaveout.readout.settings import Storage

TOP = {"float32": None, "float16": 1.0, "int8": 127.0}


def encode(vectors: Tensor, storage: Storage) -> dict[str, np.ndarray]:
    """Arrays `signature` [rows, width] and `scale` [rows] float32 of vectors [rows, width]."""
    vectors = vectors.cpu()
    top = TOP[storage]
    if top is None:
        scale = torch.ones(len(vectors))
        stored = vectors.float()
    else:
        scale = (vectors.abs().amax(1) / top).float()
        scaled = vectors / torch.where(scale > 0, scale, 1.0)[:, None].to(vectors.dtype)
        stored = scaled.round().clamp_(-top, top).to(torch.int8) if storage == "int8" else scaled.half()
    return {"signature": stored.numpy(), "scale": scale.numpy()}


def decode(arrays: Mapping[str, np.ndarray]) -> Tensor:
    """Vectors [rows, width] float32 of stored arrays."""
    return torch.from_numpy(np.asarray(arrays["signature"], np.float32) * arrays["scale"][:, None])


def blocks(arrays: Mapping[str, np.ndarray], n_rows: int) -> Iterator[Tensor]:
    """The vectors of stored arrays, [at most n_rows, width] float32 at a time."""
    n_rows = max(1, n_rows)
    for start in range(0, len(arrays["scale"]), n_rows):
        yield decode({name: arrays[name][start : start + n_rows] for name in ("signature", "scale")})
