"""Saving the state of a run that takes long, and going on from it. Plain safetensors files; nothing is unpickled."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from leaveout.errors import FormatError, MismatchError
from leaveout.jets import Jet

VERSION = "1"


@dataclass
class Checkpoint:
    """One file that holds step and state of one run. `key` says which run: recipe, weights or directions, degree."""

    path: Path
    key: str
    every: float = 60.0  # seconds between two savings
    _last: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write under another name, sync, rename: a killed run leaves the old file or the new one."""
        plain = {k: torch.view_as_real(t) if t.is_complex() else t for k, t in tensors.items()}
        plain = {k: t.detach().contiguous().clone() for k, t in plain.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(plain, temporary, metadata={"version": VERSION, "key": self.key, "step": str(step)})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, self.path)
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors of the file, None if there is none. Complex tensors come as pairs of real numbers.

        Raises: MismatchError if it belongs to another run; FormatError if it is not such a file.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise FormatError(f"{self.path} is not a checkpoint ({error}): delete it to start anew.") from None
        if about.get("version") != VERSION:
            raise FormatError(f"{self.path} has version {about.get('version')}, wanted {VERSION}: delete it.")
        if about["key"] != self.key:
            raise MismatchError(f"{self.path} belongs to another run: delete it, or give another directory.")
        return int(about["step"]), tensors


def state_of(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and optimizer state as named plain tensors; jets give two."""
    out: dict[str, Tensor] = {}
    for name, p in params.items():
        _put(out, f"parameter/{name}", p)
        for key, value in optimizer.state[p].items():
            if value is not None:
                _put(out, f"{key}/{name}", value)
    return out


def _put(out: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Jet):
        out[f"{name}/c"], out[f"{name}/h"] = value.c, value.h
    else:
        out[name] = value if isinstance(value, Tensor) else torch.tensor(value)


def restore_state(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Put saved tensors back. Optimizer state is made first by the optimizer's own rules for a zero gradient."""
    with torch.no_grad():
        for name, p in params.items():
            _get(saved, f"parameter/{name}", p)
            for full, value in saved.items():
                key, _, rest = full.partition("/")
                if key == "parameter" or rest not in (name, f"{name}/c"):
                    continue
                optimizer.state[p][key] = _revived(saved, key, name, p, value)


def _revived(saved: dict[str, Tensor], key: str, name: str, p: Tensor, value: Tensor) -> Any:
    if f"{key}/{name}/c" in saved:
        buffer = torch.zeros_like(p)
        _get(saved, f"{key}/{name}", buffer)
        return buffer
    if key == "step" and not value.is_floating_point():
        return int(value)
    return value.clone()


def _get(saved: dict[str, Tensor], name: str, into: Tensor) -> None:
    if isinstance(into, Jet):
        into.c.copy_(saved[f"{name}/c"])
        h = saved[f"{name}/h"]
        into.h.copy_(torch.view_as_complex(h) if into.h.is_complex() else h)
    else:
        into.copy_(saved[name])
