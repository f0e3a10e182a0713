"""The tables of the README and of the docs, made from the result files, so that no number in them is typed by hand.

    python benchmarks/tables.py                  # rewrites what stands between the markers
    python benchmarks/tables.py --check          # 1 if a page differs from the results

A table NAME stands between the lines `<!-- table:NAME -->` and `<!-- end:NAME -->`; a new table is one function and
one row of TABLES.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tables_codes import TABLES_OF_CODES, million
from tables_influence import (
    by_method,
    changes,
    coherent,
    headline,
    refined,
    removals,
    shares_reached,
    stored_forms,
    truth_bank,
)
from tables_learned import TABLES_OF_LEARNED
from tables_reverse import TABLES_OF_REVERSE
from tables_tasks import TASKS, table, times
from tables_trainer import TABLES_OF_TRAINER

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- end:(\w+) -->", re.DOTALL)


def index_cost(result: dict[str, Any]) -> str:
    names = {
        "trunk": "forward pass without the head",
        "logits": "forward pass with all logits",
        "paper/response": "index with `paper`",
        "default/response": "index with `default`",
        "statistics/response": "statistics of `default`, of as many rows",
        "paper/all": "index with `paper`, prompts learned too",
        "default/all": "index with `default`, prompts learned too",
    }
    parts = []
    for model, facts in result["models"].items():
        head = [
            f"{model}: {facts['rows']} rows, {facts['tokens']:,} tokens",
            "CPU s",
            "over trunk",
            "over logits",
            "peak MB above the model",
        ]
        lines = [
            [
                text,
                f"{facts['cpu_seconds'][name]['median']:.1f}",
                times(facts["over_trunk"][name]),
                times(facts["over_logits"][name]),
                f"{facts['peak_mb_above_model'][name]:.0f}" if name in facts["peak_mb_above_model"] else "",
            ]
            for name, text in names.items()
        ]
        parts.append(table(head, lines))
    return "\n".join(parts)


def retrieval(result: dict[str, Any]) -> str:
    head = [f"{result['rows']:,} rows, {result['poisoned']} of them wanted"]
    for name in result["results"]:
        head += [f"{name}: P@10", f"recall@{result['poisoned']}", "average precision"]
    lines = []
    for method in next(iter(result["results"].values())):
        line = [f"`{method}`" if method in ("default", "paper-responses", "similarity") else method]
        for methods in result["results"].values():
            facts = methods[method]
            ap = facts["average_precision"]
            line += [f"{facts['precision_at_10']['mean']:.2f}", f"{facts['recall_at_poisoned']['mean']:.2f}"]
            line.append(f"{ap['mean']:.2f} [{ap['low']:.2f}, {ap['high']:.2f}]")
        lines.append(line)
    return table(head, lines)


def speed(result: dict[str, Any]) -> str:
    names = {"microgpt": "microgpt, {:,} parameters", "gpt2": "GPT-2 shape, {:,} parameters, 8 x 64 tokens"}
    head = ["model", "number type", "degree", "directions", "us per step and direction", "share of the matrix rate"]
    return table(
        head,
        [
            [
                names[row["model"]].format(row["parameters"]), row["dtype"], f"{row['degree']}", f"{row['directions']}",
                f"{row['us_per_step_per_direction']:,.0f}", f"{row['matmul_share']:.0%}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip


def retraining(result: dict[str, Any]) -> str:
    head = ["retrainings of microgpt as one batch", "steps each", "CPU s"]
    return table(head, [[f"{result['runs']:,}, float32", f"{result['steps']:,}", f"{result['cpu_seconds']:.0f}"]])


KINDS = {
    "1": "one document",
    "50": "50 random",
    "300": "300 random",
    "contains a letter": "contains a letter",
    "block of 50": "block of 50",
    "mean": "mean of nine kinds",
}


def deletion(result: dict[str, Any]) -> str:
    """Pearson / Spearman / median relative error per kind of deletion set, and coverage."""
    head = [
        f"n = {result['n']:,}, {result['sets']} sets, {len(result['queries'])} queries",
        "cost",
        *KINDS.values(),
        "inside 95 %",
    ]
    lines = []
    for name, arm in result["arms"].items():
        numbers = [
            "/".join(f"{result[key][name][kind]:.2f}" for key in ("pearson", "spearman", "relative_error"))
            for kind in KINDS
        ]
        inside = result["coverage"][name]["mean"]
        lines.append(
            [name, f"{arm['retraining_equivalents']:,.0f}", *numbers, "" if inside is None else f"{inside:.0%}"]
        )
    return table(head, lines)


def bought(result: dict[str, Any]) -> str:
    """What a budget buys: means over all kinds of sets."""
    names = {"posterior, plan": "`plan`", "datamodels": "datamodels", "leave-one-out sums": "leave-one-out sums"}
    lines = []
    for name, arm in result["arms"].items():
        kind, _, budget = name.rpartition(", ")
        if kind in names and budget.isdigit():
            inside, error = result["coverage"][name]["mean"], result["relative_error"][name]["mean"]
            line = [names[kind], budget, f"{arm['retraining_equivalents']:,.0f}"]
            line += [
                f"{result['spearman'][name]['mean']:.2f}",
                f"{error:.2f}",
                "" if inside is None else f"{inside:.0%}",
            ]
            lines.append(line)
    head = ["", "budget", "cost", "Spearman", "median relative error", "inside 95 %"]
    return table(head, sorted(lines, key=lambda line: (line[0] != "`plan`", line[0], int(line[1]))))


def letters(result: dict[str, Any]) -> str:
    head = [f"26 first letters, {len(result['queries'])} queries", "cost"]
    head += ["sets of 4: Spearman", "relative error", "sets of 8: Spearman", "relative error", "inside 95 %"]
    lines = []
    for name, arm in result["arms"].items():
        numbers = [f"{result[key][name][k]:.2f}" for k in ("4", "8") for key in ("spearman", "relative_error")]
        inside = result["coverage"][name]["mean"]
        lines.append(
            [name, f"{arm['retraining_equivalents']:,.0f}", *numbers, "" if inside is None else f"{inside:.0%}"]
        )
    return table(head, lines)


def coverage(*results: dict[str, Any]) -> str:
    """Inside 95 % with an interval over sets, and the width over the best constant one, by kind and run."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result["kinds"]))
    head = ["inside 95 % (over sets), width", *(result["case"] for result in results)]

    def cell(result: dict[str, Any], kind: str) -> str:
        if (found := result["kinds"].get(kind)) is None:
            return ""
        low, high = found["interval"]
        return f"{found['inside']:.0%} ({low:.0%} to {high:.0%}), {found['width_over_constant']:.2g}"

    lines = [[kind, *(cell(result, kind) for result in results)] for kind in kinds]
    lines.append(["mean over kinds", *(f"{result['mean_inside']:.1%}" for result in results)])
    news = [[facts["inside"] for facts in (result.get("new_runs") or {}).values()] for result in results]
    lines.append(["one new run: mean, least kind", *(f"{np.mean(new):.0%}, {min(new):.0%}" if new else "" for new in news)])
    return table(head, lines)


def new_run(result: dict[str, Any]) -> str:
    """By case and kind of set: agreement with the mean of new runs beside what its noise allows, and intervals of one run."""
    head = ["case: kind (sets)", "a run's deviation", "effect", "Spearman", "ceiling", "no more than a seed", "runs inside 95 %",
            "width of it"]  # fmt: skip
    lines = [
        [
            f"{case}: {kind} ({found['sets']})", f"{found['run_std']:.2g}", f"{found['rms_effect']:.2g}",
            f"{found['spearman']:.2f}", f"{found['ceiling']:.2f}", f"{found['not_distinguishable']:.0%}",
            f"{found['coverage']:.1%}", f"{found['width']:.2g}",
        ]
        for case, facts in sorted(result["cases"].items())
        for kind, found in facts["kinds"].items()
    ]  # fmt: skip
    return table(head, lines)


def choices(result: dict[str, Any]) -> str:
    head = [
        "share of a query's help removed",
        *(f"seed {seed}: actual over predicted | inside, not widened | widened" for seed in result["seeds"]),
    ]
    head = [part for text in head for part in text.split(" | ")]
    seeds = [facts["by_share_of_help"] for facts in result["seeds"].values()]
    lines = []
    for bins in zip(*seeds, strict=True):
        low, high = bins[0]["share"]
        line = [f"{low:.0%} to {high:.0%}"]
        for found in bins:
            line += [
                f"{found['actual_over_predicted']:.1f}",
                f"{found['inside_without']:.0%}",
                f"{found['inside_with']:.0%}",
            ]
        lines.append(line)
    return table(head, lines)


def strong(result: dict[str, Any]) -> str:
    """Actual over predicted of strong sets: the median, where 80 % of pairs lie, and how often intervals held."""
    words = {"8": "random sets of 8"}
    columns = [
        (case, kind) for case in result["cases"] for kind in case["ways"][0] if isinstance(case["ways"][0][kind], dict)
    ]
    head = [
        "actual over predicted",
        *(f"{case['case']}: {words.get(kind, kind)}, {case['ways'][0][kind]['pairs']} pairs" for case, kind in columns),
    ]
    lines = []
    for number, first in enumerate(result["cases"][0]["ways"]):
        line = [first["way"]]
        for case, kind in columns:
            found = case["ways"][number][kind]
            held = "" if found["inside"] is None else f", held {found['inside']:.0%}"
            line.append(f"{found['actual_over_predicted']:.2f} ({found['low']:.2f} to {found['high']:.2f}){held}")
        lines.append(line)
    return table(head, lines)


def noise(result: dict[str, Any]) -> str:
    found, names = result["noise"], result["names"]
    head = ["Spearman at a noise of, in effects of a document", *(f"{level:g}" for level in found["levels"])]
    return table(head, ([names[n], *(f"{v:.2f}" for v in values)] for n, values in found["spearman"].items()))


def shares(result: dict[str, Any]) -> str:
    found, names = result["small_shares"], result["names"]
    head = [f"relative error, part of the weight of sets of {found['kind']}", *(f"{s:.0%}" for s in found["shares"])]
    return table(head, ([names[n], *(f"{v:.3f}" for v in values)] for n, values in found["relative_error"].items()))


def damping(result: dict[str, Any]) -> str:
    by_seed = {seed: facts["spearman_by_damping"] for seed, facts in result["seeds"].items()}
    names = list(next(iter(by_seed.values())))
    head = ["damping of the scores", *(n.removesuffix(".0") for n in names)]
    return table(head, [[f"seed {seed}", *(f"{found[n]:.3f}" for n in names)] for seed, found in by_seed.items()])


def steps(result: dict[str, Any]) -> str:
    """Seconds of all steps of `make bench`, the longest first."""
    found = sorted(result["steps"].items(), key=lambda item: -item[1]["cpu"])
    lines = [[name, "yes" if step["alone"] else "", f"{step['cpu']:,.0f}"] for name, step in found]
    alone, rest = result["cpu_seconds_alone"], result["cpu_seconds_of_the_rest"]
    title = f"these {len(found)} of {result['all']} steps, on two cores {(alone + rest / 2) / 3600:.1f} h (goal 3)"
    lines.append([title, "", f"{alone + rest:,.0f}"])
    return table(["step", "alone on the machine", "CPU s"], lines)


def streaming(result: dict[str, Any]) -> str:
    """Memory of a streamed build, and CPU seconds of both ways."""
    memory, time = result["memory"], result["time"]
    whole = f"{memory['parameters'] / 1e9:.1f} billion parameters in bfloat16"
    lines = [
        [f"{whole}, {memory['blocks']} blocks: weights", f"{memory['weights_gb']:.2f} GB"],
        [f"largest resident memory of a build (`--max-memory {memory['max_memory']}`)", f"{memory['peak_gb']:.2f} GB"],
        ["of these the program before it began", f"{memory['of_which_before']:.2f} GB"],
        ["share of the weights", f"{memory['share']:.2f}"],
        [
            f"{time['tokens']:,} tokens through {time['parameters'] / 1e9:.1f} billion parameters, whole",
            cpu(time["whole"]),
        ],
        ["the same, streamed", cpu(time["streamed"])],
        [
            "streamed over whole",
            f"{time['ratio']['median']:.3f} [{time['ratio']['low']:.3f}, {time['ratio']['high']:.3f}]",
        ],
        [
            "largest resident memory, whole and streamed",
            f"{time['peak_whole_gb']:.2f}, {time['peak_streamed_gb']:.2f} GB",
        ],
        ["hidden states equal bit for bit; index equal", f"{_yes(time['equal'])}; {_yes(result['index']['equal'])}"],
    ]
    return table(["made by `benchmarks/streaming.py`, one core", ""], lines)


def cpu(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.0f} CPU s"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def numbers(bank: dict[str, Any], bought: dict[str, Any], cost: dict[str, Any]) -> str:
    """Three numbers for the README: how well rows are found, how well a model is predicted, what an index costs."""
    found = {line["method"]: line for line in bank["lds"]}
    lds = {name: found[name]["lds"]["mean"] for name in ("default@final", "ek-fac@final", "bm25")}
    seconds = found["ek-fac@final"]["cpu_seconds"] / found["default@final"]["cpu_seconds"]
    arm = "posterior, plan, 100"
    model = cost["models"]["SmolLM2-135M"]
    row = model["cpu_seconds"]["default/response"]["median"] / model["rows"]
    lines = [
        [
            "Do scores tell what training without rows does?",
            f"rank correlation {lds['default@final']:.2f} with what 30 trainings without half of the rows did; EK-FAC, which "
            f"goes backwards through the model, {lds['ek-fac@final']:.2f} for {seconds:.0f} times the time; word search "
            f"(BM25) {lds['bm25']:.2f}",
            "`influence.py --bank gemma`",
        ],
        [
            "Are predictions right?",
            f"rank correlation {bought['spearman'][arm]['mean']:.2f} with 258 models trained without parts of 1,000 names, for "
            f"the price of {bought['arms'][arm]['retraining_equivalents']:.0f} trainings; "
            f"{bought['coverage'][arm]['mean']:.0%} of the 95 % intervals held",
            "`deletion_accuracy.py`",
        ],
        [
            "What does a row cost?",
            f"{row:.2f} CPU seconds with a model of 135 million parameters, and 16 KB",
            "`index_cost.py`",
        ],
    ]
    return re.sub(r"(?m)---:", "---", table(["question", "answer", "made by, in `benchmarks/`"], lines))


README, RESULTS = "README.md", "docs/evidence/results.md"
JETS, READOUT = "docs/evidence/jets.md", "docs/evidence/readout.md"
DELETION, EVALUATION = "docs/evidence/deletion.md", "docs/evidence/evaluation.md"
BANKS = tuple(f"readout_influence_{name}.json" for name in ("stories", "neox", "qwen", "gemma", "olmo"))
COVERED = ("names", "digits", "lora", "cnn", "prose", "smollm2")
TABLES: dict[str, tuple[str, str | tuple[str, ...], Callable[..., str]]] = {
    "numbers": (
        README,
        ("readout_influence_gemma.json", "deletion_accuracy_documents.json", "readout_index_cost.json"),
        numbers,
    ),
    "headline": (EVALUATION, BANKS, headline),
    "bought": (DELETION, "deletion_accuracy_documents.json", bought),
    "index_cost": (READOUT, "readout_index_cost.json", index_cost),
    "retrieval": (READOUT, "readout_retrieval.json", retrieval),
    **{name: (READOUT, file, made) for name, (file, made) in TABLES_OF_CODES.items()},
    "deletion": (DELETION, "deletion_accuracy_documents.json", deletion),
    "letters": (DELETION, "deletion_accuracy_letters.json", letters),
    "new_run": (DELETION, "new_run.json", new_run),
    "coverage": (DELETION, tuple(f"deletion_coverage_{case}.json" for case in COVERED), coverage),
    "noise": (DELETION, "deletion_regimes.json", noise),
    "shares": (DELETION, "deletion_regimes.json", shares),
    "choices": (DELETION, "deletion_prior_choices.json", choices),
    "strong": (DELETION, "strong_sets.json", strong),
    "damping": (DELETION, "deletion_prior_choices.json", damping),
    "influence": (EVALUATION, BANKS, by_method),
    "influence_shares": (EVALUATION, BANKS, shares_reached),
    "refined": (
        EVALUATION,
        tuple(f"readout_refined_{name}.json" for name in ("stories", "neox", "qwen", "gemma")),
        refined,
    ),
    "coherent": (EVALUATION, "coherent_sets.json", coherent),
    "truth_bank": (EVALUATION, "truth_bank.json", truth_bank),
    "influence_removals": (EVALUATION, BANKS, removals),
    "influence_changes": (EVALUATION, BANKS, changes),
    "influence_forms": (EVALUATION, BANKS, stored_forms),
    **TABLES_OF_LEARNED,
    **TASKS,
    **TABLES_OF_TRAINER,
    **TABLES_OF_REVERSE,
    "million": (RESULTS, "readout_search_million.json", million),
    "steps": (RESULTS, "bench_steps.json", steps),
    "speed": (JETS, "jets_speed.json", speed),
    "streaming": ("docs/how-to/big-models.md", "streaming.json", streaming),
    "retraining": (JETS, "jets_loo_retraining.json", retraining),
}
"""Name of a table -> the page it stands in, the result file or files, the function that writes it."""


def files_of(table: str) -> tuple[str, ...]:
    """The result files of a table."""
    files = TABLES[table][1]
    return (files,) if isinstance(files, str) else files


def filled(text: str, results: Path, page: str = README) -> str:
    """A page with its tables made anew; those whose results are not there stay as they are, which is said.

    Raises: ValueError for a marker without a table, a table without a marker, or results of a smoke run.
    """
    found = sorted(match[1] for match in MARKED.finditer(text))
    wanted = sorted(name for name, (where, _, _) in TABLES.items() if where == page)
    if found != wanted:
        raise ValueError(f"the tables marked in {page} are {found}, but there are {wanted}.")

    def made(match: re.Match[str]) -> str:
        if match[1] != match[3]:
            raise ValueError(f"the table {match[1]} ends with the marker of {match[3]}.")
        if missing := [file for file in files_of(match[1]) if not (results / file).exists()]:
            print(f"{page}: the table {match[1]} stays as it is, as there is no {missing[0]}", file=sys.stderr)
            return match[0]
        read = [json.loads((results / file).read_text()) for file in files_of(match[1])]
        for file, result in zip(files_of(match[1]), read, strict=True):
            if result.get("smoke"):
                raise ValueError(f"{file} is of a smoke run: run the benchmark in full.")
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]][2](*read)}<!-- end:{match[1]} -->"

    return MARKED.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds the pages")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    differs = False
    for page in dict.fromkeys(where for where, _, _ in TABLES.values()):
        path = args.root / page
        old = path.read_text()
        try:
            new = filled(old, args.results, page)
        except (ValueError, OSError) as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        if new != old and args.check:
            print(f"{page} differs from the results: run python benchmarks/tables.py", file=sys.stderr)
            differs = True
        elif new != old:
            path.write_text(new)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
