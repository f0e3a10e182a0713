"""Self-contained HTML pages without scripts: found rows with the words that did it, a heat map of two texts, predictions
with their intervals; and what such pages are made of.

Everything that comes from data or from a model is escaped. Colours: green pushes a score up, red pushes it down.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from leaveout.deletion.predict import Prediction, Verification, prediction_table, reach
from leaveout.readout.explain import Explanation, explain_rows
from leaveout.readout.index import Index
from leaveout.readout.search import Hit, Hits, SearchOptions
from leaveout.tables import Table, shorten

STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #dde2ea; --paper: #ffffff; --tint: #f6f8fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9f0; --soft: #9aa5b8; --line: #343c4c; --paper: #161a22; --tint: #1e2430; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p.note, .soft { color: var(--soft); } .row { border-left: 3px solid var(--line); padding: .2rem .8rem; margin: .7rem 0; }
.row.marked { border-left-color: #d9822b; } .row p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.badge { background: #d9822b; color: #fff; border-radius: .6rem; padding: 0 .5rem; font-size: .8rem; }
blockquote { background: var(--tint); margin: .6rem 0; padding: .6rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .8rem 0; } td, th { padding: .2rem .7rem; text-align: left;
  border-bottom: 1px solid var(--line); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.heat { overflow-x: auto; } .heat td { padding: 0; width: 1.1rem; min-width: 1.1rem; height: 1.1rem; border: 0; }
.heat th { font-weight: normal; border: 0; padding: 0 .3rem; white-space: pre; } .heat th.up { writing-mode: vertical-rl; }
.chart { width: 100%; height: auto; font-size: 12px; } .chart text { fill: var(--ink); } .chart .label { text-anchor: end; }
.chart .axis { text-anchor: middle; fill: var(--soft); } .chart path { stroke: var(--soft); fill: none; stroke-width: 1.5; }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .bar { stroke: #4c8fdb; stroke-width: 5; opacity: .45; }
.chart .dot { fill: #2f6fc4; } .chart .ring { fill: none; stroke: #d9822b; stroke-width: 2; }
"""

CHART_ROWS = 60


# --- pages ----------------------------------------------------------------------------------------------------------


def search_page(
    index: Index, rows: Sequence[Any], texts: Iterable[str], found: Sequence[Hits], options: SearchOptions
) -> str:
    """Queries with their hits, each word tinted by what it adds. Cost: one forward pass per hit, or two (both sides)."""
    sections: list[str] = []
    for row, text, hits in zip(rows, texts, found, strict=True):
        sections += [heading("Query"), quote(text)]
        if hits.controls is not None:
            sections.append(hits.controls.table().html())
        ids = [hit.id for hit in hits]
        for hit, why in zip(hits, explain_rows(index, row, ids, options.length, options.prompt_weight), strict=True):
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


# --- what they are made of ------------------------------------------------------------------------------------------


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document from ready-made sections."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def heading(text: str, note: str = "") -> str:
    """A section's heading with a note under it."""
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<h2>{html.escape(text)}</h2>{below}"


def quote(text: str) -> str:
    """A query or another text set off from the rest."""
    return f"<blockquote>{html.escape(text)}</blockquote>"


def highlighted(pieces: Sequence[str], weights: np.ndarray) -> str:
    """Text with each piece tinted by its weight, the largest in full colour."""
    largest = float(np.abs(weights).max(initial=0.0)) or 1.0
    marked: list[str] = []
    for piece, weight in zip(pieces, weights, strict=True):
        share = float(weight) / largest
        text = html.escape(piece)
        if abs(share) < 0.08:
            marked.append(text)
        else:
            marked.append(f'<span title="{float(weight):.3g}" style="background:{_tint(share)}">{text}</span>')
    return "".join(marked)


def _tint(share: float) -> str:
    colour = "46,160,67" if share > 0 else "218,54,51"
    return f"rgba({colour},{min(abs(share), 1.0) * 0.6:.2f})"


def hit_block(hit: Hit, body: str | None = None, badge: str = "") -> str:
    """One found row; `body` is ready-made HTML for its text, `badge` a word that marks it."""
    facts = " · ".join([f"#{hit.rank}", f"score {hit.score:.4g}", hit.id, *(f"{k}={v}" for k, v in hit.meta.items())])
    label = f' <span class="badge">{html.escape(badge)}</span>' if badge else ""
    return (
        f'<div class="row{" marked" if badge else ""}"><span class="soft">{html.escape(facts)}</span>{label}'
        f"<p>{html.escape(hit.text) if body is None else body}</p></div>"
    )


def heat_map(row_tokens: list[str], column_tokens: list[str], values: np.ndarray) -> str:
    """A table of tinted cells, values [row tokens, column tokens]; tokens whose values are all zero are left out."""
    rows, columns = (np.flatnonzero(np.abs(values).sum(axis)) for axis in (1, 0))
    shown = values[np.ix_(rows, columns)]
    largest = float(np.abs(shown).max(initial=0.0)) or 1.0
    top = "".join(f'<th class="up">{html.escape(column_tokens[c])}</th>' for c in columns)
    lines: list[str] = []
    for r, line in zip(rows, shown, strict=True):
        cells = (f'<td title="{v:.3g}" style="background:{_tint(float(v) / largest)}"></td>' for v in line)
        lines.append(f"<tr><th>{html.escape(row_tokens[r])}</th>{''.join(cells)}</tr>")
    return f'<div class="heat"><table><tr><th></th>{top}</tr>{"".join(lines)}</table></div>'


def interval_chart(lines: Sequence[Mapping[str, Any]], unit: str = "nats") -> str:
    """Inline SVG of predictions, one row each: base (tick), predicted with its 95 % interval (dot and bar), actual (ring).

    lines: those of `Prediction.lines`; the first CHART_ROWS are drawn, and the rest are counted under the picture.
    """
    drawn = lines[:CHART_ROWS]
    ends = [line[key] for line in drawn for key in ("base", "predicted", "actual") if key in line]
    for line in drawn:
        ends += [line["predicted"] - (reach(line) or 0), line["predicted"] + (reach(line) or 0)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return round(310 + 480 * (value - low) / span, 1)

    bottom = 26 * len(drawn) + 10
    parts = [_chart_row(line, 26 * i + 16, x) for i, line in enumerate(drawn)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = x(low + share * span)
        parts.append(f'<path class="grid" d="M{at} 4V{bottom}"/><text class="axis" x="{at}" y="{bottom + 16}">')
        parts.append(f"{low + share * span:.3g}</text>")
    parts.append(f'<text class="axis" x="550" y="{bottom + 34}">value of the query ({html.escape(unit)})</text>')
    rest = len(lines) - len(drawn)
    more = f'<p class="note">{rest} more are not drawn.</p>' if rest else ""
    key = "| base &nbsp; ● predicted, with its 95 % interval" + (
        " &nbsp; ◯ actual" if any("actual" in line for line in drawn) else ""
    )
    return (
        f'<svg class="chart" viewBox="0 0 820 {bottom + 40}" role="img">{"".join(parts)}</svg>'
        f'<p class="note">{key}</p>{more}'
    )


def _chart_row(line: Mapping[str, Any], y: int, x: Callable[[float], float]) -> str:
    label = html.escape(shorten(f"{line['query']} without {line['without']}", 46))
    parts = [f'<text class="label" x="300" y="{y + 4}">{label}</text>']
    if (half := reach(line)) is not None:
        ends = x(line["predicted"] - half), x(line["predicted"] + half)
        parts.append(f'<path class="bar" d="M{ends[0]} {y}H{ends[1]}"/>')
    at = x(line["base"])
    parts.append(f'<path class="base" d="M{at} {y - 7}V{y + 7}"/>')
    parts.append(f'<circle class="dot" cx="{x(line["predicted"])}" cy="{y}" r="4"/>')
    if "actual" in line:
        parts.append(f'<circle class="ring" cx="{x(line["actual"])}" cy="{y}" r="6"/>')
    return "".join(parts)
