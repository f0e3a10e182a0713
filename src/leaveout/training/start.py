"""The start of a run: a fresh model whenever one is asked for, and what is tried before the first step.

Every run of a recipe must begin with the same model, and an example's loss must be a function of that example and the
parameters alone. What users give may break either; a few forward passes on the first batch tell.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.errors import FormatError, LeaveoutError, UnsupportedError

EXAMPLES = 8
"""Of the first batch, in a try."""
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative difference of two losses that counts as one of rounding: kernels order sums by the size of a batch."""
AGAIN = 0.01
"""Of that, what counts where the same batch is asked again."""


def made_by(source: Any) -> Any:
    """A model of its own: what a function gives, or the module (or pair of module and tokenizer) itself, copied.

    Copied also where a function gave it, which may give the same object each time.
    """
    return _copied(source if isinstance(source, (nn.Module, tuple)) else source())


def module_of(made: Any) -> nn.Module:
    """The module of what `model` gave. Raises: FormatError if there is none."""
    if not isinstance(made, nn.Module):
        kind = f"{type(made).__module__}.{type(made).__qualname__}"
        raise FormatError(f"`model` must be an nn.Module or a function that makes one, it gives a {kind}.")
    return made


def pair_of(made: Any) -> tuple[Any, Any]:
    """The model and tokenizer that `model` gave. Raises: FormatError if it is not a pair."""
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        kind = f"{type(made).__module__}.{type(made).__qualname__}"
        raise FormatError(f"`model` of a causal-lm recipe must give a pair (model, tokenizer), it gives a {kind}.")
    return made


def _copied(made: Any) -> Any:
    if isinstance(made, tuple):  # tokenizers are not trained
        return tuple(_copied(part) if isinstance(part, nn.Module) else part for part in made)
    if not isinstance(made, nn.Module):
        return made
    try:
        return copy.deepcopy(made).cpu()  # a run starts there, and is moved where it is to run
    except Exception as error:
        raise UnsupportedError(
            f"The model of class {type(made).__qualname__} cannot be copied ({error}), and every run needs one of its own: "
            "mend its __deepcopy__, or save it and give the directory."
        ) from None


def refuse_another_start(one: nn.Module, other: nn.Module) -> None:
    """Raises: UnsupportedError if two models of one recipe, made with the same seed, are not equal."""
    a, b = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    for name, value in a.items():
        if name not in b or b[name].shape != value.shape or b[name].dtype != value.dtype:
            raise UnsupportedError(f"`model` gives another model each time: {name} is not alike in the first two.")
        if not torch.equal(value, b[name]) and not torch.allclose(value, b[name], 0.0, 0.0, equal_nan=True):
            at = int((value != b[name]).flatten().nonzero()[0])
            first, second = (float(v.detach().flatten()[at]) for v in (value, b[name]))
            raise UnsupportedError(
                f"`model` gives other numbers each time ({name} has {first:.6g}, then {second:.6g}): draw them by torch's "
                "own generator, which `seed` sets before each call, or by one that the function seeds itself."
            )


def tried_numbers(batches: Sequence[Sequence[int]], n_examples: int) -> list[int]:
    """The examples that are tried: some of the first batch, and others where it has only one."""
    first = list(dict.fromkeys(batches[0] if batches else ()))[:EXAMPLES]
    return first if len(first) > 1 else list(dict.fromkeys([*first, *range(min(n_examples, 4))]))


def try_loss(task: Any, examples: Sequence[Any], numbers: Sequence[int]) -> None:
    """Tries the losses of a task on some examples: once, once more, and in other batches.

    Raises: UnsupportedError for a loss that is not one finite number an example, draws random numbers, changes with the
    other examples of its batch, or does not depend on what is trained, or for a model that changes its buffers.
    """
    before = {name: b.detach().clone() for name, b in task.model.named_buffers()}
    try:
        batch = task.encode([examples[i] for i in numbers])
    except FormatError:
        raise
    except Exception:
        if len(numbers) == 1:
            raise
        return try_loss(task, examples, numbers[:1])  # examples of different shapes, each a batch of its own
    losses = _checked(task, _losses(task, batch, len(numbers)), numbers)
    again = task.loss(task.model, batch).detach()
    for i, a, b in _unlike(losses, again, numbers, AGAIN):
        raise UnsupportedError(
            f"The loss of example {i} is {a:.9g} and, asked again, {b:.9g}: model and loss must not draw random numbers or "
            "keep a state (dropout or augmentation that does not heed .eval())."
        )
    for name, buffer in task.model.named_buffers():
        if not torch.equal(buffer, before[name]) and not bool(before[name].isnan().any()):
            raise UnsupportedError(
                f"The model changes its buffer {name} when it computes a loss: buffers are constants here, so let it heed "
                ".eval(), or make it a parameter."
            )
    _try_parts(task, examples, numbers, losses)


def _losses(task: Any, batch: Any, n: int) -> Any:
    try:
        return task.loss(task.model, batch)
    except LeaveoutError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"The loss fails for {n} examples ({' '.join(str(error).split())}): it is called as loss(model, batch), with a "
            "tensor of the batch for each part of an example, and gives one number an example."
        ) from error


def _try_parts(task: Any, examples: Sequence[Any], numbers: Sequence[int], losses: Tensor) -> None:
    for size in {1, len(numbers) // 2} - {0, len(numbers)}:
        parts = [numbers[:size], numbers[size:]]
        try:
            with torch.no_grad():
                found = torch.cat([task.loss(task.model, task.encode([examples[i] for i in part])) for part in parts])
        except Exception as error:
            raise UnsupportedError(
                f"The loss fails for {size} of the first {len(numbers)} examples alone ({error}): it must give a number for "
                "each example of any batch, also of one."
            ) from None
        if found.shape != losses.shape:
            raise UnsupportedError(
                f"The loss gives the shape {list(found.shape)} for {len(numbers)} examples in two parts."
            )
        for i, a, b in _unlike(losses, found, numbers):
            n = len(parts[0] if i in parts[0] else parts[1])
            raise UnsupportedError(
                f"The loss of example {i} is {a:.6g} in a batch of {len(numbers)} and {b:.6g} in one of {n}: an example's "
                "loss must not depend on the others of its batch (batch norm in training form, weights normalised over "
                "the batch); use stored statistics, or divide by something fixed."
            )


def _checked(task: Any, losses: Any, numbers: Sequence[int]) -> Tensor:
    n = len(numbers)
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        shape = f"the shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__qualname__}"
        raise UnsupportedError(
            f"The loss gives {shape} for {n} examples: it must give one number for each, [{n}] (reduction='none', and a mean "
            "over all other axes)."
        )
    if not losses.is_floating_point():
        raise UnsupportedError(f"The loss gives numbers of type {losses.dtype}: it must give floating-point numbers.")
    for i, value in zip(numbers, losses.tolist(), strict=True):
        if value != value or value in (float("inf"), float("-inf")):
            raise UnsupportedError(f"The loss of example {i} is {value} before the first step: correct it or the loss.")
    if not losses.requires_grad:
        raise UnsupportedError("The loss does not depend on any trained parameter (`trained`): it has no gradient.")
    return losses.detach()


def _unlike(one: Tensor, other: Tensor, numbers: Sequence[int], part: float = 1.0) -> list[tuple[int, float, float]]:
    """Example number and both losses where they differ by more than rounding, the largest difference first.

    Rounding is that of a loss itself and of an ordinary one: a huge loss hides nothing in the others.
    """
    limit = part * ROUNDING.get(one.dtype, 1e-4) * (one.abs() + one.abs().median())
    gaps = (one - other).abs()
    gaps[gaps.isnan()] = float("inf")
    places = [i for i in gaps.argsort(descending=True).tolist() if gaps[i] > limit[i]]
    return [(numbers[i], float(one[i]), float(other[i])) for i in places[:1]]
