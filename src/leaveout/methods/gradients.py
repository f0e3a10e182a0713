"""Gradients and losses of single examples under given parameters: what the methods by gradients are made of.

Each example is taken in a batch of its own, so that its loss is the mean over its own learned tokens, whatever the recipe's
`loss_per` is. Gradients are those of the trained parameters, flattened in the order of `task.trained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leaveout.errors import MismatchError
from leaveout.training.formulas import plain_attention
from leaveout.training.tasks import Parameters, Task, example_loss

TOGETHER = 32
"""Examples in one vectorised pass at most: more gain nothing on a CPU and hold the activations of all."""
MEMORY = 2**30
SUMMED = 8192
"""Products that are summed in the gradients' own precision; such sums are added up in float64."""


def example_losses(task: Task, parameters: Parameters, rows: Sequence[Any]) -> Tensor:
    """Losses [rows] in nats, each in a batch of its own, so that no number depends on the other rows.

    Cost: one forward pass a row.
    """
    one = example_loss(task).under
    values = checked(task, parameters)
    with torch.no_grad():
        losses = [one(values, *(t[0] for t in task.encode([row]))) for row in rows]
    return torch.stack(losses) if losses else torch.zeros(0)


def example_gradients(
    task: Task, parameters: Parameters, rows: Sequence[Any], memory: int = MEMORY
) -> Iterator[Tensor]:
    """Gradients of the rows' losses [some rows, parameters], in order; a last chunk may be smaller.

    Memory: an eighth of `memory` in bytes for the numbers yielded and as much again while they are made, but never less
            than one row; and the activations of at most 32 rows.
    Cost:   one forward and one backward pass a row.
    """
    values = checked(task, parameters)
    gradients = torch.vmap(
        torch.func.grad(example_loss(task).under), in_dims=(None,) + (0,) * len(task.encode(rows[:1]))
    )
    for part in _parts(rows, min(TOGETHER, rows_within(memory // 8, values))):
        with plain_attention():
            found = gradients(values, *task.encode(part))
        yield torch.cat([found[name].detach().flatten(1) for name in task.trained], 1)


def rows_within(memory: int, parameters: Parameters) -> int:
    """How many gradients fit in so many bytes, at least 1."""
    return max(1, memory // sum(p.numel() * p.element_size() for p in parameters.values()))


def gathered(chunks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in blocks of at least `rows` where there are so many, for fewer passes over the other side."""
    held: list[Tensor] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(map(len, held)) >= rows:
            block, held = torch.cat(held), []
            yield block
    if held:
        yield torch.cat(held)


def products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products [left, right] float64 of gradients [left, parameters] and [right, parameters].

    A float32 sum of so many terms, one after the other, would lose digits: 2e-5 of the largest product over 50,000
    parameters, and more over more.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for some in _stretches(left):
        total += left[:, some] @ right[:, some].T
    return total


def unit_rows(x: Tensor) -> Tensor:
    """Rows [rows, width] scaled to length 1; a row of zeros stays one."""
    length = torch.zeros(len(x), 1, dtype=torch.float64)
    for some in _stretches(x):  # for the reason of `products`
        length += x[:, some].norm(dim=1, keepdim=True).double().square()
    return x / torch.where(length > 0, length.sqrt(), 1.0).to(x.dtype)


def _stretches(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + SUMMED) for start in range(0, x.shape[1], SUMMED))


def checked(task: Task, parameters: Parameters) -> Parameters:
    """The parameters that the task trains. Raises: MismatchError if they are not of this task."""
    own = dict(task.model.named_parameters())
    for name in task.parameters():
        if name not in parameters or parameters[name].shape != own[name].shape:
            raise MismatchError(
                f"The parameters have no {name} of shape {tuple(own[name].shape)}: give this task's own."
            )
    return {name: parameters[name].detach() for name in task.parameters()}


def _parts(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
