"""Whitening of factors that are too wide for a matrix of their own: their main directions, and the variance of each number.

The second moment M [size, size] is never held. Its products with a random matrix, M W [size, COLUMNS], and its diagonal are
summed over the positions; from the first follow its main directions F F^T (Nystrom's approximation), F [size, KEPT], and the
diagonal of what is left over is exact:

    M + damping  is about  S + F F^T,     S = diag(M) - diag(F F^T) + damping
    root  =  S^(-1/2) Q diag(1 + s^2)^(-1/2),     s, Q from S^(-1/2) F: its singular values, then 0, and left directions

Q is a product of KEPT reflections, 1 - Y T Y^T, so that a position costs 2 size KEPT multiplications and not size squared.
Source: Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736, section 2; Schreiber and Van Loan, SIAM J. Sci. Stat. Comput.
10 (1989), for the compact form of Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

WIDE = 12_288  # numbers of a factor from which on it has no matrix of its own: that one takes 1.2 GB, its root five times it
KEPT, COLUMNS = 4096, 8192  # directions that are kept, and random ones from which they are found
NOISE = 10  # roundings of the largest eigenvalue: what is smaller is made of them
STEM = ".wide-"  # between the name of a root and what it consists of


@dataclass(frozen=True)
class WideRoot:
    """x @ root whitens rows of x [positions, size]: what comes back has the main directions first.

    Shapes: scale [size], reflections [size, k], triangle [k, k], by [size].
    """

    scale: Tensor
    reflections: Tensor
    triangle: Tensor
    by: Tensor

    def __rmatmul__(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return torch.addmm(x, x @ self.reflections @ self.triangle, self.reflections.t(), alpha=-1) * self.by

    def to(self, *where: torch.device | torch.dtype) -> WideRoot:
        return WideRoot(*(getattr(self, field.name).to(*where) for field in fields(self)))

    def cpu(self) -> WideRoot:
        return self.to(torch.device("cpu"))


Root = Tensor | WideRoot


def idle_root(size: int, device: torch.device, dtype: torch.dtype) -> Root:
    """A root that changes nothing and takes the time of one that does: for measuring without a sample of rows."""
    if size <= WIDE:
        return torch.eye(size, device=device, dtype=dtype)
    ones = torch.ones(size, device=device, dtype=dtype)
    reflections = torch.zeros(size, KEPT, device=device, dtype=dtype)
    return WideRoot(ones, reflections, torch.zeros(KEPT, KEPT, device=device, dtype=dtype), ones)


def arrays_of(roots: Mapping[str, Root]) -> dict[str, np.ndarray]:
    """What is stored of roots, by name."""
    found: dict[str, np.ndarray] = {}
    for name, root in roots.items():
        parts = {name: root} if isinstance(root, Tensor) else {f"{name}{STEM}{key}": v for key, v in vars(root).items()}
        found |= {key: tensor.cpu().numpy() for key, tensor in parts.items()}
    return found


def roots_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Root]:
    """The roots that `arrays_of` was given."""
    tensors = {name: torch.tensor(np.array(value)) for name, value in arrays.items()}
    ends = [f"{STEM}{field.name}" for field in fields(WideRoot)]
    stems = dict.fromkeys(name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0]))
    wide: dict[str, Root] = {stem: WideRoot(*(tensors.pop(stem + end) for end in ends)) for stem in stems}
    return {**tensors, **wide}


class WideMoment:
    """Sums over positions from which the root of a second moment is made.

    Memory: 12 bytes times size times COLUMNS; in `root` four times 8 bytes times that.
    """

    def __init__(self, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        columns, generator = min(COLUMNS, size), torch.Generator().manual_seed(seed)
        self.probes = torch.randn(size, columns, generator=generator, dtype=dtype).to(device)
        self.products = torch.zeros(size, columns, dtype=torch.float64, device=device)
        self.diagonal = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Adds the moments of positions [positions, size]."""
        self.products += (x.t() @ (x @ self.probes)).double()
        self.diagonal += x.double().square().sum(0)

    def trace(self) -> Tensor:
        return self.diagonal.sum()

    def root(self, count: int, damping: float) -> WideRoot:
        """The root, in float64, of the mean over `count` positions with a share `damping` of its mean eigenvalue added."""
        diagonal, products = self.diagonal / count, self.products / count
        core = self.probes.double().t() @ products
        values, vectors = torch.linalg.eigh((core + core.t()) / 2)
        seen = values > NOISE * torch.finfo(self.probes.dtype).eps * values[-1]
        factor = products @ (vectors[:, seen] * values[seen].rsqrt())  # factor factor^T is about M
        added = damping * diagonal.mean()
        scaled = factor / (diagonal + added).sqrt()[:, None]
        main = torch.linalg.eigh(scaled.t() @ scaled).eigenvectors.flip(1)[:, :KEPT]
        factor = factor @ main
        left = (diagonal - factor.square().sum(1)).clamp_min(0)  # below 0 by rounding only
        scale = (left + added).rsqrt()
        factor *= scale[:, None]
        squares, turned = torch.linalg.eigh(factor.t() @ factor)
        reflections, triangle = _reflections(factor @ turned.flip(1))
        by = torch.ones_like(scale)
        by[: len(squares)] = (1 + squares.flip(0).clamp_min(0)).rsqrt()
        return WideRoot(scale, reflections, triangle, by)


def _reflections(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Y [size, k] and T [k, k] of the orthogonal matrix 1 - Y T Y^T whose first columns point along k orthogonal ones."""
    packed, tau = torch.geqrf(directions)
    y = packed.tril(-1)
    y.diagonal().fill_(1.0)
    inner, triangle = y.t() @ y, torch.diag(tau)
    for column in range(1, len(tau)):
        triangle[:column, column] = -tau[column] * (triangle[:column, :column] @ inner[:column, column])
    return y, triangle
