"""How much memory a jet run needs, stated before it starts, and how its directions are split to fit."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from leaveout.errors import UnsupportedError
from leaveout.models import free_memory
from leaveout.training.dropout import dropped
from leaveout.training.formulas import plain_attention
from leaveout.training.norms import by_batches, norms_of
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Task, rows_are_separate, text_length

COPIES = {"sgd": 2, "momentum": 3, "adam": 4, "adamw": 4, "paper-adam": 4}
"""Parameter-sized arrays that a step holds: parameter, gradient, and the optimizer's moments."""

ON_DEVICE = 6
"""More of them for a step of all parameters at once, as on GPUs (`FlatAdam`): gradient, update, and what these are made of."""

ROUND = 256
"""Directions trained together on a CPU, at most: beyond this, more of them no longer make a step cheaper per direction."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run of `directions` directions, `together` of them at a time."""

    state: int  # per direction: degree * copies * bytes of a coefficient * trained parameters
    activations: int  # per direction: what one backward pass keeps, in series form
    directions: int
    together: int
    limit: int

    @property
    def peak(self) -> int:
        """Bytes at the same time."""
        return (self.state + self.activations) * self.together

    @property
    def rounds(self) -> int:
        """How often the run is repeated."""
        return -(-self.directions // self.together)

    def __str__(self) -> str:
        size = f"{self.peak / 1e9:.2f} GB" if self.peak >= 1e8 else f"{self.peak / 1e6:.1f} MB"
        return (
            f"{self.directions} directions in {self.rounds} round(s) of {self.together}: {size} "
            f"(state {self.state / 1e6:.2f} MB and activations {self.activations / 1e6:.2f} MB per direction)"
        )


def plan_memory(
    recipe: Recipe, task: Task, degree: int, directions: int, dtype: torch.dtype, limit: int | None = None
) -> MemoryPlan:
    """The plan for a jet run; `limit` in bytes, default half of what the machine has free.

    Raises: UnsupportedError if not even one direction fits.
    """
    limit = limit if limit is not None else free_memory(task.device) // 2
    count = sum(p.numel() for p in task.parameters().values())
    name = "momentum" if recipe.optimizer.name == "sgd" and recipe.optimizer.momentum else recipe.optimizer.name
    copies = COPIES[name] + (ON_DEVICE if "adam" in name and task.device.type != "cpu" else 0)
    state = copies * degree * dtype.itemsize * count
    kept = kept_bytes(recipe, task) * degree * dtype.itemsize // recipe.real_dtype.itemsize
    fits = limit // max(1, state + kept)
    if fits < 1:
        raise UnsupportedError(
            f"One direction at degree {degree} needs {(state + kept) / 1e9:.2f} GB and {limit / 1e9:.2f} GB are allowed: "
            "train fewer parameters (LoRA, named modules), use a smaller batch (accumulate), or a lower degree."
        )
    rounds = -(-directions // min(fits, ROUND if task.device.type == "cpu" else directions))
    return MemoryPlan(state, kept, directions, -(-directions // rounds), limit)


MANY_ABSENT, HEAVY, HUGE = 0.3, 16 * 2**20, 2**27
"""Share of absent examples, and bytes kept for a backward pass, above which a run goes by itself; and bytes above which it
does so on a CPU whatever is absent, as calls take next to nothing of a step (benchmarks/LOG.md)."""


def runs_together(recipe: Recipe, task: Task, most: int, limit: int | None = None, absent: float = 0.0) -> int:
    """How many retrainings of a recipe fit into `limit` bytes as one batch (default half of what is free), at most `most`.

    Each holds its parameters, gradient and moments, and what its backward pass keeps; one always counts as fitting.
    absent: the share of examples of weight 0 in a run. A run by itself leaves them out, a batch of runs can not: where
    there are many, and the calls are a small part of a step, each goes by itself.
    """
    limit = limit if limit is not None else free_memory(task.device) // 2
    count = sum(p.numel() for p in task.parameters().values())
    kept = kept_bytes(recipe, task)
    if kept > HUGE and task.device.type == "cpu":
        return 1
    if absent > MANY_ABSENT and kept > HEAVY and rows_are_separate(recipe, task):
        return 1
    each = 5 * recipe.real_dtype.itemsize * count + kept
    return max(1, min(most, limit // max(1, each)))


def largest_part(recipe: Recipe) -> tuple[int, tuple[int, ...]]:
    """The step and the examples of the largest micro-batch of the plain run."""
    parts = ((number, part) for number, step in enumerate(recipe.micro_batches()) for part in step)
    return max(parts, key=lambda found: sum(text_length(recipe.examples[i]) for i in found[1]))


def kept_bytes(recipe: Recipe, task: Task) -> int:
    """Bytes that autograd keeps for the largest micro-batch of the plain run, parameters not counted."""
    _, largest = largest_part(recipe)
    seen: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in task.model.parameters()}

    def pack(t: torch.Tensor) -> None:
        """Counts a tensor, which lives on without its graph: what an operation saves of its own result would never be freed."""
        if is_traceable_wrapper_subclass(t):  # nested tensors
            for name in t.__tensor_flatten__()[0]:
                pack(getattr(t, name))
            return
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.is_floating_point():
            seen[storage.data_ptr()] = t.detach()

    seed = None if recipe.dropout is None else 0
    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing)
    ones = torch.ones(len(largest), dtype=recipe.real_dtype, device=task.device)
    norms = by_batches(task.model, ones, follows=False) if task.running else nullcontext()
    with kept, dropped(task.model, seed), norms, plain_attention():
        loss = task.loss(task.model, task.batch([recipe.examples[i] for i in largest]))
    del loss
    for norm in norms_of(task.model):
        norm.made = []
    total = sum(t.untyped_storage().nbytes() for t in seen.values())
    seen.clear()  # now, as `pack` and what it holds are a cycle
    return total


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while this is entered, as long as they live: `peak` is the most.

    Tensors from before are not counted, nor what a kernel needs inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and id(storage := t.untyped_storage()) not in given | self._seen.keys():
                self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Let the allocator keep what is freed while a run on a CPU lasts.

    glibc gives large blocks back at once and faults every page in anew at the next operation: 3 % of the time of a
    microgpt step, and 40 % of a second pass through a language model. Elsewhere than on glibc nothing is changed.
    """
    mallopt = getattr(_glibc(device), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _GLIBC_DEFAULT)
        mallopt(_M_TRIM_THRESHOLD, _GLIBC_DEFAULT)
        give_back(device)


def give_back(device: torch.device) -> None:
    """Give what the allocator has kept back to a CPU's machine, before a part of a run that needs other sizes."""
    trim = getattr(_glibc(device), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _glibc(device: torch.device) -> Any:
    """The C library, where a device takes its memory from it."""
    return ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _GLIBC_DEFAULT = -1, -3, 128 * 1024


@contextmanager
def flushed_denormals(device: torch.device) -> Iterator[None]:
    """Moments of weights that no longer get a gradient decay to denormal numbers, which slow a CPU's step down tenfold."""
    if device.type != "cpu":
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
