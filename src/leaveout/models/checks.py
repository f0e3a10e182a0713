"""What a model must be before its numbers are used: in evaluation form, causal, and without hooks that change it."""

# Modules of other packages: what they hold, and torch's hooks, have no types and no public names.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from leaveout.errors import UnsupportedError
from leaveout.models.identity import is_compiled, scaled_by_length

# Largest difference over the largest number that counts as rounding, by dtype of the model.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}
SHORT, LONG = 24, 320  # tokens of the two tests of causality
# Largest change of the states before a token over that of the states behind it which is rounding, by dtype. Measured: 0 for
# causal families, 1e-6 for mixtures of experts in float32; 1e-3 and more for BERT with its first random weights.
LEAK = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 4e-3}
NARROW_LEAK, SHARE = 1e-3, 0.25  # in 16 bits also refused: a change this large in this share of all numbers


@contextmanager
def evaluating(lm: nn.Module) -> Generator[None]:
    """Every module in evaluation form, and put back into its own form afterwards.

    Rotary frequencies that a longer input has left behind are put back to those of the start, too. Modules that
    torch.compile has compiled run as they are written, since compiled ones do not heed hooks that come later.
    """
    training, compiled = [], False
    for module in lm.modules():
        compiled = compiled or is_compiled(module)
        if module.training:
            training.append(module)
            module.training = False
        if scaled_by_length(module):
            _reset_positions(module)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


def _reset_positions(module: Any) -> None:
    """Dynamic scaling keeps the frequencies of the longest input so far; transformers resets them only at a shorter one."""
    for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        start = getattr(module, name)
        module.register_buffer(
            f"{prefix}inv_freq", start.to(getattr(module, f"{prefix}inv_freq")).clone(), persistent=False
        )
        if hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def length_limit(lm: nn.Module) -> int | None:
    """Tokens from which on a row must be computed beside rows of its own length only; None for most models.

    Rotary frequencies of the kinds `dynamic` and `longrope` depend on the longest row of a batch from there on.
    """
    limits = [limit for module in lm.modules() if scaled_by_length(module) for limit in _limits(module)]
    return min(limits) if limits else None


def _limits(module: Any) -> Iterator[int]:
    """Lengths from which on a rotary module may take other frequencies."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    for one in [parameters, *parameters.values()]:
        if isinstance(one, dict) and isinstance(one.get("original_max_position_embeddings"), int):
            yield one["original_max_position_embeddings"]
    yield int(module.original_max_seq_len)


def probe_ids(vocabulary: int, length: int, device: torch.device | str, seed: int = 7919) -> Tensor:
    """Token ids [1, length], spread over the vocabulary."""
    return ((torch.arange(length) + 1) * seed % vocabulary).unsqueeze(0).to(device)


@torch.no_grad()
def refuse_look_ahead(
    lm: nn.Module,
    states: Callable[[list[Tensor]], list[Tensor]],
    vocabulary: int,
    context: int,
    device: torch.device | str,
) -> None:
    """Refuses a model whose states at a token change with later tokens: it sees what it is to predict.

    states: inputs of token ids [1, tokens] -> of each numbers [1, tokens, any], as the caller will use the model.
    Raises: UnsupportedError. Tested on 24 and up to 320 tokens, with all tokens from the second, from the middle and the
    last one replaced.
    """
    # Some models with learned positions, as RoBERTa, take two or so fewer tokens than they have positions.
    lengths = sorted({min(SHORT, context), min(LONG, max(SHORT, context - 4), context)} - {0, 1})
    places = {length: sorted({1, length // 2, length - 1}) for length in lengths}
    inputs: list[Tensor] = []
    for length in lengths:
        ids = probe_ids(vocabulary, length, device)
        inputs.append(ids)
        for place in places[length]:
            inputs.append(ids.clone())
            inputs[-1][:, place:] = (ids[:, place:] + 1 + vocabulary // 3) % vocabulary
    with evaluating(lm), runs(lm):
        found = iter(states(inputs))
    for length in lengths:
        before = next(found)
        limit = LEAK.get(before.dtype, 1e-4)
        for place in places[length]:
            moved = (next(found) - before).abs().double()
            behind = max(float(moved[:, place:].max()), 1e-30)
            leak, share = float(moved[:, :place].max()) / behind, float((moved[:, :place] > 0).double().mean())
            if leak > limit or (before.element_size() == 2 and leak > NARROW_LEAK and share > SHARE):
                raise UnsupportedError(
                    f"{type(lm).__name__} sees the tokens that it is to predict: when the tokens from {place + 1} of {length} "
                    f"on are replaced, its states before them change ({leak:.2g} of the change behind); give a causal "
                    "language model (is_decoder=True, is_causal=True, no bidirectional attention)."
                )


@contextmanager
def runs(lm: nn.Module) -> Generator[None]:
    """What torch raises when a model cannot run as it is, as one sentence."""
    try:
        yield
    except (RuntimeError, IndexError, NotImplementedError) as error:
        dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{type(lm).__name__} does not run in {dtype} here ({first_line(error)}): load it with another dtype, or on "
            "another device."
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"{type(lm).__name__} does not run on token ids alone ({first_line(error)}): give a causal language model of "
            "transformers (a decoder)."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says first, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---------------------------------------------------------------- hooks


def hooked_modules(lm: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with forward hooks or pre-hooks, by name."""
    return [(name, module) for name, module in lm.named_modules() if module._forward_hooks or module._forward_pre_hooks]


@contextmanager
def _without_hooks(lm: nn.Module) -> Generator[None]:
    """The model without anybody's forward hooks, those of all modules included."""
    owners: list[Any] = [module for _, module in hooked_modules(lm)]
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(owner, name, getattr(owner, name)) for owner in owners for name in names]
    kept += [(torch_module, f"_global{name}", getattr(torch_module, f"_global{name}")) for name in names]
    with ExitStack() as stack:
        for owner, name, hooks in kept:
            stack.callback(setattr, owner, name, hooks)
            setattr(owner, name, OrderedDict())
        yield


@torch.no_grad()
def refuse_hooks(lm: nn.Module, outputs: Callable[[Tensor], list[Tensor]], ids: Tensor) -> None:
    """Refuses forward hooks that change what the model gives; hooks that only look on are left alone.

    Raises: UnsupportedError naming the modules with hooks.
    """
    hooked = hooked_modules(lm)
    everywhere = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    if not hooked and not everywhere:
        return
    with evaluating(lm):
        with_hooks = [tensor.clone() for tensor in outputs(ids)]
    with evaluating(lm), _without_hooks(lm):
        without = outputs(ids)
    if not all(torch.equal(one, other) for one, other in zip(with_hooks, without, strict=True)):
        names = [name or type(module).__name__ for name, module in hooked] or ["all modules"]
        raise UnsupportedError(
            f"A forward hook on {names[0]}{f' or {len(names) - 1} others' if names[1:] else ''} changes what the model "
            "gives: remove it (handle.remove()), as nothing that is kept would know of it."
        )
