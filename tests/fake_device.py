"""A device that this machine does not have: what runs on a GPU is tried, and its launches, copies and waits are counted.

    model.to(DEVICE)                            # or any place where torch takes a device: "pretend", DEVICE
    with counting() as counts:
        signer.rows(windows, n)
    counts.launches, counts.waits               # numbers; counts.by_line("waits") says where

A tensor on DEVICE keeps its numbers on the CPU, computes there, and refuses what a GPU refuses: operands on two devices, a
CPU generator, `.numpy()`. What is counted, each by the line of leaveout that caused it:

    launches   operations that compute or move memory on the device; views are free. One a call of a torch operation: some of
               them are several kernels on a real device, and attention, which is fused, is one
    copies     to the device and from it, with their bytes
    waits      where the host stands still until the device is done: numbers that it asks for (`item`, `tolist`, `bool`),
               sizes that only the device knows (`nonzero`, boolean indices), decompositions that look whether they succeeded,
               copies that are not `non_blocking`, and `synchronize` of events, streams and the device

It is PyTorch's one place for a backend of another package, taken when this module is imported: a process cannot give it back,
and autograd makes a thread for every device at the first backward pass of a process, never later. `torch.accelerator` says
that there is none outside `counting`, nothing of torch is replaced, and tensors of the CPU never come here.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import leaveout

NAME = "pretend"
MEMORY = 80 * 10**9  # bytes that the device says it has, all of them free
PACKAGE = str(Path(leaveout.__file__).parent)

# ---------------------------------------------------------------- counts


@dataclass
class Counts:
    """What happened, by kind, and in each kind by (line of leaveout, operation)."""

    kinds: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, kind: str, operation: str) -> None:
        self.kinds.setdefault(kind, Counter())[_line(), operation] += 1

    def total(self, kind: str) -> int:
        return sum(self.kinds.get(kind, Counter()).values())

    @property
    def launches(self) -> int:
        return self.total("launches")

    @property
    def waits(self) -> int:
        return self.total("waits")

    @property
    def copies(self) -> int:
        return self.total("copies")

    def by_line(self, kind: str) -> Counter[str]:
        """How often each line of leaveout caused it: "readout/forms.py:120 low_rank"."""
        found: Counter[str] = Counter()
        for (line, _), count in self.kinds.get(kind, Counter()).items():
            found[line] += count
        return found

    def below(self, name: str, kind: str = "launches") -> int:
        """Those of lines that begin with a name: of a module, or of a line."""
        return sum(count for line, count in self.by_line(kind).items() if line.startswith(name))


_counting: list[Counts] = []  # what is counted into now; more than one where one `counting` stands in another


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts what happens inside, on all threads."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def _count(kind: str, operation: str) -> None:
    for counts in _counting:
        counts.add(kind, operation)


def _line() -> str:
    """The innermost line of leaveout on the stack of this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return f"{code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "elsewhere"


# ---------------------------------------------------------------- the device


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a backend. None is there, for whoever looks for one, but where a test counts."""

    def is_available(self) -> bool:
        return bool(_counting)

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class Event:
    """A point in the work of the device, which the host may wait for."""

    def __init__(self, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _count("waits", "event")


class Stream:
    """A queue of work; all work here is done at once."""

    def __init__(self, *places: Any, **options: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        _count("waits", "stream")


class _Module:
    """`torch.pretend`, as `torch.cuda` is for CUDA, as far as somebody asks."""

    Event, Stream = Event, Stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(_counting)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """It draws nothing, and has no state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and all bytes."""
        return MEMORY, MEMORY

    def synchronize(self, device: Any = None) -> None:
        _count("waits", "synchronize")

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    def stream(self, stream: Stream) -> contextlib.AbstractContextManager[Stream]:
        return contextlib.nullcontext(stream)

    def empty_cache(self) -> None: ...


_setup_privateuseone_for_python_backend(NAME, _Module(), _Hooks(), _Guard())
DEVICE = torch.device(NAME, 0)


class Mixed(RuntimeError):
    """Operands of one operation on two devices."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on DEVICE; its numbers are `numbers`, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(kind, OnDevice) for kind in types):
            return NotImplemented  # tensors made of these (jets) say what they do with it
        return _carry_out(func, args, kwargs or {})

    def tolist(self) -> Any:
        _count("waits", "tolist")
        return self.numbers.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first. ({_line()})")
        return self.cpu().numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.numbers!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = OnDevice(self.numbers.clone())
            kept = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
            memo[id(self)] = kept
        return memo[id(self)]


# ---------------------------------------------------------------- operations

# Of these nothing is launched: they say otherwise where the same memory stands, or give memory that nobody wrote.
FREE = {
    "_conj", "_neg_view", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty",
    "empty_like", "empty_strided", "expand", "imag", "is_same_size", "lift_fresh", "mT", "narrow", "new_empty",
    "new_empty_strided", "permute", "real", "select", "size", "slice", "split", "split_with_sizes", "squeeze", "stride",
    "sym_size", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as_complex", "view_as_real",
}  # fmt: skip
# The host waits for these: for a number, for a size, or for whether a decomposition succeeded.
ASKED = {"_local_scalar_dense", "item", "is_nonzero", "equal", "_linalg_check_errors"}
SIZED = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount", "histc"}
CHECKED = {"_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_eigvals", "linalg_lstsq"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
RESHAPING = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapaxes_"}
RESIZING = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm", "range")
_aten = torch.ops.aten


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation with a tensor on DEVICE, or with DEVICE for its result."""
    name = func.name().removeprefix("aten::").split(".")[0]
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # below autograd, where nobody has taken it apart yet
    flat = tree_flatten((args, kwargs))[0]
    if name in ("_to_copy", "copy_"):
        return _copied(name, args, kwargs)
    if name in RESHAPING:
        raise NotImplementedError(f"{func} changes a tensor's shape in its place, which {DEVICE} cannot: {_line()}")
    _refuse_mixed(func, name, args, flat)
    _note(name, args, kwargs)
    if any(isinstance(x, torch.device) and x.type == NAME for x in args):  # a rare device among the others
        args = tuple(torch.device("cpu") if isinstance(x, torch.device) else x for x in args)
    found = _computed(func, name, tree_map(_numbers, args), tree_map(_numbers, kwargs))
    if isinstance(kwargs.get("out"), OnDevice):
        return kwargs["out"]
    known = {id(x.numbers): x for x in flat if isinstance(x, OnDevice)}  # what was changed in its place is given back
    return tree_map(lambda x: (known[id(x)] if id(x) in known else OnDevice(x)) if isinstance(x, Tensor) else x, found)


def _numbers(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x.numbers if isinstance(x, OnDevice) else x


def _computed(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result on the CPU, where some forms of products are not there."""
    if name in ("mm", "bmm") and "dtype" in func._overloadname:
        a, b, dtype = args[:3]
        product = func._overloadpacket(a.to(dtype), b.to(dtype))
        return product if "out" not in kwargs else kwargs["out"].copy_(product)
    if name == "_int_mm":
        a, b = args[:2]
        if a.shape[0] <= 16 or a.shape[1] % 8 or b.shape[1] % 8:
            raise RuntimeError(f"_int_mm of {tuple(a.shape)} and {tuple(b.shape)}: a GPU needs more than 16 rows, and "
                               f"multiples of 8 else ({_line()})")  # fmt: skip
    return func(*args, **kwargs)


def _refuse_mixed(func: Any, name: str, args: Any, flat: list[Any]) -> None:
    """Raises: Mixed unless all tensors are on DEVICE, but for single numbers and for indices, which come over."""
    here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    if name in INDEXED and isinstance(args[0], OnDevice):
        indices = [x for x in here if any(x is i for i in args[1])]
        here = [x for x in here if not any(x is i for i in indices)]
        for _ in indices:
            _count("copies", "index")
            _count("waits", "copy of an index")
    wrong = [tuple(x.shape) for x in here if x.dim() > 0 or (name in INDEXED and not isinstance(args[0], OnDevice))]
    if wrong:
        raise Mixed(f"{func}: all tensors must be on one device, but those of shapes {wrong} are on the CPU: {_line()}")
    if any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f"{func}: a generator of the CPU was given for {DEVICE}: {_line()}")


def _note(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Counts an operation that is no copy between devices."""
    if name in ASKED:
        _count("waits", name)
        return
    sized = name in SIZED or (name == "repeat_interleave" and kwargs.get("output_size") is None)
    by_mask = name in INDEXED and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    checks = name in CHECKED or (name.endswith("_ex") and (kwargs.get("check_errors") or True in args[1:]))
    if sized or by_mask or checks:
        _count("waits", name)
    if name not in FREE:
        _count("launches", name)


def _copied(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`_to_copy` and `copy_`, from one place to another or within one."""
    if name == "copy_":
        into, source = args[0], args[1]
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        _note_copy(isinstance(into, OnDevice), source, waits)
        _numbers(into).copy_(_numbers(source))
        return into
    options = dict(kwargs)
    place = options.pop("device", None)
    waits = not options.pop("non_blocking", False)
    there = isinstance(args[0], OnDevice) if place is None else torch.device(place).type == NAME
    _note_copy(there, args[0], waits)
    found = _aten._to_copy(_numbers(args[0]), **{key: value for key, value in options.items() if value is not None})
    return OnDevice(found) if there else found


def _note_copy(there: bool, source: Tensor, waits: bool) -> None:
    if there and isinstance(source, OnDevice):
        _count("launches", "copy")
        return
    size = source.numel() * source.element_size()
    for counts in _counting:
        counts.add("copies", "to the device" if there else "from the device")
        counts.bytes_in += size if there else 0
        counts.bytes_out += 0 if there else size
    if waits:
        _count("waits", "copy to the device" if there else "copy from the device")


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    **options: Any,
) -> Tensor:  # fmt: skip
    """One launch, as of the fused kernels of a GPU; by the plain formula for series, and where a gradient is asked for."""
    if not isinstance(query, OnDevice) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    ):
        plain = _aten._scaled_dot_product_attention_math
        return plain(query, key, value, mask, dropout, causal, None, **options)[0]
    _count("launches", "attention")
    given = map(_numbers, (query, key, value, mask))
    return OnDevice(_aten.scaled_dot_product_attention(*given, dropout, causal, **options))


def _registered() -> list[torch.library.Library]:
    """What must be asked for by name: operations that make tensors out of none, or that come here below what sees classes."""
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda func, *args, **kwargs: _carry_out(func, args, kwargs), "PrivateUse1")
    some.impl("copy_", lambda *args, **kwargs: _copied("copy_", args, kwargs), "PrivateUse1")
    for name in RESIZING:  # torch would make these of no size first, which is that of the class until the end
        func = getattr(_aten, name.split(".")[0])
        func = getattr(func, name.partition(".")[2] or "default")
        some.impl(name, lambda *args, func=func, **kwargs: _carry_out(func, args, kwargs), "PrivateUse1")
    some.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    return [every, some]


_LIBRARIES = _registered()  # which would be taken back with the last name for them
