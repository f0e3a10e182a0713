"""HTML pages for what the command line answers: found rows with the words that did it, a heat map of two texts, and
predictions with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from leaveout.deletion.predict import Prediction, Verification, prediction_table
from leaveout.readout.explain import Explanation, explain_rows
from leaveout.readout.index import Index
from leaveout.readout.search import Hit
from leaveout.report.blocks import (
    heading,
    heat_map,
    highlighted,
    hit_block,
    interval_chart,
    page,
    quote,
)
from leaveout.tables import Table


def search_page(index: Index, rows: Sequence[Any], texts: Iterable[str], found: Sequence[Sequence[Hit]]) -> str:
    """Queries with their hits, each word tinted by what it adds. Cost: one forward pass per hit."""
    sections: list[str] = []
    for row, text, hits in zip(rows, texts, found, strict=True):
        sections += [heading("Query"), quote(text)]
        for hit, why in zip(hits, explain_rows(index, row, [hit.id for hit in hits]), strict=True):
            sections.append(hit_block(hit, highlighted(why.row_tokens, why.row_weights)))
    return page("Rows that influenced these texts", sections)


def explain_page(query: str, found: Explanation) -> str:
    """One row's tinted text and the heat map of query tokens and row tokens."""
    sections = [
        quote(query),
        heading(f"Row {found.id}", f"score {found.score:.4g}, stored {found.stored_score:.4g}"),
        f"<p>{highlighted(found.row_tokens, found.row_weights)}</p>",
        heat_map(found.query_tokens, found.row_tokens, found.pairs),
    ]
    return page("Which tokens answer which", sections)


def prediction_page(found: Prediction) -> str:
    """A picture and a table of predictions, and what retraining says of them all if they were verified."""
    note = (
        f"Estimator: {found.estimator}. Values of queries under the model trained on everything (base), and without the "
        "set."
    )
    lines = list(found.lines())
    sections = [heading("Predictions", note), interval_chart(lines), prediction_table(lines).html()]
    if isinstance(found, Verification):
        facts = [
            (name.replace("_", " "), "unknown" if value is None else value) for name, value in found.summary().items()
        ]
        sections += [heading("Against retraining"), Table(["", ""], facts).html()]
    return page("The model without some of its data", sections)
