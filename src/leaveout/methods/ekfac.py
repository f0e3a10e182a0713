"""EK-FAC influence through the package kronfluence: gradient products in the metric of a Kronecker-factored Fisher matrix.

Each linear layer's part is <gradient of query, (F + damping)^-1 gradient of row>, with F in the eigenbasis of its two
Kronecker factors. Labels for F are drawn from the model's own predictions. Embeddings, norms and convolutions of GPT-2
(which are no linear layers) are left out, as in the source.
Source: arXiv 2308.03296, as kronfluence 1.0.1 computes it.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaveout.errors import UnsupportedError, needs
from leaveout.methods.scorer import NAMED_KINDS, Scorer, method
from leaveout.training.examples import asked
from leaveout.training.tasks import IGNORED, Batch, Parameters, Task

WIDEST = 8192
"""Largest side of a factor: its covariance and eigenvectors take 256 MB each, the eigendecomposition minutes."""


@dataclass(frozen=True)
class EkFac:
    """EK-FAC influence at one set of trained parameters.

    layers:  patterns of the linear layers to use; default: all whose weight is trained
    damping: added to the corrected eigenvalues; None: a tenth of their mean in each layer
    together: queries whose gradients are kept while the corpus passes by
    """

    task: Task
    parameters: Parameters
    layers: tuple[str, ...] = ("*",)
    damping: float | None = None
    together: int = 32
    seed: int = 0

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32; divided by the number of rows they estimate nats of query loss.

        The factors are those of the corpus, of at most 100,000 rows. Rows run one by one, so that no padding counts.

        Memory: three squares of both sides of each layer, and `together` copies of the layers' weights. On disk (in a
                temporary directory): the same factors, and the scores.
        Cost:   about three forward and backward passes for each row, and one more for each `together` queries.
        Raises: UnsupportedError without kronfluence, for a custom recipe, or for layers that are none or too wide.
        """
        kron = package()
        if not len(queries) or not len(corpus):
            return np.zeros((len(queries), len(corpus)), np.float32)
        model = self._model()
        names = self._layers(model)
        task = _kronfluence_task(kron, self.task, names)
        pairs = kron.ScoreArguments(
            damping_factor=self.damping, query_gradient_accumulation_steps=min(self.together, len(queries))
        )
        common = {"dataloader_kwargs": kron.DataLoaderKwargs(collate_fn=self.task.encode), "overwrite_output_dir": True}
        with tempfile.TemporaryDirectory() as place, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*GradScaler", FutureWarning)  # kronfluence 1.0.1 asks for the old name
            torch.manual_seed(self.seed)
            analyzer = kron.Analyzer(
                "ekfac", kron.prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=place
            )
            analyzer.fit_all_factors("f", list(corpus), 1, factor_args=kron.FactorArguments("ekfac"), **common)
            analyzer.compute_pairwise_scores("s", "f", asked(queries), list(corpus), 1, 1, score_args=pairs, **common)
            return analyzer.load_pairwise_scores("s")["all_modules"].float().numpy()

    def _model(self) -> nn.Module:
        """A copy of the model with the trained parameters."""
        model = copy.deepcopy(self.task.model)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name in self.task.parameters():
                own[name].copy_(self.parameters[name])
        return model

    def _layers(self, model: nn.Module) -> list[str]:
        """Names of the layers to use; each is wrapped, so that it sees one example at a time."""
        trained = {id(p) for name, p in model.named_parameters() if name in self.task.trained}
        chosen = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
            and id(layer.weight) in trained
            and any(fnmatch.fnmatch(name, pattern) for pattern in self.layers)
        }
        if not chosen:
            raise UnsupportedError(f"No trained linear layer matches {', '.join(self.layers)}: EK-FAC needs one.")
        for name, layer in chosen.items():
            side = max(layer.in_features, layer.out_features)
            if side > WIDEST:
                raise UnsupportedError(
                    f"Layer {name} is {side} wide, and EK-FAC would square that: name other layers (layers=...)."
                )
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _OneExample(layer))
        return [f"{name}.layer" for name in chosen]


class _OneExample(nn.Module):
    """A linear layer whose input is all of one example, whatever axes the model gives it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:  # LoRA layers ask for its dtype
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(1, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _drawn_loss(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Loss of one example with labels drawn from the model, scaled so that its squared gradient is that of the mean loss.

    A mean over T independent draws has a T times smaller squared gradient than the Fisher matrix of the mean loss.
    """
    if task.outputs is None:
        raise UnsupportedError(
            "EK-FAC draws labels from logits, which a custom recipe does not name: use another kind."
        )
    logits, targets = task.outputs(model, batch)
    learned = logits[targets != IGNORED]
    with torch.no_grad():
        labels = torch.multinomial(learned.softmax(-1), 1).squeeze(1)
    return F.cross_entropy(learned, labels, reduction="sum") / math.sqrt(len(labels))


def _kronfluence_task(kron: Any, task: Task, layers: list[str]) -> Any:
    class Adapted(kron.Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            return _drawn_loss(task, model, batch) if sample else task.loss(model, batch).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return task.loss(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    return Adapted()


def package() -> Any:
    """The names of kronfluence that are used here, in one place."""
    pip = "'leaveout[methods]', then pip install --no-deps kronfluence==1.0.1"
    needs("kronfluence", "EK-FAC", pip=pip)
    from kronfluence import analyzer, arguments, task
    from kronfluence.utils import dataset

    class Names:
        Analyzer, prepare_model = analyzer.Analyzer, staticmethod(analyzer.prepare_model)
        FactorArguments, ScoreArguments = arguments.FactorArguments, arguments.ScoreArguments
        DataLoaderKwargs, Task = dataset.DataLoaderKwargs, task.Task

    return Names


@method(package=package, kinds=NAMED_KINDS, plain=True)
def ek_fac(scorer: Scorer, at: str) -> np.ndarray:
    """With all trained linear layers."""
    return EkFac(scorer.task, scorer.parameters(at), seed=scorer.seed).score(scorer.query_rows, scorer.rows)


@method(package=package, kinds=NAMED_KINDS, plain=True)
def ek_fac_blocks(scorer: Scorer, at: str) -> np.ndarray:
    """With the layers below the head, which is as wide as the vocabulary."""
    below = (f"{getattr(scorer.task.model, 'base_model_prefix', '')}.*",)
    return EkFac(scorer.task, scorer.parameters(at), below, seed=scorer.seed).score(scorer.query_rows, scorer.rows)
