"""Whitening of factors that are too wide for a matrix of their own: their main directions, and one number for the rest.

The second moment M [size, size] is never held. Its products with a random matrix, M W [size, WANTED + OVER], and its diagonal
are summed over the positions; from them follow its largest directions (Nystrom's approximation of M with the damping on its
diagonal, which has a root). All others count alike, in units of the diagonal, so that what each number varies by itself is
exact:

    M + damping  =  D^(1/2) (U diag(v) U^T + rest (1 - U U^T)) D^(1/2),     D = diag(M) + damping

    root  =  D^(-1/2) Q diag(v_1 .. v_k, rest ..)^(-1/2),     Q = 1 - Y T Y^T orthogonal, its first k columns U

Q is a product of k reflections, so that a position costs 4 size k multiplications instead of size squared.
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
WANTED, OVER = 1024, 512  # directions that are kept, and how many more are looked at to find them
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

    Memory: 12 bytes times size times (WANTED + OVER), and as much again, twice, in `root`.
    """

    def __init__(self, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.wanted = min(WANTED, size)
        columns = min(self.wanted + OVER, size)
        generator = torch.Generator().manual_seed(seed)
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
        diagonal, probes = self.diagonal / count, self.probes.double()
        added = damping * diagonal.mean()
        scale = (diagonal + added).rsqrt()
        products = self.products / count + added * probes
        core = probes.t() @ products
        factor = torch.linalg.solve_triangular(
            torch.linalg.cholesky((core + core.t()) / 2), (products * scale[:, None]).t(), upper=False
        )
        values, rotation = torch.linalg.eigh(factor @ factor.t())
        values, rotation = values.flip(0)[: self.wanted], rotation.flip(1)[:, : self.wanted]
        directions = factor.t() @ (rotation * values.rsqrt())
        left = len(scale) - self.wanted
        rest = (len(scale) - values.sum()) / max(left, 1)  # D^(-1/2) (M + damping) D^(-1/2) has ones on its diagonal
        reflections, triangle = _reflections(directions)
        by = torch.cat([values, rest.expand(left)]).rsqrt()
        return WideRoot(scale, reflections, triangle, by)


def _reflections(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Y [size, k] and T [k, k] of the orthogonal matrix 1 - Y T Y^T whose first columns are k orthonormal ones, up to sign."""
    packed, tau = torch.geqrf(directions)
    y = packed.tril(-1)
    y.diagonal().fill_(1.0)
    inner, triangle = y.t() @ y, torch.diag(tau)
    for column in range(1, len(tau)):
        triangle[:column, column] = -tau[column] * (triangle[:column, :column] @ inner[:column, column])
    return y, triangle
