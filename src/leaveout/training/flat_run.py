"""A training run on one flat state, which can be stepped forward, put back, and gone through twice by reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leaveout.errors import UnsupportedError
from leaveout.training.recipe import Recipe
from leaveout.training.steps import Part, Steps
from leaveout.training.tasks import task_of
from leaveout.training.train import Parameters, Queries, encoded, make_optimizer, own_parameters

MOMENTS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
SecondPass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cotangents of a gradient [queries, parameters] -> Hessian-vector products, and slopes along each example's weight."""


class FlatRun:
    """A training run whose whole state is one tensor `state` [1 + moments, parameters].

    Its first row holds the parameters, and the model's own parameters are views of it. Parameters that the loss does
    not use get no gradient, and PyTorch's optimizers then leave them alone: they are constants here.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.task = recipe, task_of(recipe)
        self.trained_on, self.unit_of = Steps(recipe, self.task), recipe.unit_of
        self.steps = len(self.trained_on)
        if not self.steps:
            raise ValueError("the recipe takes no step: give epochs, steps or order that make at least one")
        own: Parameters = own_parameters(self.task)
        unused = self._unused(own)
        self.idle = [own[name] for name in unused]
        self.names = [name for name in own if name not in unused]
        self.params = [own[name] for name in self.names]
        self.sizes = [p.numel() for p in self.params]
        name = recipe.optimizer.name
        self.kind = name if name != "sgd" else "momentum" if recipe.optimizer.momentum else "sgd"
        moments = MOMENTS["adam" if "adam" in name else self.kind]
        self.state = torch.zeros(1 + len(moments), sum(self.sizes), dtype=recipe.real_dtype)
        self.state[0] = self.flat([p.detach() for p in self.params])
        for p, values in zip(self.params, self.state[0].split(self.sizes), strict=True):
            p.data = values.view_as(p)
        self.theta = nn.Parameter(self.state[0])
        self.optimizer = make_optimizer(recipe, [self.theta])
        self.optimizer.state[self.theta].update(zip(moments, self.state[1:], strict=True))

    def _unused(self, own: Parameters) -> list[str]:
        grads = torch.autograd.grad(self._loss(self.parts(0)[0]), list(own.values()), allow_unused=True)
        return [name for name, g in zip(own, grads, strict=True) if g is None]

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step."""
        return self.trained_on.parts(step)

    def _loss(self, part: Part, weights: Tensor | None = None) -> Tensor:
        return part.loss(self.task.loss(self.task.model, encoded(self.recipe, self.task, part.numbers)), weights)

    @staticmethod
    def flat(tensors: Any) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector [parameters] in the shapes of the model's parameters."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.params, strict=True)]

    def parameters(self) -> Parameters:
        """A copy of the trained parameters by name, constants included."""
        return {name: p.detach().clone() for name, p in own_parameters(self.task).items()}

    def gradient(self, step: int) -> Tensor:
        """The gradient [parameters] of a step, before clipping."""
        return torch.stack([self.flat(self._gradients(self._loss(part), step)) for part in self.parts(step)]).sum(0)

    def _gradients(self, loss: Tensor, step: int, create_graph: bool = False) -> list[Tensor]:
        inputs = [*self.params, *self.idle]
        grads = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
        used = [g for g in grads[: len(self.params)] if g is not None]
        if len(used) < len(self.params) or any(g is not None for g in grads[len(self.params) :]):
            raise UnsupportedError(
                f"At step {step} the loss uses other parameters than at the first step: name those it always uses in "
                "`trained`."
            )
        return used

    def advance(self, step: int, gradient: Tensor | None = None) -> None:
        """Take a step forward, with its gradient if that is known already."""
        self.theta.grad = self.gradient(step) if gradient is None else gradient.clone()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_([self.theta], self.recipe.clip_norm)
        self.optimizer.param_groups[0]["lr"] = self.recipe.rate(step, self.steps)
        if len(self.state) == 3:
            count: Any = step if self.kind == "paper-adam" else torch.tensor(float(step))
            self.optimizer.state[self.theta]["step"] = count
        self.optimizer.step()

    def second_pass(self, part: Part, step: int) -> tuple[Tensor, SecondPass]:
        """The gradient of a part of a batch, and the function that goes back through it (once)."""
        alone = len(part.numbers) == 1  # then its weight scales the whole gradient, and needs no graph of its own
        weights = torch.ones(len(part.numbers), dtype=self.recipe.real_dtype, requires_grad=True)
        grads = self._gradients(self._loss(part, None if alone else weights), step, create_graph=True)
        inputs, gradient = [*self.params] if alone else [*self.params, weights], self.flat([g.detach() for g in grads])

        def one(cotangent: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.autograd.grad(
                grads, inputs, self.shaped(cotangent), allow_unused=True, materialize_grads=True
            )
            slopes = (cotangent @ gradient)[None] if alone else found[-1]
            return self.flat(found[: len(self.params)]), slopes

        return gradient, torch.vmap(one)

    def count(self, queries: Queries) -> int:
        with torch.no_grad():
            return self._values(queries).numel() if callable(queries) else len(queries)

    def _values(self, queries: Callable[[nn.Module], Tensor]) -> Tensor:
        values = queries(self.task.model)
        if values.dim() != 1:
            raise ValueError(f"wanted a query function that gives a vector, got the shape {tuple(values.shape)}")
        return values

    def query_gradients(self, queries: Queries, part: slice) -> tuple[Tensor, Tensor]:
        """Losses [queries] of some of the queries at the present parameters, and gradients [queries, parameters]."""
        task = self.task
        if callable(queries):
            losses = list(self._values(queries)[part])
        else:
            losses = [task.loss(task.model, task.encode_queries([q]))[0] for q in queries[part]]
        rows = torch.zeros(len(losses), sum(self.sizes), dtype=self.recipe.real_dtype)
        for row, loss in zip(rows, losses, strict=True):
            grads = torch.autograd.grad(
                loss, self.params, retain_graph=callable(queries), allow_unused=True, materialize_grads=True
            )
            row.copy_(self.flat(grads))
        return torch.tensor([v.item() for v in losses], dtype=torch.float64), rows
