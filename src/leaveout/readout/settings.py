"""What a signature is made of: the one frozen dataclass that an index is built with, and the presets.

A signature is a sum of channels. Per position t a channel has a left factor (from the residual r_t = p_t - e_y, or from
the readout gradient g_t = W^T r_t) and a right factor (the hidden state, or an activation); a row's channel is
the sum over its positions of left (x) right. Source: arXiv 2604.16197 for `rh` and `gh`; the others are leaveout's own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from leaveout.corpus.chat import Template
from leaveout.errors import choices, require_list, require_whole

Kind = Literal["rh", "gh", "residual"]
Projection = Literal["countsketch", "orthogonal"]
Storage = Literal["float32", "float16", "int8"]
Long = Literal["stored", "none"]
Targets = Literal["response", "all", "both"]
Output = Literal["attention", "mlp"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Channel:
    """One channel: `rh` is r (x) h, `gh` is g (x) h, `residual` is (g before the final norm) (x) (inputs of every
    block's output projections), one part per projection.

    Whitening multiplies a factor by (M + damping * mean eigenvalue of M)^(-1/2), M its second moment over target
    positions with labels drawn from the model. g, h and activations are whitened, then projected; r, as long as
    the vocabulary, is projected first, then whitened.

    left_damping    of r and g (None: the same as damping, which is that of h and activations)
    layers, depths  of the residual channel: numbers of blocks, or shares of the way from the first block (0) to the
                    last (1); neither: all blocks
    outputs         of the residual channel: which output projections of a block
    """

    kind: Kind = "gh"
    weight: float = 1.0
    left_width: int | None = None  # None: not projected
    right_width: int | None = None
    projection: Projection = "countsketch"
    whiten_left: bool = False
    whiten_right: bool = False
    damping: float = 0.1
    left_damping: float | None = None
    layers: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    outputs: tuple[Output, ...] = ("attention", "mlp")

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, Kind)
        _one_of("projection", self.projection, Projection)
        for name in ("left_width", "right_width"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise ValueError(f"{name} is {width}: give a positive number, or None for no projection.")
        for name in ("damping", "left_damping"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: give a positive share of the mean eigenvalue.")
        self._check_places()

    def _check_places(self) -> None:
        """What the residual channel is taken from; the other kinds have no choice."""
        for name in ("layers", "depths", "outputs"):
            if (given := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, tuple(dict.fromkeys(given)))
            if not given:
                raise ValueError(f"{name} is empty: give at least one, or leave it out for all.")
            if self.kind != "residual" and getattr(self, name) != getattr(Channel, name):
                raise ValueError(f"{name} belongs to the residual channel, not to {self.kind}: leave it out.")
        for output in self.outputs:
            _one_of("outputs", output, Output)
        if self.layers is not None and self.depths is not None:
            raise ValueError("layers and depths both say which blocks are taken: give one of them.")
        if self.depths is not None and not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths is {self.depths}: give numbers from 0, the first block, to 1, the last.")

    def damping_of(self, side: Side) -> float | None:
        """Damping with which a side is whitened; None: it is not."""
        if side == "right":
            return self.damping if self.whiten_right else None
        damping = self.damping if self.left_damping is None else self.left_damping
        return damping if self.whiten_left else None


@dataclass(frozen=True)
class SignatureSettings:
    """Everything that a signature depends on besides model and row.

    temperature     s = logits / temperature before the softmax
    support         only the `support` largest logits (and the target) count; None: the whole vocabulary
    mass, minimum   with a support: its smallest prefix of this probability, at least `minimum` long, plus the target
    unit_positions  each factor is scaled to unit length per position
    unit_length     window signatures and row signatures are scaled to unit length; a row is the mean of its windows.
                    Otherwise a row is the sum over its target positions, each counted once
    length_power    that sum is divided by (number of target positions) ** length_power: 0 leaves the sum, 1 makes it
                    the mean, which is what a row weighs where training takes the mean loss of each row
    targets         which tokens are learned: `response` (prompts are context only), `all`, or `both`: responses, and beside
                    them what comes before, as a second side of the row with codes and lengths of its own, each of half the
                    bytes. Both are whitened by the moments of responses, which is what training learned
    template        how chats and instructions become text: None, the tokenizer's own chat template, or the plain form where
                    it has none; "none", the plain form; a name among the tokenizer's templates, or a Jinja file. An
                    index keeps the template itself
    window, stride  a longer row is cut into windows of `window` tokens that start every `stride`
    bytes_per_row   of a stored row in all, the short form included. What the long form has of them holds vectors in
                    `storage`, or in 4 bits a number, where they fit; else as many singular triples of the row's outer
                    products as fit, in 1, 2 or 4 bits a number, those first that have most for their bytes. Scores of the
                    long form are called exact. None: vectors in `storage`, however long
    storage         type of the numbers of vectors; every row has a float32 scale beside them
    short_bytes     of the short form of a row, from which a search takes the list that it scores exactly. None, or more than
                    a quarter of `bytes_per_row`: no short form, every search is exact
    long            `none`: only the short form is kept, and the rows of a list are encoded anew from their texts, which
                    takes the time of a forward pass each
    sample_rows     rows of the statistics pass that whitening needs
    seed            of all projections and of the sample
    """

    channels: tuple[Channel, ...]
    temperature: float = 1.0
    support: int | None = None
    mass: float = 1.0
    minimum: int = 1
    unit_positions: bool = False
    unit_length: bool = False
    length_power: float = 0.0
    targets: Targets = "response"
    template: Template | None = None
    window: int = 1024
    stride: int = 768
    bytes_per_row: int | None = 16384
    storage: Storage = "int8"
    short_bytes: int | None = 2048
    long: Long = "stored"
    sample_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        require_list("channels", self.channels, "Channel(...) objects")
        object.__setattr__(self, "channels", tuple(self.channels))
        for name in ("temperature", "mass", "length_power"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number.")
        for name in ("support", "minimum", "window", "stride", "bytes_per_row", "short_bytes", "sample_rows", "seed"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 0 if name == "seed" else 1)
        _one_of("targets", self.targets, Targets)
        _one_of("storage", self.storage, Storage)
        _one_of("long", self.long, Long)
        if self.long == "none" and self.short_bytes is None:
            raise ValueError("A row needs a stored form: give short_bytes, or long='stored'.")
        if not self.channels:
            raise ValueError("channels is empty: give at least one Channel.")
        if not all(isinstance(channel, Channel) for channel in self.channels):
            raise ValueError("channels holds something else than channels: give Channel(...) objects.")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: give a positive number.")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}: give a probability in (0, 1].")
        if not 0 <= self.length_power <= 1:
            raise ValueError(f"length_power is {self.length_power}: give 0 (sum) to 1 (mean).")
        if self.length_power and self.unit_length:
            raise ValueError("Rows of unit length have no other length: give length_power=0 with unit_length.")
        if self.support is None and self.mass < 1:
            raise ValueError("mass below 1 needs a support: give support=256, say, or leave mass at 1.")
        if self.support is not None and not self.support >= self.minimum >= 1:
            raise ValueError(f"support is {self.support}, minimum {self.minimum}: give support >= minimum >= 1.")
        if not 1 <= self.stride < self.window:  # a first token has no context, so windows must overlap
            raise ValueError(f"window is {self.window}, stride {self.stride}: give 1 <= stride < window.")

    @property
    def whitens(self) -> bool:
        return any(channel.whiten_left or channel.whiten_right for channel in self.channels)

    @property
    def sides(self) -> int:
        """Of a row that have codes of their own: its response, and its prompt with `both`."""
        return 2 if self.targets == "both" else 1

    @property
    def of_side(self) -> SignatureSettings:
        """With the bytes that one side has."""
        halves = {name: getattr(self, name) for name in ("bytes_per_row", "short_bytes")}
        return replace(self, **{name: value and value // self.sides for name, value in halves.items()})

    @property
    def overlap(self) -> int:
        return self.window - self.stride

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SignatureSettings:
        """The settings that `to_dict` gave. Raises: ValueError naming an unknown field."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"Unknown signature setting {sorted(unknown)[0]!r}: this index needs a newer leaveout.")
        channels = tuple(Channel(**channel) for channel in values["channels"])
        return cls(**{**values, "channels": channels})

    def fingerprint(self) -> str:
        """Sixteen hex digits that differ as soon as one setting does."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _one_of(name: str, value: Any, literal: Any) -> None:
    if value not in get_args(literal):
        raise ValueError(f"{name} is {value!r}: {choices(value, get_args(literal))}.")


_HEAD = Channel("rh", left_width=1024, whiten_left=True, whiten_right=True, damping=1.0, left_damping=3.0)
_BLOCKS = Channel("residual", whiten_left=True, whiten_right=True, damping=0.3, left_damping=3.0)
_PAPER = SignatureSettings(
    channels=(Channel("rh", left_width=128, right_width=128), Channel("gh", 0.3, left_width=64, right_width=128)),
    temperature=0.1,
    support=256,
    mass=0.92,
    minimum=4,
    unit_positions=True,
    unit_length=True,
    targets="all",
    window=256,
    stride=206,
    bytes_per_row=None,
    storage="float16",
)
PRESETS: dict[str, SignatureSettings] = {
    # Influence: what training on the row changes about the query. Gradients of the head and of three MLP outputs.
    "default": SignatureSettings(
        channels=(_HEAD, replace(_BLOCKS, depths=(0.0, 0.5, 1.0), outputs=("mlp",))),
        length_power=0.5,
    ),
    # Influence over the head and every layer from the same forward pass, for large budgets per row.
    "residual": SignatureSettings(
        channels=(_HEAD, _BLOCKS),
        length_power=0.5,
        bytes_per_row=32768,
    ),
    # Likeness of content and manner, not influence: nothing is whitened.
    "similarity": SignatureSettings(
        channels=(Channel("gh"),),
        unit_length=True,
    ),
    # The signature of arXiv 2604.16197 as its official code makes it: default widths, and all tokens of a row are learned.
    "paper": _PAPER,
    # The same of responses alone, for rows of which only those were trained on.
    "paper-responses": replace(_PAPER, targets="response"),
}


def resolve_settings(preset: str | SignatureSettings = "default", **changes: Any) -> SignatureSettings:
    """The settings of a preset name (or given settings), with single fields changed.

    Raises: ValueError naming an unknown preset or field.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}: {choices(preset, PRESETS)}.")
        preset = PRESETS[preset]
    if not isinstance(preset, SignatureSettings):
        raise TypeError(f"preset is {preset!r}: give one of {', '.join(PRESETS)}, or SignatureSettings(...).")
    known = {field.name for field in fields(SignatureSettings)}
    for name in changes:
        if name in {field.name for field in fields(Channel)}:
            raise ValueError(
                f"{name} belongs to a channel, not to the whole signature: give channels=(Channel(..., {name}=...), ...), "
                "or replace() those of a preset."
            )
        if name not in known:
            raise ValueError(f"There is no signature setting {name!r}: {choices(name, sorted(known))}.")
    return replace(preset, **changes)
