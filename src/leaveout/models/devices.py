"""The devices of this machine: by name, by process, and the memory that is free on one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SEVERAL = ("auto", "cuda")  # names that leave open which of several CUDA devices it is
NUMBERS = (
    "LOCAL_RANK",
    "LEAVEOUT_WORKER",
)  # variables that number the processes of a machine: torchrun's, our workers'


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; auto: cuda where there is one.

    Of several CUDA devices `auto` and `cuda` are the one of this process: a process of torchrun takes that of its
    LOCAL_RANK, and else worker i takes cuda:i (counted round where there are more processes than devices).
    Raises: ValueError for one that is not here.
    """
    if name in SEVERAL and torch.cuda.is_available() and (count := torch.cuda.device_count()) > 1:
        number = next((os.environ[key] for key in NUMBERS if os.environ.get(key, "").isdecimal()), "0")
        return torch.device("cuda", int(number) % count)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {name!r}: give cpu, cuda, cuda:1, mps or auto.") from None
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no numbers: give cpu, cuda or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device here: give cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but the last one here is cuda:{torch.cuda.device_count() - 1}: give that."
        )
    try:
        torch.empty(1, device=device)
    except Exception:  # torch raises a kind of its own for each device that it lacks
        raise ValueError(f"device is {name!r}, but torch finds no such device here: give cpu.") from None
    return device


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be used on a device; on the CPU what a new process can use without swapping."""
    device = torch.device(device)
    if device.type != "cpu" and (asked := getattr(torch.get_device_module(device), "mem_get_info", None)):
        cuda = device.type == "cuda"  # where torch holds what was freed for later
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if cuda else 0
        return asked(device)[0] + held
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting until it is there; what is computed with it there waits."""
    if device.type == "cpu":
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@contextmanager
def full_precision() -> Generator[None]:
    """Products of float32 numbers on a GPU without TF32, which keeps 11 bits of them and which cuDNN takes by default.

    The flags are `fp32_precision` of torch.backends.cuda.matmul, .cudnn.conv and .cudnn.rnn, and torch's older ones, which
    must agree with them wherever torch looks; what they were comes back.
    """
    backends: Any = torch.backends
    flags: tuple[Any, ...] = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    products, convolutions = _asked(torch.get_float32_matmul_precision), _asked(lambda: backends.cudnn.allow_tf32)
    try:
        _set(flags, ["ieee"] * 3, "highest", False)
        yield
    finally:
        _set(flags, before, products, convolutions)


def _asked(old: Callable[[], Any]) -> Any:
    """An older flag; None where only the newer ones were set, of which it says nothing."""
    try:
        return old()
    except RuntimeError:
        return None


def _set(flags: tuple[Any, ...], values: list[str], products: str | None, convolutions: bool | None) -> None:
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    for flag, value in zip(flags, values, strict=True):
        flag.fp32_precision = value


class Fetched:
    """Tensors on their way from a device to the host, as one copy that begins when the device comes to it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        device = next(iter(tensors.values())).device
        self.kinds = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
        flat = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in tensors.values()])
        self.host, self.there = flat, None
        if device.type != "cpu":
            self.host = torch.empty(len(flat), dtype=torch.uint8, pin_memory=device.type == "cuda")
            self.host.copy_(flat, non_blocking=True)
            self.there = torch.get_device_module(device).Event()
            self.there.record()

    def arrays(self) -> dict[str, np.ndarray]:
        """The numbers, when all of them have come."""
        if self.there is not None:
            self.there.synchronize()
        found: dict[str, Any] = {}
        start = 0
        for name, (dtype, shape) in self.kinds.items():
            kind = torch.empty(0, dtype=dtype).numpy().dtype
            end = start + kind.itemsize * math.prod(shape)
            whole: Any = self.host[start:end].numpy()
            found[name] = whole.view(kind).reshape(shape)
            start = end
        return found
