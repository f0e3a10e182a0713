"""Where a GPU run takes place, until when, in which sizes, and how it measures."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "src")]  # leaveout need not be installed on the machine

from leaveout.readout.model import Readout, load_readout  # noqa: E402
from leaveout.readout.tokens import Window  # noqa: E402
from measuring import tiny  # noqa: E402


@dataclass
class Card:
    """Where things run, until when, and in which sizes."""

    device: str
    until: float
    dry: bool
    model: str | None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, task: Callable[[], object], repeats: int = 3) -> float:
        """The median of some repeats, after one that does not count."""
        found = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            task()
            self.wait()
            found.append(time.perf_counter() - began)
        return sorted(found[1:])[repeats // 2]

    def peak(self, task: Callable[[], object]) -> float:
        """Gigabytes that a task needs beside what is there; 0 on a CPU, where nobody counts."""
        if not self.cuda:
            task()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def kernels(self, task: Callable[[], object]) -> dict[str, Any]:
        """Launches, waits, and the ten costliest kernels of a task, with their calls and milliseconds."""
        if not self.cuda:
            task()
            return {}
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            task()
            self.wait()
        calls = Counter[str]()
        spent = Counter[str]()
        for event in profile.key_averages():
            calls[event.key] += event.count
            spent[event.key] += getattr(event, "self_device_time_total", 0)
        return {
            "launches": sum(n for key, n in calls.items() if "LaunchKernel" in key),
            "waits": sum(n for key, n in calls.items() if "Synchronize" in key),
            "costliest": [[key[:80], calls[key], round(us / 1e3, 3)] for key, us in spent.most_common(10)],
        }

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def readout(self, device: str, dtype: torch.dtype = torch.float32) -> Readout:
        """The small model, in another place or dtype each time: none shares tensors with another."""
        small = tiny(0) if self.model is None else load_readout(self.model)
        return load_readout(small.lm.to(device=device, dtype=dtype), small.tokenizer)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to the length of what is wanted."""
    found, wanted = (x.double().cpu() for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def random_windows(vocabulary: int, count: int, longest: int, seed: int = 0) -> list[Window]:
    """Rows of one window: random tokens, of which the last two thirds are learned."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 4, longest, (count,), generator=chance).tolist()
    ids = [torch.randint(vocabulary, (length,), generator=chance).tolist() for length in lengths]
    return [Window(row, 0, ids[row], list(range(n // 3, n - 1))) for row, n in enumerate(lengths)]
