"""The loop over the steps of a run: its parts, optimizers and checkpoints.

The loss of a step is the sum over its examples of weight * size * loss, divided by the sum of all their sizes. The size
is 1, or the number of learned tokens (`loss_per: token`); a recipe may divide each micro-batch by itself, or by a number
that it gives. Weights do not enter the divisor, so that the trained model is
a smooth function of them: an example of weight 0 adds nothing, and what the others add stays as it was.
"""

from __future__ import annotations

import fnmatch
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from leaveout.errors import FormatError, MismatchError, UnsupportedError
from leaveout.files import replacing
from leaveout.jets import Jet, Series
from leaveout.jets.rules_optim import AdamStep, adam_step_, gradient_of
from leaveout.models import full_precision, sent
from leaveout.training.dropout import dropped, seed_of
from leaveout.training.norms import by_batches
from leaveout.training.recipe import Recipe, in_parts
from leaveout.training.tasks import Batch, Task

# --- what a step trains on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step.

    numbers  its examples
    sizes    what the loss of each counts [examples], None where all count alike
    seed     of its dropout masks, None where nothing is dropped
    divisor  of its sum: that of the whole step, or of this part where the recipe wants it; whatever the weights are
    whole    where masks are drawn for a larger micro-batch, the examples of that; places: of the examples here in it
    """

    numbers: tuple[int, ...]
    sizes: Tensor | None
    divisor: float
    seed: int | None = None
    whole: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    def loss(self, losses: Any, weights: Any = None) -> Any:
        """What this part adds to the loss of its step. Shapes: losses and weights [..., examples]."""
        sized = losses if self.sizes is None else losses * sent(self.sizes, losses.device)
        return (sized if weights is None else sized * weights).sum() / self.divisor

    def only(self, kept: Sequence[int]) -> Part:
        """The same without some of its examples, for where the weights of these are 0."""
        chosen = set(kept)
        return self._some([i for i, number in enumerate(self.numbers) if number in chosen])

    def pieces(self, size: int) -> list[Part]:
        """The same in parts of at most so many examples, with the masks that they have in the whole."""
        if len(self.numbers) <= size:
            return [self]
        n = len(self.numbers)
        return [self._some(range(i, min(n, i + size))) for i in range(0, n, size)]

    def _some(self, chosen: Sequence[int]) -> Part:
        """The same with the examples at these places of it, which keep their masks."""
        numbers = tuple(self.numbers[i] for i in chosen)
        sizes = None if self.sizes is None else self.sizes[list(chosen)]
        if self.seed is None or len(chosen) == len(self.numbers):
            return replace(self, numbers=numbers, sizes=sizes)
        places = self.places or range(len(self.numbers))
        return replace(
            self,
            numbers=numbers,
            sizes=sizes,
            whole=self.whole or self.numbers,
            places=tuple(places[i] for i in chosen),
        )

    @property
    def weights(self) -> Tensor:
        """What part of a step's loss each example has [examples]; 1 where it has none, and so no gradient."""
        sizes = torch.ones(len(self.numbers), dtype=torch.float64) if self.sizes is None else self.sizes.double()
        return torch.where(sizes > 0, sizes / self.divisor, 1.0)


KEPT = 2**28
"""Bytes of batches that stay on a GPU; others are copied there at each step, which waits for nothing."""


class Steps:
    """The steps of a recipe. Sizes are counted when they are first needed, each example once.

    mixed: whether forward passes are in the recipe's `autocast`; follows: whether they move running statistics
    """

    def __init__(self, recipe: Recipe, task: Task, mixed: bool = True) -> None:
        self._autocast, self.follows = mixed and recipe.autocast is not None, True
        self.recipe, self.task, self.batches = recipe, task, recipe.batches()
        self._micro_batches = recipe.micro_batches()
        self._sizes: dict[int, int] = {}
        self._kept: dict[tuple[int, ...], tuple[Batch, Tensor]] = {}
        self._room = 0 if task.device.type == "cpu" else KEPT

    def __len__(self) -> int:
        return len(self.batches)

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step."""
        per, seed = self.recipe.loss_per, self.recipe.dropout
        parts = self._parts(self._micro_batches[step], None if isinstance(per, str) else per[step])
        return parts if seed is None else [replace(p, seed=seed_of(seed, step, i)) for i, p in enumerate(parts)]

    def parts_of(self, numbers: Sequence[int], n: int) -> list[Part]:
        """Those of a step on these examples, at most n."""
        return self._parts(tuple(in_parts(tuple(numbers), n)), None)

    def _parts(self, groups: Sequence[tuple[int, ...]], divisor: float | None) -> list[Part]:
        dtype, counted = self.recipe.real_dtype, self.task.sizes is not None
        sizes = [[self._size(i) if counted else 1 for i in group] for group in groups]
        whole = sum(map(sum, sizes)) if divisor is None else divisor
        apart = self.recipe.loss_per == "micro-batch"
        return [
            Part(group, torch.tensor(own, dtype=dtype) if counted else None, sum(own) * len(groups) if apart else whole)
            for group, own in zip(groups, sizes, strict=True)
        ]

    def fed(self, part: Part) -> tuple[Batch, Tensor]:
        """The batch of a part, and the numbers of its examples [examples], where the model is."""
        if part.whole:
            batch, numbers = self.fed(Part(part.whole, None, 1.0))
            some = sent(torch.tensor(part.places), self.task.device)
            return tuple(t[some] for t in batch), numbers[some]
        if (kept := self._kept.get(part.numbers)) is not None:
            return kept
        batch = self.task.batch([self.recipe.examples[i] for i in part.numbers])
        places = sent(torch.tensor(part.numbers), self.task.device)
        size = sum(t.nbytes for t in (*batch, places))
        if size <= self._room:
            self._room -= size
            self._kept[part.numbers] = batch, places
        return batch, places

    def loss(self, part: Part, weigh: Callable[[Tensor], Any] | None = None, share: bool = False) -> Any:
        """What a part adds to the loss of its step, under the model's present parameters.

        weigh  gives the weights [..., examples] of examples with these numbers; share: norms of batches do not see them
        """
        batch, places = self.fed(part)
        weights = None if weigh is None else weigh(places)
        with self.passing(part, None if share else weights):
            losses = self.task.learned(self.task.model, batch)
        return part.loss(losses, weights)

    @contextmanager
    def passing(self, part: Part, weights: Any = None) -> Iterator[None]:
        """While forward passes of a part are made: its dropout, norms by its weights, and the recipe's autocast."""
        kind = self.task.device.type
        mixed = torch.autocast(kind, torch.bfloat16, cache_enabled=False) if self._autocast else nullcontext()
        norms = by_batches(self.task.model, weights, self.follows) if self.task.running else nullcontext()
        with dropped(self.task.model, part.seed, part.places, len(part.whole)), norms, mixed:
            yield

    def _size(self, number: int) -> int:
        if number not in self._sizes:
            assert self.task.sizes is not None
            self._sizes[number] = int(self.task.sizes(self.task.encode([self.recipe.examples[number]])))
        return self._sizes[number]


# --- optimizers -------------------------------------------------------------------------------------------------------


PAPER_BETAS, PAPER_EPS = (0.85, 0.99), 1e-3
BLOCK = 65536
"""Elements that stay in the cache through the seven passes of a plain step; matters for stacked parameters."""


class PaperAdam(torch.optim.Optimizer):
    """Adam whose step is lr * (m / c1) / sqrt(v / c2 + eps), with c_i = 1 - beta_i ** step.

    With epsilon outside the root the square root is singular at v = 0, and the series of a parameter with a small
    gradient grow without bound; inside, eps = 1e-3 keeps them tame.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, betas: tuple[float, float] = PAPER_BETAS, eps: float = PAPER_EPS
    ) -> None:
        if lr < 0 or eps <= 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"wanted lr >= 0, eps > 0 and betas in [0, 1), got lr={lr}, eps={eps}, betas={betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the gradients of all parameters that have one."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                if not (state := self.state[p]):
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
            together = not any(p.is_cpu or isinstance(p, Jet) for p in moved)
            if together and len({self.state[p]["step"] for p in moved}) == 1:
                self._step_all(moved, group)
                continue
            for p in moved:
                self._step_one(p, group)
        return loss

    def _step_all(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """The same for all parameters by one call an operation, as calls are what a GPU waits for."""
        (beta1, beta2), states = group["betas"], [self.state[p] for p in params]
        means, squares = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
        grads = [p.grad for p in params if p.grad is not None]
        c1, c2 = 1 - beta1 ** states[0]["step"], 1 - beta2 ** states[0]["step"]
        each: Any = torch  # whose operations on lists have no types
        each._foreach_lerp_(means, grads, 1 - beta1)
        each._foreach_mul_(squares, beta2)
        each._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = each._foreach_div(squares, c2)
        each._foreach_add_(roots, group["eps"])
        each._foreach_sqrt_(roots)
        each._foreach_addcdiv_(params, means, roots, -group["lr"] / c1)

    def _step_one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        (beta1, beta2), mean, square, grad = group["betas"], state["exp_avg"], state["exp_avg_sq"], p.grad
        assert grad is not None
        settings = AdamStep(group["lr"], beta1, beta2, group["eps"], state["step"], eps_inside=True)
        if isinstance(p, Jet):
            series = grad.series if isinstance(grad, Jet) else Series(grad, torch.zeros_like(p.h))
            adam_step_(p.series, series, mean.series, square.series, settings)
            return
        c1, c2 = settings.corrections
        flat = (t.view(-1).split(BLOCK) for t in (p.data, grad.contiguous(), mean, square))
        for theta, g, m, v in zip(*flat, strict=True):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            theta.addcmul_(m, (v / c2).add_(group["eps"]).rsqrt_(), value=-group["lr"] / c1)


class FlatAdam(torch.optim.Optimizer):
    """Adam of jets on a GPU, where a call costs more than a copy: one step for all parameters.

    The parameters, and the moments, become views of one series each. A parameter that once had no gradient is left alone
    then, as torch's optimizers do it, and all of them are taken one by one from there on.
    """

    @torch.no_grad()
    def __init__(self, params: list[Any], settings: AdamStep) -> None:
        super().__init__(params, {"lr": settings.lr})
        self.settings, self.sizes = settings, [p.numel() for p in params]
        self.flat = self._joined([p.series for p in params])
        self.moments = [self.flat.map(torch.zeros_like) for _ in range(2)]
        parts = [self._parts(series, params) for series in (self.flat, *self.moments)]
        for p, own, mean, square in zip(params, *parts, strict=True):
            p.c, p.h = own.c, own.h
            self.state[p] = {"step": 0, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the gradients of all parameters that have one."""
        loss = None if closure is None else closure()
        group = self.param_groups[0]
        moved = [(p, self.state[p]) for p in group["params"] if p.grad is not None]
        for _, state in moved:
            state["step"] = int(state["step"]) + 1
        counts = {state["step"] for _, state in moved}
        settings = [replace(self.settings, lr=group["lr"], step=count) for count in counts]
        grads = [gradient_of(p.grad, p) for p, _ in moved]
        if len(moved) == len(self.sizes) and len(counts) == 1:
            adam_step_(self.flat, self._joined(grads), self.moments[0], self.moments[1], settings[0])
            return loss
        of_count = {s.step: s for s in settings}
        for (p, state), grad in zip(moved, grads, strict=True):
            mean, square = state["exp_avg"].series, state["exp_avg_sq"].series
            adam_step_(p.series, grad, mean, square, of_count[state["step"]])
        return loss

    def _joined(self, series: list[Series]) -> Series:
        """Series of parameters as one of all their numbers."""
        return Series(torch.cat([s.c.reshape(-1) for s in series]), torch.cat([s.h.flatten(2) for s in series], 2))

    def _parts(self, flat: Series, params: list[Any]) -> list[Jet]:
        """Views of one series in the shapes of the parameters."""
        parts = zip(params, flat.c.split(self.sizes), flat.h.split(self.sizes, 2), strict=True)
        return [Jet(c.view(p.shape), h.view(*h.shape[:2], *p.shape), p.space) for p, c, h in parts]


def spared_by_decay(recipe: Recipe, task: Task) -> set[str]:
    """The trained parameters that weight decay leaves alone. Raises: UnsupportedError for a pattern that none has."""
    wanted, own = recipe.optimizer.undecayed, task.parameters()
    if wanted == "vectors":
        return {name for name, p in own.items() if p.dim() < 2}
    found = {pattern: fnmatch.filter(own, pattern) for pattern in wanted}
    if unknown := [pattern for pattern, names in found.items() if not names]:
        raise UnsupportedError(
            f"No trained parameter matches {unknown[0]!r} of `undecayed`: correct it or leave it out."
        )
    return {name for names in found.values() for name in names}


def make_optimizer(
    recipe: Recipe, decayed: list[Any], fused: bool = False, spared: Sequence[Any] = ()
) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters; weight decay leaves the spared ones alone."""
    s = recipe.optimizer
    first = (decayed or spared)[0]
    given: Any = [{"params": decayed}, {"params": list(spared), "weight_decay": 0.0}] if spared else decayed
    chosen: dict[str, Any] = {k: v for k, v in (("betas", s.betas), ("eps", s.eps)) if v is not None}
    if s.name == "paper-adam":  # it has no decay
        decayed = given = [*decayed, *spared]
    if s.name != "sgd" and isinstance(first, Jet) and not first.is_cpu and (given is decayed):
        paper = s.name == "paper-adam"
        betas, eps = s.betas or (PAPER_BETAS if paper else (0.9, 0.999)), s.eps or (PAPER_EPS if paper else 1e-8)
        return FlatAdam(decayed, AdamStep(s.lr, *betas, eps, 0, paper, s.weight_decay, s.name == "adamw"))
    if s.name == "sgd":
        foreach = not (first.is_cpu or isinstance(first, Jet))  # one call for all parameters
        return torch.optim.SGD(
            given, s.lr, momentum=s.momentum, nesterov=s.nesterov, weight_decay=s.weight_decay, foreach=foreach
        )
    if s.name == "paper-adam":
        return PaperAdam(given, s.lr, **chosen)
    kind = torch.optim.Adam if s.name == "adam" else torch.optim.AdamW
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
    return kind(given, s.lr, weight_decay=s.weight_decay, **how, **chosen)


def clip_together(params: Mapping[str, Any], limit: float) -> None:
    """Clips the gradients of parameters to a global norm."""
    nn.utils.clip_grad_norm_(list(params.values()), limit)


def clip_each(params: Mapping[str, Any], limit: float) -> None:
    """Global-norm clipping of each of stacked runs by itself, as clip_grad_norm_ does it."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


# --- checkpoints: plain safetensors files; nothing is unpickled --------------------------------------------------------


VERSION = "1"
DONE, TELL = "done", 1.0
"""The file that says which part of a task is done, and the seconds between two times that it does."""


@dataclass
class Checkpoint:
    """One file that holds step and state of one run. `key` says which run: recipe, weights or directions, degree."""

    path: Path
    key: str
    every: float = 60.0  # seconds between two savings
    _last: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the last saving is long enough ago."""
        return time.monotonic() - self._last >= self.every

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the file; a killed run leaves the old one or the new one."""
        plain = {k: torch.view_as_real(t) if t.is_complex() else t for k, t in tensors.items()}
        plain = {k: _alone(t.detach().cpu().contiguous()) for k, t in plain.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            save_file(plain, temporary, metadata={"version": VERSION, "key": self.key, "step": str(step)})
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and tensors of the file, None if there is none. Complex tensors come as pairs of real numbers.

        Raises: MismatchError if it belongs to another run; FormatError if it is not such a file.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise FormatError(f"{self.path} is not a checkpoint ({error}): delete it to start anew.") from None
        if about.get("version") != VERSION:
            raise FormatError(f"{self.path} has version {about.get('version')}, wanted {VERSION}: delete it.")
        if about["key"] != self.key:
            raise MismatchError(f"{self.path} belongs to another run: delete it, or give another directory.")
        return int(about["step"]), tensors


def _alone(t: Tensor) -> Tensor:
    """A tensor that shares its memory with no other: itself, or a copy."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def state_of(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and optimizer state as named plain tensors; jets give two."""
    out: dict[str, Tensor] = {}
    for name, p in params.items():
        _put(out, f"parameter/{name}", p)
        for key, value in optimizer.state[p].items():
            if value is not None:
                _put(out, f"{key}/{name}", value)
    return out


def _put(out: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Jet):
        out[f"{name}/c"], out[f"{name}/h"] = value.c, value.h
    else:
        out[name] = value if isinstance(value, Tensor) else torch.tensor(value)


def restore_state(params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Put saved tensors back, wherever they were saved."""
    # A fused optimizer counts its steps where the parameters are, others on the CPU.
    fused = bool(optimizer.param_groups[0].get("fused"))
    with torch.no_grad():
        for name, p in params.items():
            _get(saved, f"parameter/{name}", p)
            for full, value in saved.items():
                key, _, rest = full.partition("/")
                if key == "parameter" or rest not in (name, f"{name}/c"):
                    continue
                if f"{key}/{name}/c" in saved:
                    buffer = optimizer.state[p].get(key, torch.zeros_like(p))
                    _get(saved, f"{key}/{name}", buffer)
                elif key == "step" and isinstance(optimizer, (PaperAdam, FlatAdam)):
                    buffer = int(value)
                else:
                    buffer = value.to(p.device if fused or key != "step" else "cpu", copy=True)
                    buffer = buffer.float() if key == "step" else buffer
                optimizer.state[p][key] = buffer


def _get(saved: dict[str, Tensor], name: str, into: Tensor) -> None:
    if isinstance(into, Jet):
        into.c.copy_(saved[f"{name}/c"])
        # As real numbers: a file's are aligned for those only.
        (torch.view_as_real(into.h) if into.h.is_complex() else into.h).copy_(saved[f"{name}/h"])
    else:
        into.copy_(saved[name])


# --- the loop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes its numbers but for rounding.

    directory: where checkpoints go, and how much is done (None: nowhere); memory: bytes a jet run may use
    progress: a bar on stderr; round: which of how many runs this is, one after the other
    batched: whether runs may share steps, if that is known; None: it is tried before the first step.
    device: cpu, cuda, cuda:1, ..., or auto: cuda where there is one. Other devices round otherwise. What is given and what
    comes back is on the CPU; a checkpoint of one device is resumed on any.
    """

    directory: Path | None = None
    progress: bool = False
    memory: int | None = None
    save_every: float = 60.0
    batched: bool | None = None
    device: str | torch.device = "cpu"
    round: tuple[int, int] = (0, 1)
    _told: list[float] = field(default_factory=lambda: [time.monotonic()], compare=False, repr=False)

    def tell(self, part: float) -> None:
        """Writes which part of all rounds is done, once that of this one is so large; not more often than needed."""
        if self.directory is not None and (now := time.monotonic()) - self._told[0] >= TELL:
            self._told[0] = now
            (place := Path(self.directory)).mkdir(parents=True, exist_ok=True)
            (place / DONE).write_text(f"{(self.round[0] + part) / self.round[1]:.4f}")

    def checkpoint(self, name: str, *parts: Any) -> Checkpoint | None:
        """The file of a run named `name`, whose key is the digest of parts; None without a directory."""
        if self.directory is None:
            return None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else str(part).encode())
        return Checkpoint(Path(self.directory) / f"{name}.safetensors", digest.hexdigest(), self.save_every)


@dataclass
class Loop:
    """One pass over the steps of a recipe, from a checkpoint if there is one.

    params    what is trained, by name; backward: adds the gradients of a part of a step
    clip      clips the gradients of the parameters, where the recipe wants it; after: called with the number of steps done
    """

    steps: Steps
    params: dict[str, Any]
    backward: Callable[[Part], None]
    fused: bool = False
    clip: Callable[[dict[str, Any], float], None] = clip_together
    after: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        self.recipe = self.steps.recipe
        spared = spared_by_decay(self.recipe, self.steps.task)
        decayed = [p for name, p in self.params.items() if name not in spared]
        self.optimizer = make_optimizer(self.recipe, decayed, self.fused, [self.params[name] for name in spared])

    def run(self, checkpoint: Checkpoint | None, label: str, options: RunOptions) -> None:
        """Takes all steps that the checkpoint does not hold already. Raises: as `Checkpoint.load`."""
        total, start = len(self.steps), self._resume(checkpoint)
        steps = range(start, total)
        hidden = not options.progress
        with full_precision():
            for step in tqdm(steps, label, total, initial=start, unit="step", disable=hidden, file=sys.stderr):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.recipe.rate(step, total)
                self.step(self.steps.parts(step))
                self.after(step + 1)
                options.tell((step + 1) / total)
                if checkpoint is not None and (checkpoint.due or step + 1 == total):
                    checkpoint.save(step + 1, state_of(self.params, self.optimizer))

    def step(self, parts: Iterable[Part]) -> None:
        """Takes one step on these parts."""
        self.optimizer.zero_grad()
        for part in parts:
            self.backward(part)
        if self.recipe.clip_norm is not None:
            self.clip(self.params, self.recipe.clip_norm)
        self.optimizer.step()

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        saved = None if checkpoint is None else checkpoint.load()
        if saved is None:
            return 0
        restore_state(self.params, self.optimizer, saved[1])
        return saved[0]
