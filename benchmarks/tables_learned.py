"""Tables of docs/evidence/evaluation.md: how the length of a row counts, on the banks and on rows that are learned."""

from __future__ import annotations

from typing import Any

from tables_tasks import table, within

PAGE = "docs/evidence/evaluation.md"
WAYS = {
    "product": "product", "power 0.5": "root of the length", "cosine": "cosine", "power 1.25": "power 1.25",
    "cosine, long as before": "cosine, as long as before", "cosine, prompts learned too": "cosine, `targets=\"all\"`",
    "both sides": "cosine, `targets=\"both\"`", "both sides, 0.5": "the same, prompt weight .5",
    "both sides, 1": "the same, prompts alone", "cosine, before": "cosine, model before",
    "chance": "random",
}  # fmt: skip

SUMS = ("power 0.5", "cosine", "power 1.25", "cosine, long as before")


def lengths(result: dict[str, Any]) -> str:
    """LDS and QLD of the product, and what other lengths add to them, by bank and checkpoint."""
    head = ["", "LDS, product", *(WAYS[name] for name in SUMS), "QLD, product", "cosine"]
    lines = []
    for bank in result["banks"]:
        for at in dict.fromkeys(line["at"] for line in bank["lines"]):
            found = {line["length"]: line for line in bank["lines"] if line["at"] == at}
            more = [within(found[name]["lds_minus_product"], 3) for name in SUMS]
            qld = ["", ""]
            if "qld" in found["cosine"]:
                qld = [f"{found['product']['qld']['mean']:.3f}", within(found["cosine"]["qld_minus_product"], 3)]
            lines.append([f"{bank['bank']}, {at}", f"{found['product']['lds']['mean']:.3f}", *more, *qld])
    return table(head, lines)


def learned(result: dict[str, Any]) -> str:
    """Average precision of each way on each kind of rows, a table a model."""
    tables = []
    for name, model in result["models"].items():
        kinds = model["kinds"]
        seeds = len({run["seed"] for run in model["runs"]})
        head = [f"{name}, {seeds} seeds: average precision", *kinds]
        losses = [f"{kind['loss_of_wanted']:.3f} / {kind['loss_of_others']:.3f}" for kind in kinds.values()]
        lines = [["nats a token of wanted rows / of others", *losses]]
        found = [way for way in WAYS if all(way in kind["ap"] for kind in kinds.values())]
        lines += [[WAYS[way], *(within(kind["ap"][way]) for kind in kinds.values())] for way in found]
        tables.append(table(head, lines))
    return "\n".join(tables)


def controls(result: dict[str, Any]) -> str:
    """Of each kind of queries, at how many a control spoke, and which."""
    head = ["queries", "of seeds not chosen on", "a control spoke", "which", "on the seeds of the choice"]
    lines = []
    for kind, x in result["kinds"].items():
        before = result["in_sample"][kind]
        which = ", ".join(f"{name} {count}" for name, count in sorted(x["by"].items(), key=lambda item: -item[1]))
        name = f"{x['sort']}: {kind}"
        lines.append([name, str(x["queries"]), str(x["spoke"]), which, f"{before['spoke']} of {before['queries']}"])
    for sort in ("found", "made"):
        lines.append([f"**{sort}**, mean over kinds", "", f"{result[sort]:.0%}", "", ""])
    return table(head, lines)


def preferences(result: dict[str, Any]) -> str:
    """LDS on preference rows, and what leaving out ten rows does to the preference asked about."""
    head = [
        f"{result['rows']} pairs, {result['queries']} queries, {result['halves']} halves", "LDS", "`default` minus it",
        "margin falls without its ten, nats", "more than without random ten", "turned",
    ]  # fmt: skip
    lines = []
    for name, found in result["removed"].items():
        own, less = result["lds"].get(name), result["default_minus"].get(name)
        lines.append([
            name, "" if own is None else within(own), "" if less is None else within(less), within(found["fall"]),
            "" if name == "ten random rows" else f"{found['narrowed_more_than_random']:.0%}", f"{found['turned']:.0%}",
        ])  # fmt: skip
    return table(head, lines)


TABLES_OF_LEARNED = {
    "preferences": (PAGE, "preferences.json", preferences),
    "lengths": (PAGE, "readout_lengths.json", lengths),
    "controls": (PAGE, "controls.json", controls),
    "learned_rows": (PAGE, "learned_rows.json", learned),
}
