"""Scores that know nothing of what a row taught: a method that is no better than they are may rank form."""

from __future__ import annotations

import numpy as np
import torch

from leaveout.errors import UnsupportedError
from leaveout.methods.scorer import Scorer, method
from leaveout.methods.signatures import indexed, readout_of, scores_of
from leaveout.models import quiet_transformers
from leaveout.models.checks import first_line
from leaveout.readout.model import Readout, load_readout


@method(kinds=("causal-lm",), text=True)
def norm(scorer: Scorer, at: str) -> np.ndarray:
    """The lengths of the rows' signatures by `default`, the same for every query."""
    with indexed(scorer, readout_of(scorer, at), "default") as index:
        return np.tile(index.lengths_of(np.arange(len(index))), (len(scorer.queries), 1))


@method(text=True)
def length(scorer: Scorer, at: str) -> np.ndarray:
    """How many characters are learned of each row, the same for every query and at every checkpoint."""
    return np.tile([float(len(text)) for text in scorer.texts(scorer.rows)], (len(scorer.queries), 1))


@method(kinds=("causal-lm",), text=True)
def untrained(scorer: Scorer, at: str) -> np.ndarray:
    """`default` of a model of the same architecture with random weights; the same at every checkpoint."""
    return scores_of(scorer, random_weights(readout_of(scorer, "start"), scorer.seed), "default")


def random_weights(readout: Readout, seed: int) -> Readout:
    """A model of the same class and config. Raises: UnsupportedError where its class makes none of a config."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            lm = type(readout.lm)(readout.lm.config)  # type: ignore[arg-type]
        except Exception as error:
            raise UnsupportedError(
                f"A {type(readout.lm).__name__} with random weights was not made ({first_line(error)}): leave untrained out."
            ) from error
        return load_readout(lm.to(readout.device, readout.dtype), readout.tokenizer)
