"""Gradients of every block's output projections, to first order, from one forward pass.

A block adds to the residual stream, so the gradient at any block's output is about the gradient at the last residual
state: g_t pulled back through the final norm, by the module itself (a vector-Jacobian product), so that no norm is
written down twice. The gradient of an output projection with input a_t is then about g_t (x) a_t. Norms between
projection and residual stream (OLMo-2, Gemma-2) are passed over: pulling back through them predicted retraining worse.

Other packages add families by the hook `family` of `leaveout.plugins`.

Source: leaveout's own; judged by retraining in docs/, not by derivation.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import leaveout.plugins as plugins
from leaveout.errors import MismatchError, UnsupportedError
from leaveout.models import plain_module
from leaveout.readout.model import Readout
from leaveout.readout.settings import Channel


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its blocks and their output projections, as names of modules.

    layers, final_norm  below the model without its head
    attention, mlp      below each block: the linear layers whose outputs are added to the residual stream
    """

    layers: str
    final_norm: str
    attention: str
    mlp: str


_LLAMA = Family("layers", "norm", "self_attn.o_proj", "mlp.down_proj")
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "olmo", "gemma", "phi3", "smollm3")
NORMS_BEHIND = ("olmo2", "olmo3", "gemma2", "gemma3_text")  # in the same places, with a norm behind each
FAMILIES: dict[str, Family] = {
    **dict.fromkeys((*_LIKE_LLAMA, *NORMS_BEHIND), _LLAMA),
    "gpt_neox": Family("layers", "final_layer_norm", "attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": Family("h", "ln_f", "attn.c_proj", "mlp.c_proj"),
}


@dataclass(frozen=True)
class Tap:
    """One output projection: its name and the module."""

    name: str
    projection: nn.Module

    @property
    def block(self) -> int:
        return int(self.name.partition(".")[0])

    @property
    def inputs(self) -> int:
        if isinstance(self.projection, nn.Linear):
            return self.projection.in_features
        return self.projection.weight.shape[0]  # type: ignore[union-attr,index,return-value]  # GPT-2's Conv1D is [in, out]


def family_of(name: str) -> Family | None:
    """The family of models whose config says `model_type = name`; None for an unknown one.

    Raises: MismatchError if a package adds a family that leaveout has; UnsupportedError if what it adds is none.
    """
    entry = plugins.found("family").get(name)
    if entry is None:
        return FAMILIES.get(name)
    if name in FAMILIES:
        raise MismatchError(
            f"leaveout knows the family {name!r}, and {entry.value} adds it again: uninstall that package."
        )
    family = plugins.load(entry)
    if not isinstance(family, Family):
        raise UnsupportedError(
            f"The family {name!r} ({entry.value}) is {family!r}: make it a {Family.__qualname__}(...)."
        )
    return family


def find_taps(readout: Readout, channel: Channel) -> tuple[list[Tap], nn.Module] | None:
    """The output projections that a residual channel takes, and the final norm; None for an unknown family.

    Raises: UnsupportedError if the model lacks what a family of another package names, or that is no linear layer which
            writes to the residual stream.
    """
    family = family_of(readout.family)
    if family is None:
        return None
    trunk = readout.trunk
    try:
        blocks: Any = trunk.get_submodule(family.layers)
        places = {"attention": family.attention, "mlp": family.mlp}
        taps = []
        for index in _blocks_of(channel, len(blocks)):
            for output in channel.outputs:
                module = plain_module(blocks[index].get_submodule(places[output]))
                _check_shape(readout, f"{family.layers}.{index}.{places[output]}", module)
                taps.append(Tap(f"{index}.{output}", module))
        return taps, trunk.get_submodule(family.final_norm)
    except AttributeError as error:
        if readout.family in FAMILIES:
            return None  # a variant that keeps them elsewhere
        raise UnsupportedError(
            f"The family {readout.family!r} of another package names what the model lacks: {error}; name its own modules."
        ) from error


def block_of(readout: Readout, number: int) -> nn.Module:
    """A block by number, after which hidden states are asked for.

    Raises: UnsupportedError for an unknown family; ValueError for a number that no block has.
    """
    family = family_of(readout.family)
    if family is None:
        raise UnsupportedError(
            f"The layers of a {readout.family} model are not known, so that no block has a number: probe its last hidden "
            "states, with block None."
        )
    blocks: Any = readout.trunk.get_submodule(family.layers)
    if not 0 <= number < len(blocks):
        raise ValueError(f"The model has blocks 0 to {len(blocks) - 1}: block {number} is not one of them.")
    return blocks[number]


def _check_shape(readout: Readout, name: str, module: nn.Module) -> None:
    """Raises: UnsupportedError unless the module is a linear layer with as many outputs as the residual stream is wide."""
    weight = getattr(module, "weight", None)
    sizes = list(weight.shape) if isinstance(weight, Tensor) else []
    outputs = sizes[0] if isinstance(module, nn.Linear) else sizes[-1] if len(sizes) == 2 else None
    if outputs != readout.hidden_size:
        raise UnsupportedError(
            f"{name} of a {readout.family} model is a {type(module).__name__} with a weight of shape {sizes}, and a linear "
            f"layer with {readout.hidden_size} outputs was wanted: name another, or leave the residual channel out."
        )


def _blocks_of(channel: Channel, count: int) -> Iterable[int]:
    """Numbers of the blocks that a channel names, each once."""
    if channel.depths is not None:
        return dict.fromkeys(round(depth * (count - 1)) for depth in channel.depths)
    for index in channel.layers or ():
        if not 0 <= index < count:
            raise ValueError(f"The model has layers 0 to {count - 1}: layer {index} is not one of them.")
    return range(count) if channel.layers is None else channel.layers


@dataclass
class Recorder:
    """Inputs of modules at chosen positions of the forward pass that runs inside `recording`."""

    grid: torch.Size  # rows and tokens of the forward pass
    batch: Tensor  # [positions] int64
    token: Tensor  # [positions] int64
    inputs: MutableMapping[nn.Module, Tensor] = field(default_factory=dict[nn.Module, Tensor])

    def at(self, x: Tensor) -> Tensor:
        """Numbers [positions, size] of x [rows, tokens, size], on the device of the positions."""
        return x[self.batch.to(x.device), self.token.to(x.device)].to(self.batch.device)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.ndim != 3 or x.shape[:2] != self.grid:
            raise UnsupportedError(
                f"A {type(module).__name__} of this model gets numbers of shape {tuple(x.shape)}, and [{self.grid[0]} rows, "
                f"{self.grid[1]} tokens, size] was wanted: leave the residual channel out for this family."
            )
        self.inputs[module] = self.at(x)


@contextmanager
def recording(modules: Iterable[nn.Module], recorder: Recorder) -> Generator[None]:
    """Records the inputs [positions, size] of the modules.

    Raises: UnsupportedError, in the forward pass, for inputs that are not [rows, tokens, size].
    """
    handles = [module.register_forward_pre_hook(recorder.hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pull_back(norm: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient [positions, hidden] at the norm's input x, given the gradient at its output."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = norm(x)
        return torch.autograd.grad(y, x, gradient.to(y.dtype))[0].to(gradient.dtype)


@dataclass(frozen=True)
class Scaling:
    """A norm y = gain * c * s + rest, where c is x, or x without its mean where `centred`, and s one number a position, such
    that c * s has mean square 1 (or less, by what the norm adds).

    Its pull-back of g is s (1 - u u^T) (gain * g), u = c s / root of the size, without the mean where centred.
    """

    gain: Tensor
    rest: Tensor
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, size: int, device: torch.device, dtype: torch.dtype) -> Scaling | None:
        """What a norm of vectors of this size and type is found to do; None if that is something else."""
        even = torch.ones(size, device=device, dtype=dtype)
        signs = even.clone()
        signs[1::2] = -1
        ahead, behind, level = norm(4096 * torch.stack([signs, -signs, even])).double()
        gain, rest = (ahead - behind) / 2 * signs, (ahead + behind) / 2
        found = cls(gain, rest, bool((level - rest).norm() < 0.1 * gain.norm()))
        x, g = torch.randn(2, 8, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        wanted = pull_back(norm, x.to(dtype), g)
        known = (found.back(g, *found.at(norm, x.to(dtype))) - wanted).norm() < 0.02 * wanted.norm()
        return found if known else None

    def at(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """s [positions, 1] and u [positions, size] at inputs x, float64."""
        c = self.without_mean(x.double())
        along = self.gain * c
        s = ((norm(x).double() - self.rest) * along).sum(1, keepdim=True)
        s = s / along.square().sum(1, keepdim=True).clamp_min(1e-300)
        return s, c * s / c.shape[1] ** 0.5

    def back(self, g: Tensor, s: Tensor, u: Tensor) -> Tensor:
        g = self.without_mean(self.gain * g)
        return s * (g - u * (u * g).sum(1, keepdim=True))

    def without_mean(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True) if self.centred else x
