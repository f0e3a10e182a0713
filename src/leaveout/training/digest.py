"""Digests of all that a recipe or a query may hold: data, rows, modules, and functions with everything they read.

Equal content gives equal digests, in any process of the same Python version. A function is its bytecode, its defaults, the
cells of its closure and the globals it reads by name, each by content; an object is its class and what pickle would store
of it. What belongs to the standard library or to an installed package counts by its name. A list and a tuple are alike.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from leaveout.corpus import Row
from leaveout.errors import UnsupportedError

DESCRIPTORS = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType, np.ufunc,
)  # fmt: skip
OF_CLASSES = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__", "__static_attributes__",
    "__abstractmethods__", "_abc_impl", "__slotnames__",
}  # fmt: skip
"""What a class's namespace holds besides its methods and attributes."""
OF_MODULES = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "training",
    "_is_full_backward_hook",
}
"""What a module's namespace holds besides attributes and hooks; parameters and buffers are taken by their names."""


def digest_of(value: Any, name: str, version: str = "") -> str:
    """Digest of a value, 32 hexadecimal digits. `name` says in messages whose it is.

    version: stands for parts that cannot be read, which then may change unseen.
    Raises: UnsupportedError for such a part without a version.
    """
    return _Reader(name, version).of(value).hex()[:32]


class _Reader:
    """Reads one value. Parts of an object are digests, so that an order that means nothing can be sorted away."""

    def __init__(self, name: str, version: str) -> None:
        self.version, self.where = version, [name]
        self.done: dict[int, tuple[Any, bytes]] = {}  # the objects too, so that no id is used twice
        self.open: list[int] = []

    def of(self, value: Any) -> bytes:
        if plain := _plain(value):
            return _hashed(*plain)
        if id(value) in self.done:
            return self.done[id(value)][1]
        if id(value) in self.open:  # a function that calls itself, an object that holds itself
            return _hashed("again", str(len(self.open) - self.open.index(id(value))).encode())
        self.open.append(id(value))
        found = self._content(value)
        self.open.pop()
        self.done[id(value)] = value, found
        return found

    def _content(self, value: Any) -> bytes:
        for kinds, read in _READERS:
            if isinstance(value, kinds):
                return read(self, value)
        return self._object(value)

    def part(self, name: str, value: Any) -> bytes:
        """Of a part that has a name, for messages."""
        self.where.append(name)
        found = self.of(value)
        self.where.pop()
        return found

    def named(self, kind: str, parts: Mapping[str, Any]) -> bytes:
        return _hashed(kind, *(d for name in sorted(parts) for d in (name.encode(), self.part(name, parts[name]))))

    def listed(self, kind: str, parts: Iterable[Any]) -> bytes:
        return _hashed(kind, *(self.of(part) for part in parts))

    # --- what holds other values ---------------------------------------------------------------------------------

    def _mapping(self, value: Mapping[Any, Any]) -> bytes:
        return _hashed("mapping", *sorted(_hashed("item", self.of(k), self.part(str(k), v)) for k, v in value.items()))

    def _set(self, value: Collection[Any]) -> bytes:
        return _hashed("set", *sorted(self.of(item) for item in value))

    def _row(self, row: Row) -> bytes:
        return self.listed("row", [row.id, row.text, row.responses, row.messages, row.unit, row.content_hash])

    def _array(self, array: np.ndarray) -> bytes:
        if array.dtype.hasobject:
            return self.listed(f"objects {array.shape}", array.ravel().tolist())
        return _hashed("array", f"{array.dtype.str} {array.shape}".encode(), _bytes_of(np.ascontiguousarray(array)))

    def _tensor(self, tensor: torch.Tensor) -> bytes:
        if tensor.layout != torch.strided or tensor.is_quantized:
            return self._unreadable(tensor)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _hashed("tensor", f"{tensor.dtype} {tuple(tensor.shape)}".encode(), _bytes_of(raw))

    # --- functions and classes -----------------------------------------------------------------------------------

    def _partial(self, value: functools.partial[Any]) -> bytes:
        return _hashed("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))

    def _function(self, function: types.FunctionType) -> bytes:
        code, cells = function.__code__, {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # not yet filled
                cells[name] = None
        if _installed(code.co_filename):
            return _hashed("installed", _name_of(function), self.named("closure", cells))
        read = {name: function.__globals__[name] for name in _globals_read(code) if name in function.__globals__}
        return _hashed(
            "function", self.of(code), self.of(function.__defaults__), self.of(function.__kwdefaults__),
            self.named("closure", cells), self.named("globals", read),
        )  # fmt: skip

    def _code(self, code: types.CodeType) -> bytes:
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        exceptions = getattr(code, "co_exceptiontable", b"")
        return self.listed("code", [code.co_code, code.co_consts, names, counts, exceptions])

    def _method(self, value: types.MethodType) -> bytes:
        return _hashed("method", self.of(value.__func__), self.of(value.__self__))

    def _builtin(self, value: Any) -> bytes:
        owner = getattr(value, "__self__", None)
        bound = owner is not None and not isinstance(owner, (types.ModuleType, type))
        return _hashed("builtin", _name_of(value), self.of(owner) if bound else b"")

    def _wrapped(self, value: Any) -> bytes:
        """A property, a static or class method, a cached function: what it wraps."""
        parts = [getattr(value, name, None) for name in ("__func__", "__wrapped__", "fget", "fset", "func")]
        return self.listed(type(value).__name__, parts)

    def _class(self, value: type) -> bytes:
        if _installed(_file_of(value)):
            return _hashed("installed", _name_of(value))
        space = {name: part for name, part in vars(value).items() if name not in OF_CLASSES}
        return _hashed("class", value.__qualname__.encode(), self.of(value.__bases__), self.named("namespace", space))

    def _library(self, value: types.ModuleType) -> bytes:
        file = getattr(value, "__file__", None)
        if file is None or _installed(file) or not Path(file).is_file():
            return _hashed("library", value.__name__.encode())
        return _hashed("file", hashlib.sha256(Path(file).read_bytes()).digest())

    # --- objects -------------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> bytes:
        """Classes, attributes and hooks of all submodules, parameters and buffers."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return _hashed(
            "module", self.named("tensors", tensors),
            *(_hashed(f"submodule {name}", self._attributes(m)) for name, m in module.named_modules()),
        )  # fmt: skip

    def _attributes(self, module: nn.Module) -> bytes:
        own = {name: value for name, value in vars(module).items() if name not in OF_MODULES}
        tables = {
            name: list(value.values()) for name, value in own.items() if "hook" in name and isinstance(value, dict)
        }
        own = {name: value for name, value in {**own, **tables}.items() if tables.get(name, True)}  # keys are counters
        known = self.of(type(module))
        if not _installed(_file_of(type(module))):
            return _hashed("own", known, self.named("attributes", own))
        # An installed module keeps more than what it computes with: parts that cannot be read count by their class.
        inner, out = _Reader(self.where[0], "installed"), []
        inner.done, inner.open = self.done, self.open
        for name in sorted(own):
            out += [name.encode(), inner.of(own[name])]
        return _hashed("installed", known, *out)

    def _tokenizer(self, value: Any) -> bytes:
        """A fast tokenizer without what its last call left in it (truncation and padding)."""
        backend = json.loads(value.backend_tokenizer.to_str())
        kept = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
        more = [str(value.special_tokens_map), value.padding_side, getattr(value, "chat_template", None)]
        return _hashed("tokenizer", json.dumps(kept, sort_keys=True).encode(), self.of(more))

    def _object(self, value: Any) -> bytes:
        if hasattr(value, "backend_tokenizer") and hasattr(value, "special_tokens_map"):
            return self._tokenizer(value)
        if hasattr(value, "__wrapped__") and callable(value):
            return self._wrapped(value)
        try:
            made = value.__reduce_ex__(2)
        except Exception:
            return self._unreadable(value)
        if isinstance(made, str):
            return _hashed("global", _name_of(type(value)), made.encode())
        constructor, arguments, *rest = made
        parts = [list(part) if i and part is not None else part for i, part in enumerate(rest[:3])]
        return _hashed("object", self.of(type(value)), self.of(constructor), self.of(arguments), *map(self.of, parts))

    def _unreadable(self, value: Any) -> bytes:
        if self.version:
            return _hashed("unread", _name_of(type(value)), self.version.encode())
        name, *inside = self.where
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        through = f" ({' > '.join(inside)})" if inside else ""
        raise UnsupportedError(
            f"{name}{through} holds a {kind}, whose content cannot be hashed, so that a change of it would not be seen: do "
            "without it, or give `version=`, a text that you change whenever it changes."
        )


_READERS: list[tuple[Any, Callable[[_Reader, Any], bytes]]] = [
    (Row, _Reader._row),
    (torch.Tensor, _Reader._tensor),
    (np.ndarray, _Reader._array),
    (nn.Module, _Reader._module),
    (functools.partial, _Reader._partial),
    (types.FunctionType, _Reader._function),
    (types.MethodType, _Reader._method),
    (types.CodeType, _Reader._code),
    (types.ModuleType, _Reader._library),
    ((staticmethod, classmethod, property, functools.cached_property), _Reader._wrapped),
    (DESCRIPTORS, _Reader._builtin),
    (type, _Reader._class),
    (Mapping, _Reader._mapping),
    ((set, frozenset), _Reader._set),
    ((list, tuple), lambda reader, value: reader.listed("list", value)),
]


def _plain(value: Any) -> tuple[str, bytes] | None:
    """Kind and bytes of a value that holds no other."""
    if isinstance(value, Enum):
        return "enum", f"{type(value).__qualname__}.{value.name}".encode()
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, range, slice)):
        return type(value).__name__, repr(value).encode()
    if isinstance(value, str):
        return "str", value.encode("utf-8", "surrogatepass")
    if isinstance(value, (bytes, bytearray)):
        return "bytes", bytes(value)
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return f"numpy {value.dtype.str}", value.tobytes()
    if isinstance(value, PurePath):
        return "path", str(value).encode()
    if isinstance(value, (torch.dtype, torch.device)):
        return "torch", str(value).encode()
    return None


def _hashed(kind: str, *parts: bytes) -> bytes:
    digest = hashlib.sha256(kind.encode() + b"\0")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _bytes_of(array: np.ndarray) -> bytes:
    """A fast digest of an array's bytes: weights may be large, and nobody forges them."""
    return xxhash.xxh3_128_digest(array.data if array.size else b"")


def _globals_read(code: types.CodeType) -> set[str]:
    """Names that a function and the functions inside it look up as globals."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_globals_read(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _name_of(value: Any) -> bytes:
    owner = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
    return f"{owner}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}".encode()


def _file_of(value: type) -> str | None:
    return getattr(sys.modules.get(value.__module__), "__file__", None) if value.__module__ != "__main__" else "<main>"


_PLACES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).resolve().parents[1])}
)


@functools.lru_cache(4096)
def _installed(file: str | None) -> bool:
    """Whether a file belongs to the standard library, to an installed package or to leaveout; no file: built in."""
    return file is None or str(Path(file).resolve()).startswith(_PLACES) or file.startswith("<frozen")
