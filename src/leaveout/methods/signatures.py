"""The presets of the readout engine as methods: a run's rows, indexed in a temporary directory and scored.

Scores of a preset are products, so that they can be summed over sets of rows; those of its `cosine` are over the rows'
lengths, as a search ranks them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.corpus import Row
from leaveout.corpus.chat import Template, chosen_template
from leaveout.corpus.tokens import pair_tokens
from leaveout.deletion.run import TrainingRun
from leaveout.methods.scorer import Method, Scorer, as_row
from leaveout.models import load_tokenizer
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.preferences import Preferences
from leaveout.readout.scan import Length
from leaveout.readout.settings import SignatureSettings
from leaveout.training.tasks import references_of


def signature_scores(
    scorer: Scorer, at: str, preset: str | SignatureSettings, length: Length = "product"
) -> np.ndarray:
    """Scores of the readout engine [query, example], from an index of the rows as the run was trained on them."""
    return scores_of(scorer, readout_of(scorer, at), preset, length)


def scores_of(
    scorer: Scorer, readout: Readout, preset: str | SignatureSettings, length: Length = "product"
) -> np.ndarray:
    """The same of a language model that may be another than the run's."""
    with indexed(scorer, readout, preset) as index:
        return index.score([as_row(row) for row in scorer.query_rows], length=length)


@contextmanager
def indexed(scorer: Scorer, readout: Readout, preset: str | SignatureSettings) -> Generator[Index]:
    """An index of the rows as the run was trained on them, for a while."""
    template = chosen_template(scorer.run.recipe.template, readout.tokenizer)
    recipe, references = scorer.run.recipe, references_of(scorer.run.recipe)
    beta = (recipe.loss or {}).get("beta", Preferences.beta)
    rows = [
        replace(
            trained_part(row, readout.tokenizer, template, recipe.max_tokens),
            id=str(i), unit=str(i), reference=references.get(row.content_hash),
        )
        for i, row in enumerate(map(as_row, scorer.rows))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        yield Index.build(readout, rows, Path(place) / "index", preset, template=template, beta=beta)


def readout_of(scorer: Scorer, at: str) -> Readout:
    """The language model of the run at a checkpoint."""
    return load_readout(scorer.model(at), tokenizer_of(scorer.run))


def trained_part(row: Row, tokenizer: Any, template: Template, limit: int) -> Row:
    """A row as it was trained on, of which the tokens count that the recipe takes.

    Its text stays whole: a text that ends within a word or a sign has other tokens.
    """
    sides = pair_tokens(row, tokenizer, template, limit)
    kept = limit if any(side.cut for side in sides) else None
    if row.pair is not None:
        return replace(row, pair=(sides[0].row, sides[1].row), kept=kept)
    return replace(sides[0].row, kept=kept)


def tokenizer_of(run: TrainingRun) -> Any:
    """The tokenizer of a causal-lm recipe."""
    source: Any = run.recipe.model() if callable(run.recipe.model) else run.recipe.model
    return source[1] if isinstance(source, tuple) else load_tokenizer(str(source))


def _preset(name: str, length: Length = "product") -> Method:
    return Method(lambda scorer, at: signature_scores(scorer, at, name, length), kinds=("causal-lm",), text=True)


default, residual, similarity, paper, paper_responses = map(
    _preset, ("default", "residual", "similarity", "paper", "paper-responses")
)
default_cosine, residual_cosine = (_preset(name, "cosine") for name in ("default", "residual"))
