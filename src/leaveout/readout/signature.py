"""Signatures: one forward pass per row, a sum of outer products per channel, projected and stored.

    windows -> trunk -> hidden states at target positions -> left and right factors per part
            -> sum over positions of left (x) right -> projection -> row vectors -> stored form

A *part* is one outer product of a channel: `rh` and `gh` have one, `residual` one per output projection.
Source: arXiv 2604.16197 (its signature is the `paper` preset); whitening as in K-FAC, arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from leaveout.errors import MismatchError, UnsupportedError
from leaveout.projection import CountSketch, Hadamard, orthogonal
from leaveout.readout.codec import NUMBERS, Codec, Flat, Triples, low_rank, pairs
from leaveout.readout.families import Tap, find_taps, pull_back, recording
from leaveout.readout.logits import Head, Map, map_width
from leaveout.readout.model import Readout
from leaveout.readout.settings import Channel, Side, SignatureSettings
from leaveout.readout.tokens import Window

BATCH_TOKENS = 1024  # tokens of one forward pass, padding included
SMALL = 1e-8  # a factor shorter than this has no direction: it counts as zero where factors get unit length
PROJECT_NUMBERS = 2**22  # unprojected numbers that exist at once


@dataclass(frozen=True)
class Factor:
    """One side of a part: where its raw vectors come from, and what is done to them.

    raw       key of the raw vectors in `Positions.raw`
    whiten    name of the whitening matrix in the statistics, or None
    sketch    dense projection [size, width] applied after whitening, or None
    """

    raw: str
    size: int
    whiten: str | None = None
    sketch: Tensor | None = None

    @property
    def width(self) -> int:
        return self.size if self.sketch is None else self.sketch.shape[1]


@dataclass(frozen=True)
class Part:
    """One outer product of a channel and where it ends up in a stored row."""

    name: str
    weight: float
    left: Factor
    right: Factor
    hadamard: Hadamard | None = None

    @property
    def flat(self) -> int:
        return self.left.width * self.right.width

    @property
    def stored(self) -> int:
        return self.flat if self.hadamard is None else len(self.hadamard.outputs)


@dataclass
class Positions:
    """Raw vectors [positions, size] of a batch of windows, by key, and the slice of positions of each window."""

    raw: dict[str, Tensor]
    spans: list[slice]
    hidden: Tensor
    target: Tensor


def _stream(channel: Channel, side: Side, number: int, name: str) -> str:
    """Name of a projection's randomness; the hidden states of all channels share one."""
    return f"{channel.kind}/{number}/{name}/{side}" if side == "left" or name else "h"


def _whitening_name(raw: str, channel: Channel, side: Side) -> str | None:
    damping = channel.damping_of(side)
    return None if damping is None else f"{raw}.damping-{damping!r}"


class Signer:
    """Computes signatures of one readout with one set of settings.

    Memory: logits of a block (48 MiB, twice while searched), the padded batch (1,024 tokens through the trunk), and
    16 MiB of unprojected products at a time; nothing grows with the corpus.

    Raises: UnsupportedError for settings that this model cannot have.
    """

    def __init__(self, readout: Readout, settings: SignatureSettings) -> None:
        self.readout = readout
        self.settings = settings
        self.dtype = torch.float64 if readout.weight.dtype == torch.float64 else torch.float32
        self.head = Head(readout, settings, self.dtype)
        self.weight = readout.weight  # kept, as every use of the property makes another tensor
        self.maps: dict[str, Map] = {}  # raw left vectors are r @ maps[key]
        self.taps: dict[str, Tap] = {}
        self.final_norm: torch.nn.Module | None = None
        self.notes: list[str] = []
        self.whitening: dict[str, Tensor] = {}
        self._fallen_back: set[str] = set()  # kinds that replace residual channels of an unknown family
        parts = [part for number, channel in enumerate(settings.channels) for part in self._parts(number, channel)]
        fits = settings.final_width is not None and sum(part.flat for part in parts) <= settings.final_width
        rank, numbers = None if fits else settings.rank, NUMBERS[settings.storage]
        self.parts = parts if rank is not None else _share_width(parts, settings, self)
        self.codec: Codec = Flat(numbers, sum(part.stored for part in self.parts))
        if rank is not None:
            self.codec = Triples.of_rank(numbers, tuple((part.left.width, part.right.width) for part in parts), rank)

    def _parts(self, number: int, channel: Channel) -> list[Part]:
        if channel.kind == "residual":
            return self._residual_parts(number, channel)
        key = f"{channel.kind}{number}"
        left = self._rh_left(key, number, channel) if channel.kind == "rh" else self._gh_left(key, number, channel)
        return [
            Part(key, channel.weight, left, self._factor_of("h", self.readout.hidden_size, channel, "right", number))
        ]

    def _rh_left(self, key: str, number: int, channel: Channel) -> Factor:
        """r itself: its map is the projection, so that a whitening matrix is of the projected size.

        A vocabulary of at most `left_width` tokens is not projected.
        """
        vocabulary, width = self.readout.vocabulary, channel.left_width
        if width is None and vocabulary > 8192:
            raise UnsupportedError(
                f"An unprojected rh channel would hold {vocabulary} x {self.readout.hidden_size} numbers a row: "
                "set its left_width (1024, say)."
            )
        if width is None or width >= vocabulary:
            self.maps[key] = CountSketch.identity(vocabulary).to(self.readout.device, self.dtype)
        elif channel.projection == "countsketch":
            sketch = self._count_sketch(channel, "left", number, vocabulary)
            self.maps[key] = sketch.to(self.readout.device, self.dtype)
        else:
            dense = self._sketch(channel, "left", number, vocabulary)
            assert dense is not None
            self.maps[key] = dense
        return Factor(key, map_width(self.maps[key]), _whitening_name(key, channel, "left"))

    def _gh_left(self, key: str, number: int, channel: Channel) -> Factor:
        factor = self._factor_of(key, self.readout.hidden_size, channel, "left", number)
        if factor.whiten is not None or factor.sketch is None:
            self.maps[key] = self.weight
            return factor
        self.maps[key] = self.weight.to(self.dtype) @ factor.sketch  # once, so that only its narrow rows are touched
        return Factor(key, factor.width)

    def _residual_parts(self, number: int, channel: Channel) -> list[Part]:
        found = find_taps(self.readout, channel)
        if found is None:
            unknown = f"The layers of a {self.readout.family} model are not known, so the residual channel"
            gh = replace(
                channel, kind="gh", left_width=None, right_width=None, layers=None, depths=None, outputs=Channel.outputs
            )
            there = {other.kind for other in self.settings.channels} | self._fallen_back
            instead = [item for item in (replace(gh, kind="rh", left_width=256), gh) if item.kind not in there]
            self._fallen_back |= {item.kind for item in instead}
            names = " and ".join(item.kind for item in instead)
            self.notes.append(f"{unknown} falls back to {names}." if instead else f"{unknown} is left out.")
            return [part for i, item in enumerate(instead) for part in self._parts(1000 * (number + 1) + i, item)]
        taps, self.final_norm = found
        self.maps["g"] = self.weight
        parts = []
        for tap in taps:
            self.taps[tap.name] = tap
            left = self._factor_of("g.final", self.readout.hidden_size, channel, "left", number, tap.name)
            right = self._factor_of("a." + tap.name, tap.inputs, channel, "right", number, tap.name)
            parts.append(Part(f"residual{number}/{tap.name}", channel.weight, left, right))
        return parts

    def _factor_of(self, raw: str, size: int, channel: Channel, side: Side, number: int, name: str = "") -> Factor:
        """A factor that is whitened, then projected. A whitening matrix is named by its vectors and damping."""
        return Factor(raw, size, _whitening_name(raw, channel, side), self._sketch(channel, side, number, size, name))

    def _sketch(self, channel: Channel, side: Side, number: int, size: int, name: str = "") -> Tensor | None:
        width = channel.left_width if side == "left" else channel.right_width
        if width is None or (channel.projection == "orthogonal" and width >= size):
            return None  # never project where the size already fits
        if channel.projection == "orthogonal":
            dense = orthogonal(size, width, self.settings.seed, _stream(channel, side, number, name))
        else:
            dense = self._count_sketch(channel, side, number, size, name).matrix()
        return dense.to(self.readout.device, self.dtype)

    def _count_sketch(self, channel: Channel, side: Side, number: int, size: int, name: str = "") -> CountSketch:
        width = channel.left_width if side == "left" else channel.right_width
        assert width is not None
        return CountSketch.make(size, width, self.settings.seed, _stream(channel, side, number, name))

    # ---------------------------------------------------------------- positions of a batch

    @torch.no_grad()
    def positions(self, windows: Sequence[Window], redraw: torch.Generator | None = None) -> Positions:
        """Raw vectors of every target position of the windows, in their order.

        `redraw`: replace the targets by labels drawn from the model's own softmax, as second moments need.
        """
        device = self.readout.device
        length = max(len(window.ids) for window in windows)
        ids = torch.zeros(len(windows), length, dtype=torch.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
        counts = [len(window.positions) for window in windows]
        batch = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(counts))
        token = torch.tensor([position for window in windows for position in window.positions])
        target = ids[batch, token + 1].to(device)
        ids, batch, token = ids.to(device), batch.to(device), token.to(device)
        with recording(self._recorded(), ids.shape, batch, token) as recorder:
            hidden = self.readout.hidden(ids)[batch, token].to(self.dtype)
        if redraw is not None:
            target = self._draw(hidden, redraw)
        raw = {"h": hidden} | self._mapped(hidden, target)
        if self.final_norm is not None:
            g = raw.pop("g")
            raw["g.final"] = pull_back(self.final_norm, recorder.inputs[self.final_norm], g)
            for name, tap in self.taps.items():
                raw["a." + name] = recorder.inputs[tap.projection].to(self.dtype)
        ends = np.cumsum(counts).tolist()
        spans = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return Positions(raw, spans, hidden, target)

    def _recorded(self) -> list[torch.nn.Module]:
        final = [self.final_norm] if self.final_norm is not None else []
        return [*final, *(tap.projection for tap in self.taps.values())]

    def _mapped(self, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
        """r @ map for every map, over blocks of logits; maps that are one matrix are multiplied once."""
        owners: dict[int, str] = {}
        first = {key: owners.setdefault(id(one), key) for key, one in self.maps.items()}
        raw = {key: hidden.new_empty(len(hidden), map_width(self.maps[key])) for key in first.values()}
        for piece, residual in self.head.residuals(hidden, target):
            for key, product in raw.items():
                product[piece] = residual @ self.maps[key]
        return {key: raw[same] for key, same in first.items()}

    def _draw(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        for piece, logits in self.head.blocks(hidden):
            scores = logits.div_(self.settings.temperature)  # in its place, as all that follows
            ends = scores.sub_(scores.amax(1, keepdim=True)).exp_().cumsum_(1)
            uniform = torch.rand(len(ends), 1, generator=generator, dtype=ends.dtype).to(ends.device)
            drawn[piece] = (ends < uniform * ends[:, -1:]).sum(1)  # at most the last, however large the number
        return drawn

    # ---------------------------------------------------------------- factors and sums

    def factors(self, positions: Positions, part: Part) -> tuple[Tensor, Tensor]:
        """Left [positions, left width] and right [positions, right width] factors of a part, weight in the left."""
        left, right = (self._factor(positions.raw[side.raw], side) for side in (part.left, part.right))
        return (left if part.weight == 1.0 else left * part.weight), right

    def _factor(self, x: Tensor, side: Factor) -> Tensor:
        if side.whiten is not None:
            if side.whiten not in self.whitening:
                raise MismatchError(
                    "These settings whiten, but no statistics were given: run the statistics pass first."
                )
            x = x @ self.whitening[side.whiten]
        if side.sketch is not None:
            x = x @ side.sketch
        if self.settings.unit_positions:
            norm = x.norm(dim=1, keepdim=True)
            x = torch.where(norm <= SMALL, 0.0, x / norm)  # this way round, not-a-number stays visible
        return x

    @torch.no_grad()
    def window_vectors(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Vectors [windows, width] of a batch of windows, and their squared lengths [windows] before projection.

        Rows of singular triples have their lengths only where settings ask for unit length.
        """
        positions, codec = self.positions(windows), self.codec
        spans = positions.spans
        vectors, square = [], torch.zeros(len(windows), dtype=self.dtype, device=self.readout.device)
        for part in self.parts:
            left, right = self.factors(positions, part)
            if isinstance(codec, Triples):
                if self.settings.unit_length:
                    square += torch.stack([pairs(left[s], left[s], right[s], right[s]).sum() for s in spans])
                vectors.append(torch.stack([low_rank(left[s], right[s], codec.rank) for s in spans]))
                continue
            pieces = []
            group = max(1, PROJECT_NUMBERS // (part.hadamard.padded if part.hadamard else part.flat))
            for first in range(0, len(windows), group):
                flat = torch.stack([(left[s].t() @ right[s]).flatten() for s in spans[first : first + group]])
                square[first : first + group] += (flat * flat).sum(1)
                pieces.append(part.hadamard(flat) if part.hadamard else flat)
            vectors.append(torch.cat(pieces))
        return torch.cat(vectors, 1), square

    @torch.no_grad()
    def rows(self, windows: Sequence[Window], n_rows: int, advance: Callable[[int], object] | None = None) -> Tensor:
        """Unquantised row vectors [n_rows, width] of all the windows of rows 0 .. n_rows - 1.

        Windows run in batches of similar length; `advance(k)` is called when k more windows are done.
        """
        codec, unit = self.codec, self.settings.unit_length
        total = torch.zeros(n_rows, codec.width, dtype=self.dtype, device=self.readout.device)
        n_windows = np.bincount([window.row for window in windows], minlength=n_rows)
        for batch in batches(windows, self.readout.batch_class):
            vectors, square = self.window_vectors(batch)
            if unit:
                vectors = codec.divided(vectors, square.sqrt().clamp_min(1e-30))
            owner = torch.tensor([window.row for window in batch], device=self.readout.device)
            if isinstance(codec, Triples):
                for row, vector in zip(owner.tolist(), vectors, strict=True):
                    total[row] = codec.add(total[row], vector) if n_windows[row] > 1 else vector
            else:
                total.index_add_(0, owner, vectors)
            if advance is not None:
                advance(len(batch))
        if unit:
            lengths = codec.lengths(total)
            return torch.where(lengths[:, None] == 0, 0.0, codec.divided(total, lengths))
        if self.settings.length_power:
            targets = np.bincount(
                [window.row for window in windows], [len(window.positions) for window in windows], n_rows
            )
            total = codec.divided(total, torch.from_numpy(targets.clip(1) ** self.settings.length_power).to(total))
        return total


def batches(windows: Sequence[Window], kind: Callable[[int], int]) -> Iterator[list[Window]]:
    """Groups of windows of similar length, at most BATCH_TOKENS tokens each with padding, and of one kind of length."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        full = (len(batch) + 1) * len(batch[0].ids) > BATCH_TOKENS if batch else False
        if full or (batch and kind(len(window.ids)) != kind(len(batch[0].ids))):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _share_width(parts: list[Part], settings: SignatureSettings, signer: Signer) -> list[Part]:
    """Parts with a Hadamard projection where the sum of their sizes exceeds final_width.

    Equal shares; what a small part does not need goes to the others.
    """
    if settings.final_width is None or sum(part.flat for part in parts) <= settings.final_width:
        return parts
    budget, shares = settings.final_width, {}
    for left, part in zip(range(len(parts), 0, -1), sorted(parts, key=lambda part: part.flat), strict=True):
        shares[part.name] = min(part.flat, budget // left)
        budget -= shares[part.name]
    if min(shares.values()) < 1:
        raise ValueError(f"final_width {settings.final_width} is too small for {len(parts)} parts: raise it.")
    device = signer.readout.device
    return [
        part
        if shares[part.name] == part.flat
        else Part(
            part.name,
            part.weight,
            part.left,
            part.right,
            Hadamard.make(part.flat, shares[part.name], settings.seed, part.name).to(device, signer.dtype),
        )
        for part in parts
    ]
