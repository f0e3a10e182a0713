"""HTML pages for what the command line answers: found rows with the words that did it, a heat map of two texts, and
predictions with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leaveout import report
from leaveout.readout.explain import Explanation, explain_rows
from leaveout.readout.index import Index
from leaveout.readout.search import Hit


def search_page(index: Index, rows: Sequence[Any], texts: Iterable[str], found: Sequence[Sequence[Hit]]) -> str:
    """Queries with their hits, each word tinted by what it adds. Cost: one forward pass per hit."""
    sections = []
    for row, text, hits in zip(rows, texts, found, strict=True):
        sections += [report.heading("Query"), report.quote(text)]
        for hit, why in zip(hits, explain_rows(index, row, [hit.id for hit in hits]), strict=True):
            sections.append(report.hit_block(hit, report.highlighted(why.row_tokens, why.row_weights)))
    return report.page("Rows that influenced these texts", sections)


def explain_page(query: str, found: Explanation) -> str:
    """One row's tinted text and the heat map of query tokens and row tokens."""
    sections = [
        report.quote(query),
        report.heading(f"Row {found.id}", f"score {found.score:.4g}, stored {found.stored_score:.4g}"),
        f"<p>{report.highlighted(found.row_tokens, found.row_weights)}</p>",
        report.heat_map(found.query_tokens, found.row_tokens, found.pairs),
    ]
    return report.page("Which tokens answer which", sections)


def prediction_page(lines: Sequence[Mapping[str, Any]], estimator: str, summary: Mapping[str, Any] | None) -> str:
    """A picture and a table of predictions (`Prediction.lines`), and what retraining says of them all."""
    note = (
        f"Estimator: {estimator}. Values of queries under the model trained on everything (base), and without the set."
    )
    sections = [report.heading("Predictions", note), report.interval_chart(lines)]
    sections.append(report.html_table(*report.prediction_table(lines)))
    if summary is not None:
        facts = [(name.replace("_", " "), "unknown" if value is None else value) for name, value in summary.items()]
        sections += [report.heading("Against retraining"), report.html_table(["", ""], facts)]
    return report.page("The model without some of its data", sections)
