"""Commands of the deletion engine: train, measure, plan, predict a model without some of its data, and verify."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from leaveout.cli.program import (
    Backend,
    BehaviourFile,
    Columns,
    Device,
    Form,
    Json,
    Memory,
    Prompt,
    QueryFile,
    QueryText,
    RunPath,
    SetsFile,
    Without,
    WithoutWhere,
    Workers,
    app,
    is_index,
    one_thread,
    open_run,
    print_facts,
    quantity,
    query_rows,
    read_queries,
    read_sets,
    remember,
    require_outputs,
    to_line,
)
from leaveout.errors import FormatError
from leaveout.quantities import BYTES, SECONDS
from leaveout.tables import terminal_width, wrapped

if TYPE_CHECKING:
    from leaveout.deletion.estimators import EstimatorSettings
    from leaveout.deletion.measurements import MeasureSettings
    from leaveout.deletion.plan import Choice
    from leaveout.deletion.predict import Prediction

Estimator = Annotated[
    str,
    typer.Option(
        help="posterior, least_squares, mean, median_of_means, leave_one_out, pairwise, datamodels or first_order."
    ),
]
Degree = Annotated[
    int | None,
    typer.Option(min=1, help="Highest order of jets used: of posterior, least_squares, mean and median_of_means."),
]
Meaning = Annotated[
    str | None,
    typer.Option(
        help="same-run: the same batches, weight 0. new-run: rows gone, batches packed anew, another order; the default where "
        "`measure --repeats` was made."
    ),
]
StepsWanted = Annotated[
    bool | None,
    typer.Option(
        "--steps/--no-steps",
        help="Gauss-Newton steps for sets that take most of what helps a query (default: where they take less than a training).",
    ),
]
Html = Annotated[Path | None, typer.Option(help="Also write a page with a picture of the intervals.")]
AllPairs = Annotated[
    bool,
    typer.Option("--all-pairs", help="Also show sets with queries that they were not chosen for (`attribute --sets`)."),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe (docs/reference/recipe.md).")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the run.")],
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Train a recipe on all its data. Killed, the same command goes on; finished, it reopens the run.

    Example: leaveout train recipe.yaml --out run
    """
    one_thread(device)
    from leaveout.deletion.run import TrainingRun

    began = time.monotonic()
    run = TrainingRun.train(recipe, out, progress=True, device=device)
    remember(out)
    facts = {"examples": len(run.recipe.examples), "units": len(run.recipe.unit_names)}
    facts |= {"parameters": sum(p.numel() for p in run.parameters.values()), "steps": len(run.recipe.batches())}
    print_facts({"run": str(out), **facts, "seconds": round(time.monotonic() - began, 1)}, json_)


@app.command()
def recipe(
    idx: Annotated[Path, typer.Argument(metavar="IDX", help="Directory of an index of the rows that were trained on.")],
    out: Annotated[Path, typer.Option("--out", help="The YAML file; its rows are written beside it.")],
    model: Annotated[str | None, typer.Option(help="What the fine-tuning started from: a path or id.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adam or sgd.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of all but biases and norms.")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest length of a gradient.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longer rows were cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of rows, and of adapters.")] = None,
    units: Annotated[str | None, typer.Option(help="Field whose value says which rows are left out together.")] = None,
    lora: Annotated[
        str | None, typer.Option(help="Layers with adapters instead of full training, such as q_proj,v_proj.")
    ] = None,
    lora_r: Annotated[int, typer.Option(min=1, help="Rank of the adapters of --lora.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Alpha of the adapters of --lora.")] = 16,
    json_: Json = False,
) -> None:
    """Write the recipe of the fine-tuning that an index's rows are of. So that predictions can be calibrated: rows, model,
    template and learned tokens from the index, the rest from what you say. What nobody said is marked in the file.

    Example: leaveout recipe idx --out draft/recipe.yaml --model ./base --lr 1e-4 --epochs 2
    """
    from leaveout.training.drafted import UNSAID, draft_recipe

    said: dict[str, Any] = {
        "model": model, "lr": lr, "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer,
        "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup, "clip_norm": clip_norm,
        "max_tokens": max_tokens, "seed": seed, "units": units,
    }  # fmt: skip
    if lora is not None:
        said["lora"] = {"r": lora_r, "alpha": lora_alpha, "targets": [part.strip() for part in lora.split(",")]}
    written = draft_recipe(idx, out, **{name: value for name, value in said.items() if value is not None})
    unsaid = [line.split(":")[0] for line in written.read_text(encoding="utf-8").splitlines() if UNSAID in line]
    print_facts(
        {"recipe": str(written), "not said": unsaid, "next": f"leaveout train {shlex.quote(str(written))} --out run"},
        json_,
    )


@app.command()
def measure(
    run: RunPath,
    directions: Annotated[int, typer.Option(min=0, help="Jet runs along random directions.")] = 0,
    degree: Annotated[int, typer.Option(min=1, help="Degree of the jets.")] = 1,
    retrain: Annotated[int, typer.Option(min=0, help="Retrainings by --design.")] = 0,
    design: Annotated[
        str, typer.Option(help="auto, singles, pairs, all pairs, random, subsets, along or extremes.")
    ] = "auto",
    without: Without = None,
    without_where: WithoutWhere = None,
    sets: SetsFile = None,
    halves: Annotated[
        bool, typer.Option("--halves", help="Two halves of each set that you name, instead of the set.")
    ] = False,
    most: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the sets that you name and their halves, the so many that say most of all of them."
        ),
    ] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Retrainings for calibration: a number of sets of all kinds, or a file of sets.")
    ] = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="The exact first order of the queries.")] = False,
    repeats: Annotated[
        int, typer.Option(min=0, help="New runs with all data, and twice as many of held-out sets: the noise of runs.")
    ] = 0,
    each_order: Annotated[
        bool, typer.Option("--each-order", help="The sets that you name in the order of each new run, too (--repeats).")
    ] = False,
    query: QueryText = None,
    prompt: Prompt = None,
    form: Form = None,
    queries: QueryFile = None,
    columns: Columns = None,
    behaviour: BehaviourFile = None,
    workers: Workers = 1,
    backend: Backend = "processes",
    memory: Memory = None,
    seed: Annotated[int, typer.Option(help="Of random directions and sets.")] = 0,
    sizes: Annotated[str | None, typer.Option(help="Sizes of random sets, such as 4,10.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of jets: complex64 or complex128 (default: the run's).")] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Jets along real orthogonal directions: half the cost and half the numbers.")
    ] = False,
    merge: Annotated[Path | None, typer.Option(help="Add the measurements of another run of the same recipe.")] = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Add measurements to the bank of a run. Jets, retrainings, the exact first order, or another run's bank. What is
    there is not measured again, so that a killed command can be repeated. Without queries, trained parameters are
    kept, and any query can be asked later.

    Example: leaveout measure run --gradient --retrain 50 --heldout 16 --repeats 4 --queries questions.jsonl
    """
    named = without is not None or without_where is not None or sets is not None
    if not (directions or retrain or named or heldout or gradient or repeats or merge):
        raise typer.BadParameter(
            "say what to measure: --directions, --retrain, --without, --heldout, --gradient, --repeats or --merge"
        )
    if halves and not named:
        raise typer.BadParameter("--halves are those of sets that you name: --without, --without-where or --sets")
    if most is not None and (halves or not named):
        raise typer.BadParameter(
            "--most is of sets that you name and their halves: --without, --without-where or --sets"
        )
    settings = _settings(workers, backend, memory, seed, sizes, dtype, real)
    opened = open_run(run, device)
    before = len(opened.bank)
    if merge is not None:
        if not (merge / "bank").is_dir():
            raise FormatError(f"{merge} is not a training run: name the directory of one with the same recipe.")
        opened.bank.merge(merge / "bank")
    unasked = all(given is None for given in (query, prompt, form, queries, columns, behaviour))
    opened.measure(
        directions, degree, retrain=retrain, design=design, gradient=gradient, repeats=repeats, each_order=each_order,
        halves=halves, most=most, settings=settings,
        without=read_sets(opened, without, without_where, sets) if named else None,
        heldout=None if heldout is None else _heldout(heldout),
        queries=None if unasked else read_queries(opened, query, prompt, queries, form, columns, behaviour),
    )  # fmt: skip
    remember(run)
    facts = {"run": str(run), "added": len(opened.bank) - before, **opened.bank.info()}
    notes = list(dict.fromkeys([*facts.pop("notes", []), *opened.said]))
    if not json_:  # what was said while it was measured was on the screen
        notes = [note for note in notes if note not in opened.said]
    print_facts({**facts, **({"notes": notes} if notes else {})}, json_)


@app.command()
def plan(
    run: RunPath,
    budget: Annotated[str, typer.Option(help="Wall time, such as 600s, 10min or 2h.")],
    query: QueryText = None, prompt: Prompt = None, form: Form = None, queries: QueryFile = None, columns: Columns = None,
    behaviour: BehaviourFile = None,
    without: Without = None, without_where: WithoutWhere = None, sets: SetsFile = None,
    examples: Annotated[
        bool, typer.Option("--examples", help="The sets stand for others like them: retraining just these is no help.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=0, help="New runs with all data in every choice, for the noise of runs; 0: none.")
    ] = 4,
    jets: Annotated[bool, typer.Option("--jets", help="Weigh jets, too; trying them takes many trainings.")] = False,
    disk: Annotated[str | None, typer.Option(help="At most so much for the bank, such as 2GB.")] = None,
    memory: Annotated[str | None, typer.Option(help="At most so much for an estimator, such as 4GB.")] = None,
    workers: Workers = 1,
    device: Device = "cpu",
    json_: Json = False,
) -> None:  # fmt: skip
    """Say which measurements to buy for a budget of time. Their time, disk, memory, and the error to expect (0: exact, 1:
    nothing is known), best first, with the command that buys them. It begins with two retrainings, which count, and tries
    the first steps of other runs for at most a tenth of the budget.

    Example: leaveout plan run --queries questions.jsonl --without rivers --budget 10min
    """
    from leaveout.deletion.plan import Budget

    seconds = quantity(budget, SECONDS, "--budget")
    limits = quantity(disk, BYTES, "--disk"), quantity(memory, BYTES, "--memory")
    assert seconds is not None
    allowed = Budget(seconds, *limits, workers, examples=examples, jets=jets, repeats=repeats)
    opened = open_run(run, device)
    removed = read_sets(opened, without, without_where, sets)
    found = opened.plan(read_queries(opened, query, prompt, queries, form, columns, behaviour), removed, allowed)
    asked = _options(query=query, prompt=prompt, form=form, queries=queries, behaviour=behaviour)
    named = _options(without=without, without_where=without_where, sets=sets)
    crew = _options(workers=workers if workers > 1 else None, device=None if device == "cpu" else device)
    commands = [_measure_command(run, choice, asked, named, crew) for choice in found.choices]
    if json_:
        keys = ("name", "seconds", "disk", "memory", "error")
        listed = [
            {**{key: getattr(choice, key) for key in keys}, "command": command}
            for choice, command in zip(found.choices, commands, strict=True)
        ]
        stability = None if found.stability is None else found.stability.verdict
        print(to_line({"choices": listed, "stability": stability, "notes": list(found.notes), "budget": seconds}))
        return
    numbered = [f"{n}. {command}" for n, command in enumerate(commands, 1)]
    print(replace(found.table(), notes=()))
    print("\n".join(numbered))  # unbroken, to be copied
    for note in found.notes:
        print(*wrapped(note, terminal_width()), sep="\n")


@app.command()
def predict(
    run: RunPath,
    query: QueryText = None, prompt: Prompt = None, form: Form = None, queries: QueryFile = None, columns: Columns = None,
    behaviour: BehaviourFile = None,
    without: Without = None, without_where: WithoutWhere = None, sets: SetsFile = None,
    estimator: Estimator = "posterior",
    degree: Degree = None,
    steps: StepsWanted = None,
    meaning: Meaning = None,
    curve: Annotated[Path | None, typer.Option(help="Also draw predictions as the share removed grows (.png).")] = None,
    html: Html = None,
    all_pairs: AllPairs = False,
    device: Device = "cpu",
    json_: Json = False,
) -> None:  # fmt: skip
    """Predict a model without some of its data, with 95 % intervals. From the bank: nothing is trained.

    Of an index, without a recipe: the scores of each set summed up. Sets can be ranked by that, but it is not calibrated, and
    foretells no loss.

    Example: leaveout predict run --query thames --without rivers --without herbs,dogs
    """
    if is_index(run):
        _require_no_bank(curve, html, degree, estimator, meaning, steps)
        _sum_up(run, device, (query, prompt, queries, form, columns), without, without_where, sets, json_)
        return
    chosen = _estimator(estimator, degree, steps)
    _require_outputs(html, curve)
    opened = open_run(run, device)
    asked = read_queries(opened, query, prompt, queries, form, columns, behaviour)
    removed = read_sets(opened, without, without_where, sets)
    found = opened.predict(asked, removed, chosen, meaning=meaning)
    if curve is not None:
        from leaveout.deletion.predict import draw_curves

        draw_curves(opened.curve(asked, removed, chosen, meaning=meaning), curve)
    _print_prediction(found, html, json_, all_pairs)


NOT_CALIBRATED = (
    "Not calibrated: scores of an index summed up, above 0 where training on the set lowers the loss; `together`: without other "
    "rows to stand in for these. The 95 % intervals are over the rows of a set, not over runs. They rank sets; how many nats one "
    "is worth takes the recipe of the run (`leaveout recipe` drafts it, `train` and `measure` follow)."
)


def _require_no_bank(
    curve: Path | None, html: Path | None, degree: int | None, estimator: str, meaning: str | None, steps: bool | None
) -> None:
    """Refuses what only measurements of a run can answer."""
    other = None if estimator == "posterior" else estimator
    asked = {"--curve": curve, "--html": html, "--degree": degree, "--estimator": other, "--meaning": meaning}
    asked |= {"--steps": steps}
    if name := next((name for name, value in asked.items() if value is not None), None):
        raise typer.BadParameter(f"{name} needs a training run, and this is an index")


def _sum_up(
    idx: Path, device: str, asked: tuple[Any, ...], without: list[str] | None, where: str | None, sets: Path | None,
    json_: bool,
) -> None:  # fmt: skip
    """What sets of an index's rows did to queries, in the order of the sets."""
    from leaveout.cli.asking import print_groups
    from leaveout.cli.readout import open_index
    from leaveout.deletion.sets import label, listed_sets

    opened = open_index(idx, device=device)
    named: dict[str, list[str]] = {}
    given = [[id.strip() for id in entry.split(",") if id.strip()] for entry in without or []]
    for name, entry, _ in [*(("", ids, "") for ids in given), *(listed_sets(sets) if sets is not None else [])]:
        ids = [entry] if isinstance(entry, str) else list(entry)
        if isinstance(entry, Mapping) and any(share != 1 for share in entry.values()):
            raise FormatError("Scores of an index are of whole rows: leave shares out, or predict with a training run.")
        named[name or label(ids)] = ids
    if where is not None:
        named[where] = opened.ids_where(where)
        if not named[where]:
            raise FormatError(opened.store.unmatched(where))
    if not named:
        raise typer.BadParameter("say what is left out: --without, --without-where or --sets")
    query, prompt, queries, form, columns = asked
    encoded = opened.encode(list(query_rows(query, prompt, queries, form, opened, columns=columns)))
    print_groups(encoded.texts, opened.set_scores(encoded, named), "without", True, json_, [NOT_CALIBRATED])


@app.command()
def verify(
    run: RunPath,
    query: QueryText = None, prompt: Prompt = None, form: Form = None, queries: QueryFile = None, columns: Columns = None,
    behaviour: BehaviourFile = None,
    without: Without = None, without_where: WithoutWhere = None, sets: SetsFile = None,
    estimator: Estimator = "posterior",
    degree: Degree = None,
    steps: StepsWanted = None,
    meaning: Meaning = None,
    new_run: Annotated[bool, typer.Option("--new-run", help="Short for --meaning new-run.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="New runs of each set, of which the mean is compared.")] = 1,
    html: Html = None,
    all_pairs: AllPairs = False,
    workers: Workers = 1,
    backend: Backend = "processes",
    memory: Memory = None,
    device: Device = "cpu",
    json_: Json = False,
) -> None:  # fmt: skip
    """Predict, retrain without the data, and compare. Is the actual value inside the 95 % interval? The retrainings
    are kept and used for nothing else. Sets that were measured already prove nothing: their values are read, and they
    are counted apart. With --json a last line holds the summary.

    Example: leaveout verify run --query thames --without rivers
    """
    if new_run and meaning not in (None, "new-run"):
        raise typer.BadParameter(f"--new-run and --meaning {meaning} are two answers: give one")
    chosen = _estimator(estimator, degree, steps)
    _require_outputs(html)
    settings = _settings(workers, backend, memory)
    opened = open_run(run, device)
    asked = read_queries(opened, query, prompt, queries, form, columns, behaviour)
    removed = read_sets(opened, without, without_where, sets)
    meant = "new-run" if new_run else meaning
    found = opened.verify(asked, removed, chosen, settings, meaning=meant, runs=runs)
    _print_prediction(found, html, json_, all_pairs)
    if json_:
        print(to_line({"summary": found.summary()}))


def _heldout(text: str) -> int | Path:
    """A number of random sets, or the file of sets."""
    if not text.isdecimal() and not Path(text).is_file():
        raise typer.BadParameter(f"--heldout must be a number of sets or a file of sets that exists, got {text!r}")
    return int(text) if text.isdecimal() else Path(text)


def _settings(
    workers: int,
    backend: Backend,
    memory: str | None,
    seed: int = 0,
    sizes: str | None = None,
    dtype: str | None = None,
    real: bool = False,
) -> MeasureSettings:
    limit = quantity(memory, BYTES, "--memory")
    parts = [] if sizes is None else sizes.split(",")
    if any(not part.strip().isdecimal() or int(part) < 1 for part in parts):
        raise typer.BadParameter(f"--sizes must be positive numbers with commas, such as 4,10, got {sizes!r}")
    from leaveout.deletion.measurements import MeasureSettings

    numbers = tuple(int(part) for part in parts)
    try:
        return MeasureSettings(
            workers, cast(Any, backend), memory=limit, seed=seed, sizes=numbers, dtype=dtype, real=real, progress=True
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _estimator(name: str, degree: int | None, steps: bool | None) -> EstimatorSettings:
    from leaveout.deletion.estimators import EstimatorSettings

    chosen = EstimatorSettings(name)
    try:
        return replace(chosen, degree=degree, steps=steps)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None


def _require_outputs(html: Path | None, curve: Path | None = None) -> None:
    """Refuses files that could not be written after the work."""
    require_outputs(html, curve)
    if curve is not None:
        from leaveout.deletion.predict import require_plots

        require_plots()


def _print_prediction(found: Prediction, html: Path | None, json_: bool, all_pairs: bool) -> None:
    if html is not None:
        from leaveout.report import prediction_page

        html.write_text(prediction_page(found, all_pairs), encoding="utf-8")
    print("\n".join(map(to_line, found.lines())) if json_ else found.table(all_pairs))


# --- the command that a plan's choice stands for -------------------------------------------------------------------


def _options(**given: Any) -> str:
    """Options as the user gave them, to be repeated in another command."""
    parts = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            parts.append(f"--{name.replace('_', '-')} {shlex.quote(str(one))}")
    return " ".join(parts)


def _measure_command(run: Path, choice: Choice, asked: str, named: str, crew: str) -> str:
    """The command that carries out a choice."""
    arguments, settings = choice.arguments, choice.arguments.get("settings")
    parts = [_options(**{name: arguments.get(name) for name in ("directions", "degree", "retrain", "design")})]
    if arguments.get("gradient"):
        parts.append("--gradient")
    if arguments.get("each_order"):
        parts.append("--each-order")
    if arguments.get("without") is not None:
        parts.append(named)
    sizes = ",".join(map(str, settings.sizes)) if settings else ""
    counts = {name: arguments.get(name) or None for name in ("most", "heldout", "repeats")}
    parts += [_options(**counts, sizes=sizes or None), asked]
    parts.append(crew)
    return " ".join(["leaveout measure", shlex.quote(str(run)), *filter(None, parts)])
