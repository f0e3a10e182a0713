"""Second moments of the factors over a sample of rows, and the matrices that whiten by them.

Labels are drawn from the model's own softmax (so that the moment of g is the Fisher matrix, not the one of the data).
The expectation over labels is taken exactly. For `rh` and `gh` it is Cov_y (M_y) = M^T diag(p) M - (M^T p)(M^T p)^T, which
needs only the mean of p. For `residual` that passes the final norm at each position (see `families.Scaling`), whose
pull-back is a multiple of 1 - u u^T: two more products with W. Where the norm is of no such kind, or the factor too wide
for a matrix, one label a position is drawn.
Source: K-FAC, arXiv 1503.05671, section 3; docs/explanation/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

import leaveout.readout.wide as wide
from leaveout.errors import FormatError
from leaveout.projection import CountSketch
from leaveout.readout.families import Scaling
from leaveout.readout.logits import Map, transposed_product, wide_product
from leaveout.readout.signature import Factor, Signer
from leaveout.readout.tokens import Window, batches
from leaveout.readout.wide import Root, WideMoment

SUMS = 8 * 10**9  # bytes of moments that are summed in one pass over the sample


@torch.no_grad()
def whitening_matrices(
    signer: Signer, windows: Sequence[Window], advance: Callable[[int], object] | None = None
) -> dict[str, Root]:
    """Whitening matrices (see `inverse_root`) for every factor that whitens, by their names; of wide ones a `WideRoot`.

    Memory: 8 bytes times the squared size of each factor of at most `wide.WIDE` numbers, in as many passes over the sample as
    `moment_groups` says; of a wider one as `WideMoment`. At the end five times that of one factor.
    Raises: FormatError if a factor is zero on the whole sample.
    """
    sides = _whitened(signer)
    found: dict[str, Root] = {}
    for group in moment_groups(signer):
        sums, count = _moments(signer, windows, group, advance)
        for key in group:
            moment = sums.pop(key)  # one after another, so that each is let go of
            for name in (name for name, side in sides.items() if side.raw == key):
                found[name] = _root(moment, count, float(name.rsplit("damping-", 1)[1]), name, signer)
    return {name: found[name] for name in sides}


def moment_groups(signer: Signer) -> list[dict[str, int]]:
    """Sizes of the factors that whiten, by key, in groups whose moments are summed together: one pass each."""
    groups, room = [dict[str, int]()], SUMS
    for key, size in {side.raw: side.size for side in _whitened(signer).values()}.items():
        n_bytes = 8 * size**2 if _has_matrix(signer, key, size) else 12 * size * wide.COLUMNS
        if groups[-1] and n_bytes > room:
            groups.append({})
            room = SUMS
        groups[-1][key] = size
        room -= n_bytes
    return groups


def _whitened(signer: Signer) -> dict[str, Factor]:
    return {side.whiten: side for part in signer.parts for side in (part.left, part.right) if side.whiten}


def _has_matrix(signer: Signer, key: str, size: int) -> bool:
    return size <= wide.WIDE or key in signer.maps


def _moments(
    signer: Signer, windows: Sequence[Window], sizes: Mapping[str, int], advance: Callable[[int], object] | None
) -> tuple[dict[str, Tensor | WideMoment], int]:
    """Sums of moments over the sample, by key, and of how many positions; labels are drawn alike in every pass."""
    device, vocabulary, norm = signer.readout.device, signer.readout.vocabulary, signer.final_norm
    sums: dict[str, Tensor | WideMoment] = {
        key: torch.zeros(size, size, dtype=torch.float64, device=device)
        if _has_matrix(signer, key, size)
        else WideMoment(size, signer.settings.seed, device, signer.dtype)
        for key, size in sizes.items()
    }
    matrices = {key: sum for key, sum in sums.items() if isinstance(sum, Tensor)}
    scaling = None
    if norm is not None and "g.final" in matrices:
        scaling = Scaling.of(norm, sizes["g.final"], device, signer.readout.dtype)
    exact = {key: matrices[key] for key in sizes if key in signer.maps or (key == "g.final" and scaling is not None)}
    masses = {key: torch.zeros(vocabulary, dtype=torch.float64, device=device) for key in exact}
    generator = torch.Generator().manual_seed(signer.settings.seed) if "g.final" in sizes.keys() - exact else None
    count = 0
    for passed in signer.passed(batches(windows, signer.readout.batch_class, signer.limits)):
        drawn = signer.positions(passed, redraw=generator)
        # One row whose signature will be refused or skipped (see add_rows) must not spoil the moments of all others.
        finite = torch.stack([torch.isfinite(x).all(1) for x in drawn.raw.values()]).all(0)
        count += int(finite.sum())
        for key, moment in sums.items():
            if key not in exact:
                x = drawn.raw[key][finite]
                if isinstance(moment, Tensor):
                    moment += (x.t() @ x).double()
                else:
                    moment.add(x)
        normed = None
        if scaling is not None and norm is not None:
            normed = scaling, *scaling.at(norm, passed.recorder.inputs[norm][finite])
        if exact:
            _subtract_mean_products(signer, drawn.hidden[finite], exact, masses, normed)
        if advance is not None:
            advance(len(passed.windows))
    for key, moment in exact.items():
        if key in signer.maps:
            _add_weighted_products(moment, signer.maps[key], masses[key])
        elif scaling is not None:
            inside = torch.zeros_like(moment)
            _add_weighted_products(inside, signer.weight, masses[key])
            moment += scaling.without_mean(scaling.without_mean(scaling.gain * inside).t() * scaling.gain)
    return sums, count


def _root(moment: Tensor | WideMoment, count: int, damping: float, name: str, signer: Signer) -> Root:
    """The root of a mean moment. Raises: FormatError for one that is zero."""
    if not moment.trace().item() > 0:
        raise FormatError(
            f"The factor {name!r} is zero or not finite on all sampled rows: run `leaveout doctor` on the model."
        )
    if isinstance(moment, WideMoment):
        return moment.root(count, damping).to(signer.dtype)
    return inverse_root(moment / max(count, 1), damping).to(signer.dtype)


def whitening_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """xxh3-128 over names and bytes of whitening matrices: equal digests, equal whitening."""
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _subtract_mean_products(
    signer: Signer,
    hidden: Tensor,
    sums: Mapping[str, Tensor],
    masses: Mapping[str, Tensor],
    normed: tuple[Scaling, Tensor, Tensor] | None,
) -> None:
    """Takes sum_t m_t m_t^T, m = M^T (slope p), off each moment, and adds sum_t slope^2 p to its mass [vocabulary].

    Behind the norm both are of pulled-back rows of W: s (a_y - u <u, a_y>) for a row a_y = gain w_y. There the mass counts
    s^2 times, and what u adds to the products of a_y is sum_t s^2 (u c^T + c u^T - <u, c> u u^T), c = sum_y p_y <u, a_y> a_y.
    """
    for piece, logits in signer.head.blocks(hidden):
        slope = signer.readout.slope(logits)
        p = logits.div_(signer.settings.temperature)
        p.sub_(p.amax(1, keepdim=True)).exp_()
        p.div_(p.sum(1, keepdim=True)).mul_(slope)
        for key, by in signer.maps.items():
            if key in sums:
                mean = by(p) if isinstance(by, CountSketch) else wide_product(p, by)
                sums[key].sub_((mean.t() @ mean).double())
                masses[key].add_((p * slope).sum(0))
        if normed is not None:
            scaling, s, u = normed[0], *(x[piece] for x in normed[1:])
            mean = scaling.back(wide_product(p, signer.weight).double(), s, u)
            p.mul_(slope)
            masses["g.final"].add_((p * s.square().to(p.dtype)).sum(0))
            p.mul_(transposed_product((scaling.gain * u).to(p.dtype), signer.weight))
            c = scaling.without_mean(scaling.gain * wide_product(p, signer.weight).double())
            cross = (s.square() * (c - u * (u * c).sum(1, keepdim=True) / 2)).t() @ u
            sums["g.final"].sub_(mean.t() @ mean + cross + cross.t())


def _add_weighted_products(moment: Tensor, by: Map, mass: Tensor) -> None:
    """Adds M^T diag(mass) M, in pieces of the vocabulary; of a CountSketch it is a diagonal."""
    if isinstance(by, CountSketch):
        moment.diagonal().index_add_(0, by.buckets, mass)
        return
    for start in range(0, len(by), 4096):
        piece = by[start : start + 4096].double()
        moment += piece.t() @ (piece * mass[start : start + 4096, None])


def inverse_root(moment: Tensor, damping: float) -> Tensor:
    """E (L + damping * tr(M) / size * 1)^(-1/2) [size, size] of a second moment M = E L E^T, by eigenvalues in float64.

    x @ matrix has the products of the symmetric root, in the directions of the eigenvectors, those of the largest moments
    first: what a short code leaves out is at the end (see `codec.kept_sides`).
    """
    mean = (moment.trace() / len(moment)).item()
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1).div_((values.flip(0).clamp_min(0) + damping * mean).sqrt())
