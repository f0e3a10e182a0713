"""Gradients of every block's output projections, to first order, from one forward pass.

A block adds to the residual stream, so the gradient at any block's output is about the gradient at the last residual
state: g_t pulled back through the final norm, by the module itself (a vector-Jacobian product), so that no norm is
written down twice. The gradient of an output projection with input a_t is then about g_t (x) a_t. Norms between
projection and residual stream (OLMo-2, Gemma-2) are passed over: pulling back through them predicted retraining worse.

Source: leaveout's own; judged by retraining in docs/, not by derivation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.models import plain_module
from leaveout.readout.model import Readout
from leaveout.readout.settings import Channel


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its blocks and their output projections."""

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
    def inputs(self) -> int:
        if isinstance(self.projection, nn.Linear):
            return self.projection.in_features
        return self.projection.weight.shape[0]  # type: ignore[union-attr,index,return-value]  # GPT-2's Conv1D is [in, out]


def find_taps(readout: Readout, channel: Channel) -> tuple[list[Tap], nn.Module] | None:
    """The output projections that a residual channel takes, and the final norm; None for an unknown family."""
    family = FAMILIES.get(readout.family)
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
                taps.append(Tap(f"{index}.{output}", module))
        return taps, trunk.get_submodule(family.final_norm)
    except AttributeError:
        return None


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

    batch: Tensor  # [positions] int64
    token: Tensor  # [positions] int64
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self.inputs[module] = x[self.batch, self.token]


@contextmanager
def recording(modules: list[nn.Module], batch: Tensor, token: Tensor) -> Iterator[Recorder]:
    """Records the inputs [positions, size] of the modules at positions (batch[i], token[i])."""
    recorder = Recorder(batch, token)
    handles = [module.register_forward_pre_hook(recorder.hook, with_kwargs=True) for module in modules]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def pull_back(norm: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient [positions, hidden] at the norm's input x, given the gradient at its output."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = norm(x)
        return torch.autograd.grad(y, x, gradient.to(y.dtype))[0].to(gradient.dtype)
