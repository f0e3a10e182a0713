"""Commands of the readout engine: index a corpus, keep it, and ask which rows made the model say something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leaveout.cli.program import (
    Device,
    Dtype,
    Json,
    Prompt,
    QueryText,
    Where,
    Workers,
    app,
    one_thread,
    print_facts,
    query_rows,
)
from leaveout.cli.runs import is_run
from leaveout.errors import FormatError
from leaveout.report import hit_json, print_table, shorten, to_line

if TYPE_CHECKING:
    from leaveout.readout.build import BuildReport
    from leaveout.readout.index import Index

IndexPath = Annotated[Path, typer.Argument(metavar="IDX", help="Directory of an index.")]
ModelAt = Annotated[str | None, typer.Option("--model", help="The index's model, if it is no longer where it was.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and list bad rows instead of stopping at the first.")]


@app.command()
def index(
    model: Annotated[str, typer.Argument(help="Path or id of a causal language model, or a .gguf file.")],
    data: Annotated[Path, typer.Argument(help="JSONL, Parquet, or a directory that `datasets` saved.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the new index.")],
    preset: Annotated[str, typer.Option(help="default, residual, similarity or paper.")] = "default",
    targets: Annotated[str | None, typer.Option(help="Tokens that are learned: response or all.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softmax temperature; try 2 for a model trained on these rows.")
    ] = None,
    units: Annotated[str | None, typer.Option(help="Field whose value says which rows belong together.")] = None,
    skip_bad: SkipBad = False,
    workers: Workers = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Revision of a model named by id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a model ships.")
    ] = False,
    json_: Json = False,
) -> None:
    """Index a corpus with a model; the same command resumes after a kill.

    Example: leaveout index HuggingFaceTB/SmolLM2-135M rows.jsonl --out idx --units source
    """
    from leaveout.readout.index import Index

    one_thread(device)
    changes = {"targets": targets, "temperature": temperature}
    built = Index.build(
        model,
        data,
        out,
        preset,
        units=units,
        skip_bad=skip_bad,
        workers=workers,
        progress=True,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in changes.items() if value is not None},
    )
    for note in built.info()["notes"]:
        print(f"leaveout: {note}", file=sys.stderr)
    _print_report(built, built.last_report, json_)


@app.command()
def append(
    idx: IndexPath,
    data: Annotated[Path, typer.Argument(help="Rows to add, in any form that `index` takes.")],
    skip_bad: SkipBad = False,
    workers: Workers = 1,
    model: ModelAt = None,
    json_: Json = False,
) -> None:
    """Add new rows to an index; rows that it has already are counted, not added.

    Example: leaveout append idx more.jsonl
    """
    opened = open_index(idx, model)
    report = opened.append(data, skip_bad=skip_bad, workers=workers, progress=True)
    _print_report(opened, report, json_)


@app.command()
def delete(
    idx: IndexPath,
    id: Annotated[list[str] | None, typer.Option("--id", help="Id of a row; may be given again.")] = None,
    where: Where = None,
    json_: Json = False,
) -> None:
    """Hide rows from every search, score and selection; `purge` then removes their bytes.

    Example: leaveout delete idx --where "source = 'scraped'"
    """
    opened = open_index(idx)
    if (id is None) == (where is None):
        raise typer.BadParameter("give either --id or --where")
    if where is None:
        count = opened.delete([row.id for row in opened.records(id or [])])
    else:
        count = opened.delete(opened.ids_where(where))
    print_facts({"deleted": count, "rows": len(opened)}, json_)


@app.command()
def purge(idx: IndexPath, json_: Json = False) -> None:
    """Remove the bytes and texts of deleted rows from the files, and prove that they are gone.

    Example: leaveout purge idx
    """
    print_facts(open_index(idx).purge(), json_)


@app.command()
def search(
    idx: IndexPath,
    query: QueryText = None,
    prompt: Prompt = None,
    queries: Annotated[Path | None, typer.Option(help="Queries in any form that `index` takes rows.")] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="Hits per query.")] = 10,
    where: Where = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the words that did it.")] = None,
    model: ModelAt = None,
    json_: Json = False,
) -> None:
    """Find the rows that influenced a text: positive scores helped the model to say it.

    Example: leaveout search idx --prompt "Capital of Norway?" --query " Bergen" -k 5
    """
    opened = open_index(idx, model)
    rows = list(query_rows(query, prompt, queries))
    encoded = opened.encode(rows)
    found = opened.search(encoded, k=k, where=where)
    if html is not None:
        from leaveout.pages import search_page

        html.write_text(search_page(opened, rows, encoded.texts, found), encoding="utf-8")
    for text, hits in zip(encoded.texts, found, strict=True):
        if json_:
            print(to_line({"query": text, "hits": [hit_json(hit) for hit in hits]}))
        else:
            lines = [(hit.rank, hit.score, hit.id, shorten(hit.text, 70), _meta(hit.meta)) for hit in hits]
            print_table(["rank", "score", "id", "text", "fields"], lines, title=shorten(text, 100))


@app.command()
def explain(
    idx: IndexPath,
    query: Annotated[str, typer.Option(help="Text of the query.")],
    id: Annotated[str, typer.Option("--id", help="Id of a row.")],
    prompt: Prompt = None,
    html: Annotated[Path | None, typer.Option(help="Also write a heat map.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Pairs of tokens to list.")] = 15,
    model: ModelAt = None,
    json_: Json = False,
) -> None:
    """Show which tokens of a row answer which of the query.

    Example: leaveout explain idx --query "The tower is in Lyon" --id row-17 --html why.html
    """
    import numpy as np

    from leaveout.pages import explain_page

    opened = open_index(idx, model)
    found = opened.explain(next(query_rows([query], prompt, None)), id)
    if html is not None:
        html.write_text(explain_page(query, found), encoding="utf-8")
    order = np.argsort(-np.abs(found.pairs), axis=None)[:top]
    places = [(int(q), int(r)) for q, r in zip(*np.unravel_index(order, found.pairs.shape), strict=True)]
    pairs = [(found.query_tokens[q], found.row_tokens[r], float(found.pairs[q, r]), q, r) for q, r in places]
    if json_:
        keys = ("query_token", "row_token", "score", "query_index", "row_index")
        listed = [dict(zip(keys, pair, strict=True)) for pair in pairs]
        facts = {"id": id, "score": found.score, "stored_score": found.stored_score, "top": listed}
        print(
            to_line(
                {
                    **facts,
                    "query_tokens": found.query_tokens,
                    "row_tokens": found.row_tokens,
                    "pairs": found.pairs.tolist(),
                }
            )
        )
    else:
        title = f"{id}: score {found.score:.4g} (stored {found.stored_score:.4g})"
        print_table(
            ["query token", "row token", "score"], [(repr(a), repr(b), s) for a, b, s, _, _ in pairs], title=title
        )


@app.command()
def select(
    idx: IndexPath,
    wanted: Annotated[Path, typer.Option(help="Rows that the model should become good at.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL file for the selected rows, best first.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of rows to select.")] = 1000,
    unwanted: Annotated[Path | None, typer.Option(help="Rows that it should not become good at.")] = None,
    combine: Annotated[str, typer.Option(help="mean of the wanted rows, or rrf: fusion of their rankings.")] = "mean",
    where: Where = None,
    model: ModelAt = None,
    json_: Json = False,
) -> None:
    """Choose the rows whose training would help a few wanted rows most.

    Example: leaveout select idx --wanted good.jsonl -n 500 --out train.jsonl
    """
    from leaveout.corpus import Corpus

    opened = open_index(idx, model)
    options: dict[str, Any] = {"combine": combine, "where": where}
    if unwanted is not None:
        options["unwanted"] = list(Corpus.open(unwanted))
    hits = opened.select(list(Corpus.open(wanted)), n, **options)
    records = opened.records([hit.id for hit in hits])
    with out.open("w", encoding="utf-8") as file:
        for hit, record in zip(hits, records, strict=True):
            file.write(to_line({**record.meta, **_content(record), "id": record.id, "score": hit.score}) + "\n")
    facts = {"selected": len(hits), "of": len(opened), "out": str(out)}
    if hits:
        facts |= {"best_score": hits[0].score, "last_score": hits[-1].score}
    print_facts(facts, json_)


def open_index(path: Path, model: str | None = None) -> Index:
    """The index in a directory, with one torch thread."""
    if is_run(path):
        raise FormatError(f"{path} is a training run, not an index: ask it with `leaveout predict`.")
    from leaveout.readout.index import Index

    one_thread()
    return Index.open(path, model)


def _meta(meta: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shorten(str(value), 30)}" for key, value in meta.items())


def _content(record: Any) -> dict[str, str]:
    """The row's text in a form that `index` takes: prompt and response where one response ends the text."""
    spans, text = record.extra["responses"], record.text
    if len(spans) == 1 and spans[0][0] > 0 and spans[0][1] == len(text) and not record.extra["chat"]:
        return {"prompt": text[: spans[0][0]], "response": text[spans[0][0] :]}
    return {"text": text}


def _print_report(built: Index, report: BuildReport, json_: bool) -> None:
    for message in report.messages:
        print(f"leaveout: skipped: {message}", file=sys.stderr)
    facts = {"rows": len(built), "added": report.added, "skipped": report.skipped, "repeated": report.repeated}
    print_facts({**facts, "seconds": round(report.seconds, 1), "index": str(built.path)}, json_)
