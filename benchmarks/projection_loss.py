"""How much of the ranking by its own exact product does the `default` preset keep when it is projected and rounded?

    python benchmarks/projection_loss.py         # SmolLM2-135M, 400 instruction rows, 20 queries
    python benchmarks/projection_loss.py --smoke

One forward pass gives the exact, unprojected rows (hidden squared numbers each, float32). Each of them then passes
Hadamard projections of several widths, with several seeds, and the rounding of the stored form; queries are projected
and not rounded, as in a search. Reported per width and type: the Spearman correlation over the rows of stored and exact
scores, as a mean over queries with its bootstrap interval, and the share of the exact 10 best rows that stay among the
10 best. The first seed is that of the preset; its projection is checked to be the one that an index applies. Beside it,
for as many bytes: rows stored by their largest singular triples (the setting `rank`), queries in full.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Corpus
from leaveout.metrics import bootstrap_interval, recall_at, spearman
from leaveout.readout.model import Readout
from leaveout.readout.projection import Hadamard
from leaveout.readout.settings import PRESETS, SignatureSettings
from leaveout.readout.signature import Signer, low_rank
from leaveout.readout.storage import decode, encode
from leaveout.readout.tokens import TokenisedRow, Window
from leaveout.readout.whitening import whitening_matrices
from measuring import (
    RememberingReadout,
    alpaca,
    arguments,
    made_rows,
    smollm2,
    spread,
    tiny,
    tokenised,
    write_result,
)

WIDTHS = (4096, 8192, 16384, 32768)
RANKS = (7, 14, 28)  # about as many bytes as 8,192, 16,384 and 32,768 numbers of a projection
STORAGES = ("int8", "float16")
LONGEST_RESPONSE = 120
GOAL = 0.95  # for the preset as it is stored
PIECE = 32  # rows projected at a time


def chosen_rows(rows: list[dict[str, str]], readout: Readout, n: int) -> list[dict[str, str]]:
    """The first n rows whose responses have at most LONGEST_RESPONSE tokens."""
    rows = rows[: 2 * n]
    tokens = tokenised(rows, readout, PRESETS["default"])
    return [row for row, one in zip(rows, tokens, strict=True) if one.n_targets <= LONGEST_RESPONSE][:n]


def exact_rows(
    readout: Readout, rows: list[dict[str, str]], n_train: int, settings: SignatureSettings
) -> tuple[Tensor, Signer]:
    """Unprojected vectors [rows, hidden * hidden], and a signer of the settings with the same statistics.

    The statistics come from a sample of the first `n_train` rows, as in an index of these.
    """
    signer, exact = Signer(readout, settings), Signer(readout, replace(settings, final_width=None))
    tokens = tokenised(rows, readout, settings)
    sample = Corpus.open(rows[:n_train]).sample(settings.sample_rows, settings.seed)
    signer.whitening = whitening_matrices(signer, windows_of([tokens[row.number] for row in sample]))
    exact.whitening = signer.whitening
    return exact.rows(windows_of(tokens), len(rows)), signer


def windows_of(tokens: Sequence[TokenisedRow]) -> list[Window]:
    return [window for row in tokens for window in row.windows]


def exact_scores(queries: Tensor, train: Tensor) -> np.ndarray:
    """Scores [query, train] in float64, in pieces of the train rows."""
    wide = queries.double().t()
    return torch.cat([piece.double() @ wide for piece in train.split(PIECE)]).t().numpy()


def project(rows: Tensor, hadamard: Hadamard) -> Tensor:
    return torch.cat([hadamard(piece) for piece in rows.split(PIECE)])


def judge(exact: np.ndarray, scores: np.ndarray, seed: int) -> dict[str, Any]:
    """Agreement of scores [query, train] with the exact ones."""
    k = min(10, exact.shape[1])
    best = exact >= np.partition(exact, -k, axis=1)[:, -k, None]
    found = spearman(exact, scores)
    return {
        "spearman": bootstrap_interval(found, seed)._asdict(),
        "spearman_lowest_query": float(found.min()),
        "best_10_kept": float(recall_at(scores, best, k).mean()),
    }


def cosines(queries: Tensor, train: Tensor) -> dict[str, float]:
    """Spread of the exact cosines of queries and rows; a projection adds an error of about 1 / sqrt(width) to each."""
    lengths = queries.norm(dim=1).double().numpy()[:, None] * train.norm(dim=1).double().numpy()
    found = exact_scores(queries, train) / lengths
    return {"mean": found.mean(), "standard_deviation": found.std(), "largest": found.max()}


def measure(signer: Signer, queries: Tensor, train: Tensor, widths: Sequence[int], seeds: Sequence[int]) -> list[Any]:
    """One line of results per projection seed, width and type of the stored numbers."""
    part, exact = signer.parts[0], exact_scores(queries, train)
    assert part.hadamard is not None
    lines = []
    for seed, width in itertools.product(seeds, widths):
        hadamard = Hadamard.make(part.flat, width, seed, part.name)
        if seed == signer.settings.seed and width == part.stored:
            assert torch.equal(hadamard.outputs, part.hadamard.outputs)
            assert torch.equal(hadamard.signs, part.hadamard.signs)
        projected, asked = project(train, hadamard), project(queries, hadamard)
        for storage in STORAGES:
            scores = (asked @ decode(encode(projected, storage)).t()).numpy()
            facts = {"form": "projection", "size": width, "numbers": width, "storage": storage, "seed": seed}
            lines.append(facts | judge(exact, scores, seed))
    return lines


def measure_ranks(signer: Signer, queries: Tensor, train: Tensor, ranks: Sequence[int]) -> list[Any]:
    """The same for rows stored by their largest singular triples, as the setting `rank` does, in int8."""
    part, exact = signer.parts[0], exact_scores(queries, train)
    left, right = part.left.width, part.right.width
    identity = torch.eye(left)
    factors = [low_rank(identity, row.view(left, right), max(ranks)) for row in train]
    u = torch.stack(factors)[:, : max(ranks) * left].unflatten(1, (-1, left))
    v = torch.stack(factors)[:, max(ranks) * left :].unflatten(1, (-1, right))
    lines = []
    for rank in ranks:
        stored = decode(encode(torch.cat([u[:, :rank].flatten(1), v[:, :rank].flatten(1)], 1), "int8"))
        us, vs = stored[:, : rank * left].reshape(-1, left), stored[:, rank * left :].reshape(-1, right)
        products = torch.stack([((us @ query.view(left, right)) * vs).sum(1) for query in queries])
        scores = products.unflatten(1, (-1, rank)).sum(2).numpy()
        facts = {"form": "rank", "size": rank, "numbers": rank * (left + right), "storage": "int8", "seed": 0}
        lines.append(facts | judge(exact, scores, 0))
    return lines


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the projection seeds, per form, size and type."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["form"], line["size"], line["storage"], line["numbers"]), []).append(line)
    return [
        {
            "form": form,
            "size": size,
            "storage": storage,
            "bytes_per_row": numbers * (1 if storage == "int8" else 2) + 4,
            "spearman": spread([line["spearman"]["mean"] for line in group]),
            "spearman_lowest_query": spread([line["spearman_lowest_query"] for line in group]),
            "best_10_kept": spread([line["best_10_kept"] for line in group]),
        }
        for (form, size, storage, numbers), group in groups.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--projections", type=int, default=5, help="seeds of the projection, that of the preset first")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = PRESETS["default"]
    if args.smoke:
        n_rows, n_queries, widths, ranks, projections = 20, 4, (16, 32, 64), (1, 4), 2
        settings = replace(settings, final_width=32)
        readout, rows = RememberingReadout.of(tiny(args.seed)), made_rows(24, args.seed)
    else:
        n_rows, n_queries, widths, ranks, projections = 400, 20, WIDTHS, RANKS, args.projections
        readout = RememberingReadout.of(smollm2())
        rows = chosen_rows(alpaca(args.seed), readout, n_rows + n_queries)
    vectors, signer = exact_rows(readout, rows, n_rows, settings)
    seeds = range(settings.seed, settings.seed + projections)
    queries, train = vectors[n_rows:], vectors[:n_rows]
    lines = measure(signer, queries, train, widths, seeds) + measure_ranks(signer, queries, train, ranks)
    summary = summarise(lines)
    for line in summary:
        rho, kept = line["spearman"], line["best_10_kept"]
        print(f"{line['form']:10} {line['size']:6} {line['storage']:8} Spearman {rho['median']:.4f}", end=" ")
        print(f"[{rho['low']:.4f}, {rho['high']:.4f}], of the 10 best {kept['median']:.0%} kept")
    own = next(line for line in lines if (line["size"], line["storage"]) == (settings.final_width, settings.storage))
    reached = own["spearman"]["mean"] >= GOAL
    print(f"{'reached' if reached else 'MISSED'}: default as stored {own['spearman']['mean']:.4f} (goal {GOAL})")
    result = {
        "question": (__doc__ or "").split("\n", 1)[0],
        "model": "tiny" if args.smoke else "SmolLM2-135M",
        "rows": n_rows,
        "queries": n_queries,
        "longest_response": LONGEST_RESPONSE,
        "numbers_unprojected": signer.parts[0].flat,
        "statistics_rows": min(settings.sample_rows, n_rows),
        "repeats": projections,
        "default_as_stored": {**own, "goal": GOAL, "reached": reached},
        "exact_cosines": cosines(queries, train),
        "summary": summary,
        "projections": lines,
    }
    print(write_result(args.out, "readout_projection.json", result, args).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
