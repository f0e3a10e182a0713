"""Second moments of the factors over a sample of rows, and the matrices that whiten by them.

Labels are drawn from the model's own softmax (so that the moment of g is the Fisher matrix, not the one of the data).
For `rh` and `gh` the expectation over labels is taken exactly: Cov_y (M_y) = M^T diag(p) M - (M^T p)(M^T p)^T, which
needs only the mean of p; for `residual`, whose factor passes a norm at each position, one label is drawn.
Source: K-FAC, arXiv 1503.05671, section 3; docs/explanation/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from leaveout.errors import FormatError
from leaveout.projection import CountSketch
from leaveout.readout.logits import Map, wide_product
from leaveout.readout.signature import Signer, batches
from leaveout.readout.tokens import Window


@torch.no_grad()
def whitening_matrices(
    signer: Signer, windows: Sequence[Window], advance: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Whitening matrices (see `inverse_root`) for every factor that whitens, by their names.

    Memory: 8 bytes times the squared size of each factor.
    Raises: FormatError if a factor is zero on the whole sample.
    """
    sides = {side.whiten: side for part in signer.parts for side in (part.left, part.right) if side.whiten}
    keys = {side.raw: side.size for side in sides.values()}
    exact = [key for key in keys if key in signer.maps]
    sums = {
        key: torch.zeros(size, size, dtype=torch.float64, device=signer.readout.device) for key, size in keys.items()
    }
    mass = torch.zeros(signer.readout.vocabulary, dtype=torch.float64, device=signer.readout.device)
    generator = torch.Generator().manual_seed(signer.settings.seed)
    count = 0
    for passed in signer.passed(batches(windows, signer.readout.batch_class, signer.limits)):
        drawn = signer.positions(passed, redraw=generator if signer.final_norm is not None else None)
        # One row whose signature will be refused or skipped (see add_rows) must not spoil the moments of all others.
        finite = torch.stack([torch.isfinite(x).all(1) for x in drawn.raw.values()]).all(0)
        count += int(finite.sum())
        for key in keys:
            if key not in exact:
                x = drawn.raw[key][finite]
                sums[key] += (x.t() @ x).double()
        if exact:
            mass += _subtract_mean_products(signer, drawn.hidden[finite], {key: sums[key] for key in exact})
        if advance is not None:
            advance(len(passed.windows))
    for key in exact:
        _add_weighted_products(sums[key], signer.maps[key], mass)
    return {
        name: inverse_root(sums[side.raw] / max(count, 1), float(name.rsplit("damping-", 1)[1]), name).to(signer.dtype)
        for name, side in sides.items()
    }


def whitening_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """xxh3-128 over names and bytes of whitening matrices: equal digests, equal whitening."""
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _subtract_mean_products(signer: Signer, hidden: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """Takes sum_t m_t m_t^T, m = M^T (slope p), off each moment; returns sum_t slope^2 p [vocabulary]."""
    mass = torch.zeros(signer.readout.vocabulary, dtype=torch.float64, device=hidden.device)
    for _, logits in signer.head.blocks(hidden):
        slope = signer.readout.slope(logits)
        p = logits.div_(signer.settings.temperature)
        p.sub_(p.amax(1, keepdim=True)).exp_()
        p.div_(p.sum(1, keepdim=True)).mul_(slope)
        for key, moment in sums.items():
            by = signer.maps[key]
            mean = by(p) if isinstance(by, CountSketch) else wide_product(p, by)
            moment -= (mean.t() @ mean).double()
        mass += p.mul_(slope).sum(0)
    return mass


def _add_weighted_products(moment: Tensor, by: Map, mass: Tensor) -> None:
    """Adds M^T diag(mass) M, in pieces of the vocabulary; of a CountSketch it is a diagonal."""
    if isinstance(by, CountSketch):
        moment.diagonal().index_add_(0, by.buckets, mass)
        return
    for start in range(0, len(by), 4096):
        piece = by[start : start + 4096].double()
        moment += piece.t() @ (piece * mass[start : start + 4096, None])


def inverse_root(moment: Tensor, damping: float, name: str) -> Tensor:
    """E (L + damping * tr(M) / size * 1)^(-1/2) [size, size] of a second moment M = E L E^T, by eigenvalues in float64.

    x @ matrix has the products of the symmetric root, in the directions of the eigenvectors, those of the largest moments
    first: what a short code leaves out is at the end (see `codec.kept_sides`).
    """
    mean = (moment.trace() / len(moment)).item()
    if not mean > 0:
        raise FormatError(
            f"The factor {name!r} is zero or not finite on all sampled rows: run `leaveout doctor` on the model."
        )
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1) / (values.flip(0).clamp_min(0) + damping * mean).sqrt()
