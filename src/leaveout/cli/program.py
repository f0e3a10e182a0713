"""The program that commands are added to, the options they share, and how answers and errors are printed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from typer.core import TyperGroup

import leaveout.quantities as quantities
from leaveout.errors import LeaveoutError

if TYPE_CHECKING:
    from leaveout.corpus import Corpus
    from leaveout.deletion.run import TrainingRun
    from leaveout.deletion.sets import DeletionSets

COMMANDS = "commands.jsonl"
"""The file of an index or run that says by which commands it was made."""

GROUPS = {
    "Ask an index of rows": ("index", "append", "merge", "delete", "purge", "search", "groups", "explain", "select"),
    "Leave rows out": ("recipe", "train", "measure", "plan", "predict", "verify"),
    "Judge": ("attribute", "evaluate", "doctor", "check"),
    "Show": ("info", "serve", "mcp", "demo"),
}
"""The commands as `--help` lists them."""


class _Grouped(TyperGroup):
    """Lists the commands in groups, each with its whole first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        grouped = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in self.commands if name not in grouped)
        for title, names in (*GROUPS.items(), ("Others", others)):
            if lines := [
                (name, self.commands[name].get_short_help_str(1000)) for name in names if name in self.commands
            ]:
                with formatter.section(title):
                    formatter.write_dl(lines)


app = typer.Typer(
    name="leaveout",
    cls=_Grouped,
    help="Which training data made the model do this, and what would it do without it?",
    no_args_is_help=True,
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
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, float64, or auto: as it is stored.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto: cuda where there is one (not run on a GPU by us).")
]
Offload = Annotated[
    str,
    typer.Option(
        help="layers: the model's blocks stay in its files, and each is read once for many rows; none; or auto: layers where "
        "the model does not fit."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="For a model's weights and what waits beside them, such as 8GB (default: 4/5 of what is free, half on a GPU)."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: accelerate shares the model out over several devices (not run on a GPU by us)."),
]
QueryText = Annotated[list[str] | None, typer.Option("--query", help="Text of a query; may be given again.")]
Prompt = Annotated[str | None, typer.Option(help="Context before --query that is not itself asked about.")]
Form = Annotated[
    str | None,
    typer.Option(
        help="How --prompt and --query make a row: text, prompt, instruction or messages. Default: as most rows are that are "
        "asked, and a text without --prompt. In the last two, white space around both is dropped."
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Which field of the rows is what, where they are in no known form: prompt=question,response=answer."
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a dataset, or a part of it: train, 'train[:1000]'.")]
Subset = Annotated[str | None, typer.Option(help="Subset (configuration) of a dataset of the Hub.")]
DataRevision = Annotated[str | None, typer.Option(help="Revision of a dataset of the Hub.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first rows; a dataset of the Hub is then streamed, not downloaded.")
]
TextRows = Annotated[str, typer.Option(help="What a row of a text file is: paragraph, line or file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a training run.")]
BehaviourFile = Annotated[
    str | None,
    typer.Option("--behaviour", help="One query of many texts: rows with a sign, 1 or -1, or with a weight."),
]
QueryFile = Annotated[
    str | None, typer.Option("--queries", help="Queries: rows in any form, with a field `measure`; or .npz with x, y.")
]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="Ids of units or examples, with commas; again for another set.")
]
WithoutWhere = Annotated[str | None, typer.Option(help="A set by SQL over id, unit, text and the examples' fields.")]
SetsFile = Annotated[
    Path | None,
    typer.Option(
        "--sets", help="One set a line: ids with commas, a JSON list, id -> share removed, or {name, query, without}."
    ),
]
Memory = Annotated[str | None, typer.Option(help="For all workers, such as 4GB (default: half of what is free).")]


class Asked(Protocol):
    """What is asked: an index or a recipe."""

    @property
    def forms(self) -> Mapping[str, int]: ...


STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
"""What stops a command, where the system has it: Ctrl-C, a word to the process, and a closed terminal."""


class _Stopped(BaseException):
    """A signal that ends the command; no KeyboardInterrupt, which typer would take for its own."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> None:
    """Runs the command line and turns expected errors into one sentence and exit code 1, a signal n into code 128 + n."""
    with _watched_signals():
        code = _run()
    if code is not None:  # outside of any `except`, so that nothing of the stopped work is still held
        sys.exit(code)


def _run() -> int | None:
    try:
        app()
    except (LeaveoutError, ValueError, TypeError, OSError) as error:
        if os.environ.get("LEAVEOUT_TRACEBACK"):
            raise
        _tell(_sentence(error))
        return 1
    except _Stopped as stop:
        _tell("stopped; what was committed stays, and the same command resumes.")
        return 128 + stop.number
    return None


def _tell(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"leaveout: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def _watched_signals() -> Iterator[None]:
    """Signals that would end this process at once end the command in order: workers are stopped, and files closed.

    The second one of a kind is not waited for. What is ignored, as by `nohup`, stays so.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Stopped(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    found = {number: signal.getsignal(number) for name in STOPS if (number := getattr(signal, name, None)) is not None}
    watched = {number: handler for number, handler in found.items() if handler in usual}
    if threading.current_thread() is not threading.main_thread():
        watched = {}  # only the main thread may
    for number in watched:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in watched.items():
            signal.signal(number, handler)


_OF_THE_SYSTEM: dict[type[OSError], str] = {
    FileNotFoundError: "there is no {}: check the path, and make the directory first if it is to be written",
    FileExistsError: "{} is there already: give another path",
    IsADirectoryError: "{} is a directory: give a file",
    NotADirectoryError: "{} is not a directory, or lies below a file: check the path",
    PermissionError: "{} may not be read or written by this user: change its permissions, or give another path",
}


def _sentence(error: Exception) -> str:
    """The message of an error on one line; those of the system, which have only a number and a path, in words."""
    if isinstance(error, OSError) and error.filename is not None:
        words = next((text for kind, text in _OF_THE_SYSTEM.items() if isinstance(error, kind)), None)
        return f"{error.filename}: {error.strerror}" if words is None else words.format(error.filename)
    return " ".join(str(error).split())


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
    """One torch thread on a CPU: more of them are slower on shared cores, and --workers uses the others."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)


def open_rows(place: str | Path, columns: str | None = None, **reading: Any) -> Corpus:
    """The rows at a place, as --columns and the other options of `Corpus.open` say."""
    from leaveout.corpus import Corpus

    pairs = [] if columns is None else [pair.partition("=") for pair in columns.split(",")]
    if wrong := next((name for name, _, theirs in pairs if not name.strip() or not theirs.strip()), None):
        raise typer.BadParameter(f"--columns must be our name=its name, with commas, got {wrong!r} of {columns!r}")
    named = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    return Corpus.open(place, columns=named, **reading)


def query_rows(
    query: list[str] | None,
    prompt: str | None,
    file: str | None,
    form: str | None,
    asked: Asked,
    against: list[str] | None = None,
    behaviour: str | None = None,
    columns: str | None = None,
) -> Iterator[Any]:
    """Rows of --query (with --prompt) or of --queries, or the --behaviour; exactly one of them must be given. `against`:
    contrasts.

    Rows of a file keep their own form; a prompt and query get that of most rows of what is asked, which is said.
    """
    if sum(one is not None for one in (query, file, behaviour)) != 1:
        raise typer.BadParameter("give either --query or --queries" + ("" if behaviour is None else ", or --behaviour"))
    if query is None:
        from leaveout.corpus import Behaviour

        given = {"--prompt": prompt, "--form": form, "--against": against or None}
        if name := next((name for name, value in given.items() if value is not None), None):
            raise typer.BadParameter(f"{name} goes with --query; rows of --queries have their own prompts and forms")
        rows = open_rows(file or behaviour or "", columns)
        yield from (rows if behaviour is None else [Behaviour.of_rows(rows, name=Path(behaviour).stem)])
        return
    if columns is not None:
        raise typer.BadParameter("--columns goes with rows of a file")
    if any(not text.strip() for text in (*query, *(against or []))):
        raise typer.BadParameter("--query and --against are what is asked about: give each some text")
    from leaveout.corpus.rows import CALLED, asked_row, commonest

    if form is None and prompt is not None:
        form = commonest(asked.forms)
        print(f"leaveout: asked as {CALLED[form]}, the commonest form of its rows; --form overrides", file=sys.stderr)
    rows = [[asked_row(text, prompt, form) for text in texts] for texts in (query or [], against or [])]
    if not against:
        yield from rows[0]
        return
    if len(rows[1]) not in (1, len(rows[0])):
        raise typer.BadParameter(
            f"give one --against, or as many as --query: there are {len(rows[1])} and {len(rows[0])}"
        )
    from leaveout.corpus import Contrast

    yield from map(Contrast, rows[0], rows[1] * len(rows[0]) if len(rows[1]) == 1 else rows[1])


def is_run(path: Path) -> bool:
    """Whether a directory holds a training run (and not an index)."""
    return (path / "examples").is_dir()


def is_index(path: Path) -> bool:
    """Whether a directory holds an index (and not a training run)."""
    return (path / "catalogue.sqlite").is_file() and not is_run(path)


def open_run(path: Path, device: str = "cpu") -> TrainingRun:
    """The run in a directory, to be measured and asked on a device; with one torch thread on a CPU."""
    one_thread(device)
    from leaveout.deletion.run import TrainingRun

    return TrainingRun.open(path, device=device)


def read_queries(
    run: TrainingRun,
    query: list[str] | None,
    prompt: str | None,
    file: str | None,
    form: str | None,
    columns: str | None = None,
    behaviour: str | None = None,
) -> list[Any]:
    """Queries of --query (with --prompt) or --queries, or the --behaviour; exactly one of them must be given."""
    from leaveout.training.queries import Query, as_queries

    if file is not None and query is None and prompt is None and form is None and behaviour is None:
        if not file.endswith(".npz"):
            return as_queries(open_rows(file, columns))
        from leaveout.training.examples import read_arrays

        return [Query(row, source=f"{file}, example {i}") for i, row in enumerate(read_arrays(Path(file))[0])]
    return as_queries(query_rows(query, prompt, file, form, run.recipe, behaviour=behaviour, columns=columns))


def read_sets(run: TrainingRun, without: list[str] | None, where: str | None, file: Path | None) -> DeletionSets:
    """All sets of --without, --without-where and --sets, in this order."""
    import numpy as np

    from leaveout.deletion.sets import DeletionSets, deletion_sets

    found = []
    if without is not None:
        entries = [[id.strip() for id in entry.split(",") if id.strip()] for entry in without]
        found.append(deletion_sets(run.recipe, entries))
    if where is not None:
        ids = run.ids_where(where)
        found.append(DeletionSets(deletion_sets(run.recipe, ids).x, (where,)))
    if file is not None:
        found.append(deletion_sets(run.recipe, file))
    if not found:
        raise typer.BadParameter("say what is left out: --without, --without-where or --sets")
    labels = tuple(label for s in found for label in s.labels)
    chosen = tuple(name for s in found for name in s.chosen or ("",) * len(s))
    return DeletionSets(np.concatenate([s.x for s in found]), labels, chosen if any(chosen) else ())


def require_outputs(*files: Path | None) -> None:
    """Refuses files that could not be written after the work."""
    for file in filter(None, files):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{file} cannot be written: give a file in a directory that exists")


def remember(path: Path) -> None:
    """Adds this command to those that made a directory (see `info`), so that it can be run again."""
    from leaveout import __version__

    line = shlex.join(["leaveout", *sys.argv[1:]])
    if line in (known["command"] for known in remembered(path)):
        return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"command": line, "in": os.getcwd(), "version": __version__, "date": now}
    with (path / COMMANDS).open("a", encoding="utf-8") as file:
        file.write(to_line(facts) + "\n")


def remembered(path: Path) -> list[dict[str, str]]:
    """The commands that made a directory, each with where it was given, leaveout's version and the date."""
    file = path / COMMANDS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def to_line(value: Any) -> str:
    """One line of JSON, text kept readable; not-a-number is refused rather than written."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def print_facts(facts: dict[str, Any], json_: bool) -> None:
    """One fact a line, or one JSON object."""
    if json_:
        print(to_line(facts))
        return
    for key, value in facts.items():
        print(f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value}")


def quantity(text: str | None, units: Mapping[str, int], option: str) -> int | None:
    """The number of an option such as 4GB or 10min, if it was given."""
    try:
        return None if text is None else quantities.quantity(text, units, option)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
