"""TrackStar through the package bergson: projected gradients of the linear layers, in the metric of their second moments.

Each layer's gradient is projected on both sides to `projection` x `projection` numbers, and whitened with the second
moment of the rows' own. Embeddings, norms, biases and the head are left out, and no optimizer state is used: this is what
`bergson trackstar` does for a model on disk.
Source: arXiv 2410.17413, as bergson 2.5.1 computes it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from leaveout.errors import UnsupportedError, needs
from leaveout.methods.gradients import checked
from leaveout.methods.scorer import Scorer, method
from leaveout.training.examples import asked
from leaveout.training.tasks import Parameters, Task


@dataclass(frozen=True)
class TrackStar:
    """TrackStar at one set of trained parameters. Nothing depends on a seed: layers' names make the projections.

    projection:  numbers that each side of a layer's gradient is projected to
    damping:     added to the second moment, as a share of its mean eigenvalue in each layer
    unit_length: whether whitened gradients have length 1, as in the paper; bergson leaves this off
    mixed:       whether the second moment is mixed with that of the queries, as in the paper and in bergson; then a query's
                 scores depend on the other queries
    """

    task: Task
    parameters: Parameters
    projection: int = 16
    damping: float = 0.1
    unit_length: bool = False
    mixed: bool = True

    def score(self, queries: Sequence[Any], corpus: Sequence[Any]) -> np.ndarray:
        """Scores [query, train] float32, positive where the row makes the query more probable; their size means nothing.

        Memory: one more copy of the model, `projection`^4 numbers of 24 bytes for each layer, and `projection`^2 for each
                layer and query. On disk (in a temporary directory): the model, the second moments, the tokens, the scores.
        Cost:   two forward and backward passes for each row, one or two for each query.
        Raises: UnsupportedError without bergson, or for anything but a language model of transformers without adapters.
        """
        bergson = package()
        if not len(queries) or not len(corpus):
            return np.zeros((len(queries), len(corpus)), np.float32)
        with tempfile.TemporaryDirectory() as name, _undisturbed():
            place = Path(name)
            longest = max(
                self._save_rows(rows, place / kind) for kind, rows in (("query", asked(queries)), ("row", corpus))
            )
            index = bergson.TrackstarIndexConfig(
                run_path=str(place / "run"), data=bergson.DataConfig(dataset=str(place / "row")), precision="fp32",
                model=str(place / "model"), filter_modules=self._save_model(place / "model", bergson),
                projection_dim=self.projection, loss_reduction="mean", token_batch_size=longest,
            )  # fmt: skip
            pipeline = bergson.TrackstarConfig(
                query=bergson.QuerySetConfig(dataset=str(place / "query")),
                preprocess_cfg=bergson.PreprocessConfig(
                    unit_normalize=self.unit_length, inversion_cfg=bergson.InversionConfig(damping_factor=self.damping)
                ),
                mix_hessians=self.mixed, stats_sample_size=None,
            )  # fmt: skip
            bergson.Trackstar(index, pipeline).execute()
            found = bergson.load_scores(place / "run" / "scores")
            assert found.is_written()  # it skips rows without a token to learn, and `encode` lets none through
            return np.ascontiguousarray(found[:].T, np.float32)

    def _save_rows(self, rows: Sequence[Any], path: Path) -> int:
        """Writes tokens and labels of the rows; their largest number of tokens."""
        from datasets import Dataset

        encoded = [[part[0].tolist() for part in self.task.encode([row])] for row in rows]
        found = [{"input_ids": ids, "labels": labels, "length": len(ids)} for ids, labels in encoded]
        Dataset.from_list(found).save_to_disk(str(path))
        return max(row["length"] for row in found)

    def _save_model(self, path: Path, bergson: Any) -> str | None:
        """Writes the trained model, with an empty tokenizer as bergson opens one; names of layers that are not trained."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedModel, PreTrainedTokenizerFast

        checked(self.task, self.parameters)
        if not isinstance(self.task.model, PreTrainedModel):
            raise UnsupportedError(
                "TrackStar needs a causal-lm recipe that trains the model's own parameters: bergson opens no other model."
            )
        model = copy.deepcopy(self.task.model)
        model.load_state_dict(self.parameters, strict=False)
        model.save_pretrained(path)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}))).save_pretrained(path)
        trained = {id(p) for name, p in model.named_parameters() if name in self.task.trained}
        layers = {
            name: id(layer.weight) in trained
            for name, layer in model.base_model.named_modules()
            if isinstance(layer, bergson.LayerAdapter.supported_modules)
        }
        if not any(layers.values()):
            raise UnsupportedError("No linear layer below the head is trained: TrackStar needs one.")
        return ",".join(name for name, kept in layers.items() if not kept) or None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No report of every step on standard output and error, and Python's random state, which bergson seeds, put back."""
    state = random.getstate()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(state)


def package() -> Any:
    """The names of bergson that are used here, in one place. Its import takes over the root logger, which is undone."""
    root = logging.getLogger()
    handlers, level, root.handlers = root.handlers, root.level, []
    try:
        needs("bergson.cli.commands", "TrackStar", pip="bergson==2.5.1 (docs/reference/methods.md: without a GPU)")
        from bergson.cli.commands import Trackstar  # pyright: ignore[reportMissingImports]
        from bergson.config import config  # pyright: ignore[reportMissingImports]
        from bergson.data import load_scores  # pyright: ignore[reportMissingImports]
        from bergson.gradients import LayerAdapter  # pyright: ignore[reportMissingImports]
    finally:
        root.handlers = handlers
        root.setLevel(level)
    return SimpleNamespace(**vars(config), Trackstar=Trackstar, load_scores=load_scores, LayerAdapter=LayerAdapter)


@method(package=package, kinds=("causal-lm",), plain=True)
def trackstar(scorer: Scorer, at: str) -> np.ndarray:
    """At the parameters of a checkpoint."""
    return TrackStar(scorer.task, scorer.parameters(at)).score(scorer.query_rows, scorer.rows)
