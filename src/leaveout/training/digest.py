"""Digests of all that a recipe or a query may hold: data, rows, modules, and functions with everything they read.

Equal content gives equal digests, in any process of the same Python version. A function is its bytecode, its defaults, the
cells of its closure, its attributes, and the globals it reads by name, each by content; an object is its class and what
pickle would store of it. Of a module of the user's count the attributes that are read, or else its file and those of the
modules that it uses. What belongs to the standard library or to an installed package counts by its name. The order of a
mapping counts, as whoever goes through it meets it; that of a set does not.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.util
import json
import os
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
        if (read := _EXACT.get(type(value))) is not None:
            return read(self, value)
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
        return _hashed("mapping", *(_hashed("item", self.of(k), self.part(str(k), v)) for k, v in value.items()))

    def _set(self, value: Collection[Any]) -> bytes:
        return _hashed("set", *sorted(self.of(item) for item in value))

    def _row(self, row: Row) -> bytes:
        given = [row.raw[name] for name in ("input_ids", "labels") if name in row.raw]
        own = [row.id, row.text, row.responses, row.messages, row.unit, row.content_hash]
        return self.listed("row", own + given)

    def _array(self, array: np.ndarray) -> bytes:
        if array.dtype.hasobject:
            return self.listed(f"objects {array.shape}", array.ravel().tolist())
        kind = array.dtype.str if array.dtype.names is None else str(array.dtype.descr)
        return _hashed("array", f"{kind} {array.shape}".encode(), _bytes_of(np.ascontiguousarray(array)))

    def _tensor(self, tensor: torch.Tensor) -> bytes:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            return self._unreadable(tensor)
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
        raw = flat.view(torch.uint8).numpy()
        return _hashed("tensor", f"{tensor.dtype} {tuple(tensor.shape)}".encode(), _bytes_of(raw))

    # --- functions and classes -----------------------------------------------------------------------------------

    def _partial(self, value: functools.partial[Any]) -> bytes:
        return _hashed("partial", self.of(value.func), self.of(value.args), self.named("keywords", value.keywords))

    def _function(self, function: types.FunctionType) -> bytes:
        code, cells = function.__code__, {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # not yet filled
                cells[name] = None
        if _installed(code.co_filename):
            return _hashed("installed", _name_of(function), self.named("closure", cells))
        return _hashed(
            "function", self.of(code), self.of(function.__defaults__), self.of(function.__kwdefaults__),
            self.named("closure", cells), self.named("globals", _read_by(code, function.__globals__)),
            self.named("attributes", vars(function)),
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
        if not _is_own(value):
            return _hashed("library", value.__name__.encode())
        file = getattr(value, "__file__", None)
        if file is None:  # a directory of modules
            return _hashed("directory", value.__name__.encode())
        content = Path(file).read_bytes()
        imported = {}
        if file.endswith(".py"):
            read = _read_by(compile(content, file, "exec"), vars(value))
            imported = {name: part for name, part in read.items() if name.startswith("import ")}
        used = {
            name: sys.modules.get(getattr(part, "__module__", None) or "", part)
            for name, part in vars(value).items()
            if isinstance(part, (types.ModuleType, types.FunctionType, type))
        }
        others = {name: part for name, part in used.items() if part is not value and _is_own(part)}
        return _hashed("file", hashlib.sha256(content).digest(), self.named("modules", {**others, **imported}))

    # --- objects -------------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> bytes:
        """Classes, attributes and hooks of all submodules, parameters and buffers; what has several names, by the first."""
        tensors, submodules, first = dict[str, Any](), list[bytes](), dict[int, str]()
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                before = first.setdefault(id(tensor), name)
                tensors[name] = tensor if before == name else before
        for name, part in module.named_modules(remove_duplicate=False):
            before = first.setdefault(id(part), name)
            content = self._attributes(part) if before == name else before.encode()
            submodules.append(_hashed(f"submodule {name}", content))
        return _hashed("module", self.named("tensors", tensors), *submodules)

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
        inner.open = self.open
        for name in sorted(own):
            out += [name.encode(), inner.of(own[name])]
        return _hashed("installed", known, *out)

    def _tokenizer(self, value: Any) -> bytes:
        """A fast tokenizer without what its last call left in it (truncation and padding)."""
        backend = json.loads(value.backend_tokenizer.to_str())
        kept = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
        more = [str(value.special_tokens_map), value.padding_side, getattr(value, "chat_template", None)]
        return _hashed("tokenizer", json.dumps(kept, sort_keys=True).encode(), self.of(more))

    def _member(self, value: Enum) -> bytes:
        kind = type(value)
        methods = {name: part for name, part in vars(kind).items() if isinstance(part, _METHODS)}
        return _hashed("enum", _name_of(kind), value.name.encode(), self.of(value.value), self.named("", methods))

    def _object(self, value: Any) -> bytes:
        if hasattr(value, "backend_tokenizer") and hasattr(value, "special_tokens_map"):
            return self._tokenizer(value)
        if hasattr(value, "__wrapped__") and callable(value):
            return self._wrapped(value)
        try:
            made = copyreg.dispatch_table.get(type(value), lambda v: v.__reduce_ex__(2))(value)
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
    (nn.Module, _Reader._module),
    (functools.partial, _Reader._partial),
    (types.FunctionType, _Reader._function),
    (types.MethodType, _Reader._method),
    (types.CodeType, _Reader._code),
    (types.ModuleType, _Reader._library),
    ((staticmethod, classmethod, property, functools.cached_property), _Reader._wrapped),
    (DESCRIPTORS, _Reader._builtin),
    (type, _Reader._class),
    (Enum, _Reader._member),
]
_EXACT: dict[type, Callable[[_Reader, Any], bytes]] = {
    dict: _Reader._mapping,
    types.MappingProxyType: _Reader._mapping,
    list: lambda reader, value: reader.listed("list", value),
    tuple: lambda reader, value: reader.listed("tuple", value),
    slice: lambda reader, value: reader.listed("slice", [value.start, value.stop, value.step]),
    set: _Reader._set,
    frozenset: _Reader._set,
    np.ndarray: _Reader._array,
    np.memmap: _Reader._array,
}
"""What holds others, unless a class of its own makes something else of it."""
_METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


def _plain(value: Any) -> tuple[str, bytes] | None:
    """Kind and bytes of a value that holds no other."""
    kind = type(value)
    if value is None or value is Ellipsis or kind in (bool, int, float, complex, range):
        return kind.__name__, repr(value).encode()
    if kind is str:
        return "str", value.encode("utf-8", "surrogatepass")
    if kind in (bytes, bytearray):
        return "bytes", bytes(value)
    if isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.names is None:
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


def _read_by(code: types.CodeType, space: Mapping[str, Any]) -> dict[str, Any]:
    """What a function and the functions inside it read of their globals and import, by name; of the user's own modules
    the attributes that are read.
    """
    found, steps = dict[str, Any](), list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        name = str(step.argval)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in space:
            value = space[name]
            for inner in steps[place + 1 :]:
                attribute = str(inner.argval)
                reads = inner.opname in ("LOAD_ATTR", "LOAD_METHOD")
                if not reads or not _is_own(value) or not hasattr(value, attribute):
                    break
                name, value = f"{name}.{attribute}", getattr(value, attribute)
            found[name] = value
        elif step.opname == "IMPORT_NAME":
            level = steps[place - 2].argval
            found[f"import {'.' * level}{name}"] = _imported("." * level + name, space.get("__package__"))
    for inner in code.co_consts:
        found |= _read_by(inner, space) if isinstance(inner, types.CodeType) else {}
    return found


def _imported(name: str, package: str | None) -> Any:
    """A module that a function imports when it runs: itself if it is the user's own, else its name."""
    try:
        full = importlib.util.resolve_name(name, package)
        spec = importlib.util.find_spec(full)
        return full if spec is None or _installed(spec.origin) else importlib.import_module(full)
    except (ImportError, ValueError):  # it may be guarded by a try
        return name


def _is_own(value: Any) -> bool:
    """Whether a value is a module of the user's, a file or a directory of files."""
    if not isinstance(value, types.ModuleType):
        return False
    file: str | None = getattr(value, "__file__", None)
    places = [file] if file else list(getattr(value, "__path__", []))
    return any(not _installed(place) and Path(place).exists() for place in places)


def _name_of(value: Any) -> bytes:
    owner = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", "")
    return f"{owner}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}".encode()


def _file_of(value: type) -> str | None:
    return getattr(sys.modules.get(value.__module__), "__file__", None) if value.__module__ != "__main__" else "<main>"


_PLACES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).resolve().parents[1])}
)
"""Directories of what is installed."""


@functools.lru_cache(4096)
def _installed(file: str | None) -> bool:
    """Whether a file belongs to the standard library, to an installed package or to leaveout; no file: built in."""
    if file is None or file in ("built-in", "frozen") or file.startswith("<frozen"):
        return True
    return str(Path(file).resolve()).startswith(tuple(place + os.sep for place in _PLACES))
