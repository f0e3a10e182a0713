"""Prospective valuation: which candidate rows to train on, judged by a few wanted rows.

Source: arXiv 2604.16197 (score of a candidate against the mean of wanted queries); reciprocal-rank fusion: Cormack,
Clarke, Büttcher 2009, with its constant 60.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from leaveout.errors import choices, require_whole
from leaveout.readout.index import Index, Queries, QueryRow
from leaveout.readout.search import Best, Hit, ranking

Combine = Literal["mean", "rrf"]
RRF_CONSTANT = 60.0


def select_rows(
    index: Index,
    wanted: Sequence[QueryRow] | Queries,
    n: int = 1000,
    unwanted: Sequence[QueryRow] | Queries | None = None,
    combine: Combine = "mean",
    where: str | None = None,
) -> list[Hit]:
    """The n rows of the index whose training would help the wanted rows most, best first.

    `mean`: score against the mean of the wanted signatures, each of unit length so that long rows have no more say,
    minus that of the unwanted ones. `rrf`: sum over wanted rows of 1 / (60 + rank), minus that over unwanted ones.
    Memory: `rrf` holds 16 bytes per row of the index, `mean` n rows.
    """
    if combine not in get_args(Combine):
        raise ValueError(f"combine is {combine!r}: {choices(combine, get_args(Combine))}.")
    require_whole("n", n, 1)
    index.refuse_search(n, where)
    groups = [(1.0, index.encode(wanted))]
    if unwanted is not None:
        groups.append((-1.0, index.encode(unwanted)))
    if combine == "mean":
        best = Best(1, n)
        weights = torch.cat([sign / len(group) / index.lengths(group).clamp_min(1e-30) for sign, group in groups])
        vectors = torch.cat([group.vectors for _, group in groups])
        texts = tuple(text for _, group in groups for text in group.texts)
        for numbers, scores in index.scan(Queries(vectors, texts, index.fingerprint), where):
            best.add(numbers, scores @ weights.numpy()[:, None])
        return index.hits(best.numbers[0], best.scores[0])
    numbers, scores = _fused(index, groups, where)
    # Sums of reciprocal ranks know nothing of rounding but the order of their terms; neighbours lie close together.
    order = np.argsort(-np.round(scores, 14), kind="stable")[:n]
    return index.hits(numbers[order], scores[order])


def _fused(index: Index, groups: Sequence[tuple[float, Queries]], where: str | None) -> tuple[np.ndarray, Any]:
    """Row numbers [rows] and their fused reciprocal ranks [rows] float64."""
    total: np.ndarray | None = None
    numbers = np.empty(0, np.int64)
    for sign, group in groups:
        for query in range(len(group)):
            one = Queries(group.vectors[query : query + 1], group.texts[query : query + 1], group.fingerprint)
            parts = list(index.scan(one, where))
            if not parts:
                return numbers, np.empty(0)
            numbers = np.concatenate([part for part, _ in parts])
            order = ranking(np.concatenate([scores[:, 0] for _, scores in parts]))
            ranks = np.empty(len(order))
            ranks[order] = np.arange(1, len(order) + 1)
            total = sign / (RRF_CONSTANT + ranks) + (0.0 if total is None else total)
    assert total is not None
    return numbers, total
