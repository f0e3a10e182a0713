"""The second pass block by block: of a model's blocks only one holds its graph at a time, and is computed again for it.

With h_k the states after block k, g_k the cotangents of these in the gradient's own backward pass, and b what the
gradient's cotangent is, the derivative of <b, gradient> goes up the blocks once with u_k, the change of h_k along b, and
down once with the cotangents of h_k. Both use the graph of (h_k-1, g_k) -> (h_k, g_k-1), which all queries share. Going
up is forward over reverse (arXiv 2505.00793), in operations that every model with a second derivative has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.errors import UnsupportedError
from leaveout.models.streaming import blocks_of, standing_in

Grads = tuple[Tensor, ...]


@dataclass
class _Call:
    """What a block was called with: its states, all else, and where the random numbers stood."""

    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    noise: Tensor | None


class Blocks:
    """The blocks of a model that hand nothing but their states on. Raises: UnsupportedError where there are none."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self.model, self.params = model, list(params)
        if getattr(model, "config", None) is None:
            raise UnsupportedError(
                f"{type(model).__name__} has no blocks that could be gone through one by one: allow more memory."
            )
        self.blocks = blocks_of(model)[1]
        places = {id(p): i for i, p in enumerate(params)}
        self.own = [[places[id(p)] for p in block.parameters() if id(p) in places] for block in self.blocks]


class BlockedPass:
    """The first pass of a part of a step: its gradient; and `back`, which goes back through that.

    loss(weights)  the loss of the part, by the model's own forward
    again()        the surroundings of a forward pass of it
    drops          whether random numbers are drawn there
    gradient       [parameters] each in its shape, None where one is not used
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Callable[[Tensor], Tensor],
        weights: Tensor,
        again: Callable[[], AbstractContextManager[Any]],
        drops: bool,
    ) -> None:
        self.blocks, self.weights, self.again, self.drops = blocks, weights, again, drops
        self.calls: list[_Call] = []
        self.last: Tensor = weights
        with standing_in(blocks.blocks, self._hand_on):
            value = loss(weights)
        if len(self.calls) != len(blocks.blocks):
            self._refuse()
        params = blocks.params
        found = torch.autograd.grad(value, [self.last, *params], create_graph=True, allow_unused=True)
        self.gradient: list[Tensor | None] = [None] * len(params)
        self.tail = self._used(found[1:])
        if found[0] is None:
            self._refuse()
        self.tail_cotangent: Tensor = found[0]
        self.cotangents = [found[0].detach()]  # of h_K, ..., h_0
        for number in reversed(range(len(self.calls))):
            states, out = self._applied(number)
            own = self._own(number)
            g, *grads = torch.autograd.grad(out, [states, *own], self.cotangents[-1], allow_unused=True)
            self._add(self._pairs(number, grads))
            self.cotangents.append(g)
        self.cotangents.reverse()
        self.head: list[tuple[int, Tensor]] = []
        self.start = self.cotangents[0].clone().requires_grad_()
        if self.first.requires_grad:
            grads = torch.autograd.grad(self.first, params, self.start, create_graph=True, allow_unused=True)
            self.head = self._used(grads)

    def _used(self, grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        """Those gradients that there are, with the places of their parameters; added to the whole."""
        pairs = [(place, g) for place, g in enumerate(grads) if g is not None]
        self._add(pairs)
        return pairs

    def _pairs(self, number: int, grads: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        return [(place, g) for place, g in zip(self.blocks.own[number], grads, strict=True) if g is not None]

    def _add(self, pairs: Sequence[tuple[int, Tensor]]) -> None:
        for place, g in pairs:
            so_far = self.gradient[place]
            self.gradient[place] = g.detach() if so_far is None else so_far + g.detach()

    def _refuse(self) -> None:
        raise UnsupportedError(
            f"{type(self.blocks.model).__name__} does more between its blocks than to hand their states on, so that they "
            "can't be gone through one by one: allow more memory, or use smaller micro-batches."
        )

    def _hand_on(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a block without a graph, and keeps what it was called with."""
        named = "hidden_states" in kwargs
        states = kwargs.pop("hidden_states") if named else args[0]
        args = args if named else args[1:]
        others = [*_tensors(args), *_tensors(kwargs)]
        if number != len(self.calls) or (number and states is not self.last) or any(t.requires_grad for t in others):
            self._refuse()
        if not number:
            self.first = states
        self.calls.append(_Call(states.detach(), args, kwargs, named, self._noise() if self.drops else None))
        with torch.no_grad():
            found = self._call(self.calls[-1], forward, states)
        out, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        if any(True for _ in _tensors(rest)):
            self._refuse()
        self.last = out.detach().requires_grad_(number == len(self.blocks.blocks) - 1)
        return (self.last, *rest) if isinstance(found, tuple) else self.last

    @staticmethod
    def _call(call: _Call, forward: Callable[..., Any], states: Tensor) -> Any:
        return (
            forward(*call.args, **call.kwargs, hidden_states=states)
            if call.named
            else forward(states, *call.args, **call.kwargs)
        )

    def _noise(self) -> Tensor:
        device = self.weights.device
        return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)

    def _applied(self, number: int) -> tuple[Tensor, Tensor]:
        """The states before a block, as a leaf, and those after it; with the masks of the first time."""
        call = self.calls[number]
        states = call.states.detach().requires_grad_()
        with self.again():
            if call.noise is not None and states.is_cpu:
                torch.set_rng_state(call.noise)
            elif call.noise is not None:
                torch.cuda.set_rng_state(call.noise, states.device)
            found = self._call(call, self.blocks.blocks[number], states)
        return states, found[0] if isinstance(found, tuple) else found

    def _own(self, number: int) -> list[Tensor]:
        return [self.blocks.params[place] for place in self.blocks.own[number]]

    def _doubled(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, Tensor]]]:
        """h and the output of a block, its cotangent as a leaf, that of h, and the gradients of its parameters, as a graph."""
        states, out = self._applied(number)
        cotangent = self.cotangents[number + 1].clone().requires_grad_()
        found = torch.autograd.grad(out, [states, *self._own(number)], cotangent, create_graph=True, allow_unused=True)
        return states, out, cotangent, found[0], self._pairs(number, found[1:])

    def back(self, cotangents: Sequence[Sequence[Tensor]]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Of each query's cotangent [parameters], in shapes: Hessian-vector products, and slopes along the weights."""
        blocks, params, queries = self.blocks, self.blocks.params, range(len(cotangents))
        products = [[torch.zeros_like(p) for p in params] for _ in queries]

        def along(q: int, pairs: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
            return [cotangents[q][place] for place, _ in pairs]

        def add(q: int, places: Sequence[int], found: Sequence[Tensor | None]) -> None:
            for place, value in zip(places, found, strict=True):
                if value is not None:
                    products[q][place] += value

        heads = [g for _, g in self.head]
        changes = [
            [torch.autograd.grad(heads, self.start, along(q, self.head), retain_graph=True)[0] for q in queries]
            if heads
            else [torch.zeros_like(self.start) for _ in queries]
        ]
        for number in range(len(blocks.blocks)):
            _, _, cotangent, before, pairs = self._doubled(number)
            grads = [g for _, g in pairs]
            changes.append([
                torch.autograd.grad(
                    [before, *grads], cotangent, [changes[-1][q], *along(q, pairs)], retain_graph=q != queries[-1]
                )[0]
                for q in queries
            ])  # fmt: skip
            del cotangent, before, pairs, grads
        slopes, downs, last = [], [], changes.pop()
        for q in queries:
            found = torch.autograd.grad(
                [self.tail_cotangent, *(g for _, g in self.tail)], [self.last, *params, self.weights],
                [last[q], *along(q, self.tail)], retain_graph=True, allow_unused=True,
            )  # fmt: skip
            assert found[0] is not None and found[-1] is not None
            downs.append(found[0])
            add(q, range(len(params)), found[1:-1])
            slopes.append(found[-1])
        for number in reversed(range(len(blocks.blocks))):
            states, out, _, before, pairs = self._doubled(number)
            grads, last = [g for _, g in pairs], changes.pop()
            for q in queries:
                downs[q], *found = torch.autograd.grad(
                    [out, before, *grads], [states, *self._own(number)], [downs[q], last[q], *along(q, pairs)],
                    retain_graph=q != queries[-1], allow_unused=True,
                )  # fmt: skip
                add(q, blocks.own[number], found)
            del states, out, before, pairs, grads
        if heads:
            for q in queries:
                found = torch.autograd.grad(
                    [self.first, *heads], params, [downs[q], *along(q, self.head)], retain_graph=True, allow_unused=True
                )
                add(q, range(len(params)), found)
        return products, slopes


def _tensors(found: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for part in found:
            yield from _tensors(part)
    elif isinstance(found, dict):
        for part in found.values():
            yield from _tensors(part)
