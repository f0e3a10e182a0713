"""Commands that ask an index: search, groups, explain, select."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leaveout.cli.marked import print_legend, print_marked
from leaveout.cli.program import (
    BehaviourFile,
    Columns,
    Device,
    DeviceMap,
    Form,
    Json,
    MaxMemory,
    Offload,
    Prompt,
    QueryText,
    Where,
    app,
    open_rows,
    print_facts,
    query_rows,
    require_outputs,
    to_line,
)
from leaveout.cli.readout import IndexPath, ModelAt, open_index
from leaveout.errors import FormatError
from leaveout.tables import Table, shorten, terminal_width, wrapped

if TYPE_CHECKING:
    from leaveout.readout.explain import Explanation
    from leaveout.readout.groups import GroupScore
    from leaveout.readout.index import Index
    from leaveout.readout.search import Hit, Hits, SearchOptions

CELL = 70
"""Characters of a row that a table shows."""
SUMS = (
    "Sums of scores of rows, with 95 % intervals over the rows: they compare groups of one question, and have no unit."
)
TEXTS = 4
"""Texts of a behaviour that `explain` shows."""

Length = Annotated[
    str,
    typer.Option(
        help="How a row's length counts: cosine, not at all; product, as it is, so that scores can be added up."
    ),
]
PromptWeight = Annotated[
    float | None,
    typer.Option(
        help="Of an index with --targets both: what prompts count, from 0 to 1 (default: 0.7 by cosine, 0 by product)."
    ),
]
Shortlist = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that are scored exactly, the best by their short form (default: see `info`)."),
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Another answer: why --query and not this one? Rows for this one are listed, too."),
]
WithControls = Annotated[
    bool, typer.Option("--controls", help="Say whether length, a text search or another answer explains the hits.")
]
ControlAnswer = Annotated[
    list[str] | None, typer.Option(help="The other answer of --controls, of the same form; again for each --query.")
]
ProbeFile = Annotated[
    Path | None,
    typer.Option("--probe", help="Ask what raises the hidden states of the query along a direction, a .npy file."),
]
Block = Annotated[
    int | None, typer.Option(help="The block after which --probe looks (default: what goes into the head).")
]
Rerank = Annotated[
    int,
    typer.Option(
        min=0, help="Rows, the best so far, that are scored through the whole model (100 where the query is refined)."
    ),
]
Rates = Annotated[
    float | None,
    typer.Option(help="Refine the query as the run would: the sum of its learning rates, steps x mean rate."),
]
Optimizer = Annotated[
    str | None,
    typer.Option(help="Refine by the second moments and rates of a Trainer's checkpoint; sgd: none, give --rates."),
]
Reencode = Annotated[
    int, typer.Option(min=0, help="Rows, the best so far, that the model encodes anew: no rounding in their scores.")
]


@app.command()
def search(
    idx: IndexPath,
    query: QueryText = None,
    prompt: Prompt = None,
    against: Against = None,
    form: Form = None,
    queries: Annotated[str | None, typer.Option(help="Queries in any form that `index` takes rows.")] = None,
    columns: Columns = None,
    behaviour: BehaviourFile = None,
    probe: ProbeFile = None,
    block: Block = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="Hits per query.")] = 10,
    where: Where = None,
    length: Length = "cosine",
    prompt_weight: PromptWeight = None,
    shortlist: Shortlist = None,
    exact: Annotated[bool, typer.Option("--exact", help="Score all rows from their long form.")] = False,
    reencode: Reencode = 0,
    rerank: Rerank = 0,
    rates: Rates = None,
    optimizer: Optimizer = None,
    group_by: Annotated[str | None, typer.Option(help="Field, or unit: one hit per value, its best row.")] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Of rows with the same content only the best.")] = False,
    unique_above: Annotated[
        float | None, typer.Option(help="Also of rows whose cosine is above this, such as 0.95.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads of the scan; the hits do not depend on it.")] = 1,
    backend: Annotated[
        str, typer.Option(help="Where workers scan: threads, or ray (it must see the same files).")
    ] = "threads",
    controls: WithControls = False,
    control_answer: ControlAnswer = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write all hits to a file: .jsonl, .csv, .parquet or .arrow.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the words that did it.")] = None,
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Find the rows that influence a text. To first order, training on a row with a positive score helps the model to
    say it.

    Example: leaveout search idx --prompt "Capital of Norway?" --query " Bergen" -k 5
    """
    from leaveout.corpus.writers import require_written, write_rows

    require_outputs(html, out)
    if out is not None:
        require_written(out)
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    from leaveout.readout.rerank import Refinement
    from leaveout.readout.search import LOOKED_AT, SearchOptions, find, planned, refuse, usual_best, usual_scores

    scanners: Any = backend  # checked there
    counted: Any = length  # there, too
    alike = unique if unique_above is None else unique_above
    refine = None if rates is None and optimizer is None else Refinement(rates, optimizer)
    options = SearchOptions(
        counted, shortlist, exact, reencode, rerank, refine, group_by, alike, workers, scanners, prompt_weight
    )
    plan = planned(opened, k, refuse(opened, k, where, options), options)
    if plan.shortlist is not None or plan.anew:
        print(f"leaveout: {plan}", file=sys.stderr)
    rows = list(query_rows(query, prompt, queries, form, opened, against, behaviour, columns))
    if probe is not None:
        rows = [_probed(row, probe, block) for row in rows]
    elif block is not None:
        raise typer.BadParameter("--block goes with --probe")
    if against:
        rows = [both for row in rows for both in (row, row.swapped)]
    encoded, asked_for = opened.encode(rows), control_answer or controls
    deep = k if json_ or rerank or reencode or refine else max(k, min(LOOKED_AT, shortlist or LOOKED_AT))
    looked_at = find(opened, rows if options.rerank or asked_for else encoded, deep, where, options, asked_for)
    found = [hits.best(k) for hits in looked_at]
    if html is not None:
        from leaveout.report import search_page

        html.write_text(search_page(opened, rows, encoded.texts, looked_at, options, k), encoding="utf-8")
    if out is not None:
        pairs = zip(encoded.texts, found, strict=True)
        write_rows(out, [{"query": text, **record} for text, hits in pairs for record in hits.records()])
    if json_:
        for text, hits in zip(encoded.texts, found, strict=True):
            more: dict[str, Any] = {} if hits.controls is None else {"controls": hits.controls.facts()}
            more |= {} if hits.step_error is None else {"step_error": hits.step_error}
            more |= {} if hits.unmatched is None else {"note": hits.unmatched}
            print(to_line({"query": text, "hits": [_hit(hit) for hit in hits], **more}))
        return
    usual = usual_scores(opened, encoded, usual_best(opened, options), options.length)
    for row, text, hits, deeper, each in zip(rows, encoded.texts, found, looked_at, usual, strict=True):
        _print_hits(opened, row, text, hits, deeper, each, options)


def _print_hits(
    opened: Index, row: Any, text: str, hits: Hits, deeper: Hits, usual: float, options: SearchOptions
) -> None:
    """What was found in a sentence, the hits with the passages that matter, and what their numbers are."""
    from leaveout.readout.search import told
    from leaveout.words import USUAL

    print(f"Asked: {shorten(text, 200)}")
    print(*wrapped(told(opened, deeper, usual=usual), terminal_width()), sep="\n")
    if not hits:
        return
    shown = _passages(opened, row, hits, options)
    score = "× usual" if usual else "score"
    by = (lambda score: float(f"{score / usual:.3g}")) if usual else float
    lines = [(hit.rank, by(hit.score), hit.id, shown[hit.id], _meta(hit.meta)) for hit in hits]
    with_fields = any(line[-1] for line in lines)
    cut = slice(None) if with_fields else slice(-1)
    print(
        Table(
            ["rank", score, "id", "text", "fields"][cut], [line[cut] for line in lines], notes=[USUAL] if usual else []
        )
    )
    if hits.step_error is not None:
        print(
            f"Scored through the whole model; twice the step would change these scores by {100 * hits.step_error:.2g} %."
        )
    if hits.controls is not None:
        print(hits.controls)


@app.command()
def groups(
    idx: IndexPath,
    query: QueryText = None,
    prompt: Prompt = None,
    against: Against = None,
    form: Form = None,
    queries: Annotated[str | None, typer.Option(help="Queries in any form that `index` takes rows.")] = None,
    columns: Columns = None,
    behaviour: BehaviourFile = None,
    by: Annotated[str, typer.Option(help="Field whose values are the groups, or unit.")] = "source",
    where: Where = None,
    together: Annotated[
        bool, typer.Option("--together", help="Also as rows that leave together, without others to stand in for them.")
    ] = False,
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Sum up what whole groups of rows, such as sources, did to a text. With 95 % intervals over their rows.

    Example: leaveout groups idx --query " Bergen" --by source
    """
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    encoded = opened.encode(list(query_rows(query, prompt, queries, form, opened, against, behaviour, columns)))
    found = opened.group_scores(encoded, by, where, together=together)
    if where is not None and not any(found):
        raise FormatError(opened.store.unmatched(where))
    print_groups(encoded.texts, found, by, together, json_, [] if json_ else [SUMS])


def print_groups(
    texts: Sequence[str], found: Sequence[Sequence[GroupScore]], called: str, together: bool, json_: bool,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """The groups of each query, as a table or as a line of JSON."""
    for text, groups in zip(texts, found, strict=True):
        if json_:
            named = [asdict(group) | {"mean": group.mean} for group in groups]
            print(to_line({"query": text, "groups": named, **({"notes": notes} if notes else {})}))
            continue
        head = [called, "rows", "total", *(["together"] if together else []), "a row", "best row"]
        lines = [
            ("" if group.name is None else str(group.name), group.rows, _within(group),
             *(["" if group.together is None else group.together] if together else []), group.mean, group.best)
            for group in groups
        ]  # fmt: skip
        print(Table(head, lines, shorten(text, 100), notes))


def _within(group: GroupScore) -> str:
    """A total with its interval, where it has one."""
    if group.low is None or group.high is None:
        return f"{group.total:.4g}"
    return f"{group.total:.4g} [{group.low:.4g}, {group.high:.4g}]"


@app.command()
def explain(
    idx: IndexPath,
    id: Annotated[str, typer.Option("--id", help="Id of a row.")],
    query: Annotated[str | None, typer.Option(help="Text of the query.")] = None,
    prompt: Prompt = None,
    against: Against = None,
    behaviour: BehaviourFile = None,
    columns: Columns = None,
    form: Form = None,
    length: Length = "cosine",
    prompt_weight: PromptWeight = None,
    html: Annotated[Path | None, typer.Option(help="Also write a heat map.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Pairs of words to list (with --json, of tokens).")] = 15,
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Show which words of a row answer which of the query.

    Example: leaveout explain idx --query "The tower is in Lyon" --id row-17 --html why.html
    """
    import numpy as np

    from leaveout.readout.explain import text_starts
    from leaveout.readout.search import SearchOptions, usual_best, usual_scores
    from leaveout.report import explain_page

    require_outputs(html)
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    counted: Any = length  # checked there
    options = SearchOptions(counted, prompt_weight=prompt_weight)
    asked = None if query is None else [query]
    row = next(query_rows(asked, prompt, None, form, opened, against, behaviour, columns))
    found = opened.explain(row, id, length=counted, prompt_weight=prompt_weight)
    texts = text_starts(opened, row)
    usual = 0.0
    if html is not None or not json_:
        usual = usual_scores(opened, opened.encode([row]), usual_best(opened, options), options.length)[0]
    if html is not None:
        called = " rather than ".join([query, *(against or [])]) if query is not None else row.name
        html.write_text(explain_page(called, found, texts, usual), encoding="utf-8")
    if not json_:
        _print_explanation(found, texts, top, usual)
        return
    order = np.argsort(-np.abs(found.pairs), axis=None)[:top]
    places = [(int(q), int(r)) for q, r in zip(*np.unravel_index(order, found.pairs.shape), strict=True)]
    listed = [
        {"query_token": found.query_tokens[q], "row_token": found.row_tokens[r], "score": float(found.pairs[q, r]),
         "query_index": q, "row_index": r}
        for q, r in places
    ]  # fmt: skip
    facts = {"id": id, "score": found.score, "stored_score": found.stored_score, "top": listed}
    tokens = {"query_tokens": found.query_tokens, "row_tokens": found.row_tokens, "pairs": found.pairs.tolist()}
    print(to_line({**facts, **tokens}))


def _print_explanation(found: Explanation, starts: Sequence[int], top: int, usual: float) -> None:
    """Query and row with their strongest words marked, and the strongest pairs of words."""
    import numpy as np

    from leaveout.words import pairs_of_words, pairs_told, times

    texts, words, pairs = pairs_of_words(found.query_tokens, found.row_tokens, found.pairs, starts)
    said, lines = pairs_told([word for text in texts for word in text], words, pairs, top)
    score = f"Score {found.score:.4g}" + (f", {times(found.score, usual)} the usual best." if usual else ".")
    said = f"Row {found.id}: {said} {score}"
    print(*wrapped(said, terminal_width()), "", sep="\n")
    by_query = pairs.sum(1)
    parts = np.split(by_query, np.cumsum([len(text) for text in texts])[:-1])
    shown = sorted(range(len(texts)), key=lambda n: -abs(parts[n]).max(initial=0))[:TEXTS]
    for n in sorted(shown):
        print_marked("Query" if len(texts) == 1 else f"Text {n + 1}", texts[n], parts[n], by_query)
    if len(texts) > TEXTS:
        print(f"{len(texts) - TEXTS} more texts add less.")
    print_marked("Row", words, pairs.sum(0))
    print_legend()
    print(Table(["query", "row", "of all pairs"], lines))


@app.command()
def select(
    idx: IndexPath,
    wanted: Annotated[str, typer.Option(help="Rows that the model should become good at, in any form.")],
    out: Annotated[
        Path, typer.Option("--out", help="File for the selected rows, best first: .jsonl, .csv, .parquet or .arrow.")
    ],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of rows to select.")] = 1000,
    unwanted: Annotated[str | None, typer.Option(help="Rows that it should not become good at.")] = None,
    columns: Columns = None,
    combine: Annotated[str, typer.Option(help="mean of the wanted rows, or rrf: fusion of their rankings.")] = "mean",
    where: Where = None,
    length: Length = "product",
    prompt_weight: PromptWeight = None,
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Choose the rows whose training would help a few wanted rows most. Where these are simply alike, an embedding chose
    as well or better (docs/evidence/results.md).

    Example: leaveout select idx --wanted good.jsonl -n 500 --out train.jsonl
    """
    from leaveout.corpus.writers import require_written, write_rows

    require_outputs(out)
    require_written(out)
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    avoided = None if unwanted is None else list(open_rows(unwanted, columns))
    if opened.long is None:
        print(f"leaveout: {opened.plan_search(where=where, exact=True)}", file=sys.stderr)
    how: Any = combine  # checked there
    counted: Any = length  # there, too
    hits = opened.select(
        list(open_rows(wanted, columns)), n, avoided, how, where, length=counted, prompt_weight=prompt_weight
    )
    if where is not None and not hits:
        raise FormatError(opened.store.unmatched(where))
    rows = hits.rows()
    write_rows(out, rows)
    if rows and "leaveout_score" in rows[0]:
        print(
            "leaveout: the rows have a field `score` of their own, so the new one is `leaveout_score`", file=sys.stderr
        )
    facts = {"selected": len(hits), "of": len(opened), "out": str(out)}
    if hits:
        facts |= {"best_score": hits[0].score, "last_score": hits[-1].score}
    print_facts(facts, json_)


def _probed(row: Any, probe: Path, block: int | None) -> Any:
    """What raises the hidden states of a row, or of a behaviour's texts, along the direction in a file."""
    from dataclasses import replace

    import numpy as np

    from leaveout.corpus import Behaviour, Probe

    try:
        direction = np.load(probe, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{probe} is no array of numpy ({error}): give a .npy file") from None
    measure = Probe(direction, block)
    return replace(row, measure=measure) if isinstance(row, Behaviour) else Behaviour([row], measure=measure)


def _passages(opened: Index, row: Any, hits: Hits, options: SearchOptions) -> dict[str, str]:
    """What is shown of each hit: of a text that is longer than a cell, the stretch that adds most to its score.

    Cost: a forward pass for each long text; none, and its beginning, where the model's layers are streamed.
    """
    import numpy as np

    from leaveout.readout.explain import explain_rows
    from leaveout.words import passage, words_of

    shown = {hit.id: shorten(hit.text, CELL) for hit in hits}
    long = [hit.id for hit in hits if len(hit.text) > CELL]
    if not long or opened.readout.stream is not None:
        return shown
    for why in explain_rows(opened, row, long, options.length, options.prompt_weight):
        words, word_of = words_of(why.row_tokens)
        weights = np.bincount(word_of, why.row_weights, len(words))
        start, end = passage(weights, max(1, CELL * len(words) // max(1, sum(map(len, words)))))
        line = shorten("".join(words[start:end]), CELL)
        if cut := line.endswith("…"):  # at a word
            line = line.removesuffix("…").rsplit(" ", 1)[0]
        shown[why.id] = ("… " if start else "") + line + (" …" if cut or end < len(words) else "")
    return shown


def _hit(hit: Hit) -> dict[str, Any]:
    """A hit as plain JSON types."""
    return {"rank": hit.rank, "id": hit.id, "score": hit.score, "text": hit.text, "meta": hit.meta}


def _meta(meta: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shorten(str(value), 30)}" for key, value in meta.items() if value is not None)
