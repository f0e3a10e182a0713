"""Stored rows on the device of a model, where they stay between the searches of one opened index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leaveout.models import sent
from leaveout.readout.codec import Arrays, Codec, Tensors, tensor_on, tensors
from leaveout.readout.limits import ScanLimits
from leaveout.store import Segment


class Held:
    """The arrays of whole segments on a device, by file and form, as many as `limits.kept` bytes hold.

    What came first stays: scans read segments in turn, so that what was read last would be what is needed last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.limits = device, ScanLimits.of(device)
        self.kept: dict[tuple[Path, str], Tensors] = {}

    @property
    def n_bytes(self) -> int:
        return sum(x.nbytes for arrays in list(self.kept.values()) for x in arrays.values())

    def drop_others(self, segments: Iterable[Segment]) -> None:
        """Lets go of files that are not among these: files never change, but a store may have others by now."""
        present = {segment.path for segment in segments}
        self.kept = {key: arrays for key, arrays in list(self.kept.items()) if key[0] in present}

    def blocks(self, codec: Codec, key: tuple[Path, str], arrays: Arrays, at: np.ndarray | None) -> Iterator[Tensors]:
        """The rows of a file's arrays at positions, block after block on the device; None: all, which are kept if they fit."""
        n_rows = len(next(iter(arrays.values())))
        if at is None and key not in self.kept and self.n_bytes + _n_bytes(arrays) <= self.limits.kept:
            self.kept[key] = {name: self._whole(array, codec) for name, array in arrays.items()}
        kept = self.kept.get(key)
        for block in codec.blocks(n_rows if at is None else len(at), self.limits.block):
            rows = block if at is None else at[block]
            if kept is None:
                yield {name: sent(x, self.device) for name, x in tensors(arrays, rows).items()}
            elif at is None:
                yield {name: x[block] for name, x in kept.items()}
            else:
                chosen = sent(torch.from_numpy(at[block]), self.device)
                yield {name: x.index_select(0, chosen) for name, x in kept.items()}

    def _whole(self, array: np.ndarray, codec: Codec) -> Tensor:
        there = torch.empty(array.shape, dtype=tensor_on(array[:0]).dtype, device=self.device)
        for block in codec.blocks(len(array), self.limits.block):
            there[block].copy_(sent(tensor_on(array[block]), self.device))
        return there


def _n_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
