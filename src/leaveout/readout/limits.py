"""How much is computed at once on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leaveout.models import free_memory


@dataclass(frozen=True)
class Limits:
    """What fits into a processor's cache, or into the memory of another device.

    batch_tokens, batch_rows    of one pass through the trunk: tokens, padding included, and windows
    logit_bytes, logit_rows     of the logits that exist at once: bytes, and positions
    chunk_rows, chunk_tokens    of a chunk of a build, whose batches are cut by themselves
    """

    batch_tokens: int = 1024
    batch_rows: int = 1024
    logit_bytes: int = 48 * 2**20
    logit_rows: int = 256
    chunk_rows: int = 64
    chunk_tokens: int = 4096

    @classmethod
    def of(cls, device: torch.device, token_bytes: int, row_bytes: int) -> Limits:
        """Those of a device with a model on it, given the bytes that a token and a row take before rows are encoded.

        Of the memory that is still free a quarter is for the tokens of a batch, an eighth for its rows, a sixteenth for
        logits: each exists a second time for a while, and kernels need some.
        """
        if device.type == "cpu":
            return cls()
        free = free_memory(device)
        tokens = max(min(16_384, free // 4 // token_bytes), 1024)
        rows, logits = max(free // 8 // row_bytes, 16), min(max(free // 16, cls.logit_bytes), 4 * 2**30)
        return cls(tokens, rows, logits, 16_384, 4096, 4 * tokens)


@dataclass(frozen=True)
class ScanLimits:
    """Bytes of stored rows that stay on a device between searches, and of those that are scored together there.

    Half of the memory that is free when the first search begins is kept; unpacked, a block takes up to twenty times its bytes.
    """

    kept: int
    block: int

    @classmethod
    def of(cls, device: torch.device) -> ScanLimits:
        free = free_memory(device)
        return cls(free // 2, max(min(64 * 2**20, free // 128), 2**20))
