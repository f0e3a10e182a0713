"""How fast are rows scanned in the forms that an index stores, and what does an index of a million of them cost?

    python benchmarks/search_speed.py                    # scans, some minutes
    python benchmarks/search_speed.py --part million     # 17 GB of disk, deleted afterwards
    python benchmarks/search_speed.py --part usual       # 2 GB of disk, deleted afterwards
    python benchmarks/search_speed.py --smoke

`scan`: rows a CPU second of one core, by one query and by 16, interleaved in one run, all in memory. The rows are random
triples of the parts of `default` at hidden size 576 whose singular values fall as in k ** -0.7, 200 of them repeated:
    short     the short form of 2,048 bytes, from which a search takes its list
    long      the long form of 14,336 bytes, whose scores are called exact
    former    24 triples a part in 4.25 bits a number, as rows were stored before, scanned as they were: `former_scan`
and vectors of 24,576 numbers, as `paper` has them:
    flat short, flat    one bit a number in 2,048 bytes, and float16
    flat list           flat short, then float16 of the best 5 %
    plain               all of the float16 widened at once, then multiplied: what a search without buffers does
    sign bits           8,192 bits a row, exclusive or with the query's, counted by numpy's `bitwise_count`: SimHash
    sign bits, table    the same, counted by a table of bytes, as numpy before 2 must
Beside them stands what the official code of arXiv 2604.16197 took for its own rows, measured before and not repeated here.
On another make of processor kernels differ: all is repeated in a process that may use no more than AVX2.

`million`: a store with the arrays of an index, in segments of 64 MiB: 200 encoded rows again and again, with one random bit
flipped in 5 % of the bytes of their codes. Searched by the package's own search.

`usual`: such a store of 100,000 rows. What a search of it costs by one query, and what the best row usually scores for other
rows (`usual_best`): found, and as it is kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.readout.codec import (
    BUFFER,
    QUERIES,
    ROWS,
    SCANNED,
    SCORED,
    Arrays,
    Codec,
    Filled,
    Planes,
    Whole,
    evened,
    filled,
    multiple,
)
from leaveout.readout.forms import Triples
from leaveout.readout.opened import KIND, EncodedQueries, OpenIndex
from leaveout.readout.scan import ranking
from leaveout.readout.search import KEPT, SearchOptions, find, planned, refuse, usual_best
from leaveout.readout.settings import PRESETS
from leaveout.store import Store
from measuring import arguments, cpu_seconds, interleaved, peak_memory, ratio, spread, write_result
from store_speed import records

SIZES = ((1024, 576), *((576, 1536),) * 3)  # of SmolLM2-135M: head, and three MLP outputs
ORDERED = ((True, True),) * len(SIZES)
ROW_TRIPLES, QUERY_TRIPLES = 48, 46  # of each part; 46 learned tokens is the mean of instruction rows
PAPER = 24_576  # numbers of a row of `paper`
LONG_BYTES, SHORT_BYTES = 14_336, 2_048
MADE = 200  # rows that are encoded
LIST = 0.05
FORMER_RANK, FORMER_BLOCK = 24, 64
SIGN_BITS = 8192
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
BYTES = {"short": SHORT_BYTES, "long": LONG_BYTES, "former": 101_188, "flat short": SHORT_BYTES, "flat": 2 * PAPER + 4}
OFFICIAL = {"float16": 20_000 / 7.5, "SimHash": 20_000 / 2.1}  # rows a second of its search, one query
GOALS = {  # at least; `16 queries over one` at most
    "short over former": 30,
    "flat short over former": 100,
    "long over former": 5,
    "16 queries over one": 6,
    "flat list over plain": 20,
    "flat list over sign bits": 6,
}
SEGMENT = 64 * 2**20  # bytes of a segment, as an index is built
FLIPPED = 0.05
SOURCES = 100


def triples(form: Triples, n_rows: int, rank: int, seed: int) -> Tensor:
    """Random rows [n_rows, width] whose k-th triple of each part stands for k ** -0.7."""
    generator, root = torch.Generator().manual_seed(seed), torch.arange(1.0, rank + 1)[:, None] ** -0.35
    factors = [
        tuple(torch.randn(n_rows, rank, size, generator=generator) / size**0.5 * root for size in sizes)
        for sizes in form.sizes
    ]
    return form.joined(factors)


def repeated(arrays: Arrays, n_rows: int) -> dict[str, np.ndarray]:
    """The same rows again and again, n_rows of them."""
    return {name: np.resize(array, (n_rows, *array.shape[1:])) for name, array in arrays.items()}


def scanned(codec: Codec, arrays: Arrays, queries: Tensor) -> np.ndarray:
    """Scores [rows, queries] of all rows."""
    score = codec.scorer(queries)
    return np.concatenate([score(arrays, at) for at in codec.blocks(len(arrays["scale"]))])


# ---------------------------------------------------------------- what it is compared with


def former_rows(form: Triples, rows: Tensor) -> dict[str, np.ndarray]:
    """The largest triples in 4 bits a number: two numbers a byte, blocks of 64 with a float16 scale relative to the row's."""
    cut = form.joined([(u[:, :FORMER_RANK], v[:, :FORMER_RANK]) for u, v in form.factors(rows)])
    blocks = cut.unflatten(1, (-1, FORMER_BLOCK))
    largest = blocks.abs().amax(2)
    scale = largest.amax(1) / 7.0
    relative = (largest / 7.0 / scale[:, None]).half()
    codes = (blocks / (relative.float() * scale[:, None])[:, :, None]).round_().clamp_(-7, 7).to(torch.int8)
    low, high = codes[:, :, : FORMER_BLOCK // 2], codes[:, :, FORMER_BLOCK // 2 :]
    packed = ((low & 15) | (high << 4)).flatten(1)
    return {"signature": packed.numpy(), "scale": scale.numpy(), "block_scale": relative.numpy()}


def former_scan(form: Triples, arrays: Arrays, queries: Tensor) -> np.ndarray:
    """Scores [rows, queries] as they were made: rows are widened into one reused buffer, then multiplied part by part."""
    tables = []
    for u, v in form.factors(queries):  # the triples of all queries side by side
        left, right = (evened(x.flatten(0, 1)).t().contiguous() for x in (u, v))
        owner = torch.zeros(left.shape[1], len(evened(queries)))
        at = torch.arange(u.shape[0] * u.shape[1])
        owner[at, at // u.shape[1]] = 1.0
        tables.append((left, right, owner))
    width, n_rows = form.width(FORMER_RANK), len(arrays["scale"])
    step = multiple(max(1, BUFFER // (4 * width)), ROWS)
    buffer = torch.zeros(step * width)
    scores = []
    for start in range(0, n_rows, step):
        at = slice(start, min(start + step, n_rows))
        blocks = torch.from_numpy(arrays["signature"][at]).unflatten(1, (-1, FORMER_BLOCK // 2))
        out = buffer[: 2 * blocks.numel()].view(*blocks.shape[:2], 2, FORMER_BLOCK // 2)
        out[:, :, 0].copy_(blocks << 4)  # sixteen times the number, sign included
        out[:, :, 1].copy_(blocks & -16)
        out.mul_(torch.from_numpy(arrays["block_scale"][at]).float().div_(16.0)[:, :, None, None])
        rows = buffer.view(-1, width)[: multiple(len(blocks), ROWS)]
        total = torch.zeros(len(rows), len(evened(queries)))
        for (u, v), (a, b, owner) in zip(form.factors(rows), tables, strict=True):
            both = (u.flatten(0, 1) @ a) * (v.flatten(0, 1) @ b)
            total += both.unflatten(0, (len(rows), FORMER_RANK)).sum(1) @ owner
        scores.append(total[: len(blocks), : len(queries)].numpy())
    return np.concatenate(scores) * (arrays["scale"] ** 2)[:, None]


def list_scores(short: Codec, few: Arrays, long: Codec, arrays: Arrays, query: Tensor) -> np.ndarray:
    """Exact scores of the best rows by their short form."""
    best = np.sort(ranking(scanned(short, few, query)[:, 0])[: round(LIST * len(arrays["scale"]))])
    score = long.scorer(query)
    return np.concatenate([score(arrays, best[at]) for at in long.blocks(len(best))])


# ---------------------------------------------------------------- scans


def forms() -> tuple[Filled, Filled]:
    """The short form and the long one."""
    return filled(SIZES, ORDERED, SHORT_BYTES, 0, SCANNED), filled(SIZES, ORDERED, LONG_BYTES, 0, SCORED)


def scans(rows: dict[str, int], made: int, seed: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> rows, and what scans them. `rows`: how many of short, long, former and flat ones."""
    form, (short, long) = Triples(SIZES), forms()
    tall = triples(form, made, ROW_TRIPLES, seed)
    arrays = {"short": short.encode(tall), "long": long.encode(tall), "former": former_rows(form, tall)}
    arrays = {name: repeated(found, rows[name]) for name, found in arrays.items()}
    generator = torch.Generator().manual_seed(seed + 1)
    wide, bits = torch.randn(made, PAPER, generator=generator), Planes(PAPER, min(PAPER, 8 * (SHORT_BYTES - 4)), 1, 0)
    whole = Whole(PAPER, "float16")
    few, all_ = (repeated(codec.encode(wide), rows["flat"]) for codec in (bits, whole))
    half, signs = torch.from_numpy(all_["signature"]), np.resize(_signs(wide), (rows["flat"], SIGN_BITS // 64))
    tasks: dict[str, tuple[int, Callable[[], object]]] = {}
    for n in (1, QUERIES):
        asked, flat = triples(form, n, QUERY_TRIPLES, seed + 2), torch.randn(n, PAPER, generator=generator)
        padded = form.widened(asked, SCORED)  # as `Index.encode` gives them
        tasks |= {
            f"short, {n}": (rows["short"], lambda q=padded: scanned(short, arrays["short"], q)),
            f"long, {n}": (rows["long"], lambda q=padded: scanned(long, arrays["long"], q)),
            f"former, {n}": (rows["former"], lambda q=asked: former_scan(form, arrays["former"], q)),
            f"flat short, {n}": (rows["flat"], lambda q=flat: scanned(bits, few, q)),
            f"flat, {n}": (rows["flat"], lambda q=flat: scanned(whole, all_, q)),
        }
        if n == 1:
            own, table = _signs(flat), np.bitwise_count(np.arange(256, dtype=np.uint8))
            tasks |= {
                "flat list, 1": (rows["flat"], lambda q=flat: list_scores(bits, few, whole, all_, q)),
                "plain, 1": (rows["flat"], lambda q=flat: half.float() @ q.t()),
                "sign bits, 1": (rows["flat"], lambda own=own: np.bitwise_count(signs ^ own).sum(1, dtype=np.int32)),
                "sign bits, table, 1": (
                    rows["flat"],
                    lambda own=own, table=table: table[(signs ^ own).view(np.uint8)].sum(1, dtype=np.int32),
                ),
            }
    return tasks


def _signs(vectors: Tensor) -> np.ndarray:
    """Sign bits [rows, words] of the first numbers of vectors, 64 in a word."""
    return np.packbits(vectors[:, :SIGN_BITS].numpy() > 0, axis=1).view(np.uint64)


def measure_scans(rows: dict[str, int], made: int, repeats: int, seed: int) -> dict[str, Any]:
    """Rows a second of all scans, and ratios of speeds."""
    tasks = scans(rows, made, seed)
    for _, task in tasks.values():
        task()
    times = interleaved({name: task for name, (_, task) in tasks.items()}, repeats)
    a_row = {name: [value / tasks[name][0] for value in found] for name, found in times.items()}
    over = {
        "short over former": ("former, 1", "short, 1"),
        "short over former, 16 queries": ("former, 16", "short, 16"),
        "long over former": ("former, 1", "long, 1"),
        "long over former, 16 queries": ("former, 16", "long, 16"),
        "16 queries over one": ("short, 16", "short, 1"),
        "16 queries over one, long": ("long, 16", "long, 1"),
        "16 queries over one, flat short": ("flat short, 16", "flat short, 1"),
        "flat short over former": ("former, 1", "flat short, 1"),
        "flat list over plain": ("plain, 1", "flat list, 1"),
        "flat list over sign bits": ("sign bits, 1", "flat list, 1"),
        "flat list over sign bits, table": ("sign bits, table, 1", "flat list, 1"),
        "flat short over plain": ("plain, 1", "flat short, 1"),
        "flat short over sign bits": ("sign bits, 1", "flat short, 1"),
    }
    return {
        "rows": {name: n for name, (n, _) in tasks.items()},
        "repeats": repeats,
        "rows_a_second": {name: spread([1 / value for value in found]) for name, found in a_row.items()},
        "over_official": {
            name: spread([1 / value / slow for value in a_row["flat list, 1"]]) for name, slow in OFFICIAL.items()
        },
        "ratios": {name: ratio(a_row[slow], a_row[fast]) for name, (slow, fast) in over.items()},
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def on_avx2(args: Any) -> dict[str, Any]:
    """The same in a process that uses no later kernels."""
    command = [sys.executable, __file__, "--path", "--repeats", str(args.repeats), "--seed", str(args.seed)]
    command += ["--smoke"] if args.smoke else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **AVX2})
    return json.loads(done.stdout.splitlines()[-1])


def goals_of(ratios: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for name, goal in GOALS.items():
        found = ratios[name]["median"]
        reached = found <= goal if name == "16 queries over one" else found >= goal
        lines.append({"what": name, "goal": goal, "measured": found, "reached": reached})
    return lines


# ---------------------------------------------------------------- a million rows


def flipped(codes: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Codes with one bit flipped in some of their bytes."""
    at = chance.integers(0, codes.size, round(FLIPPED * codes.size))
    made = codes.copy()
    made.reshape(-1)[at] ^= 1 << chance.integers(0, 8, len(at), dtype=np.uint8)
    return made


def of_sources(n: int) -> dict[str, Any]:
    """The field of row n, one of a hundred sources."""
    return {"source": f"source {n * 7919 % SOURCES}"}


def encoded(made: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The arrays of a segment for so many rows, and CPU seconds of encoding a row in both forms."""
    form, (short, long) = Triples(SIZES), forms()
    rows, base = triples(form, made, ROW_TRIPLES, seed), {}
    seconds: dict[str, float] = {}
    for name, codec in (("long", long), ("short", short)):
        began = time.process_time()
        base |= {f"{name}.{key}": array for key, array in codec.encode(rows).items()}
        seconds[name] = (time.process_time() - began) / made
    return base | {"norms": form.part_lengths(rows).numpy()}, seconds


def fill(place: Path, base: dict[str, np.ndarray], n_rows: int, seed: int) -> dict[str, Any]:
    """Makes the store; CPU seconds of putting all rows, without those of making them."""
    size = sum(array[0].nbytes for array in base.values())
    step, chance, seconds = SEGMENT // size, np.random.default_rng(seed), 0.0
    short, long = forms()
    settings = {
        "kind": KIND,
        "signature": PRESETS["default"].to_dict(),
        "model": {"weights": "none", "config": "none", "tokenizer": "none"},
        "codec": {"long": long.to_dict(), "short": short.to_dict()},
    }
    with Store.create(place, settings) as store:
        for first in range(0, n_rows, step):
            count = min(step, n_rows - first)
            arrays = repeated(base, count)
            for name in ("long.codes", "short.codes"):
                arrays[name] = flipped(arrays[name], chance)
            entries = records(first, count, of_sources)
            seconds += cpu_seconds(lambda entries=entries, arrays=arrays: store.put(entries, arrays))
        segments = len(store.segments())
    sizes = {"long": long.row_bytes, "short": short.row_bytes, "all": size}
    return {
        "bytes_per_row": sizes, "segments": segments, "put_cpu_seconds": seconds, "put_rows_a_second": n_rows / seconds,
    }  # fmt: skip


def searches(index: OpenIndex, repeats: int, seed: int) -> dict[str, Any]:
    """CPU seconds of searches for the best ten by one query, and of the filter alone; peaks of memory."""
    asked = index.form.widened(triples(index.form, 1, QUERY_TRIPLES, seed + 2), SCORED)  # type: ignore[union-attr]
    query, where = EncodedQueries(asked, ("a query",), index.fingerprint), "source = 'source 7'"
    cases: dict[str, tuple[str | None, SearchOptions]] = {
        "list of 5 %": (None, SearchOptions(shortlist=max(10, round(LIST * len(index))))),
        "list of 10,000": (None, SearchOptions(shortlist=min(10_000, len(index) // 2))),
        "filtered, list of 5 %": (where, SearchOptions(shortlist=max(10, round(LIST * len(index) / SOURCES)))),
    }
    tasks: dict[str, Callable[[], Any]] = {
        name: lambda where=where, options=options: find(index, query, 10, where, options)
        for name, (where, options) in cases.items()
    }
    plans = {
        name: str(planned(index, 10, refuse(index, 10, where, options), options))
        for name, (where, options) in cases.items()
    }
    tasks["filter alone"] = lambda: index.numbers_where(where)
    first = [hit.id for hit in tasks["list of 5 %"]()[0]]
    memory = {name: peak_memory(task) for name, task in tasks.items()}
    times = interleaved(tasks, repeats)
    if [hit.id for hit in tasks["list of 5 %"]()[0]] != first:
        raise AssertionError("another search, other hits")
    return {
        "plans": plans,
        "cpu_seconds": {name: spread(found) for name, found in times.items()},
        "filtered_over_full": ratio(times["filtered, list of 5 %"], times["list of 5 %"]),
        "peak_mb_above_start": memory,
    }


def measure_million(directory: Path, n_rows: int, made: int, repeats: int, seed: int) -> dict[str, Any]:
    place, built = directory / "index", {}
    base, encoding = encoded(made, seed)
    peak = peak_memory(lambda: built.update(fill(place, base, n_rows, seed)))
    disk = {file.name: file.stat().st_size for file in place.iterdir()}
    return {
        "rows": n_rows,
        "repeats": repeats,
        "encode_seconds_per_row": encoding,
        **built,
        "disk_bytes": {"all": sum(disk.values()), "catalogue": disk["catalogue.sqlite"]},
        "build_peak_mb_above_start": peak,
        **searches(OpenIndex(Store.open(place)), repeats, seed),
    }


def measure_usual(directory: Path, n_rows: int, made: int, repeats: int, seed: int) -> dict[str, Any]:
    fill(directory / "index", encoded(made, seed)[0], n_rows, seed)
    index = OpenIndex(Store.open(directory / "index"))
    asked = index.form.widened(triples(index.form, 1, QUERY_TRIPLES, seed + 2), SCORED)  # type: ignore[union-attr]
    query, kept = EncodedQueries(asked, ("a query",), index.fingerprint), index.path / KEPT
    tasks: dict[str, Callable[[], Any]] = {
        "search, list of 5 %": lambda: find(index, query, 10),
        "usual, found": lambda: (kept.unlink(missing_ok=True), usual_best(index)),
        "usual, kept": lambda: usual_best(index),
    }
    times = interleaved(tasks, repeats)
    return {"rows": n_rows, "repeats": repeats, "cpu_seconds": {name: spread(found) for name, found in times.items()}}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("scan", "million", "usual"), default="scan")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, help="of the parts `million` (a million) and `usual` (100,000)")
    parser.add_argument("--work", type=Path, help="directory on the disk to use; default: that of temporary files")
    parser.add_argument("--path", action="store_true", help="print the scans of this process and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    question = (__doc__ or "").split("\n", 1)[0]
    if args.part == "usual":
        n_rows, made, repeats = (1200, 20, 2) if args.smoke else (args.rows or 100_000, MADE, args.repeats)
        with tempfile.TemporaryDirectory(dir=args.work) as directory:
            found = measure_usual(Path(directory), n_rows, made, repeats, args.seed)
        print(found["cpu_seconds"])
        print(write_result(args.out, "readout_search_usual.json", {"question": question, **found}, args).name)
        return 0
    if args.part == "million":
        n_rows, made, repeats = (600, 20, 2) if args.smoke else (args.rows or 1_000_000, MADE, args.repeats)
        with tempfile.TemporaryDirectory(dir=args.work) as directory:
            found = measure_million(Path(directory), n_rows, made, repeats, args.seed)
        for name in ("put_rows_a_second", "disk_bytes", "cpu_seconds", "filtered_over_full", "peak_mb_above_start"):
            print(name, found[name])
        result = {"question": question, "made_of": made, "bytes_flipped": FLIPPED, **found}
        print(write_result(args.out, "readout_search_million.json", result, args).name)
        return 0
    rows = {"short": 8192, "long": 2048, "former": 512, "flat": 5120}
    rows, made = (dict.fromkeys(rows, 64), 8) if args.smoke else (rows, MADE)
    repeats = 2 if args.smoke else args.repeats
    found = measure_scans(rows, made, repeats, args.seed)
    if args.path:
        print(json.dumps(found))
        return 0
    for name, speed in found["rows_a_second"].items():
        print(f"{name:20} {speed['median']:12,.0f} rows/s [{speed['low']:,.0f}, {speed['high']:,.0f}]")
    goals = goals_of(found["ratios"])
    for goal in goals:
        print(f"{'reached' if goal['reached'] else 'MISSED '} {goal['what']}: {goal['measured']:.1f} ({goal['goal']})")
    result = {
        "question": question, "bytes_per_row": BYTES, **found, "official_rows_a_second": OFFICIAL, "goals": goals,
        "paths": {"AVX2": on_avx2(args)},
    }  # fmt: skip
    print(write_result(args.out, "readout_search.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
