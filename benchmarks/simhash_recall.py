"""Do sign bits find what an exact search of the `paper` signatures finds, in how many bytes and how fast?

    python benchmarks/simhash_recall.py          # 2,000 rows of five kinds, the pretrained stories260K; about 1 GB of disk
    python benchmarks/simhash_recall.py --smoke

Rows are of five kinds (stories, instructions, questions, headlines, encyclopaedia); a query's wanted rows are those of
its kind, so that precision at 10 does not take the exact search for the truth. Queries are rows that are not indexed.
    exact     scan of 24,576 float16 numbers a row
    simhash   8,192 (and fewer) sign bits a row, with no, short and long lists of rows scored exactly after it
    faiss     inverted lists over 1,024 projected 8-bit numbers
`speed`: CPU seconds over an index of many random rows, in the page cache, interleaved, for 1 and 16 queries.
"""

from __future__ import annotations

import gzip
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import data, read_json
from leaveout.metrics import bootstrap_interval
from leaveout.readout.approximate import SHARE, SimHash
from leaveout.readout.codec import NUMBERS, Flat, Product
from leaveout.readout.index import Index
from leaveout.readout.model import Readout, load_readout
from leaveout.readout.scan import Best, scan
from leaveout.store import Record, Store
from measuring import arguments, interleaved, made_rows, ratio, spread, tiny, write_result

K = 10
GOALS = {"times faster": 4.0, "times smaller": 20.0, "precision lost": 0.03}
SEGMENT = 64 * 2**20


def kinds(n: int, seed: int) -> dict[str, list[str]]:
    """n texts of each of five kinds, cut to 400 characters, shuffled."""
    texts = {
        "stories": read_json("tinystories/tinystories_1000.json.gz"),
        "instructions": [f"{row['instruction']}\n{row['output']}" for row in read_json("alpaca/random_9k.json.gz")],
        "questions": [row["qText"] for row in read_json("webquestions/trainmodel.json.gz")],
        "headlines": lines("clickbait/clickbait_data.gz"),
        "encyclopaedia": lines("wikitext2/valid.txt.gz"),
    }
    found = {}
    for kind, rows in texts.items():
        rows = [row.strip()[:400] for row in rows if len(row.strip()) > 20]
        random.Random(seed).shuffle(rows)
        found[kind] = rows[:n]
    return found


def lines(name: str) -> list[str]:
    with gzip.open(data(name), "rt", encoding="utf-8") as file:
        return file.read().split("\n")


def made_kinds(n: int, seed: int) -> dict[str, list[str]]:
    return {
        kind: [f"{kind} {row['instruction']} {row['output']}" for row in made_rows(n, seed + at)]
        for at, kind in enumerate(("one", "two"))
    }


def recall(
    texts: dict[str, list[str]], readout: Readout, directory: Path, n_queries: int, bits: list[int]
) -> dict[str, Any]:
    """Quality of every way on one index of real signatures."""
    rows = [{"text": row, "kind": kind} for kind, some in texts.items() for row in some[n_queries:]]
    asked = [(row, kind) for kind, some in texts.items() for row in some[:n_queries]]
    index = Index.build(readout.lm, rows, directory / "index", "paper", readout.tokenizer)
    queries = index.encode([row for row, _ in asked])
    exact = index.search(queries, K)
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    index.prepare("faiss")
    ways |= {f"faiss, {n} rescored": {"approximate": "faiss", "rescore": n} for n in (50, 200)}
    results = {}
    for size in bits:
        ways |= {
            f"simhash of {size} bits, {n} rescored": {"approximate": "simhash", "rescore": n, "bits": size}
            for n in (0, 50, 200)
        }
    for name, options in ways.items():
        if size := options.pop("bits", None):
            index.prepare("simhash", size)
        hits = exact if name == "exact" else index.search(queries, K, **options)
        results[name] = quality(hits, exact, [kind for _, kind in asked])
    numbers = Store.open(index.path).segments()[0].arrays()["signature"]
    return {
        "rows": len(rows),
        "queries": len(asked),
        "numbers_per_row": numbers.shape[1],
        "bytes_per_row": {"exact": numbers[0].nbytes + 4} | {f"simhash of {size} bits": size // 8 + 4 for size in bits},
        "ways": results,
    }


def quality(hits: list[Any], exact: list[Any], wanted: list[str]) -> dict[str, Any]:
    right = np.array([[hit.meta["kind"] == kind for hit in row] for row, kind in zip(hits, wanted, strict=True)])
    same = [len({hit.id for hit in a} & {hit.id for hit in b}) / len(b) for a, b in zip(hits, exact, strict=True)]
    return {"precision_at_10": interval(right.mean(1)), "of_exact_best_10": interval(np.array(same))}


def interval(values: np.ndarray) -> dict[str, float]:
    found = bootstrap_interval(values, seed=0)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def fill(path: Path, rows: int, width: int, seed: int) -> Store:
    """A store of random float16 rows in segments as a build makes them."""
    store, step = Store.create(path, {"kind": "benchmark"}), max(1, SEGMENT // (2 * width))
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, rows, step):
        piece = torch.randn(min(step, rows - first), width, generator=generator).half().numpy()
        records = [Record(f"{n}", "text", f"{n}", {}, f"{n:032x}", {}) for n in range(first, first + len(piece))]
        store.put(records, {"signature": piece, "scale": np.ones(len(piece), np.float32)})
    return store


def product(queries: torch.Tensor) -> Product:
    """Scores of the rows with queries [queries, width], without the care for equal sums that a search takes."""
    transposed = queries.t().contiguous()
    return Product(Flat(NUMBERS["float16"], queries.shape[1]), lambda rows: rows @ transposed)


def signs(store: Store, queries: torch.Tensor) -> SimHash:
    return SimHash(store, Flat(NUMBERS["float16"], queries.shape[1]))


def scanned(store: Store, queries: torch.Tensor) -> Best:
    best = Best(len(queries), K)
    for numbers, scores in scan(store.segments(), product(queries)):
        best.add(numbers, scores)
    return best


def rescored(store: Store, queries: torch.Tensor, n: int) -> None:
    """A short list by sign bits and the exact scores of its rows, as `Index.search` does."""
    lists = [numbers for numbers, _ in signs(store, queries).shortlist(queries, n)]
    for _ in scan(store.segments(), product(queries), np.unique(np.concatenate(lists))):
        pass


def speed(directory: Path, rows: int, width: int, repeats: int, seed: int) -> dict[str, Any]:
    """CPU seconds of the scan and of the sign bits."""
    results: dict[str, Any] = {"rows": rows, "width": width, "repeats": repeats, "ways": {}}
    with fill(directory / "store", rows, width, seed) as store:
        made = SimHash(store, Flat(NUMBERS["float16"], width))
        results["preparing_cpu_seconds"] = interleaved({"simhash": made.prepare}, 1)["simhash"][0]
        for n_queries in (1, 16):
            queries = torch.randn(n_queries, width, generator=torch.Generator().manual_seed(seed + 1))
            tasks: dict[str, Callable[[], object]] = {
                "exact": lambda queries=queries: scanned(store, queries),
                "simhash": lambda queries=queries: list(signs(store, queries).shortlist(queries, 200)),
                "simhash, 200 rescored": lambda queries=queries: rescored(store, queries, 200),
            }
            for task in tasks.values():
                task()  # into the page cache
            times = interleaved(tasks, repeats)
            results["ways"][f"{n_queries} queries"] = {
                name: {
                    "cpu_seconds": spread(values),
                    "rows_per_second": rows / spread(values)["median"],
                    "times_faster": ratio(times["exact"], values),
                }
                for name, values in times.items()
            }
    return results


def judged(found: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    """The goals of 8,192 bits with 200 rows rescored, over one index of many rows."""
    way, ways = "simhash of 8192 bits", found["ways"]
    lost = ways["exact"]["precision_at_10"]["mean"] - ways[f"{way}, 200 rescored"]["precision_at_10"]["mean"]
    measured = {
        "times faster": timed["ways"]["16 queries"]["simhash"]["times_faster"]["median"],
        "times smaller": found["bytes_per_row"]["exact"] / found["bytes_per_row"][way],
        "precision lost": lost,
    }
    reached = {name: (value <= GOALS[name]) if name == "precision lost" else (value >= GOALS[name])
               for name, value in measured.items()}  # fmt: skip
    return {"goals": GOALS, "measured": measured, "reached": reached}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.smoke:
        texts, readout, size, n_queries = made_kinds(60, args.seed), tiny(args.seed), (300, 512, 2), 5
    else:
        texts, readout = kinds(420, args.seed), load_readout(str(data("stories260K")))
        size, n_queries = (10_000, 24_576, args.repeats), 20
    with tempfile.TemporaryDirectory() as directory:
        found = recall(texts, readout, Path(directory), n_queries, [8192] if args.smoke else [1024, 4096, 8192])
        timed = speed(Path(directory), *size, args.seed)
    for name, facts in found["ways"].items():
        print(f"{name:40} P@10 {facts['precision_at_10']['mean']:.3f}  of best {facts['of_exact_best_10']['mean']:.3f}")
    for number, ways in timed["ways"].items():
        for name, facts in ways.items():
            print(
                f"{number:12} {name:24} {facts['rows_per_second']:12,.0f} rows/s {facts['times_faster']['median']:.1f}"
            )
    goals = judged(found, timed)
    print(goals)
    result = {"question": (__doc__ or "").split("\n", 1)[0], "recall": found, "speed": timed, **goals}
    result |= {"repeats": size[2], "lists": SHARE}
    print(write_result(args.out, "readout_simhash.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
