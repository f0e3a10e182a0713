"""Run a recipe: plainly, for many weightings at once, or in jets.

All three run the same loop on the same task and the same parts of steps (`steps`). A weight is one number per unit
(plain), one per run and unit (batch), or the series 1 - z psi per direction and unit (jets).
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from leaveout.errors import StabilityError
from leaveout.jets import Jet, Series, Space, install, restore
from leaveout.training.batching import Parameters, batching_problem, losses_on, of_runs
from leaveout.training.checkpoint import Checkpoint, restore_state, state_of
from leaveout.training.memory import MemoryPlan, kept_memory, plan_memory
from leaveout.training.optimizers import PaperAdam
from leaveout.training.recipe import Recipe
from leaveout.training.steps import Part, Steps
from leaveout.training.tasks import Batch, Task, rows_are_separate, task_of

CHECK_EVERY = 20
"""Steps between two looks at whether all coefficients are finite."""
QUERIES_TOGETHER = 8


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes its numbers.

    directory: where checkpoints go (None: none); memory: bytes a jet run may use; progress: a bar on stderr.
    batched: whether runs may share steps, if that is known; None: it is tried before the first step.
    """

    directory: Path | None = None
    progress: bool = False
    memory: int | None = None
    save_every: float = 60.0
    batched: bool | None = None

    def checkpoint(self, name: str, *parts: Any) -> Checkpoint | None:
        if self.directory is None:
            return None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else str(part).encode())
        return Checkpoint(Path(self.directory) / f"{name}.safetensors", digest.hexdigest(), self.save_every)


# --- the loop ----------------------------------------------------------------------------------------------------


def make_optimizer(recipe: Recipe, params: list[Any], fused: bool = False) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters."""
    s = recipe.optimizer
    chosen: dict[str, Any] = {k: v for k, v in (("betas", s.betas), ("eps", s.eps)) if v is not None}
    if s.name == "sgd":
        return torch.optim.SGD(
            params, s.lr, momentum=s.momentum, nesterov=s.nesterov, weight_decay=s.weight_decay, foreach=False
        )
    if s.name == "paper-adam":
        return PaperAdam(params, s.lr, **chosen)
    kind = torch.optim.Adam if s.name == "adam" else torch.optim.AdamW
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
    return kind(params, s.lr, weight_decay=s.weight_decay, **how, **chosen)


@dataclass
class Loop:
    """One pass over the recipe's steps, from a checkpoint if there is one."""

    recipe: Recipe
    task: Task
    params: dict[str, Any]
    optimizer: torch.optim.Optimizer
    backward: Callable[[Part], None]  # adds the gradients of these examples
    clip: Callable[[], None]
    after: Callable[[int], None] = lambda step: None  # called with the number of steps done

    def run(self, checkpoint: Checkpoint | None, label: str, options: RunOptions) -> None:
        steps = Steps(self.recipe, self.task)
        start = self._resume(checkpoint)
        bar = tqdm(
            range(start, len(steps)), initial=start, total=len(steps), desc=label, unit="step",
            disable=not options.progress, file=sys.stderr,
        )  # fmt: skip
        for step in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate(step, len(steps))
            self.optimizer.zero_grad()
            for part in steps.parts(step):
                self.backward(part)
            self.clip()
            self.optimizer.step()
            self.after(step + 1)
            if checkpoint is not None and (checkpoint.due or step + 1 == len(steps)):
                checkpoint.save(step + 1, state_of(self.params, self.optimizer))

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        saved = None if checkpoint is None else checkpoint.load()
        if saved is None:
            return 0
        restore_state(self.params, self.optimizer, saved[1])
        return saved[0]


# --- plain -------------------------------------------------------------------------------------------------------


def train_plain(recipe: Recipe, weights: Tensor | None = None, options: RunOptions | None = None) -> Parameters:
    """The trained parameters [*shape] by name, with one weight per unit (default: all one).

    Guarantee: the numbers of an ordinary PyTorch loop over the same batches, bit for bit, when no weight is given and
    the loss is per example; up to rounding per token.
    """
    options, task = options or RunOptions(), task_of(recipe)
    params = own_parameters(task)
    by_example = None if weights is None else weights.to(recipe.real_dtype)[recipe.unit_of]

    def backward(part: Part) -> None:
        losses = task.loss(task.model, encoded(recipe, task, part.numbers))
        part.loss(losses, None if by_example is None else by_example[list(part.numbers)]).backward()

    loop = Loop(recipe, task, params, make_optimizer(recipe, list(params.values())), backward, clipper(recipe, params))
    loop.run(options.checkpoint("plain", recipe.hash(), weights), "train", options)
    return {name: p.detach() for name, p in params.items()}


def encoded(recipe: Recipe, task: Task, numbers: Sequence[int]) -> Batch:
    """The batch of these examples of a recipe."""
    return task.encode([recipe.examples[i] for i in numbers])


def own_parameters(task: Task) -> dict[str, Any]:
    """The trained parameters of a task's model by name, in the order of the task."""
    own = dict(task.model.named_parameters())
    return {name: own[name] for name in task.trained}


def clipper(recipe: Recipe, params: dict[str, Any]) -> Callable[[], None]:
    """The global-norm clipping of a recipe, over these parameters' gradients."""

    def clip() -> None:
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(params.values()), recipe.clip_norm)

    return clip


# --- many weightings at once -------------------------------------------------------------------------------------


def train_batch(recipe: Recipe, weights: Tensor, options: RunOptions | None = None, together: int = 250) -> Parameters:
    """Trained parameters [runs, *shape] by name, for weights [runs, units]; `together` runs share each step.

    Where runs cannot be batched (`batching_problem`), each goes by itself.
    Guarantee: each run equals `train_plain` with its weights, up to the rounding of batched products.
    Cost: examples of weight 0 in all runs that share a step are not computed, where they are separate (`rows_are_separate`).
    """
    options, task = options or RunOptions(), task_of(recipe)
    if min(together, len(weights)) > 1:
        known = options.batched is not None
        together = together if (options.batched if known else batching_problem(recipe, task) is None) else 1
    rounds = [_train_stack(recipe, task, part, options, number) for number, part in enumerate(weights.split(together))]
    return {name: torch.cat([r[name] for r in rounds]) for name in task.trained}


def _train_stack(recipe: Recipe, task: Task, weights: Tensor, options: RunOptions, number: int) -> Parameters:
    runs = weights.shape[0]
    params = {n: nn.Parameter(p.detach().expand(runs, *p.shape).clone()) for n, p in own_parameters(task).items()}
    by_example = weights.to(recipe.real_dtype)[:, recipe.unit_of]

    used = (by_example != 0).any(0)
    leave_out = not bool(used.all()) and rows_are_separate(recipe, task)

    def backward(part: Part) -> None:
        if leave_out:  # one is always kept, so that every parameter has a gradient, if only 0
            part = part.only([i for i in part.numbers if used[i]] or part.numbers[:1])
        losses = of_runs(losses_on(task, encoded(recipe, task, part.numbers)).under, params)  # type: ignore[arg-type]
        part.loss(losses, by_example[:, list(part.numbers)]).backward()

    def clip() -> None:
        if recipe.clip_norm is not None:
            _clip_each(params, recipe.clip_norm)

    optimizer = make_optimizer(recipe, list(params.values()), fused=True)
    checkpoint = options.checkpoint(f"batch-{number}", recipe.hash(), weights)
    with kept_memory():
        Loop(recipe, task, params, optimizer, backward, clip).run(checkpoint, f"{runs} runs", options)
    return {name: p.detach() for name, p in params.items()}


def _clip_each(params: dict[str, nn.Parameter], limit: float) -> None:
    """Global-norm clipping of each run by itself, as clip_grad_norm_ does it."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


# --- jets --------------------------------------------------------------------------------------------------------


@dataclass
class JetRun:
    """What a training run in jets gives.

    losses        series of the queries: c [queries], h [degree, directions, queries], nats; None without queries
    constants, coefficients   parameters by name, [*shape] and [degree, directions, *shape]; empty if not kept
    nonsmooth     calls of operations with a kink; with degree >= 2 `warnings` says what that means
    """

    losses: Series | None
    constants: Parameters
    coefficients: Parameters
    memory: MemoryPlan
    nonsmooth: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class JetSettings:
    """Degree, number type of the coefficients (default: complex of the recipe's precision), what to keep."""

    degree: int = 1
    dtype: torch.dtype | None = None
    keep_parameters: bool = True


Queries = Sequence[Any] | Callable[[nn.Module], Tensor]
"""Rows in the form of the recipe's examples, or a function of the trained model that gives a vector."""


def train_jets(
    recipe: Recipe,
    psi: Tensor,
    settings: JetSettings,
    queries: Queries | None = None,
    options: RunOptions | None = None,
) -> JetRun:
    """Train with weights 1 - z psi for directions psi [directions, units], and push the queries through.

    Real directions (settings.dtype float32 or float64) cost half. Raises: StabilityError if a coefficient overflows.
    """
    options, task = options or RunOptions(), task_of(recipe)
    dtype = settings.dtype or recipe.real_dtype.to_complex()
    plan = plan_memory(recipe, task, settings.degree, psi.shape[0], dtype, options.memory)
    if options.progress:
        tqdm.write(f"memory: {plan}", file=sys.stderr)
    began, seen, parts = time.process_time(), {}, []
    for number, part in enumerate(psi.split(plan.together)):
        space = Space(settings.degree, part.shape[0], dtype)
        parts.append(_jet_round(recipe, task, (part, space), settings, queries, options, number))
        for name, count in space.nonsmooth.items():
            seen[name] = seen.get(name, 0) + count
    run = _joined(parts, plan)
    run.nonsmooth, run.cpu_seconds = seen, time.process_time() - began
    if seen and settings.degree >= 2:
        run.warnings.append(
            f"Operations with a kink ({', '.join(sorted(seen))}) were followed on the branch of the unperturbed run: "
            "coefficients of degree 2 and above do not see the kink. Use degree 1, or a smooth activation."
        )
    return run


Round = tuple[Series | None, Parameters, Parameters]


def _jet_round(
    recipe: Recipe, task: Task, directions: tuple[Tensor, Space], settings: JetSettings, queries: Queries | None,
    options: RunOptions, number: int,
) -> Round:  # fmt: skip
    psi, space = directions
    replaced = install(task.model, {n: space.constant(p) for n, p in own_parameters(task).items()})
    try:
        params = own_parameters(task)
        by_example = psi.to(space.dtype)[:, recipe.unit_of]
        n_steps = len(recipe.batches())
        loop = Loop(
            recipe, task, params, make_optimizer(recipe, list(params.values()), fused=True),
            lambda part: _jet_backward(recipe, task, space, part, by_example[:, list(part.numbers)]),
            clipper(recipe, params), lambda step: _check_finite(params, step, n_steps),
        )  # fmt: skip
        checkpoint = options.checkpoint(f"jets-{number}", recipe.hash(), psi, space.degree, space.dtype)
        with flushed_denormals(), kept_memory():
            if queries is not None and number == 0:  # what they use without a rule for it is refused before the steps
                query_series(task, space, queries)
                space.nonsmooth.clear()
            loop.run(checkpoint, f"degree {space.degree}, {space.directions} directions", options)
            losses = None if queries is None else query_series(task, space, queries)
        kept = params if settings.keep_parameters else {}
        return losses, {n: p.c.clone() for n, p in kept.items()}, {n: p.h for n, p in kept.items()}
    finally:
        restore(task.model, replaced)


def _jet_backward(recipe: Recipe, task: Task, space: Space, part: Part, psi: Tensor) -> None:
    h = torch.zeros(space.degree, *psi.shape, dtype=space.dtype)
    h[0] = -psi
    weights = space.jet(torch.ones(psi.shape[1], dtype=space.real_dtype), h)
    part.loss(task.loss(task.model, encoded(recipe, task, part.numbers)), weights).backward()


def _check_finite(params: dict[str, Any], step: int, n_steps: int) -> None:
    if step % CHECK_EVERY and step < n_steps:
        return
    for name, p in params.items():
        finite = p.h.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            degree = int((~finite).nonzero()[0]) + 1
            raise StabilityError(
                f"The series of {name} overflowed at step {step}, degree {degree}: the run is not stable in jets. "
                + ("Use a lower degree, or ask" if degree > 1 else "Measure it with retrainings, or ask")
                + " `leaveout doctor RECIPE --growth` what to change."
            )


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Moments of weights that no longer get a gradient decay to denormal numbers, which slow a step down tenfold."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def query_series(task: Task, space: Space, queries: Queries) -> Series:
    """Series of queries [queries] under the jets that the task's model holds."""
    with torch.no_grad():
        if callable(queries):
            values = [queries(task.model)]
        else:
            groups = (queries[i : i + QUERIES_TOGETHER] for i in range(0, len(queries), QUERIES_TOGETHER))
            values = [task.loss(task.model, task.encode_queries(list(group))) for group in groups]
    jets = [v if isinstance(v, Jet) else space.constant(v) for v in values]
    return Series(torch.cat([j.c for j in jets]), torch.cat([j.h for j in jets], -1))


def _joined(parts: list[Round], plan: MemoryPlan) -> JetRun:
    first = parts[0]
    losses = None if first[0] is None else Series(first[0].c, torch.cat([p[0].h for p in parts if p[0] is not None], 1))
    coefficients = {name: torch.cat([p[2][name] for p in parts], 1) for name in first[2]}
    return JetRun(losses, first[1], coefficients, plan)
