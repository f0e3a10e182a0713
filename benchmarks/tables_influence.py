"""Tables of docs/evidence/evaluation.md: methods, changes of the default and stored forms against retraining, a column a bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tables_tasks import table, within

Results = Sequence[dict[str, Any]]


def by_method(*results: dict[str, Any]) -> str:
    """LDS of methods that have a name, the best of the first bank first."""
    return _lds_table(results, "lds", lambda name: _method(name) in KNOWN)


SHOWN = {
    "ek-fac@final": "EK-FAC (kronfluence)", "residual@final": "`residual`", "default@final": "`default`", "tracin": "TracIn",
    "gradient dot@final": "gradient dot", "bm25": "BM25", "paper-responses@final": "`paper-responses` (RISE)",
    "embedding@start": "embedding cosine", "random": "random",
}  # fmt: skip


def headline(*results: dict[str, Any]) -> str:
    """LDS of some methods with the trained model, without intervals, and what they took on the largest bank with all of them."""
    timed = next(result for result in results if result["bank"]["name"] == "gemma")
    seconds = {line["method"]: line["cpu_seconds"] for line in timed["lds"]}
    lines = []
    for name, text in SHOWN.items():
        found = [_found(result, "lds").get(name) for result in results]
        if any(found):
            cost = "" if name not in seconds else f"{seconds[name]:.1f}"
            lines.append([text, *("" if one is None else f"{one['mean']:.2f}" for one in found), cost])
    sizes = [f"{r['bank']['name']}, {r['bank']['parameters'] / 1e6:.1f} M" for r in results]
    return table(["", *sizes, "CPU s on gemma"], lines)


def changes(*results: dict[str, Any]) -> str:
    """LDS of changes of the default at the same checkpoint, and how far the default is above them."""
    lines, results = [], tuple(result for result in results if result["stored_forms"])
    for name in _order(results, "lds"):
        if _method(name) in KNOWN or not name.endswith("@third"):
            continue
        cells = []
        for result in results:
            found = _found(result, "lds").get(name)
            against = result["default_minus_others_lds"].get(name)
            cells += ["", ""] if found is None or against is None else [f"{found['mean']:.3f}", within(against, 3)]
        lines.append([name.removesuffix("@third"), *cells])
    own = [f"{_found(result, 'lds')['default@third']['mean']:.3f}" for result in results]
    head = [text for result in results for text in (result["bank"]["name"], "default minus it")]
    unchanged = ["the default itself", *(text for cell in own for text in (cell, ""))]
    return table(["change, after a third of training", *head], [unchanged, *lines])


def removals(*results: dict[str, Any]) -> str:
    """QLD, and how far the default is above each method on the same queries."""
    lines, results = [], tuple(result for result in results if any(line["qld"] for line in result["qld"]))
    for name in _order(results, "qld"):
        cells = []
        for result in results:
            found, against = _found(result, "qld").get(name), result["default_minus_others_qld"].get(name)
            cells += ["" if found is None else f"{found['mean']:.3f}", "" if against is None else within(against, 3)]
        lines.append([f"`{name}`", *cells])
    head = [text for result in results for text in (f"{_title(result)}: QLD, nats", "default minus it")]
    return table(["method", *head], lines)


def stored_forms(*results: dict[str, Any]) -> str:
    """LDS and bytes a row of the forms a row may be stored in."""
    lines, results = [], tuple(result for result in results if result["stored_forms"])
    for number, form in enumerate(results[0]["stored_forms"]):
        cells = []
        for result in results:
            found = result["stored_forms"][number]
            cells += [f"{found['bytes']:,}", f"{found['lds']['mean']:.3f}"]
        lines.append([form["form"], *cells])
    head = [text for result in results for text in (f"{result['bank']['name']}: bytes a row", "LDS")]
    return table(["stored form", *head], lines)


def shares_reached(*results: dict[str, Any]) -> str:
    """How much of the LDS of EK-FAC at the same checkpoint, and of the exact first order, the default reaches."""
    lines = []
    for result in results:
        found, few = _found(result, "lds"), result["on_few_queries"].get("lines", [])
        on_few = {line["method"]: line["lds"]["mean"] for line in few}
        own, exact = on_few.get("default@third"), on_few.get("metagradient")
        ekfac = next((name for name in ("ek-fac@third", "ek-fac blocks@third") if name in found), None)
        line = [_title(result), f"{found['default@third']['mean']:.3f}"]
        line += ["", ""] if ekfac is None else _share(found["default@third"]["mean"], found[ekfac]["mean"])
        line += ["", "", ""] if own is None or exact is None else [f"{own:.3f}", *_share(own, exact)]
        lines.append(line)
    head = ["bank", "`default@third`", "EK-FAC", "share", "on few queries", "exact first order", "share"]
    return table(head, lines)


def _share(own: float, other: float) -> list[str]:
    return [f"{other:.3f}", f"{own / other:.0%}"]


def truth_bank(result: dict[str, Any]) -> str:
    head = ["rows", "queries", "halves", "workers", "minutes", "goal", "CPU s"]
    facts = [result[name] for name in ("rows", "queries", "halves", "workers")]
    minutes = [f"{result['minutes']:.1f}", f"{result['goal_minutes']}", f"{result['cpu_seconds']:.0f}"]
    return table(head, [[*map(str, facts), *minutes]])


KNOWN = {
    "random", "bm25", "embedding", "gradient dot", "gradient cosine", "tracin", "rapidin", "ek-fac", "ek-fac blocks",
    "default", "residual", "similarity", "paper", "paper-responses",
}  # fmt: skip


def _lds_table(results: Results, metric: str, wanted: Any) -> str:
    head = ["method", *(f"{_title(result)}: ceiling {result['ceiling']['mean']:.3f}" for result in results)]
    lines = []
    for name in _order(results, metric):
        if wanted(name):
            found = [_found(result, metric).get(name) for result in results]
            lines.append([f"`{name}`", *("" if one is None else within(one, 3) for one in found)])
    return table(head, lines)


def _title(result: dict[str, Any]) -> str:
    return f"{result['bank']['name']}, {result['bank']['optimizer']}, {result['subsets']} halves"


def _method(name: str) -> str:
    return name.partition("@")[0]


def _found(result: dict[str, Any], metric: str) -> dict[str, dict[str, float]]:
    return {line["method"]: line[metric] for line in result[metric] if line[metric] is not None}


def _order(results: Results, metric: str) -> Iterator[str]:
    """Names by their mean over the banks, the highest first; banks that lack one are left out of it."""
    found = [_found(result, metric) for result in results]
    names = dict.fromkeys(name for one in found for name in one)

    def height(name: str) -> float:
        means = [one[name]["mean"] for one in found if name in one]
        return sum(means) / len(means)

    return iter(sorted(names, key=height, reverse=True))


REFINED = {
    "influence@third": "`influence`: all rows through the whole model, refined queries",
    "influence, list of 25%": "the same for the best 25 % by `default`",
    "influence, list of 5%": "the same for the best 5 %",
    "ek-fac@third": "EK-FAC",
    "ek-fac blocks@third": "EK-FAC",
    "default@third": "`default`",
    "rapidin@third": "RapidIn",
    "gradient dot@third": "gradient dot",
    "z0-inf": "Z0-Inf, four snapshots",
}


def refined(*results: dict[str, Any]) -> str:
    """LDS of refined queries beside the index and EK-FAC, with paired differences, a column a bank."""
    found = [{REFINED.get(line["method"]): line for line in result["lines"]} for result in results]
    lines = [
        [text, *("" if text not in own else within(own[text]["lds"], 3) for own in found)]
        for text in dict.fromkeys(REFINED.values())
    ]
    best = REFINED["influence@third"]
    for other in ("default", "ek-fac"):
        own = [next((v for k, v in f[best].items() if k.startswith(f"minus {other}")), None) for f in found]
        name = "`default`" if other == "default" else "EK-FAC"
        lines.append([f"`influence` minus {name}", *("" if one is None else within(one, 3) for one in own)])
    for text in ("`default`", "EK-FAC", best):
        rises = ["" if "qld" not in own.get(text, {}) else within(own[text]["qld"], 3) for own in found]
        if any(rises):
            lines.append([f"QLD in nats, {text.split(':')[0]}", *rises])
    seconds = ["" if own[best]["cpu_seconds"] is None else f"{own[best]['cpu_seconds']:,.0f}" for own in found]
    lines.append(["CPU s of `influence`, 30 queries", *seconds])
    return table(["after a third of training", *(result["bank"] for result in results)], lines)


COHERENT = ("source", "block of 5", "block of 20", "best 10")


def coherent(result: dict[str, Any]) -> str:
    """How sets of alike rows are predicted: slopes of what happened over what was said, by kind, and rank correlations."""
    lines = []
    for bank in result["banks"]:
        for facts in bank["ways"]:
            shown = [facts["kinds"][kind] for kind in COHERENT if kind in facts["kinds"]]
            slopes = [f"{kind['slope']:.2f} ({kind['correlation']:.2f})" for kind in shown]
            way = facts["way"].replace("@third", "")
            lines.append([bank["bank"], way, *slopes, within(facts["rank correlation over sets"], 3)])
    named = [kind for kind in COHERENT if kind in result["banks"][0]["ways"][0]["kinds"]]
    return table(["bank", "prediction", *named, "rank correlation over sets"], lines)
