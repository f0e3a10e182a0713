"""Tables of docs/evidence/results.md: the tasks of the RISE paper, and priors from signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Made = Callable[[dict[str, Any]], str]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def times(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def within(interval: dict[str, float], digits: int = 2) -> str:
    return f"{interval['mean']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def ranking(model: str, first: str, second: str) -> Made:
    """Average precision on two sets of queries, the paper's area over the ends on the first, and what a method costs."""

    def made(result: dict[str, Any]) -> str:
        facts = result["models"][model]
        head = [
            f"{model}, {facts['rows']} rows", f"AP, {first}", f"AP, {second}", f"P@10, {first}",
            f"auPRC over ends, K = 5 / 10 / 50, {first}", "bytes a row", "RapidIn's over own", "CPU s: rows / queries",
        ]  # fmt: skip
        lines = []
        for name, found in facts["results"][first].items():
            cost = facts["costs"].get(name, {})
            own, less = cost.get("bytes_per_row"), cost.get("bytes_of_rapidin_over_own")
            spent = [cost.get(key) for key in ("index_cpu_seconds", "query_cpu_seconds")]
            lines.append([
                name, within(found["average_precision"]), within(facts["results"][second][name]["average_precision"]),
                f"{found['precision_at_10']['mean']:.2f}",
                " / ".join(f"{found[f'auprc_ends_{k}']['mean']:.2f}" for k in (5, 10, 50)),
                "" if own is None else f"{own:,.0f}", "" if less is None else f"{less:.1f}",
                "" if None in spent else " / ".join(f"{s:.1f}" for s in spent),
            ])  # fmt: skip
        return table(head, lines)

    return made


def selection(result: dict[str, Any]) -> str:
    kinds = result["results"]
    head = ["selected by"] + [
        text for kind in kinds for text in (f"{kind}: held-out loss", "right kind", "`default` minus it", "p")
    ]
    lines = [["before training", *(t for k in kinds.values() for t in (f"{k['loss_at_start']:.3f}", "", "", ""))]]
    for name in next(iter(kinds.values()))["methods"]:
        line = [name]
        for kind in kinds.values():
            found, against = kind["methods"][name], kind["default_minus_others"].get(name)
            right = found.get("precision")
            line += [
                within(found["loss"], 3), "" if right is None else f"{right:.0%}",
                "" if against is None else within(against, 3), "" if against is None else f"{against['p']:.2g}",
            ]  # fmt: skip
        lines.append(line)
    return table(head, lines)


def priors(result: dict[str, Any]) -> str:
    by = result["by_retrainings"]
    head = [f"{result['bank']}: prior of the posterior"] + [
        text for n in by for text in (f"LDS, {n} retrainings", "minus identity")
    ]
    names = list(next(iter(by.values())))
    lines = [
        [name, *(text for n in by for text in (within(by[n][name]["lds"]), within(by[n][name]["minus_identity"])))]
        for name in names
    ]
    return table(head, lines)


def store(result: dict[str, Any]) -> str:
    goals = result["goals"]
    head = [f"{result['rows']:,} rows of {result['width']} float16", "measured", "goal"]
    lines = [
        ["building, MB a CPU second", f"{result['build_mb_per_second']:.0f}", f"{goals['build_mb_per_second']}"],
        ["deleting 1 %, CPU s", f"{result['delete_1_percent_seconds']:.2f}", f"{goals['delete_1_percent_seconds']}"],
        ["reading 100 rows with text, ms", f"{1e3 * result['read_100_rows_seconds']['median']:.1f}",
         f"{1e3 * goals['read_100_rows_seconds']:.0f}"],
        ["peak of the process, MB", f"{result['resident_mb']:.0f}", f"{goals['resident_mb']}"],
        ["of which before it began, MB", f"{result['resident_at_start_mb']:.0f}", ""],
        ["finding 1 % of the rows by SQL, CPU s", f"{result['select_1_percent_seconds']['median']:.2f}", ""],
        ["scan with every block checked, over plain", f"{result['verify_over_plain_scan']['median']:.2f}", ""],
    ]  # fmt: skip
    return table(head, lines)


RESULTS_PAGE = "docs/evidence/results.md"
TASKS: dict[str, tuple[str, str, Made]] = {
    "backdoor_stories": (RESULTS_PAGE, "readout_backdoor.json", ranking("stories260K", "trigger", "control")),
    "backdoor_neox": (RESULTS_PAGE, "readout_backdoor.json", ranking("GPT-NeoX", "trigger", "control")),
    "backdoor_olmo": (RESULTS_PAGE, "readout_backdoor.json", ranking("OLMo-2", "trigger", "control")),
    "domains_stories": (RESULTS_PAGE, "readout_domains.json", ranking("stories260K", "finance", "medical")),
    "domains_olmo": (RESULTS_PAGE, "readout_domains.json", ranking("OLMo-2", "finance", "medical")),
    "domains_smollm2": (RESULTS_PAGE, "readout_domains.json", ranking("SmolLM2-135M", "finance", "medical")),
    "selection": (RESULTS_PAGE, "readout_selection.json", selection),
    "selection_olmo": (RESULTS_PAGE, "readout_selection_olmo.json", selection),
    "priors_stories": (RESULTS_PAGE, "readout_priors_stories.json", priors),
    "store": (RESULTS_PAGE, "store_speed.json", store),
    "priors_neox": (RESULTS_PAGE, "readout_priors_neox.json", priors),
}
