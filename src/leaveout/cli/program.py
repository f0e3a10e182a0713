"""The program that commands are added to, the options they share, and how answers and errors are printed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from leaveout.errors import LeaveoutError
from leaveout.report import to_line

app = typer.Typer(
    name="leaveout",
    help="Which training data made the model do this, and what would it do without it?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Where = Annotated[str | None, typer.Option(help="SQL expression over id, unit, text and the rows' fields.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes, one thread each.")]
Backend = Annotated[
    str, typer.Option(help="Where workers run: processes, or ray (the cluster of RAY_ADDRESS, else this machine).")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... (not run on a GPU by us).")]
QueryText = Annotated[list[str] | None, typer.Option("--query", help="Text of a query; may be given again.")]
Prompt = Annotated[str | None, typer.Option(help="Context before --query that is not itself asked about.")]

BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def main() -> None:
    """Runs the command line and turns expected errors into one sentence and exit code 1."""
    try:
        app()
    except (LeaveoutError, ValueError, TypeError, OSError) as error:
        if os.environ.get("LEAVEOUT_TRACEBACK"):
            raise
        print(f"leaveout: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("leaveout: stopped; what was committed stays, and the same command resumes.", file=sys.stderr)
        sys.exit(130)


def _version(shown: bool) -> None:
    if shown:
        from leaveout import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def one_thread(device: str = "cpu") -> None:
    """One torch thread: more of them are slower on shared cores, and --workers uses the others."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)


def query_rows(query: list[str] | None, prompt: str | None, file: Path | None) -> Iterator[Any]:
    """Rows of --query (with --prompt) or of --queries; exactly one of the two must be given."""
    if (query is None) == (file is None):
        raise typer.BadParameter("give either --query or --queries")
    if file is not None:
        from leaveout.corpus import Corpus

        if prompt is not None:
            raise typer.BadParameter("--prompt goes with --query; rows of --queries have their own prompts")
        yield from Corpus.open(file)
    for text in query or []:
        yield text if prompt is None else {"prompt": prompt, "response": text}


def print_facts(facts: dict[str, Any], json_: bool) -> None:
    """One fact a line, or one JSON object."""
    if json_:
        print(to_line(facts))
        return
    for key, value in facts.items():
        print(f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value}")


def quantity(text: str | None, units: dict[str, int], option: str) -> int | None:
    """The number of an option such as 4GB or 10min, in the smallest of the units."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units:
        known = ", ".join(f"1{unit}" for unit in units if unit)
        raise typer.BadParameter(f"{option} must be a number with a unit ({known}), got {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def amount(n_bytes: int) -> str:
    """Bytes for people."""
    for unit in ("GB", "MB", "kB"):
        if n_bytes >= BYTES[unit.lower()]:
            return f"{n_bytes / BYTES[unit.lower()]:.3g} {unit}"
    return f"{n_bytes} B"
