"""Commands that make and keep an index: index, append, merge, delete, purge."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leaveout.cli.program import (
    Backend,
    Columns,
    DataRevision,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Limit,
    MaxMemory,
    Offload,
    Split,
    Subset,
    TextRows,
    Where,
    Workers,
    app,
    is_run,
    one_thread,
    open_rows,
    print_facts,
    remember,
)
from leaveout.errors import FormatError

if TYPE_CHECKING:
    from leaveout.readout.build import BuildReport
    from leaveout.readout.index import Index

IndexPath = Annotated[Path, typer.Argument(metavar="IDX", help="Directory of an index.")]
ModelAt = Annotated[str | None, typer.Option("--model", help="The index's model, if it is no longer where it was.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and list bad rows instead of stopping at the first.")]


ModelPlace = Annotated[
    str, typer.Argument(help="Path or id of a causal language model or a peft adapter, or a .gguf file.")
]
Rows = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, CSV, TSV, text or Parquet, a directory of them or from `save_to_disk`, or a dataset of the Hub "
        "(docs/how-to/rows.md)."
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Directory of the new index.")]
Preset = Annotated[str, typer.Option(help="default, residual, similarity, paper or paper-responses.")]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Tokens that are learned: response; all, prompts too; or both, each as a side that a search can weigh, to find "
        "what stands in prompts."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Softmax temperature; default: the preset's, 1 (paper: 0.1). On four models of four 2 predicted retraining "
        "worse once they were trained on the rows (docs/reference/presets.md)."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="How chats and instructions become text: a Jinja file, the name of one of the tokenizer's chat templates, or "
        "none for the plain form (default: the tokenizer's own, if it has one)."
    ),
]
Units = Annotated[str | None, typer.Option(help="Field whose value says which rows belong together.")]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="R/N", help="Only part R, from 0, of N, in a directory below --out; auto: as torchrun or Slurm say."
    ),
]
Statistics = Annotated[
    Path | None, typer.Option(help="Index whose whitening is taken over, so that both can be merged.")
]
BytesPerRow = Annotated[
    int | None, typer.Option(min=1, help="Bytes of a stored row (default: the preset's, 16384 of `default`).")
]
Long = Annotated[
    str | None,
    typer.Option(
        help="stored, or none: only short forms are kept, and the rows of a list are encoded anew by the model."
    ),
]
Beta = Annotated[float, typer.Option(help="Of DPO, for preference rows (chosen and rejected).")]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Model that preference rows are held against, by path or id, or base: the model without its adapters "
        "(default: the model itself)."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model named by id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a model ships.")]


@app.command()
def index(
    model: ModelPlace,
    data: Rows,
    out: Out,
    preset: Preset = "default",
    targets: Targets = None,
    temperature: Temperature = None,
    template: Template = None,
    bytes_per_row: BytesPerRow = None,
    long: Long = None,
    units: Units = None,
    beta: Beta = 0.1,
    reference: Reference = None,
    columns: Columns = None,
    split: Split = None,
    subset: Subset = None,
    data_revision: DataRevision = None,
    limit: Limit = None,
    text_rows: TextRows = "paragraph",
    skip_bad: SkipBad = False,
    workers: Workers = 1,
    backend: Backend = "processes",
    shard: Shard = None,
    statistics: Statistics = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Index a corpus with a model; the same command resumes after a kill.

    Example: leaveout index HuggingFaceTB/SmolLM2-135M rows.jsonl --out idx --units source
    """
    from leaveout.readout.index import Index

    part = _shard(shard)
    one_thread(device)
    rows = open_rows(
        data,
        columns,
        split=split,
        subset=subset,
        revision=data_revision,
        limit=limit,
        text_rows=text_rows,
    )
    built = Index.build(
        model,
        rows,
        out,
        preset,
        targets=targets,  # pyright: ignore[reportArgumentType]: checked there, as `backend`
        temperature=temperature,
        template=template,
        bytes_per_row=bytes_per_row,
        long=long,  # pyright: ignore[reportArgumentType]
        units=units,
        beta=beta,
        reference=reference,
        skip_bad=skip_bad,
        dtype=dtype,
        device=device,
        offload=offload,  # pyright: ignore[reportArgumentType]
        max_memory=max_memory,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        workers=workers,
        backend=backend,  # pyright: ignore[reportArgumentType]
        progress=True,
        shard=part,
        statistics=statistics,
    )
    for note in built.info()["notes"]:
        print(f"leaveout: {note}", file=sys.stderr)
    _print_report(built, built.last_report, json_)
    if part is not None:
        print(f"leaveout: when all shards are built: leaveout merge IDX {out}", file=sys.stderr)


@app.command()
def append(
    idx: IndexPath,
    data: Annotated[str, typer.Argument(help="Rows to add, in any form that `index` takes.")],
    reference: Reference = None,
    columns: Columns = None,
    split: Split = None,
    subset: Subset = None,
    data_revision: DataRevision = None,
    limit: Limit = None,
    text_rows: TextRows = "paragraph",
    skip_bad: SkipBad = False,
    workers: Workers = 1,
    backend: Backend = "processes",
    model: ModelAt = None,
    device: Device = "cpu",
    offload: Offload = "auto",
    max_memory: MaxMemory = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Add new rows to an index. Rows that it has already are counted, not added.

    Example: leaveout append idx more.jsonl
    """
    opened = open_index(idx, model, device, offload, max_memory, device_map)
    crew = {"workers": workers, "backend": backend, "progress": True}
    rows = open_rows(
        data,
        columns,
        split=split,
        subset=subset,
        revision=data_revision,
        limit=limit,
        text_rows=text_rows,
    )
    report = opened.append(rows, skip_bad=skip_bad, **crew)  # pyright: ignore[reportArgumentType]: checked there
    _print_report(opened, report, json_)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the new index.")],
    parts: Annotated[
        list[Path],
        typer.Argument(metavar="PART", help="Directory in which shards were built, or the directories of indexes."),
    ],
    json_: Json = False,
) -> None:
    """Make one index of the shards of a corpus, or of several indexes. They were built with one whitening (`index --shard`,
    `index --statistics`). The parts stay; killed, the same command goes on.

    Example: leaveout merge idx parts
    """
    from leaveout.readout.index import Index

    one_thread()
    merged = Index.merge(parts, out, progress=True)
    _print_report(merged, merged.last_report, json_)


@app.command()
def delete(
    idx: IndexPath,
    id: Annotated[list[str] | None, typer.Option("--id", help="Id of a row; may be given again.")] = None,
    where: Where = None,
    json_: Json = False,
) -> None:
    """Hide rows from every search, score and selection. `purge` then removes their bytes.

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
    """Remove the bytes of deleted rows, and prove that they are gone. Their texts go, too.

    Example: leaveout purge idx
    """
    print_facts(open_index(idx).purge(), json_)


def open_index(
    path: Path,
    model: str | None = None,
    device: str = "cpu",
    offload: str = "auto",
    max_memory: str | None = None,
    device_map: str | None = None,
) -> Index:
    """The index in a directory, with one torch thread on a CPU; its model is loaded as the options say."""
    if is_run(path):
        raise FormatError(f"{path} is a training run, not an index: ask it with `leaveout predict`.")
    from leaveout.readout.index import Index

    one_thread(device)
    where: Any = {"offload": offload, "max_memory": max_memory, "device_map": device_map}  # checked there
    return Index.open(path, model, device=device, **where)


def _print_report(built: Index, report: BuildReport, json_: bool) -> None:
    remember(built.path)
    for message in report.messages:
        print(f"leaveout: skipped: {message}", file=sys.stderr)
    facts = {"rows": len(built), "added": report.added, "skipped": report.skipped, "repeated": report.repeated}
    print_facts({**facts, "seconds": round(report.seconds, 1), "index": str(built.path)}, json_)


def _shard(text: str | None) -> str | tuple[int, int] | None:
    """What --shard asks for, as `Index.build` takes it."""
    if text is None or text == "auto":
        return text
    if (found := re.fullmatch(r"(\d+)/(\d+)", text)) is None:
        raise typer.BadParameter(f"--shard must be auto or R/N, such as 0/4, got {text!r}")
    return int(found[1]), int(found[2])
