"""How much slower is a search of the store than the same product over the same data in memory?

    python benchmarks/search_speed.py            # 100,000 x 4,096 float16, 16 queries, about 900 MB of disk, then deleted
    python benchmarks/search_speed.py --rows 1000000 --width 512 --name readout_search_million.json
    python benchmarks/search_speed.py --smoke

Compared in one run, interleaved, with the files in the page cache:
    search    `scan` of the store's segments and the 10 best rows of each query
    filtered  the same over a hundredth of the rows, at random places; finding them by SQL is in store_speed.py
    blocks    the product alone over a float16 tensor in memory, widened to float32 block by block in one small buffer
    half      the product alone in float16: queries and scores are rounded as well, `half_error` says how far
    widened   the product alone over the data as float32, widened beforehand: twice the memory, for information only
The goal compares with the faster of `blocks` and `half`.

`--triples` scans rows as `default` stores them at hidden size 576 (24 singular triples a part, 4 bits), and compares with the
same product over float32 rows in memory: what reading and widening add to the multiplications.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.readout.codec import NUMBERS, Flat, Product, Triples
from leaveout.readout.scan import BUFFER, Best, scan
from leaveout.store import Record, Store
from measuring import arguments, interleaved, ratio, spread, write_result

SEGMENT = 64 * 2**20  # bytes of signatures per segment, as an index is built
GOAL = 1.5
K = 10


def vectors(rows: int, width: int, seed: int) -> Tensor:
    """Random numbers [rows, width] float16, made in pieces."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.empty(rows, width, dtype=torch.float16)
    for piece in data.split(4096):
        piece.copy_(torch.randn(piece.shape, generator=generator))
    return data


def fill(path: Path, data: Tensor) -> Store:
    """A store of the rows in several segments, each with a scale of its own."""
    store = Store.create(path, {"kind": "benchmark"})
    step = max(1, SEGMENT // (2 * data.shape[1]))
    for first in range(0, len(data), step):
        piece = data[first : first + step].numpy()
        numbers = range(first, first + len(piece))
        records = [Record(f"row {n}", "text", f"row {n}", {}, f"{n:032x}", {}) for n in numbers]
        store.put(records, {"signature": piece, "scale": np.ones(len(piece), np.float32)})
    return store


def search(store: Store, queries: Tensor, wanted: np.ndarray | None = None) -> Best:
    """What `Index.search` does once its queries are encoded, and its filter has said which rows are wanted."""
    best, transposed = Best(len(queries), K), queries.t().contiguous()
    product = Product(Flat(NUMBERS["float16"], queries.shape[1]), lambda rows: rows @ transposed)
    for numbers, scores in scan(store.segments(), product, wanted):
        best.add(numbers, scores)
    return best


def in_blocks(data: Tensor, queries: Tensor) -> Tensor:
    """Scores [rows, queries] float32 over float16 data, widened in one reused buffer."""
    step, transposed = max(1, BUFFER // (4 * data.shape[1])), queries.t().contiguous()
    buffer = torch.empty(step, data.shape[1])
    scores = torch.empty(len(data), len(queries))
    for first in range(0, len(data), step):
        piece = data[first : first + step]
        rows = buffer[: len(piece)].copy_(piece)
        torch.mm(rows, transposed, out=scores[first : first + step])
    return scores


def check(best: Best, scores: Tensor) -> None:
    """The search must find what the product in memory finds."""
    wanted = scores.topk(K, dim=0)
    for query in range(scores.shape[1]):
        np.testing.assert_allclose(best.scores[query], wanted.values[:, query].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(best.numbers[query], wanted.indices[:, query].numpy())


def measure(directory: Path, rows: int, width: int, n_queries: int, repeats: int, seed: int) -> dict[str, Any]:
    data = vectors(rows, width, seed)
    queries = torch.randn(n_queries, width, generator=torch.Generator().manual_seed(seed + 1))
    with fill(directory / "store", data) as store:
        scores = in_blocks(data, queries)
        check(search(store, queries), scores)  # also warms the page cache
        wide, narrow = data.float(), queries.half()
        half_error = ((data @ narrow.t()).float() - scores).abs().max() / scores.abs().max()
        few = np.sort(np.random.default_rng(seed).choice(rows, max(K, rows // 100), replace=False))
        tasks: dict[str, Callable[[], object]] = {
            "search": lambda: search(store, queries),
            "filtered": lambda: search(store, queries, few),
            "blocks": lambda: in_blocks(data, queries),
            "half": lambda: data @ narrow.t(),
            "widened": lambda: wide @ queries.t(),
        }
        times = interleaved(tasks, repeats)
        segments = len(store.segments())
    fastest = min(("blocks", "half"), key=lambda name: spread(times[name])["median"])
    over = {name: ratio(times["search"], times[name]) for name in tasks}
    return {
        "rows": rows,
        "width": width,
        "queries": n_queries,
        "k": K,
        "segments": segments,
        "repeats": repeats,
        "cpu_seconds": {name: spread(values) for name, values in times.items()},
        "search_over": over,
        "filtered_over_search": ratio(times["filtered"], times["search"]),
        "half_error": half_error.item(),
        "fastest_in_memory": fastest,
        "goal": GOAL,
        "measured": over[fastest]["median"],
        "reached": over[fastest]["median"] <= GOAL,
    }


SIZES = ((1024, 576), *((576, 1536),) * 3)  # of SmolLM2-135M: head, and three MLP outputs
RANK, QUERY_TRIPLES = 24, 46  # the mean of learned tokens of the rows in projection_loss


def measure_triples(directory: Path, rows: int, repeats: int, seed: int) -> dict[str, Any]:
    """Scans of random rows of triples by 1 and 16 queries, against the product over widened rows in memory."""
    codec, generator = Triples.of_rank(NUMBERS["int4"], SIZES, RANK), torch.Generator().manual_seed(seed)
    arrays = codec.encode(torch.randn(rows, codec.width, generator=generator))
    width = Triples.of_rank(NUMBERS["int4"], SIZES, QUERY_TRIPLES).width
    with Store.create(directory / "store", {"kind": "benchmark"}) as store:
        store.put([Record(f"row {n}", "text", f"row {n}", {}, f"{n:032x}", {}) for n in range(rows)], arrays)
        wide, out = codec.decode(arrays), {}
        pieces = wide.split(max(1, BUFFER // (4 * wide.shape[1])))
        for n_queries in (1, 16):
            product = codec.product(torch.randn(n_queries, width, generator=generator))
            tasks: dict[str, Callable[[], Any]] = {
                "search": lambda product=product: np.concatenate([part for _, part in scan(store.segments(), product)]),
                "in memory": lambda product=product: torch.cat([product(piece) for piece in pieces]).numpy(),
            }
            wanted = tasks["in memory"]()
            np.testing.assert_allclose(tasks["search"](), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
            times = interleaved(tasks, repeats)
            out[f"{n_queries} queries"] = {
                "cpu_seconds": {name: spread(values) for name, values in times.items()},
                "search_over_memory": ratio(times["search"], times["in memory"]),
                "rows_a_second": rows / spread(times["search"])["median"],
            }
    size = sum(value[0].nbytes for value in arrays.values())
    return {
        "rows": rows,
        "bytes_per_row": size,
        "rank": RANK,
        "query_triples": QUERY_TRIPLES,
        "repeats": repeats,
        **out,
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--name", help="of the result file in --out")
    parser.add_argument("--triples", action="store_true", help="rows of singular triples")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.triples:
        with tempfile.TemporaryDirectory() as directory:
            found = measure_triples(Path(directory), 20 if args.smoke else 500, 2 if args.smoke else 5, args.seed)
        print({name: found[name]["rows_a_second"] for name in ("1 queries", "16 queries")})
        result = {"question": "How fast is a scan of rows as `default` stores them?", **found}
        print(write_result(args.out, args.name or "readout_search_triples.json", result, args).name)
        return 0
    size = (300, 64, 3, 2) if args.smoke else (args.rows, args.width, 16, args.repeats)
    with tempfile.TemporaryDirectory() as directory:
        facts = measure(Path(directory), *size, args.seed)
    for name, seconds in facts["cpu_seconds"].items():
        over = facts["search_over"][name]
        print(f"{name:8} {seconds['median']:.3f} s [{seconds['low']:.3f}, {seconds['high']:.3f}]", end="  ")
        print(f"search is {over['median']:.2f} times that [{over['low']:.2f}, {over['high']:.2f}]")
    print(f"{'reached' if facts['reached'] else 'MISSED'}: {facts['measured']:.2f} of {facts['fastest_in_memory']}")
    result = {"question": (__doc__ or "").split("\n", 1)[0], **facts}
    print(write_result(args.out, args.name or "readout_search.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
