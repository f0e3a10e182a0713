"""Prospective valuation: which candidate rows to train on, judged by a few wanted rows.

Source: arXiv 2604.16197 (score of a candidate against the mean of wanted queries); reciprocal-rank fusion: Cormack,
Clarke, Büttcher 2009, with its constant 60.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from leaveout.errors import choices, require_whole
from leaveout.readout.opened import EncodedQueries, OpenIndex, QueryRow
from leaveout.readout.scan import Best, Length, check_length, ranking
from leaveout.readout.search import Hits, SearchOptions, hits, refuse

Combine = Literal["mean", "rrf"]
Rows = Sequence[QueryRow] | EncodedQueries
RRF_CONSTANT = 60.0


def select_rows(
    index: OpenIndex, wanted: Rows, unwanted: Rows | None, n: int, combine: Combine, where: str | None, length: Length,
    prompt_weight: float | None = None,
) -> Hits:  # fmt: skip
    """The n rows of the index whose training would help the wanted rows most, best first: see `Index.select`."""
    if combine not in get_args(Combine):
        raise ValueError(f"combine is {combine!r}: {choices(combine, get_args(Combine))}.")
    check_length(length)
    require_whole("n", n, 1)
    rows = refuse(index, n, where, SearchOptions(length, prompt_weight=prompt_weight))

    def asked(queries: Rows) -> Tensor:
        vectors = index.encode(queries).vectors
        return index.weighed(vectors, index.scales(vectors, length, prompt_weight))

    groups = [(1.0, asked(wanted))]
    if unwanted is not None:
        groups.append((-1.0, asked(unwanted)))
    if combine == "mean":
        best = Best(1, n)
        lengths = [index.form.lengths(group).clamp_min(1e-30) for _, group in groups]
        weights = [sign / len(group) / of for (sign, group), of in zip(groups, lengths, strict=True)]
        for numbers, scores in index.scan(torch.cat([group for _, group in groups]), rows, length=length):
            best.add(numbers, scores @ torch.cat(weights).numpy()[:, None])
        return hits(index, best.numbers[0], best.scores[0])
    numbers, scores = _fused(index, groups, rows, length)
    # Sums of reciprocal ranks know nothing of rounding but the order of their terms; neighbours lie close together.
    order = np.argsort(-np.round(scores, 14), kind="stable")[:n]
    return hits(index, numbers[order], scores[order])


def _fused(
    index: OpenIndex, groups: Sequence[tuple[float, Tensor]], rows: np.ndarray | None, length: Length
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [rows] and their fused reciprocal ranks [rows] float64."""
    total: np.ndarray | None = None
    numbers = np.empty(0, np.int64)
    for sign, group in groups:
        for vectors in group.split(1):
            parts = list(index.scan(vectors, rows, length=length))
            if not parts:
                return numbers, np.empty(0)
            numbers = np.concatenate([part for part, _ in parts])
            order = ranking(np.concatenate([scores[:, 0] for _, scores in parts]))
            ranks = np.empty(len(order))
            ranks[order] = np.arange(1, len(order) + 1)
            total = sign / (RRF_CONSTANT + ranks) + (0.0 if total is None else total)
    assert total is not None
    return numbers, total
