"""Self-contained HTML pages without scripts: found rows with the words that did it, a heat map of two texts, predictions
with their intervals; and what such pages are made of.

Everything that comes from data or from a model is escaped. Blue pushes a score up; orange, with a dotted line, pushes it down:
both are told apart by people who see no red or green. Text keeps 4.5:1 on every tint.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from leaveout.deletion.predict import Prediction, Verification, prediction_table, reach, told
from leaveout.readout.explain import Explanation, explain_rows
from leaveout.readout.index import Index
from leaveout.readout.search import Hit, Hits, SearchOptions, usual_best, usual_scores
from leaveout.readout.search import told as told_hits
from leaveout.tables import Table, shorten
from leaveout.words import USUAL, agreement_told, pairs_of_words, pairs_told, passage, times, words_of

STYLE = """
:root { color-scheme: light dark; --ink: #1b2230; --soft: #566074; --line: #d8dee8; --paper: #ffffff; --tint: #f4f6fa;
  --up: #3f8cf0; --down: #f0902c; --mark: #2457a6; --ring: #a85a08; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf2; --soft: #a4aec0; --line: #3a4354; --paper: #151922; --tint: #1e2430; --up: #2f74d0; --down: #b8640f;
    --mark: #8db8f5; --ring: #f0a04c; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p.note, .soft { color: var(--soft); } .verdict { font-size: 1.1rem; font-weight: 600; }
.row { border-left: 4px solid var(--line); padding: .2rem .8rem; margin: .8rem 0; }
.row.marked { border-left-color: var(--ring); } .row p, .text { margin: .2rem 0; white-space: pre-wrap; }
.badge { border: 1px solid var(--ring); border-radius: .6rem; padding: 0 .5rem; font-size: .85rem; }
blockquote { background: var(--tint); margin: .6rem 0; padding: .6rem 1rem; white-space: pre-wrap; }
details { margin: .3rem 0; } summary { cursor: pointer; color: var(--soft); }
.tint { border-radius: .15rem; } .tint.up { background: color-mix(in srgb, var(--up) calc(var(--share) * 55%), transparent); }
.tint.down { background: color-mix(in srgb, var(--down) calc(var(--share) * 55%), transparent);
  border-bottom: 2px dotted color-mix(in srgb, var(--down) calc(15% + var(--share) * 85%), transparent); }
.legend { font-size: .9rem; color: var(--soft); } .legend .tint { color: var(--ink); padding: 0 .3rem; }
.key { white-space: nowrap; margin-right: 1.2rem; } .key svg { vertical-align: middle; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; } caption { text-align: left; color: var(--soft); }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; } td { min-width: 6.5rem; max-width: 24rem; } td.interval { white-space: nowrap; }
td.number { min-width: 4rem; text-align: right; font-variant-numeric: tabular-nums; }
.heat { overflow: auto; max-height: 85vh; margin: .8rem 0; max-width: 100%; }
.heat table { border-collapse: separate; border-spacing: 0; }
.heat td { padding: 0; width: 1.5rem; min-width: 1.5rem; max-width: none; height: 1.5rem; text-align: center;
  border: 1px solid var(--line);
  line-height: 1.5rem; font-weight: 600; }
.heat th { font-weight: normal; border: 0; padding: 0 .4rem; white-space: pre; background: var(--paper); position: sticky;
  max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
.heat thead th { top: 0; z-index: 1; vertical-align: bottom; } .heat tbody th { left: 0; text-align: right; }
.heat thead th:first-child { left: 0; z-index: 2; white-space: normal; font-size: .85rem; color: var(--soft); }
.heat th.up { writing-mode: vertical-rl; transform: rotate(180deg); padding: .4rem 0; max-height: 9rem; max-width: none;
  vertical-align: top; text-align: left; }
.chart { width: 100%; max-width: 30rem; height: auto; font-size: 15px; display: block; }
.chart text { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.chart .axis { text-anchor: middle; fill: var(--soft); } .chart path { fill: none; }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .zero { stroke: var(--soft); stroke-width: 2; }
.chart .bar { stroke: var(--mark); stroke-width: 6; opacity: .4; } .chart .dot { fill: var(--mark); }
.chart .ring { fill: none; stroke: var(--ring); stroke-width: 2.5; }
"""

CHART_ROWS = 60
LEAST = 0.06  # of the largest weight: what is less is not tinted
SIGNED = 0.25  # of the largest: what is more has its sign in the cell
ZOOM = (24, 16)  # words of the row and of the query that a heat map begins with


# --- pages ----------------------------------------------------------------------------------------------------------


def search_page(
    index: Index, rows: Sequence[Any], texts: Iterable[str], found: Sequence[Hits], options: SearchOptions, k: int
) -> str:
    """Queries with their best k hits, each word tinted by what it adds. Cost: a forward pass per hit, or two (both sides)."""
    usual = usual_scores(index, index.encode(rows), usual_best(index, options), options.length)
    sections = [legend("adds to the score", "takes away from it")]
    if any(usual):
        sections.append(note(USUAL))
    for row, text, hits, each in zip(rows, texts, found, usual, strict=True):
        sections += [heading("Query"), quote(text), verdict(told_hits(index, hits, usual=each))]
        if hits.controls is not None:
            sections.append(hits.controls.table().html())
        ids = [hit.id for hit in hits[:k]]
        for hit, why in zip(
            hits[:k], explain_rows(index, row, ids, options.length, options.prompt_weight), strict=True
        ):
            sections.append(hit_block(hit, cut(why.row_tokens, why.row_weights), usual=each))
    return page("Rows that influenced these texts", sections)


def explain_page(query: str, found: Explanation, starts: Sequence[int] = (), usual: float = 0.0) -> str:
    """Which words answer which: both texts tinted, the strongest pairs, and a heat map of the region that adds most.

    starts  the query's tokens at which its second, third, ... text begins; usual: see `usual_scores`
    """
    texts, words, pairs = pairs_of_words(found.query_tokens, found.row_tokens, found.pairs, starts)
    asked = [word for text in texts for word in text]
    said, best = pairs_told(asked, words, pairs, 15)
    score = f"score {found.score:.4g}" + (f", {times(found.score, usual)} the usual best" if usual else "")
    sections = [verdict(said), legend("adds to the score", "takes away from it")]
    sections.append(heading("Query", query if len(texts) > 1 else ""))
    at = 0
    for text in texts:
        sections.append(
            f'<p class="text" dir="auto">{tinted(text, pairs.sum(1)[at : at + len(text)], pairs.sum(1))}</p>'
        )
        at += len(text)
    sections += [heading(f"Row {found.id}", score), cut(found.row_tokens, found.row_weights)]
    sections += [heading("Strongest pairs of words", "How much of all that pairs of words add or take away.")]
    sections += [Table(["query", "row", "of all pairs"], best).html(), heading("Which word answers which")]
    turned = np.swapaxes(pairs, 0, 1)
    near = slice(*passage(pairs.sum(0), ZOOM[0])), slice(*passage(pairs.sum(1), ZOOM[1]))
    axes = "words of the row ↓, of the query →"
    sections += [
        note("The words around the strongest pairs. + adds, − takes away."),
        heat_map(words, asked, turned, axes, *near),
    ]
    if near != (slice(0, len(words)), slice(0, len(asked))):
        full = heat_map(words, asked, turned, axes)
        sections.append(f"<details><summary>The whole of both texts</summary>{full}</details>")
    return page("Which words answer which", sections)


def prediction_page(found: Prediction, all_pairs: bool = False) -> str:
    """A picture and a table of predictions, and what retraining says of them all if they were verified.

    all_pairs  also of sets that were chosen for another query
    """
    said = f"Estimator: {found.estimator}. An effect is how much the value of a query changes without the set."
    lines = list(found.lines()) if all_pairs else found.own_lines()
    sections = [verdict(told(lines)), note(said), interval_chart(lines), prediction_table(lines).plain().html()]
    if isinstance(found, Verification):
        sections += map(note, agreement_told(found.summary()))
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
    return f'<blockquote dir="auto">{html.escape(text)}</blockquote>'


def note(text: str) -> str:
    """A sentence for who wants to know more."""
    return f'<p class="note">{html.escape(text)}</p>'


def verdict(text: str) -> str:
    """What was found, in a sentence."""
    return f'<p class="verdict">{html.escape(text)}</p>'


def legend(up: str, down: str) -> str:
    """What the tints of words mean."""
    ways = (("up", up), ("down", down))
    marks = [f'<span class="tint {way}" style="--share:.9">{html.escape(text)}</span>' for way, text in ways]
    return f'<p class="legend">{" ".join(marks)} The word of the fullest colour is the strongest of its text.</p>'


def tinted(words: Sequence[str], weights: np.ndarray, whole: np.ndarray | None = None) -> str:
    """Words tinted by their weights, the largest (of `whole`) in full colour."""
    largest = float(np.abs(weights if whole is None else whole).max(initial=0.0)) or 1.0
    marked: list[str] = []
    for word, weight in zip(words, weights, strict=True):
        share, text = float(weight) / largest, html.escape(word.lstrip())
        space = html.escape(word[: len(word) - len(word.lstrip())])
        if abs(share) < LEAST or not text:
            marked.append(space + text)
        else:
            marked.append(f'{space}<span {_tint(share)} title="{100 * share:+.0f} % of the strongest">{text}</span>')
    return "".join(marked)


def highlighted(pieces: Sequence[str], weights: np.ndarray) -> str:
    """Text of tokens (pieces, and what each adds), tinted word by word."""
    words, place = words_of(pieces)
    return tinted(words, np.bincount(place, weights, len(words)))


def cut(pieces: Sequence[str], weights: np.ndarray) -> str:
    """The passage of a text that adds most, tinted, and behind it the whole, folded."""
    words, place = words_of(pieces)
    values = np.bincount(place, weights, len(words))
    start, end = passage(values)
    shown = (
        ("… " if start else "")
        + tinted(words[start:end], values[start:end], values)
        + (" …" if end < len(words) else "")
    )
    if end - start == len(words):
        return f'<p class="text" dir="auto">{shown}</p>'
    whole = (
        f'<summary>The whole row, {len(words):,} words</summary><p class="text" dir="auto">{tinted(words, values)}</p>'
    )
    return f'<p class="text" dir="auto">{shown}</p><details>{whole}</details>'


def _tint(share: float) -> str:
    return f'class="tint {"up" if share > 0 else "down"}" style="--share:{min(abs(share), 1.0):.2f}"'


def hit_block(hit: Hit, body: str | None = None, badge: str = "", usual: float = 0.0) -> str:
    """One found row; `body` is ready-made HTML for its text, `badge` a word that marks it, `usual` as of `usual_scores`."""
    score = f"{hit.score / usual:.3g} × usual" if usual else f"score {hit.score:.4g}"
    meta = [f"{key}: {shorten(str(value), 60)}" for key, value in hit.meta.items() if value is not None]
    facts = " · ".join([f"#{hit.rank}", score, hit.id, *meta])
    label = f' <span class="badge">{html.escape(badge)}</span>' if badge else ""
    return (
        f'<div class="row{" marked" if badge else ""}"><span class="soft">{html.escape(facts)}</span>{label}'
        f"{f'<p>{html.escape(hit.text)}</p>' if body is None else body}</div>"
    )


def heat_map(
    down: Sequence[str], across: Sequence[str], values: np.ndarray, axes: str,
    rows: slice = slice(None), columns: slice = slice(None),
) -> str:  # fmt: skip
    """A table of tinted cells, values [words down, words across]; of the given rows and columns, without words whose values are
    all zero. The tints are relative to the strongest of all."""
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    part = values[rows, columns]
    kept = [np.flatnonzero(np.abs(part).sum(axis)) for axis in (1, 0)]
    named = [
        [words[int(at)] for at in places] for words, places in zip((down[rows], across[columns]), kept, strict=True)
    ]
    top = "".join(f'<th scope="col" class="up">{html.escape(name.strip())}</th>' for name in named[1])
    lines = [
        f'<tr><th scope="row">{html.escape(name.strip())}</th>{"".join(_cell(float(v) / largest) for v in line)}</tr>'
        for name, line in zip(named[0], part[np.ix_(*kept)], strict=True)
    ]
    head = f"<thead><tr><th>{html.escape(axes)}</th>{top}</tr></thead>"
    region = f'class="heat" tabindex="0" role="region" aria-label="{html.escape(axes)}"'
    return f"<div {region}><table>{head}<tbody>{''.join(lines)}</tbody></table></div>"


def _cell(share: float) -> str:
    if abs(share) < LEAST:
        return "<td></td>"
    sign = "" if abs(share) < SIGNED else "+" if share > 0 else "−"
    return f'<td {_tint(share)} title="{100 * share:+.0f} % of the strongest pair">{sign}</td>'


# --- intervals as a picture -------------------------------------------------------------------------------------------

WIDE, LEFT, RIGHT, STEP = 400, 14, 386, 50  # of a chart, its first and last value, and a row of it


def interval_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    """Inline SVG of effects, one row each: predicted with its 95 % interval (dot and bar), and retrained (ring).

    lines: those of `Prediction.lines`; the first CHART_ROWS are drawn, and the rest are counted under the picture.
    """
    drawn = lines[:CHART_ROWS]
    if not drawn:
        return ""
    ends = [0.0]
    for line in drawn:
        ends += [line["effect"] - (reach(line) or 0), line["effect"] + (reach(line) or 0)]
        ends += [line["actual"] - line["base"]] if "actual" in line else []
    ticks = round_ticks(min(ends), max(ends))

    def x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    bottom = STEP * len(drawn) + 4
    parts: list[str] = []
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{x(tick)} 4V{bottom}"/>')
        parts.append(f'<text class="axis" x="{min(max(x(tick), 22), WIDE - 22)}" y="{bottom + 18}">{tick:g}</text>')
    parts += [_chart_row(line, STEP * i, x) for i, line in enumerate(drawn)]
    units = {line["unit"] for line in drawn}
    named = f"change in {units.pop()}" if len(units) == 1 and "" not in units else "change, each in its own unit"
    parts.append(
        f'<text class="axis" x="{WIDE / 2}" y="{bottom + 38}">{html.escape(named)}: right of 0 it rises</text>'
    )
    rest = len(lines) - len(drawn)
    more = note(f"{rest} more are not drawn.") if rest else ""
    label = "Predicted effects with their 95 % intervals; the table has the numbers"
    picture = (
        f'<svg class="chart" viewBox="0 0 {WIDE} {bottom + 46}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
    return f"{_chart_key(any('actual' in line for line in drawn))}{picture}{more}"


def _chart_key(proven: bool) -> str:
    """What the marks are, drawn as they are."""

    def mark(drawn: str) -> str:
        return (
            f'<svg class="chart" style="display:inline;width:34px" viewBox="0 0 34 16" aria-hidden="true">{drawn}</svg>'
        )

    predicted = mark('<path class="bar" d="M1 8H33"/><circle class="dot" cx="17" cy="8" r="5"/>')
    ring = mark('<circle class="ring" cx="17" cy="8" r="6"/>')
    retrained = f' <span class="key">{ring} retrained</span>' if proven else ""
    return f'<p class="legend"><span class="key">{predicted} predicted, with its 95 % interval</span>{retrained}</p>'


def _chart_row(line: Mapping[str, Any], top: int, x: Callable[[float], float]) -> str:
    y, label = top + 36, f"{shorten(line['query'], 20)} without {shorten(line['without'], 19)}"
    parts = [f'<text x="{LEFT}" y="{top + 20}">{html.escape(label)}</text>']
    if (half := reach(line)) is not None:
        parts.append(f'<path class="bar" d="M{x(line["effect"] - half)} {y}H{x(line["effect"] + half)}"/>')
    parts.append(f'<circle class="dot" cx="{x(line["effect"])}" cy="{y}" r="5"/>')
    if "actual" in line:
        parts.append(f'<circle class="ring" cx="{x(line["actual"] - line["base"])}" cy="{y}" r="7"/>')
    return "".join(parts)


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers around a range: 1, 2 or 5 times a power of ten apart."""
    rough = ((high - low) or abs(high) or 1.0) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, max(last, first + 1) + 1)]
