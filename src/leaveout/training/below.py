"""What retrainings share: blocks below the lowest trained one make the same of an example in every run and epoch.

That is computed once an example, and kept: in memory up to a limit, beyond it in files. The model's own forward is then
run with lower blocks that only hand it on, so that masks, positions and all else are what the model gives them.
"""

# Blocks of other packages: what they are called with has no types.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leaveout.files import TEMPORARY, sync
from leaveout.models import free_memory
from leaveout.models.streaming import standing_in
from leaveout.training.batching import agree, near_runs, some_examples, tried, with_gradients
from leaveout.training.dropout import dropped
from leaveout.training.loop import Part, Steps
from leaveout.training.tasks import Batch, losses_on

SHARE = 8
"""What is kept in memory is at most this part of it: of the memory that is given, or of what is free."""
FOLDER = "below"


def lower_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks before the first one that is trained, of the list or sequence that has most numbers below it; [] if none."""
    found: list[tuple[int, list[nn.Module]]] = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks = list(module)
            trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
            lower = blocks[: trained.index(True) if True in trained else len(blocks)]
            found.append((sum(p.numel() for block in lower for p in block.parameters()), lower))
    size, lower = max(found, key=lambda one: one[0], default=(0, []))
    return lower if size else []


class _Reached(Exception):
    """The last of the lower blocks has given its states."""


@dataclass
class _Kept:
    """States behind the lower blocks, and where the random numbers stand there if these have drawn some."""

    states: Tensor
    noise: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.states.nbytes


@dataclass
class Below:
    """The states behind the lower blocks, of examples, or of whole micro-batches where lower blocks have dropout.

    room    bytes of them that stay in memory; the others are in files of `folder`, or computed each time without one
    """

    steps: Steps
    lower: list[nn.Module]
    room: int
    folder: Path | None = None
    draws: bool = False
    kept: dict[str, _Kept] = field(default_factory=dict[str, _Kept])
    widths: list[int] = field(default_factory=list[int])  # of the tuples that blocks give; 0: they give states alone

    # --- computing and keeping -----------------------------------------------------------------------------------

    def of(self, part: Part) -> _Kept:
        """The states of a micro-batch [examples, ...], padded as the model's batch is."""
        whole, some = part.whole or part.numbers, list(part.places)
        if self.draws:
            kept = self._found(f"{part.seed}", lambda: self._computed(Part(whole, None, 1.0), part.seed))
            return replace(kept, states=kept.states[some]) if some else kept
        rows = [self._found(f"{n}", lambda n=n: self._computed(Part((n,), None, 1.0), None)).states for n in whole]
        if rows[0].dim() > 2:  # [texts of the example, tokens, ...]
            longest = max(row.shape[1] for row in rows)
            rows = [F.pad(row, (0, 0) * (row.dim() - 2) + (0, longest - row.shape[1])) for row in rows]
        return _Kept(torch.cat([rows[i] for i in some] or rows))

    def _found(self, name: str, make: Callable[[], _Kept]) -> _Kept:
        if name in self.kept:
            return self.kept[name]
        file = None if self.folder is None else self.folder / f"{name}.safetensors"
        if file is not None and file.exists():
            saved = load_file(file, str(self.steps.task.device))
            return _Kept(saved["states"], saved["noise"].cpu() if "noise" in saved else None)
        made = make()
        if made.nbytes <= self.room:
            self.room -= made.nbytes
            self.kept[name] = made
        elif file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = {} if made.noise is None else {"noise": made.noise}
            temporary = file.with_name(f"{uuid.uuid4().hex}{TEMPORARY}")  # another worker may be at the same one
            save_file({"states": made.states.contiguous(), **noise}, temporary)
            sync(temporary)
            os.replace(temporary, file)
        return made

    def _computed(self, part: Part, seed: int | None) -> _Kept:
        """What the lower blocks make of a micro-batch."""
        batch, _ = self.steps.fed(part)
        with self.steps.passing(Part(part.numbers, None, 1.0, seed)):
            return self._seen(lambda model: self.steps.task.learned(model, batch), self.draws)

    @torch.no_grad()
    def _seen(self, go: Callable[[nn.Module], Any], draws: bool = False) -> _Kept:
        """What the lower blocks make of what the model is given there; what each of them gives is looked at."""
        found, widths = list[_Kept](), dict[int, int]()

        def look(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, given: Any) -> None:
                widths[number] = len(given) if isinstance(given, tuple) else 0
                if number + 1 == len(self.lower):
                    states = given[0] if isinstance(given, tuple) else given
                    found.append(_Kept(states.detach().clone(), torch.get_rng_state() if draws else None))
                    raise _Reached

            return hook

        hooks = [block.register_forward_hook(look(number)) for number, block in enumerate(self.lower)]
        try:
            go(self.steps.task.model)
        except _Reached:
            self.widths = [widths[number] for number in range(len(self.lower))]
            return found[0]
        finally:
            for hook in hooks:
                hook.remove()
        raise ValueError("the lower blocks are not called")

    # --- using ---------------------------------------------------------------------------------------------------

    def passing(self, part: Part) -> AbstractContextManager[None]:
        """While forward passes of a part are made: the lower blocks hand on what is kept of it."""
        return self._handing(self.of(part))

    def asking(self, batch: Batch, go: Callable[[nn.Module], Any]) -> AbstractContextManager[None]:
        """The same of a batch of queries, which a model is given by `go`."""
        name = hashlib.sha256(b"".join(f"{t.shape}".encode() + t.cpu().numpy().tobytes() for t in batch)).hexdigest()
        return self._handing(self._found(f"asked-{name[:32]}", lambda: self._seen(go)))

    @contextmanager
    def _handing(self, given: _Kept) -> Iterator[None]:
        def hand_on(number: int, _: Callable[..., Any], *args: Any, **named: Any) -> Any:
            states = args[0] if args else named["hidden_states"]
            if number + 1 == len(self.lower):
                states = given.states
                if given.noise is not None:
                    torch.set_rng_state(given.noise)
            width = self.widths[number]
            return (states, *(None for _ in range(1, width))) if width else states

        with standing_in(self.lower, hand_on):
            yield

    def total(self) -> int:
        """Bytes of all states, by those of one example and the numbers that a batch has of each.

        Cost: every example encoded once.
        """
        steps = self.steps
        learned = [i for batch in steps.batches for i in batch]

        def size(n: int) -> int:
            return steps.task.encode([steps.recipe.examples[n]])[0].numel()

        sizes = {n: size(n) for n in set(learned)}
        some = learned[0]
        each = self._computed(Part((some,), None, 1.0), None).nbytes / sizes[some]
        return int(each * sum(sizes[n] for n in (learned if self.draws else sizes)))

    def drop_files(self) -> None:
        """Removes what is kept in files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def below_of(steps: Steps, memory: int | None = None, directory: Path | None = None) -> Below | None:
    """What retrainings of a recipe can share, None where that is nothing.

    Tried with the losses and gradients of two examples, under parameters a little beside the start's.
    memory: bytes that may be used; directory: where files go that do not fit into the part of it that is for this
    Cost: as two small steps.
    """
    recipe, task = steps.recipe, steps.task
    lower = lower_blocks(task.model)
    if not lower:
        return None
    folder = None if directory is None else directory / f"{FOLDER}-{recipe.hash()[:16]}"
    below = Below(steps, lower, (free_memory(task.device) // 2 if memory is None else memory) // SHARE, folder)
    numbers = some_examples(recipe)
    part = Part(tuple(numbers), None, 1.0)
    if tried(lambda: _equal(below, part)) is not True:
        return None
    if recipe.dropout is not None:
        if task.device.type != "cpu":  # where random numbers stand is read on a CPU only
            return None
        below.draws = _draws(below, part)
        below.kept.clear()
    return below


def _equal(below: Below, part: Part) -> bool:
    task = below.steps.task
    bound = losses_on(task, below.steps.fed(part)[0])
    run = {name: p[1] for name, p in near_runs(task).items()}

    def found() -> list[Tensor]:
        return with_gradients(bound.under, run)

    wanted = found()
    below._computed(part, None)  # shows what each block gives, also where the states are in files already
    with below.passing(part):
        return agree(found(), wanted)


def _draws(below: Below, part: Part) -> bool:
    """Whether the lower blocks, or what is before them, draw random numbers when they are trained."""
    with dropped(below.steps.task.model, 0):
        before = torch.get_rng_state()
        below.draws = True
        with torch.random.fork_rng(devices=[]):
            after = below._computed(part, None).noise
        below.draws = False
    assert after is not None
    return not torch.equal(before, after)
