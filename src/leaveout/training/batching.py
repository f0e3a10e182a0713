"""Many runs as one batch (torch.vmap) where that gives the numbers of each run by itself, and one by one elsewhere.

Operations without a batching rule fail, and some give wrong numbers without a word (an embedding with a padding index,
for one). So what a batch gives is compared with two runs by themselves before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from leaveout.training.formulas import plain_attention
from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Parameters, Task, text_length, weighted_losses

OneRun = Callable[[Parameters], Any]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""What a batched product may change of the largest numbers; rounding is a hundredth of it, a wrong rule far more."""
FEW_EXAMPLES = 8  # of a recipe without texts, in the probe


def run_count(runs: Parameters) -> int:
    """How many runs are stacked."""
    return len(next(iter(runs.values())))


def one_by_one(one: OneRun, runs: Parameters) -> Tensor:
    """What `one` gives for each of stacked runs [runs, ...]."""
    return torch.stack([one({name: p[i] for name, p in runs.items()}) for i in range(run_count(runs))])


def of_runs(one: OneRun, runs: Parameters) -> Tensor:
    """The same as one batch; a single run goes by itself. Random numbers (of dropout) are the same for all."""
    if run_count(runs) == 1:
        return one_by_one(one, runs)
    with plain_attention():
        return torch.vmap(one, randomness="same")(runs)


def checked_of_runs(one: OneRun, runs: Parameters) -> tuple[Tensor, bool]:
    """The same as one batch if that gives the numbers of the first two runs by themselves, else one by one; and which."""
    if run_count(runs) > 2:
        alone = one_by_one(one, {name: p[:2] for name, p in runs.items()})
        if (batched := tried(lambda: of_runs(one, runs))) is not None and agree([batched[:2]], [alone]):
            return batched, True
    return one_by_one(one, runs), False


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether tensors are equal up to rounding: of their own largest number, and a little of the largest of all."""
    largest = max((float(w.abs().max()) for w in wanted if w.numel()), default=0.0)
    for f, w in zip(found, wanted, strict=True):
        own = float(w.abs().max()) if w.numel() else 0.0
        limit = TOLERANCE[w.dtype] * (own + 0.01 * largest)
        if f.shape != w.shape or not torch.allclose(f, w, rtol=0.0, atol=limit, equal_nan=True):
            return False
    return True


def batching_problem(recipe: Recipe, task: Task) -> str | None:
    """Why runs of this recipe cannot share their steps, in a few words; None if they can.

    Tried on two runs, one at the start and one near it, with the losses and gradients of a few examples.
    Cost: as a few steps of two runs.
    """
    batch = task.batch([recipe.examples[i] for i in some_examples(recipe)])
    weights = torch.ones(2, len(batch[0]), dtype=recipe.real_dtype, device=task.device)
    weights[1, 0] = 0
    losses, runs = weighted_losses(task, batch, near_runs(task), weights)
    wanted = with_gradients(lambda given: one_by_one(losses, given), runs)
    problem: list[str] = []
    found = tried(lambda: with_gradients(lambda given: of_runs(losses, given), runs), problem)
    if found is None:
        return problem[0]
    return None if agree(found, wanted) else "two runs as one batch give other numbers than each alone"


def some_examples(recipe: Recipe) -> list[int]:
    """The numbers of the shortest and the longest text; of examples without text, of some that share a step."""
    lengths = [text_length(example) for example in recipe.examples]
    if max(lengths) > 1:
        return [lengths.index(pick(lengths)) for pick in (min, max)]
    first = recipe.micro_batches()[0][0]
    return list(first if recipe.kind == "custom" else first[:FEW_EXAMPLES])


def near_runs(task: Task) -> Parameters:
    """The parameters [2, *shape] of two runs, one at the start and one near it."""
    own = task.parameters()
    return {name: torch.stack([p.detach(), _near(p.detach(), i)]) for i, (name, p) in enumerate(own.items())}


def _near(p: Tensor, seed: int) -> Tensor:
    """Parameters a little beside these, so that what depends on their values (a router) may differ."""
    drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
    size = p.square().mean().sqrt()
    return p + drawn.to(p.device) * (0.1 * size if size > 0 else 0.01)


def with_gradients(losses: Callable[[Parameters], Tensor], runs: Parameters) -> list[Tensor]:
    """Losses [..., examples], and the gradient of their sum, zero where there is none."""
    leaves = {name: p.clone().requires_grad_() for name, p in runs.items()}
    values = losses(leaves)
    grads = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [values.detach(), *grads]


def tried(batched: Callable[[], Any], problem: list[str] | None = None) -> Any:
    """What a batched pass gives, None if it fails; why, is added to `problem`."""
    try:
        return batched()
    except Exception as error:  # whatever torch raises where a rule is missing: the runs go one by one
        if problem is not None:
            problem.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        return None
