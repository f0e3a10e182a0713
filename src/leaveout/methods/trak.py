"""TRAK through the package dattri: projected gradients of the log-odds, in the metric of the rows' own Gram matrix.

The model output of a row is f = log(p / (1 - p)), with p = exp(-loss) the geometric mean probability of its learned tokens.
With features phi = P grad f, the score is <phi of query, (Phi^T Phi + damping)^-1 phi of row> (1 - p of row).
Source: arXiv 2303.14186, as dattri 0.3.0 computes it, for one trained model (the paper's best scores average over several).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leaveout.errors import UnsupportedError, needs
from leaveout.methods.gradients import MEMORY, TOGETHER, checked, rows_within
from leaveout.methods.scorer import NAMED_KINDS, Scorer, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Parameters, Task, example_loss


@dataclass(frozen=True)
class Trak:
    """TRAK at one set of trained parameters; a function of the seed.

    width:   numbers that a gradient is projected to
    damping: added to the Gram matrix of the projected gradients, as a share of its mean eigenvalue; the matrix has no
             inverse where there are fewer rows than `width`
    memory:  bytes for gradients; more of them mean fewer batches, each of which draws the projection anew
    """

    task: Task
    parameters: Parameters
    width: int = 2048
    damping: float = 0.1
    seed: int = 0
    memory: int = MEMORY

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32, positive where the row makes the query more probable; their size means nothing.

        The Gram matrix is that of the corpus. A query or row of probability 1 scores 0.

        Memory: about half of `memory`, but never less than for one row, and the activations of at most 32 rows; 400 bytes
                for each trained parameter, 8 times the width for each query and row, and 12 times its square.
        Cost:   two forward and backward passes for each row and one for each query; most of the time goes into the
                projection, `width` random numbers for each parameter and batch.
        Raises: UnsupportedError without dattri, or for a custom recipe, whose loss need not be that of a probability.
        """
        dattri = package()
        if not len(queries) or not len(corpus):
            return np.zeros((len(queries), len(corpus)), np.float32)
        if self.task.outputs is None:
            raise UnsupportedError(
                "TRAK needs probabilities, which a custom recipe does not name: use another kind or method."
            )
        # dattri turns its progress bars on whatever one asks for, and builds graphs that it does not need.
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            outputs = self._outputs(dattri)
            attributor = dattri.Attributor(
                outputs,
                correct_probability_func=lambda named, example: torch.exp(-self._loss(named, example)),
                projector_kwargs={
                    "proj_dim": self.width, "proj_max_batch_size": 32, "proj_seed": self.seed, "proj_type": "normal",
                    "device": "cpu",
                },
                regularization=self.damping * self._mean_eigenvalue(outputs, corpus),
            )  # fmt: skip
            attributor.cache(self._batches(corpus))
            return attributor.attribute(self._batches(asked(queries))).T.float().contiguous().numpy()

    def _outputs(self, dattri: Any) -> Any:
        """The log-odds as dattri takes them: a function of a model's named parameters and one example.

        The model has one parameter that holds all: dattri cuts parameters out of one vector itself, and its way makes as
        many vectors of all parameters for each row as there are tensors.
        """
        values = checked(self.task, self.parameters)
        model = nn.ParameterDict({"all": torch.cat([value.flatten() for value in values.values()])})

        def log_odds(named: Parameters, example: tuple[Tensor, ...]) -> Tensor:
            loss = self._loss(named, example)
            return -loss - torch.log(-torch.expm1(-loss))

        return dattri.Task(log_odds, model, model.state_dict())

    def _loss(self, named: Parameters, example: tuple[Tensor, ...]) -> Tensor:
        values = checked(self.task, self.parameters)
        parts = named["all"].split([value.numel() for value in values.values()])
        shaped = {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}
        return example_loss(self.task).under(shaped, *example)

    def _mean_eigenvalue(self, outputs: Any, corpus: Sequence[Any]) -> float:
        """Mean eigenvalue of the Gram matrix: in expectation, projections keep lengths, which dattri divides by sqrt(size)."""
        values, _ = outputs.get_param()
        gradients = outputs.get_grad_loss_func(in_dims=(None, 0))
        squares = [gradients(values, batch).nan_to_num().square().sum() for batch in self._batches(corpus)]
        return float(torch.stack(squares).sum()) / (values.numel() * self.width)

    def _batches(self, rows: Sequence[Any]) -> DataLoader:
        together = min(TOGETHER, rows_within(self.memory // 8, self.parameters))
        return DataLoader(list(rows), batch_size=together, collate_fn=self.task.encode)  # type: ignore[arg-type]


def package() -> Any:
    """The names of dattri that are used here, in one place."""
    pip = "dattri==0.3.0 (other versions scale projections otherwise)"
    algorithm, task = (needs(f"dattri.{name}", "TRAK", pip=pip) for name in ("algorithm.trak", "task"))
    if (found := metadata.version("dattri")) != "0.3.0":
        raise UnsupportedError(
            f"Projections of dattri {found} have another scale than those of 0.3.0: pip install dattri==0.3.0."
        )
    return SimpleNamespace(Attributor=algorithm.TRAKAttributor, Task=task.AttributionTask)


@method(package=package, kinds=NAMED_KINDS, plain=True)
def trak(scorer: Scorer, at: str) -> np.ndarray:
    """At the parameters of a checkpoint."""
    return Trak(scorer.task, scorer.parameters(at), seed=scorer.seed).score(scorer.query_rows, scorer.rows)
