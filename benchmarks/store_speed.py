"""What does the store cost: building, deleting, reading rows, filters, checking, and checking while reading?

    python benchmarks/store_speed.py            # 1,000,000 x 512 float16: 1.3 GB of disk, deleted afterwards
    python benchmarks/store_speed.py --smoke

The vectors are ready in memory (one piece of them, used for every segment) and the rows are made before the clock
starts. Times are CPU seconds of this process, the system's included; files are in the page cache. Memory is the largest
resident set of the process, libraries included.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from leaveout.store import Record, Store, segment
from measuring import arguments, cpu_seconds, interleaved, ratio, spread
from provenance import provenance

SEGMENT = 64 * 2**20  # bytes of vectors per segment, as an index is built
READ = 100  # rows read at once
GOALS = {
    "build_mb_per_second": 150,
    "delete_1_percent_seconds": 2,
    "read_100_rows_seconds": 0.01,
    "resident_mb": 400,
}


def rare(n: int) -> dict[str, Any]:
    """Two fields of row n; one row in a hundred is from a rare source."""
    return {"source": "web" if n % 100 else "rare", "year": 1990 + n % 30}


def records(first: int, count: int, meta: Callable[[int], dict[str, Any]] = rare) -> list[Record]:
    """Rows like those of an index: about fifty characters, fields, and a small `extra`."""
    return [
        Record(
            f"row {n}",
            f"The text of row {n}, of about fifty characters.",
            f"row {n}",
            meta(n),
            f"{n * 2654435761 % 2**128:032x}",
            {"number": n, "tokens": 12, "targets": 7},
        )
        for n in range(first, first + count)
    ]


def pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, SEGMENT // (2 * width))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def build(path: Path, rows: int, width: int, seed: int) -> dict[str, float]:
    """Fills a store; CPU seconds of `put`, and of writing the same segments without a catalogue."""
    count = next(pieces(rows, width))[1]
    generator, vectors = np.random.default_rng(seed), np.empty((count, width), np.float16)
    for start in range(0, count, 4096):  # in pieces, so that the peak of memory is the store's
        piece = vectors[start : start + 4096]
        piece[:] = generator.standard_normal(piece.shape, np.float32)
    with_catalogue, files_only = 0.0, 0.0
    with Store.create(path, {"kind": "benchmark"}) as store:
        for first, count in pieces(rows, width):
            made, arrays = records(first, count), {"signature": vectors[:count], "scale": np.ones(count, np.float32)}
            with_catalogue += cpu_seconds(lambda made=made, arrays=arrays: store.put(made, arrays))
            file = path / "alone"
            files_only += cpu_seconds(lambda file=file, arrays=arrays: segment.write(file, arrays))
            file.unlink()
    return {"seconds": with_catalogue, "files_only_seconds": files_only, "mb": rows * (2 * width + 4) / 1e6}


def scan(store: Store) -> float:
    """A scan that does nothing but widen all vectors and add them up, block by block."""
    total = 0.0
    for part in store.segments():
        vectors = part.arrays()["signature"]
        buffer = np.empty((2048, vectors.shape[1]), np.float32)
        for start in range(0, len(vectors), len(buffer)):
            block = vectors[start : start + len(buffer)]
            np.copyto(buffer[: len(block)], block)
            total += float(buffer[: len(block)].sum())
    return total


def measure(path: Path, rows: int, width: int, args: Any) -> dict[str, Any]:
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # mostly torch, which the store does not use
    built = build(path, rows, width, args.seed)
    chance, repeats = random.Random(args.seed), 2 if args.smoke else 5
    reader = Store.open(path)
    wanted = [chance.sample(range(rows), READ) for _ in range(20)]
    read = [cpu_seconds(lambda numbers=numbers: reader.rows(numbers)) for numbers in wanted]
    began = time.perf_counter()
    reader.rows(wanted[0])
    wall = time.perf_counter() - began
    filters = [cpu_seconds(lambda: reader.numbers_where("source = 'rare'")) for _ in range(2)]
    found = len(reader.numbers_where("source = 'rare'"))
    plain, verified = {}, {}
    for number in range(repeats):  # opened outside of the clock: only the scans are compared
        stores = {"plain": Store.open(path), "verified": Store.open(path, verify=True)}
        times = interleaved({name: lambda store=store: scan(store) for name, store in stores.items()}, 1)
        plain[number], verified[number] = times["plain"][0], times["verified"][0]
    opened = [cpu_seconds(lambda verify=verify: Store.open(path, verify=verify)) for verify in (False, True)]
    problems: list[str] = []
    checking = cpu_seconds(lambda: problems.extend(reader.check()))
    if problems:
        raise RuntimeError(f"the store is damaged: {problems[0]}")
    size = sum(file.stat().st_size for file in path.iterdir())
    with Store.open(path, write=True) as store:
        ids = [f"row {n}" for n in chance.sample(range(rows), rows // 100)]
        deleting = cpu_seconds(lambda: store.delete(ids))
    return {
        "build": built,
        "build_mb_per_second": built["mb"] / built["seconds"],
        "files_only_mb_per_second": built["mb"] / built["files_only_seconds"],
        "catalogue_us_per_row": (built["seconds"] - built["files_only_seconds"]) / rows * 1e6,
        "delete_1_percent_seconds": deleting,
        "read_100_rows_seconds": spread(read),
        "read_100_rows_wall_seconds": wall,
        "select_1_percent_seconds": {"rows": found, **spread(filters)},
        "check": {"seconds": checking, "mb_per_second": size / 1e6 / checking},
        "open_seconds": {"plain": opened[0], "verify": opened[1]},
        "scan_seconds": {"plain": spread(list(plain.values())), "verify": spread(list(verified.values()))},
        "verify_over_plain_scan": ratio(list(verified.values()), list(plain.values())),
        "bytes": {"store": size, "catalogue": (path / "catalogue.sqlite").stat().st_size},
        "resident_at_start_mb": at_start,
        "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "repeats": repeats,
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--json", type=Path, help="the result file (default: store_speed.json in --out)")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args(argv)
    rows, width = (3_000, 64) if args.smoke else (args.rows, args.width)
    directory = Path(tempfile.mkdtemp(prefix="store_speed."))
    try:
        result = measure(directory / "store", rows, width, args)
    finally:
        shutil.rmtree(directory)
    question = next(line for line in (__doc__ or "").splitlines() if line)
    result = {"question": question, "rows": rows, "width": width, "goals": GOALS, **result}
    result |= {"smoke": args.smoke, **provenance(args.seed)}
    file = args.json or args.out / "store_speed.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in (*GOALS, "verify_over_plain_scan")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
