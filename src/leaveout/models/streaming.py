"""A model whose blocks stay in their files: one at a time is read and applied to many batches, the next is read meanwhile.

Embedding, head and norms stay in memory. What a block is given beside its states (masks, rotary positions, embeddings of
its own) is what the model's own forward gives it: that runs once a batch with blocks that only hand their states on, and
once more behind the last block. So the numbers are those of the whole model, bit for bit. Called like any model, it reads
every block once.
"""

# Modules of transformers: what they hold has no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from leaveout.errors import FormatError, UnsupportedError
from leaveout.models.checks import evaluating

Item = TypeVar("Item")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WAVE = {"cpu": 16_384, "cuda": 131_072}
"""Tokens that go through the blocks together, if they fit: so many that reading a block takes little of its time."""
LEAST = 1024  # tokens that must fit
RENAMED = {"lm_head.weight": "embed_out.weight"}  # as GPT-NeoX's files call it


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes begin at `start`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Files:
    """The tensors in a directory's safetensors files, by name. Raises: FormatError for files that are damaged."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self.paths = _weight_files(directory)
        for path in self.paths:
            self.tensors |= _stored(path)

    @staticmethod
    def are_in(directory: Path) -> bool:
        return (directory / INDEX).is_file() or (directory / SINGLE).is_file()

    def n_bytes(self, dtype: torch.dtype | None) -> int:
        """Bytes of all tensors, once those of floating point have a dtype."""
        return sum(_bytes_in(one, dtype) for one in self.tensors.values())

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file."""
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]


def _weight_files(directory: Path) -> list[Path]:
    if not (directory / INDEX).is_file():
        return [directory / SINGLE]
    try:
        names = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(f"{directory / INDEX} is no list of weight files: get the model again.") from None
    paths = [directory / name for name in sorted(set(names))]
    if lacking := next((path for path in paths if not path.is_file()), None):
        raise FormatError(f"{lacking}, which {INDEX} names, is not there: get the model again.")
    return paths


def _stored(path: Path) -> dict[str, Stored]:
    """What a file's head says: 8 bytes with its length, JSON, then the tensors' bytes."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head: dict[str, Any] = json.loads(file.read(min(size, path.stat().st_size)))
        found = {
            name: Stored(path, STORED[one["dtype"]], tuple(one["shape"]), 8 + size + one["data_offsets"][0])
            for name, one in head.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError):
        raise FormatError(
            f"{path} is no safetensors file, or holds numbers of a kind that is not known here: get the model again."
        ) from None
    if not found or max(one.start + one.n_bytes for one in found.values()) > path.stat().st_size:
        raise FormatError(f"{path} is cut short: get the model again.")
    return found


def _bytes_in(stored: Stored, dtype: torch.dtype | None) -> int:
    wide = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
    return math.prod(stored.shape) * wide.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def placed(flat: Tensor, stored: Stored, dtype: torch.dtype) -> Tensor:
    """Room for a tensor in flat bytes that are 64 more than it needs. Where nothing is converted it lies as far from a
    multiple of 64 as in its file: so it does in a whole model, whose files are mapped, and some sums depend on it."""
    shift = stored.start % 64 if dtype == stored.dtype and stored.start % dtype.itemsize == 0 else 0
    start = (shift - flat.data_ptr()) % 64
    size = math.prod(stored.shape) * dtype.itemsize
    return flat[start : start + size].view(dtype).view(stored.shape)


def room_for(stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bytes for `placed`."""
    return torch.empty(math.prod(stored.shape) * dtype.itemsize + 64, dtype=torch.uint8, device=device)


def read_tensor(stored: Stored, out: Tensor) -> Tensor:
    """`out` with the bytes of a tensor of its dtype on the CPU; read, not mapped, so that it is aligned and goes with it."""
    view, done = _bytes_of(out), 0
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while done < len(view):
            if not (count := file.readinto(view[done : done + 2**30])):
                raise FormatError(f"{stored.file} became shorter: leave the model's files alone meanwhile.")
            done += count
    return out


# ---------------------------------------------------------------- what waits


class Waiting:
    """Room for tensors that wait: in memory as far as they fit, the others in a file that goes with it."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.file: Any = None

    def shelf(self) -> Shelf:
        return Shelf(self)

    def put(self, tensor: Tensor) -> Tensor | tuple[int, Tensor]:
        if tensor.nbytes <= self.left:
            self.left -= tensor.nbytes
            return tensor
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  # as long as anything waits in it
            weakref.finalize(self, self.file.close)
        start = self.file.seek(0, os.SEEK_END)
        self.file.write(_bytes_of(tensor.contiguous().cpu()))
        return start, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def get(self, kept: Tensor | tuple[int, Tensor], device: torch.device) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        start, like = kept
        found = torch.empty(like.shape, dtype=like.dtype)
        self.file.seek(start)
        self.file.readinto(_bytes_of(found))
        return found.to(device)


class Shelf(MutableMapping[Any, Tensor]):
    """A dict of tensors some of which wait in a file."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting
        self.kept: dict[Any, tuple[Tensor | tuple[int, Tensor], torch.device]] = {}

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        self.kept[key] = self.waiting.put(tensor), tensor.device

    def __getitem__(self, key: Any) -> Tensor:
        return self.waiting.get(*self.kept[key])

    def __delitem__(self, key: Any) -> None:
        del self.kept[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Leaf:
    """A parameter of a block: where it belongs, what stands there while it is not here, and where it is stored."""

    owner: nn.Module
    name: str
    path: str  # below the block
    absent: nn.Parameter
    stored: Stored


class _Block:
    """The forward of a block whose weights come and go."""

    comes_and_goes = True  # see identity: no change that somebody made

    def __init__(self, stream: LayerStream, number: int, forward: Callable[..., Any]) -> None:
        self.stream = stream
        self.number = number
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stream.call(self.number, self.forward, args, kwargs)


@dataclass
class _Call:
    """What the model's own forward gives a block beside its states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # whether the states come as `hidden_states`

    def to(self, block: nn.Module, states: Tensor) -> Any:
        return block(**self.kwargs, hidden_states=states) if self.named else block(states, *self.args, **self.kwargs)


class LayerStream:
    """The blocks of a model that were left in their files.

    Made by `stream_layers`. `limit`: bytes for weights and for what waits; the program and the work on one batch come
    beside it.

    Raises: UnsupportedError for a model whose blocks cannot be found; ValueError where not even one block fits.
    """

    def __init__(self, lm: nn.Module, stored: Mapping[str, Stored], files: Files, device: torch.device, limit: int):
        self.lm = lm
        self.files = files
        self.stored = stored
        self.device = device
        self.name, self.blocks = blocks_of(lm)
        self.leaves = [_leaves(f"{self.name}.{number}", block, stored) for number, block in enumerate(self.blocks)]
        self.slots: tuple[dict[str, Tensor], ...] = ({}, {})  # bytes of two blocks
        self.weights: tuple[dict[str, nn.Parameter], ...] = ({}, {})  # in these bytes
        self.raw = torch.empty(0, dtype=torch.uint8)  # bytes of a tensor whose dtype or device differs
        self.pool = ThreadPoolExecutor(1, "next block")
        self.ahead: tuple[int, Future[None]] | None = None
        self.mode: Literal["whole", "hand on", "apply", "end"] = "whole"
        self.width: int | None = None  # of the tuples that blocks give; 0: they give their states alone
        self.last: Any = None  # states that are handed on, or those behind the last block
        self.calls: list[_Call] = []
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.used = [torch.cuda.Event() for _ in self.slots] if device.type == "cuda" else []
        self._plan(limit)
        for number, block in enumerate(self.blocks):
            block.forward = _Block(self, number, block.forward)  # pyright: ignore[reportAttributeAccessIssue]

    def _plan(self, limit: int) -> None:
        """How many tokens make a wave, and the bytes of what may wait beside their states."""
        config: Any = self.lm.config.get_text_config()  # pyright: ignore
        inside = {id(leaf.absent) for leaves in self.leaves for leaf in leaves}
        resident = sum(one.nbytes for one in {id(p): p for p in self.lm.parameters()}.values() if id(one) not in inside)
        sizes = [sum(leaf.absent.nbytes for leaf in leaves) for leaves in self.leaves]
        raw = [one.stored.n_bytes for leaves in self.leaves for one in leaves if not self._straight(one)]
        self.fixed = resident + 2 * max(sizes) + max(raw, default=0)
        self.token_bytes = 2 * config.hidden_size * next(self.lm.parameters()).element_size()
        needed = self.fixed + LEAST * self.token_bytes
        if limit < needed:
            raise ValueError(
                f"{_rounded_up(limit)} may be used, and what stays in memory of this model, two of its blocks and {LEAST} tokens "
                f"need {_rounded_up(needed)}: give --max-memory at least that."
            )
        self.limit, room = limit, limit - self.fixed
        self.wave_tokens = min(WAVE.get(self.device.type, WAVE["cpu"]), room // self.token_bytes)
        self.waiting_bytes = room - self.wave_tokens * self.token_bytes

    def _straight(self, leaf: _Leaf) -> bool:
        """Whether a tensor is read to where it is used."""
        return self.device.type == "cpu" and leaf.stored.dtype == leaf.absent.dtype

    # ------------------------------------------------------------ one block after the other

    def _load(self, number: int) -> None:
        """Reads a block into its slot."""
        slot = self.slots[number % 2]
        if self.copies is not None:
            self.copies.wait_event(self.used[number % 2])
        for leaf in self.leaves[number]:
            dtype, flat = leaf.absent.dtype, slot.get(leaf.path)
            if flat is None or len(flat) < leaf.absent.nbytes + 64:
                flat = slot[leaf.path] = room_for(leaf.stored, dtype, self.device)
                if self.copies is not None:  # these bytes may have been those of something that is still computed with
                    self.copies.wait_stream(torch.cuda.current_stream(self.device))
            found = placed(flat, leaf.stored, dtype)
            if self._straight(leaf):
                read_tensor(leaf.stored, found)
            else:
                self._copy(leaf.stored, found)
            self.weights[number % 2][leaf.path] = nn.Parameter(found, requires_grad=False)

    def _copy(self, stored: Stored, out: Tensor) -> None:
        if len(self.raw) < stored.n_bytes:
            self.raw = torch.empty(stored.n_bytes, dtype=torch.uint8, pin_memory=self.copies is not None)
        raw = read_tensor(stored, self.raw[: stored.n_bytes].view(stored.dtype)).view(stored.shape)
        if self.copies is None:
            out.copy_(raw)
            return
        with torch.cuda.stream(self.copies):
            out.copy_(raw, non_blocking=True)
        self.copies.synchronize()  # this thread alone waits: the bytes are overwritten next

    def _fetch(self, number: int) -> Future[None]:
        """The reading of a block, begun now if it is not yet under way."""
        if self.ahead is None or self.ahead[0] != number:
            if self.ahead is not None:
                self.ahead[1].exception()  # of work that was given up
            self.ahead = number, self.pool.submit(self._load, number)
        return self.ahead[1]

    @contextmanager
    def _filled(self, number: int) -> Generator[None]:
        """A block with its weights, while the next one is read."""
        self._fetch(number).result()
        self.ahead = None
        if number + 1 < len(self.blocks):
            self._fetch(number + 1)
        leaves, weights = self.leaves[number], self.weights[number % 2]
        for leaf in leaves:
            leaf.owner._parameters[leaf.name] = weights[leaf.path]  # pyright: ignore[reportPrivateUsage]
        try:
            yield
        finally:
            for leaf in leaves:
                leaf.owner._parameters[leaf.name] = leaf.absent  # pyright: ignore[reportPrivateUsage]
            if self.used:
                self.used[number % 2].record(torch.cuda.current_stream(self.device))

    def call(self, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward of a block gives: see `_Block`."""
        if self.mode == "apply":
            return forward(*args, **kwargs)
        if self.mode == "whole":
            with self._filled(number):
                found = forward(*args, **kwargs)
            self.width = len(found) if isinstance(found, tuple) else 0
            return found
        named = "hidden_states" in kwargs
        states = kwargs["hidden_states"] if named else args[0]
        if self.mode == "hand on":
            if number and states is not self.last:
                self._refuse()
            self.calls.append(_Call(args if named else args[1:], _without_states(kwargs), named))
            self.last = states
        elif number == len(self.blocks) - 1:
            states = self.last
        return (states, *(None for _ in range(1, self.width))) if self.width else states

    def _refuse(self) -> None:
        raise UnsupportedError(
            f"{type(self.lm).__name__} does more between its blocks than to hand their states on, so that they can't be "
            "streamed: load it whole (offload none)."
        )

    @contextmanager
    def _as(self, mode: Literal["hand on", "apply", "end"]) -> Generator[None]:
        with evaluating(self.lm):
            self.mode = mode
            try:
                yield
            finally:
                self.mode = "whole"

    def _trunk(self, ids: Tensor) -> Any:
        trunk: Any = self.lm.base_model
        return trunk(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    @torch.no_grad()
    def states(
        self, many: Sequence[Tensor], watch: Callable[[int], AbstractContextManager[Any]] = lambda number: nullcontext()
    ) -> Iterator[Tensor]:
        """Last hidden states [rows, tokens, hidden] of each batch of token ids [rows, tokens]; all blocks are read once.

        watch   what surrounds every piece of the forward pass of a batch, by its number
        """
        if self.width is None:
            self._trunk(many[0][:1, :1])  # shows what a block gives
        self._fetch(0)
        states: list[Tensor] = []
        calls: list[list[_Call]] = []
        for ids in many:
            self.calls = []
            with self._as("hand on"):
                self._trunk(ids)
                states.append(self.last)
            if len(self.calls) != len(self.blocks):
                self._refuse()
            calls.append(self.calls[::-1])
        for number, block in enumerate(self.blocks):
            with self._as("apply"), self._filled(number):
                for at, own in enumerate(calls):
                    with watch(at):
                        found = own.pop().to(block, states[at])
                    states[at] = found[0] if isinstance(found, tuple) else found
        for at, ids in enumerate(many):
            with self._as("end"), watch(at):
                self.last = states[at]
                found = self._trunk(ids)
            states[at] = self.last = torch.empty(0)  # let go of
            yield found

    def waves(self, items: Iterable[Item], tokens: Callable[[Item], int]) -> Iterator[list[Item]]:
        """Items that go through the blocks together: as many as `wave_tokens` allow, at least one."""
        wave, total = list[Item](), 0
        for item in items:
            size = tokens(item)
            if wave and total + size > self.wave_tokens:
                yield wave
                wave, total = [], 0
            wave.append(item)
            total += size
        if wave:
            yield wave

    def waiting(self) -> Waiting:
        """Room for what a wave keeps beside its states."""
        return Waiting(self.waiting_bytes)

    # ------------------------------------------------------------ identity

    def numbers(self, name: str) -> Tensor:
        """A weight of the model, read from its file."""
        stored = self.stored[name]
        return read_tensor(stored, torch.empty(stored.shape, dtype=stored.dtype))

    def stamp(self) -> list[tuple[str, int, int]]:
        """What is cheap to compare of the blocks."""
        return self.files.stamp()


def _without_states(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _rounded_up(n_bytes: int) -> str:
    unit, name = (10**9, "GB") if n_bytes >= 10**8 else (10**6, "MB")
    return f"{math.ceil(100 * n_bytes / unit) / 100:.2f} {name}"


def blocks_of(lm: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and members of the list of a model's blocks. Raises: UnsupportedError where there is none."""
    count = lm.config.get_text_config().num_hidden_layers  # pyright: ignore
    lists = [(name, list(module)) for name, module in lm.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, blocks) for name, blocks in lists if len(blocks) == count]  # the outermost first
    if not found or len({id(block) for block in found[0][1]}) < count:
        raise UnsupportedError(
            f"{type(lm).__name__} keeps no list of {count} blocks of their own, so that they can't be streamed: load it "
            "whole (offload none)."
        )
    return found[0]


def _leaves(name: str, block: nn.Module, stored: Mapping[str, Stored]) -> list[_Leaf]:
    return [
        _Leaf(module, leaf, f"{path}.{leaf}", parameter, stored[f"{name}.{path}.{leaf}" if path else f"{name}.{leaf}"])
        for path, module in block.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    ]


# ---------------------------------------------------------------- making one


@contextmanager
def without_weights() -> Generator[None]:
    """Modules that are made inside have parameters without numbers; buffers, which no file has, are computed."""
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        own(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own


def stream_layers(lm: Any, name: str, files: Files, device: torch.device, limit: int) -> LayerStream:
    """The blocks of a model without weights, all else of which is read now.

    Raises: FormatError for files that lack weights under the model's own names, and as `LayerStream`.
    """
    kind = type(lm).__name__
    half = next(lm.parameters()).dtype
    if half.itemsize < 4 and (lm._keep_in_fp32_modules_strict or (half == torch.float16 and lm._keep_in_fp32_modules)):
        raise UnsupportedError(f"{kind} keeps some weights in float32: load it whole (offload none), or in float32.")
    place, _ = blocks_of(lm)
    kept: dict[str, Tensor] = lm.state_dict(keep_vars=True)
    aliases = _aliases(kept)
    stored = {key: one for key in kept if (one := _find(lm, key, aliases[id(kept[key])], files)) is not None}
    parameters = {key for key, tensor in kept.items() if isinstance(tensor, nn.Parameter)}
    wrong = (key for key in kept if key in stored and stored[key].shape != tuple(kept[key].shape))
    if lacking := next(wrong, None) or min(parameters - set(stored), default=None):
        raise FormatError(
            f"{name} lacks the weights {lacking!r} under the names and in the shapes of {kind}: give a whole model as "
            "save_pretrained writes it, or load it whole (offload none)."
        )
    done: dict[int, Tensor] = {}
    state = {}
    for key, one in stored.items():
        if key in parameters and key.startswith(f"{place}."):
            continue
        like = kept[key]
        if id(like) not in done:
            tensor = read_tensor(one, placed(room_for(one, one.dtype, torch.device("cpu")), one, one.dtype))
            done[id(like)] = tensor.to(device, like.dtype)
        state[key] = done[id(like)]
    lm.load_state_dict(state, strict=False, assign=True)
    lm.tie_weights()
    for module in lm.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    lm.eval()
    return LayerStream(lm, stored, files, device, limit)


def _aliases(kept: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The names of every tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in kept.items():
        found.setdefault(id(tensor), []).append(name)
    return found


def _find(lm: Any, name: str, aliases: Sequence[str], files: Files) -> Stored | None:
    """A tensor under one of its names, or as a model without head has it."""
    prefix = f"{lm.base_model_prefix}."
    for one in (name, *aliases, RENAMED.get(name, name)):
        for key in (one, one.removeprefix(prefix)):
            if key in files.tensors:
                return files.tensors[key]
    return None


@contextmanager
def standing_in(blocks: Sequence[nn.Module], call: Callable[..., Any]) -> Generator[None]:
    """While call(number, forward, ...) stands in for the forward of each block."""
    before = [block.__dict__.get("forward") for block in blocks]
    for number, block in enumerate(blocks):
        block.forward = functools.partial(call, number, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
