"""Tables of stored forms: what a row's bytes keep, how fast they are scanned, and what they cost to make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from leaveout.readout.codec import SCANNED, SCORED, Filled, filled
from leaveout.readout.settings import PRESETS
from tables_tasks import table, times, within

STAGES = {
    "one stage": ("code", "one stage"),
    "two stages, list of 1 %": ("code, short queries", "list 1%"),
    "two stages, list of 5 %": ("code, short queries", "list 5%"),
}
"""How all rows are ranked -> the code by which, and the stage, as codes.py names them."""
CODES = {
    "code": "code",
    "whole sides": "the same, no side cut",
    "triples in 4 bits": "former form: as many triples of each part, 4 bits",
    "projection": "random projection, int8",
    "signs": "its sign bits, queries' too (SimHash)",
    "components": "principal components of 300 other rows, int8",
}
FEW = (1024, 2048, 4096)


# ---------------------------------------------------------------- what is kept


def _shares(bank: dict[str, Any]) -> dict[tuple[int, str, str], float]:
    return {(line["bytes"], line["code"], line["stage"]): line["share"] for line in bank["lines"]}


def codes_lds(result: dict[str, Any]) -> str:
    """Share of the exact product's LDS by bytes and stage, a column a bank, one table a preset."""
    parts = []
    for preset in dict.fromkeys(bank["preset"] for bank in result["banks"]):
        banks = [bank for bank in result["banks"] if bank["preset"] == preset]
        shares = [_shares(bank) for bank in banks]
        head = [f"`{preset}`: share of the exact LDS", *(bank["bank"] for bank in banks), "mean"]
        lines = [["exact LDS itself", *(within(bank["exact"], 3) for bank in banks), ""]]
        for stage, (code, name) in STAGES.items():
            for n_bytes in sorted({n for found in shares for n, *_ in found}):
                own = [found.get((n_bytes, code, name)) for found in shares]
                lines.append([f"{n_bytes:,} bytes, {stage}", *_cells(own)])
        parts.append(table(head, lines))
    return "\n".join(parts)


def codes_others(result: dict[str, Any]) -> str:
    """The mean share over the banks of every kind of code at no more bytes, for `default`."""
    shares = [_shares(bank) for bank in result["banks"] if bank["preset"] == "default"]
    head = ["`default`, mean over banks"]
    head += [f"{n:,} bytes: {stage}" for n in FEW for stage in ("one stage", "list of 5 %")]
    lines = []
    for code, text in CODES.items():
        line = [text]
        for n_bytes in FEW:
            for stage in ("one stage", "list 5%"):
                own = [found.get((n_bytes, code, stage)) for found in shares]
                line.append(_cells(own)[-1])
        lines.append(line)
    return table(head, lines)


def _cells(shares: list[float | None]) -> list[str]:
    """Shares, and their mean where all are there."""
    known = [share for share in shares if share is not None]
    mean = f"{sum(known) / len(known):.1%}" if known and len(known) == len(shares) else ""
    return [*("" if share is None else f"{share:.1%}" for share in shares), mean]


def codes_recall(result: dict[str, Any]) -> str:
    head = [
        f"{result['rows']:,} rows, {result['repeats']} queries", "bytes", "of the best ten, first ten", "in the best 1 %",
        "2 %", "5 %", "10 %",
    ]  # fmt: skip
    names = ("recall@10", *(f"in the best {share:.0%}" for share in (0.01, 0.02, 0.05, 0.1)))
    kinds = {**CODES, "code, short queries": "code, 16 triples of a query (short form)"}
    lines = [
        [
            kinds[line["code"]],
            f"{line['bytes']:,}",
            within(line[names[0]]),
            *(f"{line[n]['mean']:.2f}" for n in names[1:]),
        ]
        for line in sorted(result["lines"], key=lambda line: (list(kinds).index(line["code"]), line["bytes"]))
    ]
    return table(head, lines)


# ---------------------------------------------------------------- bytes, by formula

MODELS = {  # hidden size -> inputs of an MLP's output projection
    "SmolLM2-135M": (576, 1536),
    "OLMo-2 1B": (2048, 8192),
    "OLMo-2 7B": (4096, 11_008),
    "OLMo-2 13B": (5120, 13_824),
}
RAPIDIN, RISE = 131_072, (49_152, 1_024)
HEAD, BLOCKS = 1024, 3  # of `default`: buckets of the head, MLP outputs


def row_bytes() -> str:
    """What rows of `default` hold at other sizes: nothing of it is measured."""
    settings = PRESETS["default"]
    assert settings.bytes_per_row is not None and settings.short_bytes is not None
    head = [
        "`default`", "hidden size", "numbers of the exact form", "bytes a row", "RapidIn over it", "RISE over it",
        "kept of a side, long form", "triples a part at 1 bit", "kept, short form", "triples a part",
    ]  # fmt: skip
    lines = []
    for name, (hidden, inner) in MODELS.items():
        sizes = ((HEAD, hidden), *((hidden, inner),) * BLOCKS)
        long = filled(
            sizes, ((True, True),) * len(sizes), settings.bytes_per_row - settings.short_bytes, settings.seed, SCORED
        )
        short = filled(sizes, ((True, True),) * len(sizes), settings.short_bytes, settings.seed, SCANNED)
        own = settings.bytes_per_row
        rise = " and ".join(_ratio(other / own) for other in RISE)
        lines.append([
            name, f"{hidden:,}", f"{sum(left * right for left, right in sizes):,}", f"{own:,}", _ratio(RAPIDIN / own), rise,
            _sides(long), f"{_fitting(long):.0f}", _sides(short), f"{_fitting(short):.0f}",
        ])  # fmt: skip
    return table(head, lines)


def _ratio(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _sides(codec: Filled) -> str:
    """What is kept of both sides of the head's part and of a block's."""
    return ", ".join(" x ".join(map(str, codec.kept[part])) for part in (0, 1))


def _fitting(codec: Filled) -> float:
    """Triples of each part that fit at one bit, if all parts have as many."""
    return codec.code_bytes // sum(codec.plane_bytes)


# ---------------------------------------------------------------- speed

FORMS = {
    "short": "short form of `default`",
    "long": "long form of `default`",
    "former": "former form: 24 triples a part in 4.25 bits",
    "flat short": "short form of vectors of 24,576 numbers",
    "flat": "the vectors in float16",
}
OTHERS = {
    "flat list": "short form, then float16 of the best 5 %",
    "plain": "float16, all of it widened, then multiplied",
    "sign bits": "8,192 sign bits, `bitwise_count`",
    "sign bits, table": "8,192 sign bits, a table of bytes",
}
RATIOS = {
    "short over former": "short form over the former scan",
    "short over former, 16 queries": "the same, 16 queries",
    "long over former": "long form over the former scan",
    "long over former, 16 queries": "the same, 16 queries",
    "flat short over former": "short form of vectors over the former scan",
    "16 queries over one": "short form: 16 queries over one, time",
    "flat list over plain": "vectors, list of 5 %, over plain float16",
    "flat list over sign bits": "vectors, list of 5 %, over sign bits",
    "flat list over sign bits, table": "the same, over sign bits by a table",
}


def search(result: dict[str, Any]) -> str:
    """Rows a second of one core by one query and by 16."""
    rates, sizes = result["rows_a_second"], result["bytes_per_row"]
    lines = []
    for name, text in {**FORMS, **OTHERS}.items():
        own = [rates.get(f"{name}, {n}") for n in (1, 16)]
        size = "" if name not in sizes else f"{sizes[name]:,}"
        lines.append([text, size, *("" if one is None else _rate(one) for one in own)])
    return table(["scan in memory, hidden size 576", "bytes a row", "rows/s, 1 query", "rows/s, 16 queries"], lines)


def search_paths(result: dict[str, Any]) -> str:
    """Ratios of speeds on the processor's own kernels and on older ones."""
    ways = {"its own kernels": result, **result["paths"]}
    goals = {goal["what"]: goal["goal"] for goal in result["goals"]}
    head = ["ratios of speeds", *(f"{name} ({found['kernels']})" for name, found in ways.items()), "goal"]
    lines = [
        [text, *(_ratio(found["ratios"][name]["median"]) for found in ways.values()), _goal(name, goals)]
        for name, text in RATIOS.items()
    ]
    for name, other in result["over_official"].items():
        text = f"vectors, list of 5 %, over the official {name} search, measured before"
        lines.append([text, f"{other['median']:.0f}", *([""] * len(ways))])
    return table(head, lines)


def _goal(name: str, goals: dict[str, float]) -> str:
    if name not in goals:
        return ""
    return f"{'at most' if name == '16 queries over one' else 'at least'} {goals[name]:g}"


def _rate(found: dict[str, float]) -> str:
    return f"{found['median']:,.0f} [{found['low']:,.0f}, {found['high']:,.0f}]"


def index_lengths(result: dict[str, Any]) -> str:
    """Cost of indexing by the length of rows, where all tokens are learned and where half of them are."""
    parts = []
    for model, lines in result["models"].items():
        head = [f"{model}: tokens a row", "learned", "index over trunk", "ms a row", "ms a learned token"]
        parts.append(table(head, _lengths(lines)))
    return "\n".join(parts)


def _lengths(lines: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{line['tokens']:,}", f"{line['learned']:,}", times(line["index_over_trunk"]), f"{line['ms_a_row']:.0f}",
            f"{line['ms_a_row'] / line['learned']:.2f}",
        ]
        for line in lines
    ]  # fmt: skip


def million(result: dict[str, Any]) -> str:
    """An index of many rows."""
    seconds, memory, sizes = result["cpu_seconds"], result["peak_mb_above_start"], result["bytes_per_row"]
    head = [f"{result['rows']:,} rows of {sizes['all']:,} bytes, one query", "CPU s", "peak MB above the start"]
    lines = [
        [f"writing them: {result['put_rows_a_second']:,.0f} rows a CPU second", f"{result['put_cpu_seconds']:.0f}",
         f"{result['build_peak_mb_above_start']:.0f}"],
        *([f"search, {name}", f"{seconds[name]['median']:.2f}", f"{memory[name]:.0f}"]
          for name in ("list of 5 %", "list of 10,000")),
        ["1 % of the rows by SQL, list of 5 % of them", f"{seconds['filtered, list of 5 %']['median']:.2f}",
         f"{memory['filtered, list of 5 %']:.0f}"],
        ["of which SQL", f"{seconds['filter alone']['median']:.2f}", f"{memory['filter alone']:.0f}"],
        [f"filtered over full: {times(result['filtered_over_full'])} (goal 0.15)", "", ""],
        [f"disk: {result['disk_bytes']['all'] / 1e9:.1f} GB, {result['disk_bytes']['catalogue'] / 1e9:.2f} of them "
         "the catalogue", "", ""],
    ]  # fmt: skip
    return table(head, lines)


TABLES_OF_CODES = {
    "codes_lds": ("readout_codes_lds.json", codes_lds),
    "codes_others": ("readout_codes_lds.json", codes_others),
    "codes_recall": ("readout_codes_recall.json", codes_recall),
    "row_bytes": ((), row_bytes),
    "search": ("readout_search.json", search),
    "search_paths": ("readout_search.json", search_paths),
    "index_lengths": ("readout_index_lengths.json", index_lengths),
}
"""Name of a table of docs/evidence/readout.md -> its result file, the function that writes it."""
