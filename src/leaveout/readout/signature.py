"""Signatures: one forward pass per row, a sum of outer products per channel, in the form that is stored.

    windows -> trunk -> hidden states at target positions -> left and right factors per part
            -> sum over positions of left (x) right: its entries, or its largest singular triples -> codec

A *part* is one outer product of a channel: `rh` and `gh` have one, `residual` one per output projection.
Source: arXiv 2604.16197 (its signature is the `paper` preset); whitening as in K-FAC, arXiv 1503.05671.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Probe
from leaveout.corpus.behaviour import Measure, measured
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models import Fetched, sent
from leaveout.projection import CountSketch, orthogonal
from leaveout.readout.codec import Codec, chosen_codec, short_codec
from leaveout.readout.families import Recorder, Tap, block_of, find_taps, pull_back, recording
from leaveout.readout.forms import Factors, Triples, low_rank, low_ranks, squared_length
from leaveout.readout.halves import halves, multiplies_halves, product_right
from leaveout.readout.limits import Limits
from leaveout.readout.logits import Head, Map, map_width, wide_product
from leaveout.readout.model import Readout
from leaveout.readout.preferences import Preferences, margins, with_references
from leaveout.readout.settings import Channel, Side, SignatureSettings
from leaveout.readout.tokens import Window, batches, padded_tokens, positions_in
from leaveout.readout.wide import Root, WideRoot

SMALL = 1e-8  # a factor shorter than this has no direction: it counts as zero where factors get unit length
ROW_RANK = 48  # singular triples of each part from which a row's stored ones are chosen
SIDES = ("", "prompt.")  # of a row, before the names of their arrays
QUERY_RANK = 64  # those of a query: all there are, up to 64 learned tokens


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
    def ordered(self) -> bool:
        """Whether its first numbers are those of the largest moments."""
        return self.whiten is not None and self.sketch is None

    @property
    def width(self) -> int:
        return self.size if self.sketch is None else self.sketch.shape[1]


@dataclass(frozen=True)
class Part:
    """One outer product of a channel."""

    name: str
    weight: float
    left: Factor
    right: Factor


@dataclass(frozen=True)
class Passed:
    """A batch of windows after the trunk.

    Shapes: ids [windows, tokens]; hidden [positions, hidden], in the model's dtype.
    """

    windows: list[Window]
    ids: Tensor
    recorder: Recorder
    hidden: Tensor


@dataclass
class Positions:
    """Raw vectors [positions, size] of a batch of windows, by key, and the slice of positions of each side of a window.

    `sign` [positions, 1]: of each position's gradient in its row's; None: all count as they are.
    """

    raw: dict[str, Tensor]
    spans: list[slice]
    hidden: Tensor
    target: Tensor
    sign: Tensor | None = None


def _stream(channel: Channel, side: Side, number: int, name: str) -> str:
    """Name of a projection's randomness; the hidden states of all channels share one."""
    return f"{channel.kind}/{number}/{name}/{side}" if side == "left" or name else "h"


def _whitening_name(raw: str, channel: Channel, side: Side) -> str | None:
    damping = channel.damping_of(side)
    return None if damping is None else f"{raw}.damping-{damping!r}"


class Signer:
    """Computes signatures of one readout with one set of settings.

    `rank`: singular triples of each part that a row has before it is stored, where its form is `Triples`.
    Memory: logits of a block, twice while searched, the padded batch on its way through the trunk, and the rows of that batch
    before they are encoded, each as large as `limits` allow; nothing grows with the corpus.

    Raises: UnsupportedError for settings that this model cannot have.
    """

    def __init__(
        self,
        readout: Readout,
        settings: SignatureSettings,
        rank: int = ROW_RANK,
        preferences: Preferences = Preferences(),  # noqa: B008  # frozen
    ) -> None:
        self.rank, self.preferences = rank, preferences
        self.readout = readout
        self.settings = settings
        self.dtype = torch.float64 if readout.weight.dtype == torch.float64 else torch.float32
        self.weight = readout.weight  # kept, as every use of the property makes another tensor
        self.in_halves = multiplies_halves(self.weight.device, self.weight.dtype)
        self.maps: dict[str, Map] = {}  # raw left vectors are r @ maps[key]
        self.taps: dict[str, Tap] = {}
        self.final_norm: torch.nn.Module | None = None
        self.notes: list[str] = []
        self.whitening: dict[str, Root] = {}
        self._halved: dict[str, tuple[Tensor, Tensor]] = {}  # whitening matrices and their halves
        self.measure: Measure | None = None  # see `asking`
        self._sketched: dict[str, Tensor] = {}  # sketches that are part of a map
        self._fallen_back: set[str] = set()  # kinds that replace residual channels of an unknown family
        self.parts = [part for number, channel in enumerate(settings.channels) for part in self._parts(number, channel)]
        sizes = tuple((part.left.width, part.right.width) for part in self.parts)
        ordered = tuple((part.left.ordered, part.right.ordered) for part in self.parts)
        self.sides = settings.sides
        self.codec: Codec = chosen_codec(sizes, ordered, settings.of_side)
        self.short: Codec | None = short_codec(sizes, ordered, settings.of_side, self.codec)
        self.form = self.codec.form  # of one side
        triples = isinstance(self.form, Triples)
        numbers = sum(rank * (left + right) if triples else left * right for left, right in sizes)
        sides = sum(side.size for part in self.parts for side in (part.left, part.right))
        self.limits = Limits.of(
            readout.device, 16 * sides, 4 * numbers * self.sides
        )  # raw, widened, whitened, filled up
        self.head = Head(readout, settings, self.dtype, self.limits)

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
            self.maps[key] = self._map(CountSketch.identity(vocabulary))
        elif channel.projection == "countsketch":
            self.maps[key] = self._map(self._count_sketch(channel, "left", number, vocabulary))
        else:
            dense = self._sketch(channel, "left", number, vocabulary)
            assert dense is not None
            self.maps[key] = dense
        return Factor(key, map_width(self.maps[key]), _whitening_name(key, channel, "left"))

    def _map(self, sketch: CountSketch) -> Map:
        """A sketch as the device takes it: scattered additions on a CPU; elsewhere they would come in any order, and a matrix
        of signs, which a half holds, is as fast.
        """
        device = self.readout.device
        if device.type == "cpu":
            return sketch.to(device, self.dtype)
        dense = self.weight.dtype if self.in_halves and self.settings.support is None else self.dtype
        return sketch.matrix().to(device, dense)

    def _gh_left(self, key: str, number: int, channel: Channel) -> Factor:
        factor = self._factor_of(key, self.readout.hidden_size, channel, "left", number)
        if factor.whiten is not None or factor.sketch is None:
            self.maps[key] = self.weight
            return factor
        self._sketched[key] = factor.sketch
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

    def passed(self, batches: Iterable[list[Window]]) -> Iterator[Passed]:
        """What the trunk gives for each batch of windows, in order; streamed blocks are read once for many batches."""
        modules, stream = self._recorded(), self.readout.stream
        if stream is None:
            for batch in batches:
                ids, recorder = self._asked(batch)
                ids = sent(ids, self.readout.device)
                with torch.no_grad(), recording(modules, recorder):
                    hidden = recorder.at(self.readout.hidden(ids))
                yield Passed(batch, ids, recorder, hidden)
            return
        for wave in stream.waves(batches, padded_tokens):
            asked, waiting = dict(enumerate(map(self._asked, wave))), stream.waiting()
            for _, recorder in asked.values():
                recorder.inputs = waiting.shelf()
            inputs = [ids for ids, _ in asked.values()]
            states = stream.states(inputs, lambda at, asked=asked: recording(modules, asked[at][1]))
            for at, (batch, hidden) in enumerate(zip(wave, states, strict=True)):
                ids, recorder = asked.pop(at)
                yield Passed(batch, ids, recorder, recorder.at(hidden))

    def _asked(self, windows: Sequence[Window]) -> tuple[Tensor, Recorder]:
        """Token ids [windows, tokens], and what records at the target positions."""
        device = self.readout.device
        ids, batch, token = positions_in(windows)
        return ids, Recorder(ids.shape, sent(batch, device), sent(token, device))

    @torch.no_grad()
    def positions(self, batch: Sequence[Window] | Passed, redraw: torch.Generator | None = None) -> Positions:
        """Raw vectors of every target position of a batch of windows, in their order.

        `redraw`: replace the targets by labels drawn from the model's own softmax, as second moments need.
        """
        passed = batch if isinstance(batch, Passed) else next(self.passed([list(batch)]))
        recorder, hidden = passed.recorder, passed.hidden.to(self.dtype)
        target = sent(passed.ids, hidden.device)[recorder.batch, recorder.token + 1]
        if redraw is not None:
            target = self._draw(hidden, redraw)
        raw = {"h": hidden} | self._left(hidden, target)
        block = self.measure.block if isinstance(self.measure, Probe) else None
        if self.final_norm is not None:
            g = raw.pop("g")
            raw["g.final"] = g if block is not None else pull_back(self.final_norm, recorder.inputs[self.final_norm], g)
            for name, tap in self.taps.items():
                x = recorder.inputs[tap.projection]
                x = x if block is None or tap.block <= block else torch.zeros_like(x)
                raw["a." + name] = x if self.in_halves else x.to(self.dtype)
        ends = np.cumsum([len(side) for window in passed.windows for side in window.sides]).tolist()
        spans = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        return Positions(raw, spans, hidden, target, self._signs(passed.windows))

    def _signs(self, windows: Sequence[Window]) -> Tensor | None:
        signs = [window.sign for window in windows for side in window.sides for _ in side]
        if all(sign > 0 for sign in signs):
            return None
        return sent(torch.tensor(signs, dtype=self.dtype)[:, None], self.readout.device)

    def _recorded(self) -> list[torch.nn.Module]:
        final = [self.final_norm] if self.final_norm is not None else []
        return [*final, *(tap.projection for tap in self.taps.values())]

    def asking(self, measure: Measure | None) -> Signer:
        """This signer, for gradients of a measure of rows in the place of their losses; each row is one window.

        Of a probe the gradient of the head is zero, and that of parts behind its block; parts before it have what the
        direction gives them through the residual stream, as they have of a loss.
        Raises: ValueError for a block that is not there; MismatchError for a direction of another width; UnsupportedError
                where no part has a gradient.
        """
        found = copy.copy(self)
        found.measure = measure
        if isinstance(measure, Probe):
            if len(measure.direction) != self.readout.hidden_size:
                raise MismatchError(
                    f"The probe has {len(measure.direction)} numbers and the hidden states of this model "
                    f"{self.readout.hidden_size}: give a direction in them."
                )
            reached = bool(self._probed) if measure.block is None else self._reached(measure.block)
            if not reached:
                where = "the last hidden states" if measure.block is None else f"block {measure.block}"
                raise UnsupportedError(
                    f"No part of this index has a gradient of {where}: build one with a residual channel that has blocks up "
                    "to there, such as `default` or `residual`."
                )
        return found

    @property
    def _probed(self) -> list[str]:
        """Maps whose products are gradients at the last hidden states."""
        return [key for key in self.maps if key == "g" or key.startswith("gh")]

    def _reached(self, block: int) -> bool:
        block_of(self.readout, block)
        return any(tap.block <= block for tap in self.taps.values())

    def _left(self, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What left factors are made of: r @ map for every map, r being the gradient at the logits."""
        if self.measure is None:
            return self._mapped(hidden, target)
        if isinstance(self.measure, Probe):
            raw = {key: hidden.new_zeros(len(hidden), map_width(by)) for key, by in self.maps.items()}
            direction = torch.from_numpy(self.measure.direction).to(hidden)
            for key in self._probed if self.measure.block is None else [key for key in self._probed if key == "g"]:
                raw[key] += direction @ self._sketched[key] if key in self._sketched else direction
            return raw
        logits = self.readout.logits(hidden).requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(measured(self.measure, logits, target), logits)[0]
        r = slope * self.readout.slope(logits.detach()) * len(hidden)  # a text's loss counts by its mean, too
        return {key: by(r) if isinstance(by, CountSketch) else wide_product(r, by) for key, by in self.maps.items()}

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
        left = left if positions.sign is None else left * positions.sign
        return (left if part.weight == 1.0 else left * part.weight), right

    def _factor(self, x: Tensor, side: Factor) -> Tensor:
        if side.whiten is not None:
            if side.whiten not in self.whitening:
                raise MismatchError(
                    "These settings whiten, but no statistics were given: run the statistics pass first."
                )
            x = self._whitened(x, side, side.whiten)
        x = x.to(self.dtype)
        if side.sketch is not None:
            x = x @ side.sketch
        if self.settings.unit_positions:
            norm = x.norm(dim=1, keepdim=True)
            x = torch.where(norm <= SMALL, 0.0, x / norm)  # this way round, not-a-number stays visible
        return x

    def _whitened(self, x: Tensor, side: Factor, name: str) -> Tensor:
        """Vectors that left the model in halves are multiplied as such: no digit of theirs is lost."""
        matrix = self.whitening[name]
        if not self.in_halves or side.raw in self.maps or isinstance(matrix, WideRoot):
            return x.to(self.dtype) @ matrix
        if name not in self._halved or self._halved[name][0] is not matrix:
            self._halved[name] = matrix, halves(matrix, self.weight.dtype)
        return product_right(x.to(self.weight.dtype), self._halved[name][1])

    @torch.no_grad()
    def window_rows(self, batch: Sequence[Window] | Passed) -> tuple[Tensor, Tensor]:
        """Rows [sides, width] of the sides of a batch of windows, one window after the other, and the lengths [sides, parts] of
        their outer products; of a side without positions zeros."""
        positions, triples = self.positions(batch), isinstance(self.form, Triples)
        if self.readout.device.type != "cpu":
            return self._rows_together(positions)
        found, squares = [], []
        for part in self.parts:
            left, right = self.factors(positions, part)
            if triples:
                found.append(torch.stack([low_rank(left[s], right[s], self.rank) for s in positions.spans]))
                squares.append(torch.stack([squared_length(left[s], right[s]) for s in positions.spans]))
            else:
                found.append(torch.stack([(left[s].t() @ right[s]).flatten() for s in positions.spans]))
                squares.append(found[-1].square().sum(1))
        return torch.cat(found, 1), torch.stack(squares, 1).sqrt()

    def _rows_together(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """As `window_rows`, of all windows and parts at once, so that nothing waits for a device."""
        factors, counts = self._filled(positions), [span.stop - span.start for span in positions.spans]
        if isinstance(self.form, Triples):
            rows, squares = low_ranks(factors, counts, self.rank)
            if 0 in counts:  # of which no iteration comes to an end
                there = sent(torch.tensor([count > 0 for count in counts]), rows.device)[:, None]
                rows, squares = torch.where(there, rows, 0.0), torch.where(there, squares, 0.0)
            return rows, squares.sqrt_()
        sizes = [part.left.width * part.right.width for part in self.parts]
        rows = positions.hidden.new_empty(len(counts), sum(sizes))
        for piece, (left, right) in zip(rows.split(sizes, 1), factors, strict=True):
            torch.bmm(left.mT, right, out=piece.unflatten(1, (left.shape[2], right.shape[2])))
        return rows, self._part_lengths(rows)

    def _filled(self, positions: Positions) -> list[Factors]:
        """Both factors of each part, [windows, positions, width] with zeros behind those of a window; a shared one once."""
        spans = positions.spans
        most = max(span.stop - span.start for span in spans)
        slots = torch.cat([torch.arange(span.stop - span.start) + row * most for row, span in enumerate(spans)])
        slots = sent(slots, self.readout.device)
        made: dict[tuple[Any, ...], Tensor] = {}
        found = []
        for part in self.parts:
            both = []
            for side, weight, sign in ((part.left, part.weight, positions.sign), (part.right, 1.0, None)):
                key = side.raw, side.whiten, id(side.sketch), weight, sign is None
                if key not in made:
                    x = self._factor(positions.raw[side.raw], side)
                    x = x if sign is None else x * sign
                    filled = x.new_zeros(len(spans) * most, x.shape[1]).index_copy_(0, slots, x)
                    made[key] = (filled if weight == 1.0 else filled * weight).unflatten(0, (len(spans), most))
                both.append(made[key])
            found.append((both[0], both[1]))
        return found

    @torch.no_grad()
    def finished(
        self,
        windows: Sequence[Window],
        advance: Callable[[int], object] | None = None,
        passes: Iterator[Passed] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Numbers [n], rows [n, width] and lengths of parts [n, parts] of rows, as soon as all their windows are computed.

        Windows run in batches of similar length; `advance(k)` is called when k more windows are done. `passes`: what the
        trunk gave for these batches, and for others behind them.
        """
        waiting = Counter(owner for owner, _ in _sides_of(windows))  # of each side of each row, as what follows
        divisors, sums = self.divisors(windows), dict[int, Tensor]()
        groups = list(batches(windows, self.readout.batch_class, self.limits))
        for batch, passed in zip(groups, passes or self.passed(groups), strict=False):
            found, lengths = self.window_rows(passed)
            if self.settings.unit_length:
                by = lengths.norm(dim=1).clamp_min(1e-30)
                found, lengths = self.form.divided(found, by), lengths / by[:, None]
            owners = [owner for owner, _ in _sides_of(batch)]
            whole = [at for at, owner in enumerate(owners) if waiting[owner] == 1 and owner not in sums]
            self._add_pieces(
                sums, found, [(owner, at) for at, owner in enumerate(owners) if waiting[owner] > 1 or owner in sums]
            )
            waiting.subtract(owners)
            done = [owner for owner in dict.fromkeys(owners) if owner in sums and not waiting[owner]]
            numbers = torch.tensor([owners[at] for at in whole] + done, dtype=torch.int64)
            if done or len(whole) < len(owners):
                found, lengths = (x[sent(torch.tensor(whole, dtype=torch.int64), x.device)] for x in (found, lengths))
            if done:
                sum_of_pieces = torch.stack([sums.pop(owner) for owner in done])
                found = torch.cat([found, sum_of_pieces])
                lengths = torch.cat([lengths, self._part_lengths(sum_of_pieces)])
            found, lengths = self._scaled(found, lengths, [divisors[n] for n in numbers.tolist()])
            rows = numbers[:: self.sides] // self.sides  # whose sides end together, one behind the other
            found, lengths = (x.reshape(len(rows), self.sides * x.shape[1]) for x in (found, lengths))
            yield rows, found, lengths
            if advance is not None:
                advance(len(batch))

    def _add_pieces(self, sums: dict[int, Tensor], found: Tensor, pieces: list[tuple[int, int]]) -> None:
        """Adds windows, by owner and place in `found`, to the sums of their owners, one of each owner at a time."""
        while pieces:
            first = dict(reversed(pieces))  # the first of each
            known = [owner for owner in first if owner in sums]
            if known:
                olds, news = (
                    torch.stack(list(x)) for x in ((sums[o] for o in known), (found[first[o]] for o in known))
                )
                both = self.form.add(olds, news) if isinstance(self.form, Triples) else olds + news
                sums.update(zip(known, both, strict=True))
            sums.update((owner, found[at]) for owner, at in first.items() if owner not in known)
            pieces = [(owner, at) for owner, at in pieces if at != first[owner]]

    def _part_lengths(self, rows: Tensor) -> Tensor:
        """Lengths [rows, parts] of the outer products of rows, as far as they are kept."""
        if isinstance(self.form, Triples):
            return self.form.part_lengths(rows)
        sizes = [part.left.width * part.right.width for part in self.parts]
        return torch.stack([piece.norm(dim=1) for piece in rows.split(sizes, 1)], 1)

    def _scaled(self, rows: Tensor, lengths: Tensor, divisors: list[float]) -> tuple[Tensor, Tensor]:
        """Rows and their lengths as the settings want them long, by their `divisors`."""
        if self.settings.unit_length:
            by = self.form.lengths(rows)
            unit = torch.where(by[:, None] == 0, 0.0, self.form.divided(rows, by))
            return unit, torch.where(by[:, None] == 0, 0.0, self._part_lengths(unit))
        if set(divisors) == {1.0}:
            return rows, lengths
        by = sent(torch.tensor(divisors, dtype=rows.dtype), rows.device)
        return self.form.divided(rows, by), lengths / by[:, None]

    def divisors(self, windows: Sequence[Window]) -> dict[int, float]:
        """What the sum over a row's positions is divided by, of each side of each row: a power of their number over the row's
        weight; of a preference row, whose loss is no mean, one over its weight and DPO's factor; infinity for a weight of 0.

        Cost: where a row has the margin of a reference model, a forward pass of its windows.
        """
        targets = Counter[int]()
        for owner, positions in _sides_of(windows):
            targets[owner] += len(positions)
        if self.settings.unit_length:
            return dict.fromkeys(targets, 1.0)
        found = {owner: max(n, 1) ** self.settings.length_power for owner, n in targets.items()}
        shared = [window for window in windows if window.share is not None]
        referred = [window for window in shared if window.share and window.share.reference is not None]
        own = margins(self.readout, referred, self.limits, self.head)
        for window in shared:
            assert window.share is not None
            factor, reference = abs(window.share.weight), window.share.reference
            if window.share.pair:
                factor *= self.preferences.factor(0.0 if reference is None else own[window.row] - reference)
            for owner, _ in _sides_of([window]):
                by = 1.0 if window.share.pair else max(targets[owner], 1) ** self.settings.length_power
                found[owner] = by / factor if factor else math.inf
        return found

    def rows(self, windows: Sequence[Window], n_rows: int, advance: Callable[[int], object] | None = None) -> Tensor:
        """Rows [n_rows, width] of the form, of all the windows of rows 0 .. n_rows - 1; zero where a row has none."""
        total: Tensor | None = None
        for numbers, rows, _ in self.finished(windows, advance):
            if total is None:
                total = rows.new_zeros(n_rows, rows.shape[1])
            total[numbers.to(total.device)] = rows
        assert total is not None
        return total

    def encoded(self, windows: Sequence[Window], n_rows: int) -> dict[str, np.ndarray]:
        """The arrays of a segment, each [n_rows, ...], and the mask `finite`, of all the windows of rows 0 .. n_rows - 1.

        `long.*` and `short.*` are the codes of both forms, as far as there are any; `norms` [rows, parts] float32 the
        lengths of a row's outer products before they were rounded; `prompt.long.*` and so on those of its other side.
        """
        return self.encoding(windows, n_rows).arrays()

    def encoding(self, windows: Sequence[Window], n_rows: int, passes: Iterator[Passed] | None = None) -> Encoding:
        """As `encoded`, still on its way from the device. `passes`: as of `finished`."""
        found = self.finished(windows, passes=passes)
        if self.readout.device.type != "cpu":
            found = _gathered(found, self.limits.batch_rows)
        return Encoding(n_rows, [(numbers, Fetched(self._coded(rows, lengths))) for numbers, rows, lengths in found])

    def _coded(self, rows: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        finite = torch.isfinite(rows).all(1)
        rows = torch.where(finite[:, None], rows, 0.0)
        arrays = {"finite": finite}
        forms = {"long": self.codec if self.settings.long == "stored" else None, "short": self.short}
        for side, own, by in zip(SIDES, rows.chunk(self.sides, 1), lengths.float().chunk(self.sides, 1), strict=False):
            arrays[f"{side}norms"] = by
            for name, codec in forms.items():
                if codec is not None:
                    arrays |= {f"{side}{name}.{key}": value for key, value in codec.coded(own).items()}
        return arrays

    def waves(self, chunks: Iterable[tuple[int, list[Window]]]) -> Iterator[list[tuple[int, list[Window]]]]:
        """Chunks whose batches go through the blocks of a streamed model together."""
        assert self.readout.stream is not None
        kind = self.readout.batch_class
        return self.readout.stream.waves(
            chunks, lambda chunk: sum(map(padded_tokens, batches(chunk[1], kind, self.limits)))
        )

    def encoded_chunks(self, chunks: Sequence[tuple[int, list[Window]]]) -> Iterator[Encoding]:
        """As `encoding`, of several chunks, each its number of rows and its windows: those of a streamed model go through
        its blocks together, in the batches that they have alone."""
        reference, found = self.preferences.reference, [dict[int, float]() for _ in chunks]
        if reference is not None:
            found = [reference.margins(windows, self.limits) for _, windows in chunks]
            chunks = [(n, with_references(windows, own)) for (n, windows), own in zip(chunks, found, strict=True)]
        groups = (group for _, windows in chunks for group in batches(windows, self.readout.batch_class, self.limits))
        passes = self.passed(groups)
        for (n_rows, windows), own in zip(chunks, found, strict=True):
            yield replace(self.encoding(windows, n_rows, passes), references=own)


@dataclass
class Encoding:
    """Codes of the rows of a chunk, by their numbers, and the margins that a reference model gave its preference rows."""

    n_rows: int
    pieces: list[tuple[Tensor, Fetched]]
    references: dict[int, float] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays [n_rows, ...]; waits until they have come."""
        total: dict[str, np.ndarray] = {}
        if self.references:
            total["reference"] = np.full(self.n_rows, np.nan)
            total["reference"][list(self.references)] = list(self.references.values())
        for numbers, piece in self.pieces:
            for name, array in piece.arrays().items():
                total.setdefault(name, np.zeros((self.n_rows, *array.shape[1:]), array.dtype))[numbers.numpy()] = array
        return total


def _gathered(found: Iterable[tuple[Tensor, Tensor, Tensor]], most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of several batches as one, as long as they are at most so many: encoding takes as many launches for few."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    for one in found:
        if held and sum(len(numbers) for numbers, _, _ in held) + len(one[0]) > most:
            yield _joined(held)
            held = []
        held.append(one)
    if held:
        yield _joined(held)


def _joined(held: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    numbers, rows, lengths = (torch.cat(list(each)) if len(held) > 1 else each[0] for each in zip(*held, strict=True))
    return numbers, rows, lengths


def _sides_of(windows: Sequence[Window]) -> Iterator[tuple[int, list[int]]]:
    """The number of each side of each window, row after row, and its positions."""
    for window in windows:
        sides = window.sides
        for side, positions in enumerate(sides):
            yield len(sides) * window.row + side, positions
