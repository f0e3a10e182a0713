"""What do a million, a hundred million and ten thousand million rows cost in bytes, seconds and machines?

    python benchmarks/scale_cost.py              # rewrites the table in docs/evidence/scale.md from the result files
    python benchmarks/scale_cost.py --check      # 1 if the page differs from them

Nothing is measured here: rates come from readout_index_cost.json (CPU seconds per row of one thread),
readout_search.json (rows scanned a CPU second in both forms, in one run) and readout_scale.json (catalogue, workers).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- table:cost -->\n(.*?)<!-- end:cost -->", re.DOTALL)
ROWS = (10**6, 10**8, 10**10)
CORES = 64  # of one machine
DISK = 30e12  # bytes of one machine
DAY, MINUTE = 86_400.0, 60.0
LIST = 10_000


def rates(results: Path) -> dict[str, Any]:
    read = {
        name: json.loads((results / f"readout_{name}.json").read_text()) for name in ("index_cost", "search", "scale")
    }
    for name, result in read.items():
        if result["smoke"]:
            raise ValueError(f"readout_{name}.json is of a smoke run: run the benchmark in full.")
    model = read["index_cost"]["models"]["SmolLM2-135M"]
    rates = {name: found["median"] for name, found in read["search"]["rows_a_second"].items()}
    sizes = read["search"]["bytes_per_row"]
    return {
        "index": model["cpu_seconds"]["default/response"]["median"] / model["rows"],
        "short": rates["short, 16"],
        "long": rates["long, 16"],
        "list": rates["long, 1"],
        "short bytes": sizes["short"],
        "long bytes": sizes["long"],
        "catalogue": read["scale"]["searching"]["bytes_per_row"]["catalogue"],
        "workers": read["scale"],
    }


def size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if n_bytes < 1000 or unit == "PB":
            return f"{n_bytes:,.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError


def minutes(seconds: float) -> str:
    value = seconds / MINUTE
    return f"{value:,.0f} core minutes" if value >= 10 else f"{value:.2g} core minutes"


def workers(result: dict[str, Any]) -> str:
    """How fast each way of building was, and how busy the machine."""
    text = f"| {result['rows']:,} rows on {result['cores']} cores | rows/s, start included | start, s | rest, s | CPU s |\n"
    text += "| --- | ---: | ---: | ---: | ---: |\n"
    for name, facts in result["building"].items():
        rate, start = facts["rows_per_second"], facts["start_wall_seconds"]["median"]
        seconds = "not counted" if name.startswith("ray") else f"{facts['all_cpu_seconds']['median']:.0f}"
        rest = facts["all_wall_seconds"]["median"] - start
        spread = f"{rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}]"
        text += f"| {name} | {spread} | {start:.0f} | {rest:.1f} | {seconds} |\n"
    load = result["load"]
    return text + f"\nLoad average before and after: {load['before']:.1f}, {load['after']:.1f}.\n"


def cost(found: dict[str, Any]) -> str:
    """Two tables: the rates, and what follows from them."""
    r = found
    text = "| measured on one core | |\n| --- | ---: |\n"
    for name, value in [
        ("index a row (`default`, SmolLM2-135M, answers of instructions)", f"{r['index']:.2f} CPU s"),
        ("scan short forms, 16 queries at once", f"{r['short']:,.0f} rows/s"),
        ("scan long forms, 16 queries at once", f"{r['long']:,.0f} rows/s"),
        ("scan long forms, one query", f"{r['list']:,.0f} rows/s"),
        ("long form, short form, catalogue with text",
         f"{r['long bytes']:,}, {r['short bytes']:,}, {r['catalogue']:,.0f} bytes a row"),
    ]:  # fmt: skip
        text += f"| {name} | {value} |\n"
    text += f"\n| rows | {' | '.join(f'10^{len(str(n)) - 1}' for n in ROWS)} |\n| --- | ---: | ---: | ---: |\n"
    own = r["long bytes"] + r["short bytes"] + r["catalogue"]
    lines = {
        "long forms = rows x long form": lambda n: size(n * r["long bytes"]),
        "short forms = rows x short form": lambda n: size(n * r["short bytes"]),
        "catalogue = rows x catalogue": lambda n: size(n * r["catalogue"]),
        f"machines of {CORES} cores to index in a day": lambda n: f"{-(-n * r['index'] // (CORES * DAY)):,.0f}",
        f"machines of {size(DISK)} to hold it": lambda n: f"{-(-n * own // DISK):,.0f}",
        "lists of 16 queries = rows / scan of short forms": lambda n: minutes(n / r["short"]),
        f"a list of {LIST:,} scored exactly, one query": lambda n: minutes(LIST / r["list"]),
        "16 queries with all rows scored exactly": lambda n: minutes(n / r["long"]),
    }
    for name, value in lines.items():
        text += f"| {name} | {' | '.join(value(n) for n in ROWS)} |\n"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table differs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence" / "scale.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    old = args.page.read_text()
    found = rates(args.results)
    table = cost(found) + "\n" + workers(found["workers"])
    new = MARKED.sub(lambda _: f"<!-- table:cost -->\n{table}<!-- end:cost -->", old)
    if args.check:
        return int(new != old)
    args.page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
