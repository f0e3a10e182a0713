"""The optimizer of arXiv 2604.07328: Adam with epsilon inside the square root, which power series need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from leaveout.jets import Jet, Series
from leaveout.jets.rules_optim import AdamStep, adam_step_

BLOCK = 65536
"""Elements that stay in the cache through the seven passes of a plain step; matters for stacked parameters."""


class PaperAdam(torch.optim.Optimizer):
    """Adam whose step is lr * (m / c1) / sqrt(v / c2 + eps), with c_i = 1 - beta_i ** step.

    With epsilon outside the root the square root is singular at v = 0, and the series of a parameter with a small
    gradient grow without bound; inside, eps = 1e-3 keeps them tame (METHODS A2 measures both).
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, betas: tuple[float, float] = (0.85, 0.99), eps: float = 1e-3
    ) -> None:
        if lr < 0 or eps <= 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"wanted lr >= 0, eps > 0 and betas in [0, 1), got lr={lr}, eps={eps}, betas={betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
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
