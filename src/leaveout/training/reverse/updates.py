"""Cheap vectors of units from one plain run: what each unit did to the parameters, and its gradient at the end.

They are features for a prior over units (docs/explanation/methods.md) and for influence functions. All of
them live in one space: the parameter axis itself, or a seeded CountSketch of it when it is longer than the width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from leaveout.models import find_device, free_memory, sent
from leaveout.projection import CountSketch
from leaveout.training.batching import agree, tried
from leaveout.training.loop import Part, RunOptions
from leaveout.training.memory import kept_bytes
from leaveout.training.queries import Queries
from leaveout.training.recipe import Recipe
from leaveout.training.reverse.adjoints import AdamForm, clip_adjoint
from leaveout.training.reverse.flat_run import FlatRun, passes
from leaveout.training.tasks import Parameters, example_loss

SEED = 2604
ROUND = 64
"""Examples whose gradients are held at the same time, at most."""


@dataclass
class UnitVectors:
    """Vectors of units, float32 [units, width or parameters, whichever is less].

    updates  sum over steps of -rate * preconditioner * gradient share, in the parameters' own scale
    final    sum of the unit's loss gradients at the trained parameters, nats per parameter
    params   the trained parameters by name
    lengths  sum over steps of rate * g . preconditioner g * the example's part of the loss, with g the gradient of its
             loss, and with what momentum makes of it later: by how much the unit's own steps lower its loss [units], nats
    owned    of Adam's second moments, what part is the unit's own share where it moves the parameters: mean over its
             updates [units]; 0 without second moments
    """

    updates: np.ndarray
    final: np.ndarray
    params: Parameters
    lengths: np.ndarray
    owned: np.ndarray


def sketch_of(parameters: int, width: int) -> CountSketch:
    """From the parameter axis to at most `width` places; the identity if the parameters are no more than that."""
    if width < 1:
        raise ValueError(f"wanted a width of at least 1, got {width}")
    if parameters <= width:
        return CountSketch.identity(parameters)
    rng = torch.Generator().manual_seed(SEED)
    places = torch.randint(width, (parameters,), generator=rng)
    return CountSketch(places, torch.randint(2, (parameters,), generator=rng) * 2.0 - 1, width)


def unit_vectors(recipe: Recipe, width: int = 1024, options: RunOptions | None = None) -> UnitVectors:
    """Train plainly once, and give every unit's updates and final gradient in a space of at most `width`.

    An example's update at a step that visits it is -rate * P * its share of the (clipped) batch gradient. P is what
    the optimizer divides by at that step, 1 / (sqrt(v / c2) + eps) for adam and adamw, 1 / sqrt(v / c2 + eps) for
    paper-adam, and the identity for sgd; momentum only spreads an update over later steps and is left out.
    With more parameters than `width`, each vector is a CountSketch (fixed seed): dot products keep their expectation.
    Memory: the result, and the gradients of at most 64 examples, fewer if options.memory (default half of what is
    free) is less. Examples of a batch must not change each other's loss.
    """
    options = options or RunOptions()
    place = find_device(options.device)
    with passes(place):
        run = FlatRun(recipe, place)
        sketch = sketch_of(sum(run.sizes), width).to(place, torch.float32)
        together, momentum = _together(run, options.memory), run.group.get("momentum", 0.0)
        updates, final = run.state.new_zeros(2, len(recipe.unit_names), sketch.width, dtype=torch.float32)
        lengths, moved, owned = run.state.new_zeros(3, len(recipe.unit_names), dtype=torch.float64)
        for step in tqdm(range(run.steps), desc="unit vectors", unit="step", disable=not options.progress):
            gradient = run.gradient(step)
            scale, second = _update_scale(run, step, gradient)
            later = (1 - momentum ** (run.steps - step)) / (1 - momentum)
            parts = run.parts(step)
            if len(run.trained_on.batches[step]) == 1:
                shares = iter([(parts[0].numbers, gradient.unsqueeze(0))])
            else:
                shares = (share for part in parts for share in example_shares(run, part, together))
            weights = {
                i: weight for part in parts for i, weight in zip(part.numbers, part.weights.tolist(), strict=True)
            }
            for numbers, rows in shares:
                updates.index_add_(0, run.units_of(numbers), sketch((rows * scale).float()))
                units = run.units_of(numbers)
                lengths.index_add_(0, units, later * _lengths(rows, scale, [weights[i] for i in numbers]))
                if second is not None:
                    ways = (rows * scale).abs()
                    moved.index_add_(0, units, ways.sum(1).double())
                    owned.index_add_(0, units, (ways * (rows.square() / second).clamp(max=1.0)).sum(1).double())
            run.advance(step, gradient)
        for numbers, rows in example_gradients(run, range(len(recipe.examples)), together):
            final.index_add_(0, run.units_of(numbers), sketch(rows.float()))
    owned = owned / moved.where(moved > 0, 1.0)
    found = (t.cpu().numpy() for t in (updates, final, lengths, owned))
    return UnitVectors(next(found), next(found), run.parameters(), *found)


def query_gradients(
    recipe: Recipe, params: Parameters, queries: Queries, width: int = 1024, device: str | torch.device = "cpu"
) -> np.ndarray:
    """Gradients of queries at given parameters, in the space of `unit_vectors` of the same width: float32 [queries, width]."""
    place = find_device(device)
    with passes(place):
        run = FlatRun(recipe, place)
        with torch.no_grad():
            for name, p in run.task.parameters().items():
                p.copy_(params[name])
        sketch = sketch_of(sum(run.sizes), width).to(place, torch.float32)
        out = torch.zeros(run.count(queries), sketch.width)
        for first in range(0, len(out), ROUND):
            part = slice(first, first + ROUND)
            out[part] = sketch(run.query_gradients(queries, part)[1].float()).cpu()
    return out.numpy()


def influence(vectors: UnitVectors, gradients: np.ndarray, damping: float = 1.0) -> np.ndarray:
    """The influence function's guess of what removing each unit adds to each query's loss: [queries, units], nats.

    g_q^T (F + damping * mean(diag F) * I)^-1 g_u, with F = sum over units of g_u g_u^T, the empirical Fisher matrix
    of the summed loss, and g_u the units' final gradients. Positive = removing the unit raises the query's loss.
    A score rather than a measurement: the order of units is better than the size. What the damping is worth to a
    posterior stands in docs/evidence/deletion.md.
    """
    if damping <= 0:
        raise ValueError(f"wanted a damping above 0, got {damping}")
    if gradients.ndim != 2 or gradients.shape[1] != vectors.final.shape[1]:
        raise ValueError(f"wanted gradients [queries, {vectors.final.shape[1]}], got {gradients.shape}: use one width")
    final, asked = vectors.final.astype(np.float64), gradients.astype(np.float64)
    units, width = final.shape
    floor = damping * (final**2).sum() / width
    if units < width:  # the same in the space of units: F^-1 G^T = G^T (G G^T + floor)^-1
        return np.linalg.solve(final @ final.T + floor * np.eye(units), final @ asked.T).T
    return np.linalg.solve(final.T @ final + floor * np.eye(width), asked.T).T @ final.T


CURVED = 0.2
"""What of a unit's length the first order gets wrong, about: digits with SGD, rates over a factor of 16 (benchmarks/LOG.md)."""


def first_order_error(vectors: UnitVectors, x: np.ndarray) -> np.ndarray:
    """What the first order of deletion vectors x [sets, units] gets wrong, over the size of the effects, about: [sets].

    Two parts, both known from the run alone. Without a unit the loss has less curvature, by g g^T along its gradient: rate
    times that, summed along the run, is `lengths`; in a set it grows with how much its units' updates point the same way
    (by 1 where they are orthogonal, by their number where they are parallel). And Adam divides by second moments that are
    partly the unit's own, `owned`.
    What it is worth stands in docs/explanation/deletion.md. Source: after arXiv 2605.18814, which names rate and length.
    """
    updates = vectors.updates.astype(np.float64)
    sizes = np.maximum(x.sum(1), 1e-300)
    way = x @ updates
    turned = (x * (way @ updates.T)) @ updates
    typical = np.maximum(x @ (updates**2).sum(1) / sizes, 1e-300)
    alike = np.linalg.norm(turned, axis=1) / np.maximum(np.linalg.norm(way, axis=1) * typical, 1e-300)
    return (CURVED * (x @ vectors.lengths) * alike + x @ vectors.owned) / sizes


# --- gradients of single examples --------------------------------------------------------------------------------


def example_gradients(run: FlatRun, numbers: Sequence[int], together: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Groups of examples, with the gradients [examples, parameters] of their losses at the present parameters."""
    for first in range(0, len(numbers), together):
        group = tuple(numbers[first : first + together])
        yield group, _stacked(run, group)


def example_shares(run: FlatRun, part: Part, together: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Groups of a part's examples, with what each adds to the gradient of the step [examples, parameters]."""
    if part.seed is not None or run.running:  # masks, statistics are those of the whole batch
        if run.divisible:
            yield from ((piece.numbers, run.part_gradient(piece, 0)[None]) for piece in part.pieces(1))
            return
        for place, number in enumerate(part.numbers):
            yield (number,), run.share(part, place)[None]
        return
    first = 0
    for group, rows in example_gradients(run, part.numbers, together):
        if part.sizes is not None:
            rows *= sent(part.sizes[first : first + len(group)], rows.device).unsqueeze(1)
        first += len(group)
        yield group, rows / part.divisor


def _stacked(run: FlatRun, group: tuple[int, ...]) -> Tensor:
    """Rows of a language model one by one: each is work enough, needs no padding, and no batching rule is missing.

    Others as one batch, if that gives the gradients of the first two alone (asked once a run).
    """
    rows = [run.recipe.examples[i] for i in group]
    if run.recipe.kind == "causal-lm" or len(rows) <= 2 or run.separate_examples is False:
        return _alone(run, rows)
    if run.separate_examples is None:
        found = tried(lambda: _batched(run, rows[:2]))
        run.separate_examples = found is not None and agree([found], [_alone(run, rows[:2])])
        return _stacked(run, group)
    return _batched(run, rows)


def _alone(run: FlatRun, rows: Sequence[Any]) -> Tensor:
    """Each as it is trained on (cut where it is too long), which a query never is."""
    batches = [run.task.batch([row]) for row in rows]
    losses = (lambda model, batch=batch: run.task.learned(model, batch) for batch in batches)
    return torch.cat([run.query_gradients(loss, slice(None))[1] for loss in losses])


def _batched(run: FlatRun, rows: Sequence[Any]) -> Tensor:
    values = {name: p.detach() for name, p in zip(run.names, run.params, strict=True)}
    batch = run.task.batch(rows)
    each = torch.vmap(
        torch.func.grad(example_loss(run.task, run.task.learned).under), in_dims=(None, *[0] * len(batch))
    )(values, *batch)
    return torch.cat([each[name].reshape(len(rows), -1) for name in values], 1)


def _lengths(rows: Tensor, scale: Tensor, weights: Sequence[float]) -> Tensor:
    """-g . scale g * weight for shares weight * g [examples]."""
    products = rows.square() @ scale.to(rows).expand(rows.shape[1])
    return -products.double() / torch.tensor(weights, dtype=torch.float64).to(rows.device)


def _update_scale(run: FlatRun, step: int, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """What turns a share of the gradient into its update: -rate * clipping * preconditioner, [parameters] or one number.

    And the square of a share that would be all of the second moment, which is None without one.
    """
    clipped, _ = clip_adjoint(gradient, run.recipe.clip_norm)
    rate = run.recipe.rate(step, run.steps)
    factor = -rate * (clipped.norm() / gradient.norm() if clipped is not gradient else 1.0)
    if run.kind in ("sgd", "momentum"):
        return torch.as_tensor(factor, device=run.device, dtype=gradient.dtype), None
    form = AdamForm(run.kind, rate, step, run.group)
    _, _, square = form.moments(clipped, run.core)
    whole = square / (1 - run.group["betas"][1]) / (factor / rate) ** 2
    return factor / form.root(square)[0], torch.where(whole > 0, whole, torch.inf)


def _together(run: FlatRun, limit: int | None) -> int:
    """Examples whose gradients fit: each needs its gradient twice, a scaled copy, and what a backward pass keeps."""
    limit = limit if limit is not None else free_memory(run.device) // 2
    each = 3 * sum(run.sizes) * run.recipe.real_dtype.itemsize + 3 * kept_bytes(run.recipe, run.task)
    return max(1, min(ROUND, limit // each))
