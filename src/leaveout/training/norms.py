"""Batch norm in training form, by the statistics of the rows that have weight: those of weight 0 are as if they were not there.

Running means and variances become parameters that no optimizer moves: all that carries parameters (stacks of runs,
series, checkpoints, stored runs) carries them too. They change nothing in training, and queries are asked with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.errors import UnsupportedError
from leaveout.jets import Jet

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class WeightedNorm(nn.modules.batchnorm._BatchNorm):
    """What a batch norm becomes by `follow_statistics`.

    weights  of the rows of a micro-batch [rows], None: all are one
    follows  whether running statistics are updated; where not, what they would move to is in `made`: mean and variance of each
             pass, with their graph
    """

    weights: Any = None
    follows: bool = True
    made: list[tuple[Tensor, Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        """By the statistics of the batch in training form, else by the running ones."""
        values = input[0].numel() // self.num_features * len(input)
        if not self.training:
            return self._normed(input, self.running_mean, self.running_var).to(input.dtype)
        if self.weights is None and values > 1 and not isinstance(self.running_mean, Jet):
            return self._native(input)
        own: Any = self.running_mean
        weights = own.detach().new_ones(len(input)) if self.weights is None else self.weights
        if weights.shape[0] != len(input):
            raise UnsupportedError(
                f"Batch norm sees {len(input)} rows of {weights.shape[0]} examples, so that it is not known whose they are: "
                "give it the examples on the first axis (and others behind the channels), or leave batch_statistics out."
            )
        return self._weighted(input, weights, values // len(input))

    def _native(self, x: Tensor) -> Tensor:
        """As torch has it, bit for bit."""
        if not self.follows:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var = self.running_mean.detach(), self.running_var.detach()  # type: ignore[union-attr]
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, float(self._part(1.0)), self.eps)

    def _part(self, live: Any) -> Any:
        """What the present batch counts in the running statistics: nothing if it is not live (0, else 1)."""
        if self.momentum is not None:
            return live * self.momentum
        tracked: Any = self.num_batches_tracked.detach()  # type: ignore[union-attr]
        tracked += live
        return live / (tracked if isinstance(tracked, Jet) else tracked.clamp(min=1))

    def _weighted(self, x: Tensor, weights: Any, each: int) -> Tensor:
        """Of rows with so many values a channel."""
        axes = [0, *range(2, x.dim())]
        total = weights.sum()
        if not isinstance(weights, Jet):  # where all is left out, numbers that stay finite are multiplied with 0
            weights = torch.where(total > 0, weights, 1.0)
        given, x = x, x.to(weights.dtype)  # of autocast
        share = (weights / (weights.sum() * each)).view(-1, *[1] * (x.dim() - 1))
        mean = (x * share).sum(axes)
        var = ((x - self._shaped(mean, x)).square() * share).sum(axes)
        if self.follows:
            with torch.no_grad():
                self._follow(mean.detach(), var.detach(), total.detach() * each)
        elif each * len(x) > 1:
            self.made.append((mean, var * (total * each / (total * each - 1))))
        return self._normed(x, mean, var).to(given.dtype)

    def _follow(self, mean: Any, var: Any, count: Any) -> None:
        """Moves the running statistics to those of so many values a channel; one alone has no variance, and moves nothing."""
        own_mean, own_var = self.running_mean.detach(), self.running_var.detach()  # type: ignore[union-attr]
        unbiased = var * (count / (count - 1))
        live: Any = 1.0
        if not isinstance(count, Jet):
            unbiased = torch.where(count > 1, unbiased, own_var)
            live = (count > 1).to(mean.dtype)
        part = self._part(live)
        own_mean += (mean - own_mean) * part
        own_var += (unbiased - own_var) * part

    def _normed(self, x: Tensor, mean: Any, var: Any) -> Tensor:
        out = (x - self._shaped(mean, x)) * self._shaped((var + self.eps).rsqrt(), x)
        if self.affine:
            out = out * self._shaped(self.weight, x) + self._shaped(self.bias, x)
        return out

    @staticmethod
    def _shaped(of_channels: Any, x: Tensor) -> Any:
        return of_channels.view(-1, *[1] * (x.dim() - 2))


def follow_statistics(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Puts the batch norms of a model that its .train() puts in training form by weighted ones.

    Gives the names of the running statistics, which are parameters from here on.
    Raises: UnsupportedError for a module whose statistics cannot be followed, by name, and where there is none to follow.
    """
    model.train()
    own = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training}
    model.eval()
    found = []
    for name, module in own.items():
        if not isinstance(module, PLAIN) and not module.track_running_stats:
            continue  # an instance norm of each example by itself
        if type(module) not in PLAIN or module.running_mean is None:
            kind = type(module).__name__ if type(module) not in PLAIN else "batch norm without running statistics"
            raise UnsupportedError(
                f"batch_statistics: {name or 'the model'} is of the class {kind}, whose statistics are not followed: use "
                "BatchNorm1d, BatchNorm2d or BatchNorm3d with running statistics, a group norm, or leave batch_statistics out."
            )
        module.__class__ = WeightedNorm  # type: ignore[assignment]
        for key in RUNNING if module.momentum is None else RUNNING[:2]:
            value = module._buffers.pop(key)
            assert value is not None
            module.register_parameter(key, nn.Parameter(value.to(dtype), requires_grad=False))
            found.append(f"{name}.{key}".removeprefix("."))
    if not found:
        raise UnsupportedError("batch_statistics: the model has no batch norm in training form: leave it out.")
    return tuple(found)


def norms_of(model: nn.Module) -> list[WeightedNorm]:
    """The norms of a model whose statistics are followed."""
    return [module for module in model.modules() if isinstance(module, WeightedNorm)]


@contextmanager
def by_batches(model: nn.Module, weights: Any = None, follows: bool = True) -> Iterator[None]:
    """The norms of a model in training form, while forward passes of rows with these weights are made."""
    norms = norms_of(model)
    for norm in norms:
        norm.train()
        norm.weights, norm.follows, norm.made = weights, follows, []
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
            norm.weights, norm.follows = None, True


@contextmanager
def fewest_values(model: nn.Module) -> Iterator[dict[str, int]]:
    """Fills with how many values of a channel each norm of a model sees at least, by name."""
    found: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(norm: WeightedNorm, given: tuple[Tensor]) -> None:
            found[name] = min(found.get(name, given[0].numel()), given[0].numel() // norm.num_features)

        return hook

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, WeightedNorm)]
    hooks = [norm.register_forward_pre_hook(look(name)) for name, norm in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
