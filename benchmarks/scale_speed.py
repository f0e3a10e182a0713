"""What do a second worker, scan workers and Ray change for the speed of building and searching an index?

    python benchmarks/scale_speed.py             # SmolLM2-135M would take hours: the pretrained stories260K, 1,500 rows
    python benchmarks/scale_speed.py --smoke

Building the same rows into the same index bit for bit (checked):
    one        in this process
    two        two worker processes
    ray one    one Ray actor          } left out without `ray`, and of the smoke form
    ray two    two Ray actors
Wall seconds include the start of workers, which load the model; CPU seconds are those of the committing process and of
worker processes (Ray's are children of its daemons and are not counted). `start` is a build of a few rows.
Searching: threads that scan segments, wall seconds.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corpora import data
from leaveout.readout.build import Pace
from leaveout.readout.index import Index
from leaveout.readout.opened import EncodedQueries
from measuring import alpaca, arguments, made_rows, spread, tiny, write_result

FEW = 8


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def timed(task: Callable[[], object]) -> dict[str, float]:
    before, began = cpu(), time.perf_counter()
    task()
    return {"wall_seconds": time.perf_counter() - began, "cpu_seconds": cpu() - before}


def ways(with_ray: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"one": {"workers": 1}, "two": {"workers": 2}}
    if not with_ray:
        return found
    try:
        import ray
    except ImportError:
        return found
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    return found | {f"ray {name}": {**options, "backend": "ray"} for name, options in found.items()}


def bits(index: Index) -> list[bytes]:
    return [array.tobytes() for segment in index.store.segments() for array in segment.arrays().values()]


def stored_bytes(index: Index) -> int:
    """Bytes of a row in all its forms, without its lengths."""
    return sum(codec.row_bytes for codec in (index.long, index.short) if codec is not None)


def building(
    model: str, rows: list[dict[str, str]], directory: Path, repeats: int, with_ray: bool = True
) -> dict[str, Any]:
    """Wall and CPU seconds of every way, and rows per second of all of it."""
    results: dict[str, Any] = {}
    whole: list[bytes] = []
    turns = list(ways(with_ray).items())
    for repeat in range(repeats):
        for name, options in turns[repeat % len(turns) :] + turns[: repeat % len(turns)]:
            for size, some in (("start", rows[:FEW]), ("all", rows)):
                place = directory / f"{repeat} {name} {size}"
                build = lambda place=place, some=some, options=options: Index.build(  # noqa: E731
                    model, some, place, "paper", pace=Pace(commit_seconds=1e9), **options
                )
                for key, value in timed(build).items():
                    results.setdefault(name, {}).setdefault(f"{size}_{key}", []).append(value)
            found = bits(Index.open(place))
            whole = whole or found
            if found != whole:
                raise AssertionError(f"{name} built another index")
    for facts in results.values():
        facts["rows_per_second"] = [len(rows) / wall for wall in facts["all_wall_seconds"]]
    return {name: {key: spread(values) for key, values in facts.items()} for name, facts in results.items()}


def searching(model: str, rows: list[dict[str, str]], directory: Path, repeats: int) -> dict[str, Any]:
    """Wall seconds of a search with so many threads, over segments of 4 MiB."""
    index = Index.build(model, rows, directory / "searched", "paper", pace=Pace(commit_bytes=4 * 2**20))
    queries = index.encode(rows[:4])
    queries = EncodedQueries(queries.vectors.repeat(4, 1), queries.texts * 4, queries.fingerprint)
    times: dict[int, list[float]] = {1: [], 2: []}
    wanted = index.search(queries, workers=1)
    for _ in range(repeats + 1):
        for workers, values in times.items():
            values.append(timed(lambda workers=workers: index.search(queries, workers=workers))["wall_seconds"])
            if index.search(queries, workers=workers) != wanted:
                raise AssertionError("other hits with other workers")
    catalogue = (index.path / "catalogue.sqlite").stat().st_size
    return {
        "rows": len(index),
        "queries": len(queries),
        "segments": len(index.store.segments()),
        "bytes_per_row": {"signature": stored_bytes(index), "catalogue": catalogue / len(index)},
        "wall_seconds": {f"{workers} workers": spread(values[1:]) for workers, values in times.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this machine only
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the processes that they are compared with
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if args.smoke:
            readout, rows, repeats = tiny(args.seed), made_rows(24, args.seed), 1
            model = str(directory / "model")
            readout.lm.save_pretrained(model)  # type: ignore[operator]
            readout.tokenizer.save_pretrained(model)
        else:
            model, rows, repeats = str(data("stories260K")), alpaca(args.seed)[:1500], args.repeats
        load = {"before": os.getloadavg()[0]}
        built = building(model, rows, directory, repeats, with_ray=not args.smoke)
        searched = searching(model, rows, directory, repeats)
        load["after"] = os.getloadavg()[0]
    for name, facts in built.items():
        print(
            f"{name:8} {facts['rows_per_second']['median']:8.1f} rows/s, CPU {facts['all_cpu_seconds']['median']:.1f} s"
        )
    print({name: round(value["median"], 3) for name, value in searched["wall_seconds"].items()})
    result = {"question": (__doc__ or "").split("\n", 1)[0], "rows": len(rows), "repeats": repeats}
    result |= {"cores": os.cpu_count(), "load": load, "building": built, "searching": searched}
    print(write_result(args.out, "readout_scale.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
