"""Which attribution scores predict what retraining without rows really does?

    python benchmarks/influence.py --bank stories --json benchmarks/results/readout_influence_stories.json
    python benchmarks/influence.py --smoke

A training run (see `influence_banks`) is retrained without random halves of its rows, in two data orders. A method's LDS is
the rank correlation of its summed scores with the mean of both; its QLD is the rise of a query's loss when the method's top
5 % of rows are removed, over random removals. Both have intervals over queries. `@start`, `@third` and `@final` name the
parameters that a method looks at. The exact first order and the posterior are costly: they are judged on --exact queries
only, with the other methods on the same queries beside them.
Everything is kept in --work and not made twice, so that a killed run goes on.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_banks import BANKS, TruthBank
from leaveout.deletion.measurements import MeasureSettings
from leaveout.deletion.run import TrainingRun
from leaveout.evaluation.judge import EvaluationSettings, judge, removal_queries
from leaveout.evaluation.report import Judged, Report
from leaveout.evaluation.truth import Truth, second_order, subset_truth
from leaveout.methods.gradients import example_gradients
from leaveout.methods.registry import Scored, load, parse
from leaveout.methods.scorer import Scorer
from leaveout.methods.signatures import readout_of, signature_scores
from leaveout.metrics import bootstrap_interval, lds
from leaveout.readout.settings import PRESETS, Channel, SignatureSettings
from leaveout.readout.signature import Signer
from leaveout.training.queries import Query
from measuring import RESULTS, arguments, write_result

CHEAP = (
    "random", "bm25", "embedding@start", "gradient dot@start", "gradient dot@final", "gradient cosine@final", "tracin",
    "rapidin@final", "ek-fac@start", "ek-fac@third", "ek-fac@final", "paper-responses@start", "paper-responses@final",
    "default@start", "default@third", "default@final", "residual@start", "residual@third", "residual@final", "similarity@start",
)  # fmt: skip
REMOVED = (
    "bm25",
    "embedding@start",
    "gradient dot@final",
    "ek-fac@third",
    "paper-responses@start",
    "default@third",
    "residual@third",
)
COMPARED = "default@third"
WIDE = ("olmo", "olmo-sgd")  # heads too wide for EK-FAC
LEFT_OUT = (  # on these, because they take too long or would hold a number for every token
    "tracin", "rapidin@final", "gradient dot@start", "gradient cosine@final", "ek-fac@start", "ek-fac@final"
)  # fmt: skip
SMALLER_REMOVED = (
    "bm25",
    "gradient dot@final",
    "paper-responses@start",
    "default@third",
)  # where a retraining takes long


def methods_of(bank: str, names: Sequence[str]) -> list[str]:
    """Names of methods as they fit a bank."""
    if bank not in WIDE:
        return list(names)
    return [name.replace("ek-fac", "ek-fac blocks") for name in names if name not in LEFT_OUT]


def variants() -> dict[str, tuple[SignatureSettings, str]]:
    """Changes of the default, one at a time: why is it as good or bad as it is?"""
    default, residual = PRESETS["default"], PRESETS["residual"]
    head, blocks = default.channels
    through = replace(head, kind="gh", left_width=None)  # the head's gradient seen from below it
    both = ("start", "third")

    def with_channels(**changes: Any) -> SignatureSettings:
        return replace(default, channels=tuple(replace(channel, **changes) for channel in default.channels))

    changed: dict[str, tuple[SignatureSettings, Sequence[str]]] = {
        "temperature 2": (replace(default, temperature=2.0), ("start", "third", "final")),
        "all targets": (replace(default, targets="all"), ("start",)),
        "sum over tokens": (replace(default, length_power=0.0), both),
        "mean over tokens": (replace(default, length_power=1.0), both),
        "unit length": (replace(default, length_power=0.0, unit_length=True), ("third",)),
        "not whitened": (with_channels(whiten_left=False, whiten_right=False), both),
        "gradients not whitened": (with_channels(whiten_left=False), both),
        "damping of gradients 0.1": (with_channels(left_damping=0.1), both),
        "damping of gradients 10": (with_channels(left_damping=10.0), ("third",)),
        "damping of activations 0.01": (with_channels(damping=0.01), ("third",)),
        "damping of activations 0.3": (with_channels(damping=0.3), both),
        "damping of activations 1": (with_channels(damping=1.0), ("third",)),
        "head alone": (replace(default, channels=(head,)), both),
        "head and one block": (replace(default, channels=(head, replace(blocks, depths=(0.5,)))), both),
        "blocks alone": (replace(default, channels=(blocks,)), ("third",)),
        "all MLPs": (replace(default, channels=(head, replace(blocks, depths=None))), ("third",)),
        "gh in the place of rh": (replace(default, channels=(through, blocks)), both),
        "gh beside rh": (replace(default, channels=(head, through, blocks)), ("third",)),
        "head sketched to 256": (replace(default, channels=(replace(head, left_width=256), blocks)), ("third",)),
        "head sketched to 2048": (replace(default, channels=(replace(head, left_width=2048), blocks)), ("third",)),
        "support 256": (replace(default, support=256), ("third",)),
        "first default": (FIRST_DEFAULT, both),
        "residual without its head": (replace(residual, channels=residual.channels[1:]), both),
        "residual, temperature 2": (replace(residual, temperature=2.0), ("start", "final")),
    }
    return {f"{name}@{at}": (settings, at) for name, (settings, ats) in changed.items() for at in ats}


FIRST_DEFAULT = replace(  # before any truth of this project
    PRESETS["default"], channels=(Channel("gh", whiten_left=True, whiten_right=True),), length_power=0.0
)
KB = (1, 2, 4, 8, 16)


def forms() -> dict[str, tuple[SignatureSettings, str]]:
    """The default and others as they may be stored, after a third of training: all bytes are of the long form."""
    default = PRESETS["default"]
    presets = {
        "default": default,
        "head alone": replace(default, channels=default.channels[:1]),
        "residual": PRESETS["residual"],
        "first default": FIRST_DEFAULT,
    }
    sizes = {name: KB[-1:] if name == "first default" else KB for name in presets}
    found = {
        "default, exact": replace(default, bytes_per_row=None, storage="float32", short_bytes=None),
        **{
            f"{name}, {kb} KB": replace(settings, bytes_per_row=1024 * kb, short_bytes=None)
            for name, settings in presets.items()
            for kb in sizes[name]
        },
        "paper-responses, as it is": PRESETS["paper-responses"],
    }
    return {name: (settings, "third") for name, settings in found.items()}


def scored(name: str, scorer: Scorer, place: Path) -> Scored:
    """Scores of a method or variant, from the working directory if they were made before with the same settings."""
    changed = {**variants(), **forms()}
    method, at = ("", changed[name][1]) if name in changed else parse(name)
    settings = changed[name][0] if name in changed else PRESETS.get(method)
    kind = "" if settings is None else f"-{settings.fingerprint()}"
    file = place / f"{name.replace(' ', '_')}{kind}.npz"
    if file.exists():
        with np.load(file) as kept:
            return Scored(kept["scores"], float(kept["seconds"]))
    scorer.parameters(at)  # training up to a checkpoint is no cost of the first method that looks there
    began = time.process_time()
    scores = load(method)(scorer, at) if name not in changed else signature_scores(scorer, at, changed[name][0])
    made = Scored(np.asarray(scores, np.float64), time.process_time() - began)
    place.mkdir(parents=True, exist_ok=True)
    np.savez(file, scores=made.scores, seconds=np.array(made.cpu_seconds))
    print(f"  {name}: {made.cpu_seconds:.1f} CPU s", file=sys.stderr, flush=True)
    return made


def accuracy_by_bytes(scorer: Scorer, truth: Truth, place: Path, seed: int) -> list[dict[str, Any]]:
    """Bytes a row and LDS of every stored form."""
    readout = readout_of(scorer, "third")
    out = []
    for name, (settings, _) in forms().items():
        found = lds(scored(name, scorer, place).scores, truth.removed, truth.values)
        size = Signer(readout, settings).codec.row_bytes
        out.append({"form": name, "bytes": size, "lds": bootstrap_interval(found, seed)._asdict()})
    return out


def costly(run: TrainingRun, asked: Sequence[Query], retrain: int, seed: int, place: Path) -> dict[str, Scored]:
    """The exact first order, and the posterior that has it and `retrain` retrainings, on few queries."""
    scorer = Scorer(run, asked, seed)
    out = {"metagradient": scored("metagradient", scorer, place)}
    if retrain:
        run.measure(retrain=retrain, queries=asked)
        out[f"posterior, {retrain} retrainings"] = scored("posterior", scorer, place)
    return out


def on_few(few: dict[str, Scored], all_methods: dict[str, Scored], chosen: np.ndarray, truth: Truth) -> list[Judged]:
    """LDS on some of the queries: costly methods, and all others on the same."""
    cut = {name: Scored(s.scores[chosen], s.cpu_seconds) for name, s in all_methods.items()}
    return [
        Judged(name, lds(s.scores, truth.removed, truth.values[chosen]), cpu_seconds=s.cpu_seconds)
        for name, s in {**cut, **few}.items()
    ]


def lines(report: Report) -> list[dict[str, Any]]:
    """The report without the values of single queries, which would be most of the file."""
    return [{key: value for key, value in line.items() if key != "by_query"} for line in report.lines()]


def differences(report: Report, first: str, metric: Any) -> dict[str, dict[str, float]]:
    """First minus each other method, paired by query."""
    found = {other.method: report.difference(first, other.method, metric) for other in report.judged}
    return {name: interval._asdict() for name, interval in found.items() if interval is not None and name != first}


def parts_of_gradient(scorer: Scorer, truth: Truth) -> dict[str, dict[str, float]]:
    """LDS of the final gradient dot by kind of parameter, with its share of the squared gradient of the rows.

    Memory: the gradients of all queries.
    """
    values = scorer.parameters("final")
    ends = np.cumsum([0, *(values[name].numel() for name in scorer.task.trained)])
    parts: dict[str, list[slice]] = {}
    for i, name in enumerate(scorer.task.trained):
        kind = "norms and biases" if "norm" in name or "bias" in name else re.sub(r"\.\d+\.", ".*.", name)
        parts.setdefault(kind, []).append(slice(ends[i], ends[i + 1]))
    queries = torch.cat(list(example_gradients(scorer.task, values, scorer.query_rows)))
    scores = {kind: np.zeros((len(queries), len(scorer.rows))) for kind in parts}
    squares = dict.fromkeys(parts, 0.0)
    first = 0
    for rows in example_gradients(scorer.task, values, scorer.rows):
        for kind, places in parts.items():
            for place in places:
                scores[kind][:, first : first + len(rows)] += (queries[:, place] @ rows[:, place].T).numpy()
                squares[kind] += float(rows[:, place].square().sum())
        first += len(rows)
    total = sum(squares.values())
    return {
        kind: {"lds": float(np.nanmean(lds(found, truth.removed, truth.values))), "share": squares[kind] / total}
        for kind, found in scores.items()
    }


def facts_of(bank: TruthBank, run: TrainingRun) -> dict[str, Any]:
    recipe = bank.recipe
    return {
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "rows": len(recipe.examples),
        "groups": list(bank.groups),
        "queries": len(bank.queries),
        "steps": len(recipe.batches()),
        "optimizer": recipe.optimizer.name,
        "pretraining_cpu_seconds": bank.pretraining_cpu_seconds,
        "mean_query_loss": float(run.bank.base([Query(q) for q in bank.queries]).mean()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bank", choices=tuple(name for name in BANKS if name != "smoke"), default="stories")
    parser.add_argument("--json", type=Path, help="the result file; default: by the bank, in --out")
    parser.add_argument("--work", type=Path, help="where truth and scores are kept; default: a temporary directory")
    parser.add_argument("--sizes", type=int, nargs=2, default=(20, 3), help="rows and queries of each group")
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--qld", type=int, default=10, help="queries of the QLD")
    parser.add_argument("--retrain", type=int, default=0, help="retrainings for the posterior; 0: leave it out")
    parser.add_argument("--no-variants", action="store_true", help="leave out changes of the default and stored forms")
    parser.add_argument("--exact", type=int, help="queries of the exact first order; default: as many as of the QLD")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        name = "smoke" if args.smoke else args.bank
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            args.sizes, args.subsets = (8, 2), 6
        result = measured(args, name, work)
    out = args.json or (args.out or RESULTS) / f"readout_influence_{args.bank}.json"
    print(write_result(out.parent, out.name, result, args).name)
    return 0


def measured(args: Any, name: str, work: Path) -> dict[str, Any]:
    """All numbers of the result file."""
    bank = BANKS[name](work, tuple(args.sizes), args.seed)
    settings = EvaluationSettings(
        subsets=args.subsets, removal_queries=2 if args.smoke else args.qld, draws=2 if args.smoke else 8, seed=args.seed,
        measure=MeasureSettings(workers=args.workers),
    )  # fmt: skip
    run = TrainingRun.train(bank.recipe, work / f"run-{name}")
    second = second_order(run)
    asked = [Query(q, name=q.id) for q in bank.queries]
    truth = subset_truth(run, asked, args.subsets, second=second, seed=args.seed, settings=settings.measure)
    place, scorer = work / f"scores-{name}-{run.recipe.hash()[:8]}", Scorer(run, asked, args.seed)
    wanted = [*methods_of(name, CHEAP), *([] if args.no_variants else methods_of(name, list(variants())))]
    methods = {name: scored(name, scorer, place) for name in wanted}
    report = judge(run, asked, methods, truth, replace(settings, removal_queries=0))
    show(report)
    removed = SMALLER_REMOVED if name in WIDE else REMOVED
    removals = judge(run, asked, {name: methods[name] for name in removed}, truth, settings)
    show(removals)
    chosen = removal_queries(len(asked), settings.removal_queries if args.exact is None else args.exact)
    few: dict[str, Any] = {}
    if len(chosen):
        found = costly(
            run, [asked[i] for i in chosen], args.retrain, args.seed, work / f"few-{name}-{run.recipe.hash()[:8]}"
        )
        small = Report(
            tuple(on_few(found, methods, chosen, truth)), tuple(asked[i].name for i in chosen), args.subsets, (), 0,
            seed=args.seed,
        )  # fmt: skip
        show(small)
        few = {"lines": lines(small), "default_minus_others": differences(small, COMPARED, "lds")}
    assert truth.ceiling is not None
    seconds = run.bank.info()["cpu_seconds"] + second.bank.info()["cpu_seconds"]
    return {
        "question": (__doc__ or "").split("\n", 1)[0],
        "bank": {"name": name, **facts_of(bank, run)},
        "repeats": len(asked),
        "subsets": args.subsets,
        "removed_by_qld": removals.removed_units,
        "cpu_seconds": {"retraining": seconds, "scores": sum(s.cpu_seconds or 0 for s in methods.values())},
        "agreement_of_orders": truth.ceiling.agreement._asdict(),
        "ceiling": truth.ceiling.ceiling._asdict(),
        "lds": lines(report),
        "default_minus_others_lds": differences(report, COMPARED, "lds"),
        "qld": lines(removals),
        "default_minus_others_qld": differences(removals, COMPARED, "qld"),
        "on_few_queries": few,
        "parts_of_gradient": parts_of_gradient(scorer, truth),
        "stored_forms": [] if args.no_variants else accuracy_by_bytes(scorer, truth, place, args.seed),
    }


def show(report: Report) -> None:
    rows = report.table().rows
    for row in rows:
        print("  ".join(f"{cell:28}" for cell in row).rstrip())
    print("\n".join(report.notes()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
