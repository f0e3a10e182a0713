"""Retrieval: do scores rank the rows that are known to be relevant first? Nothing is trained for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from leaveout.errors import FormatError, MismatchError
from leaveout.methods.scores import numbers_of, read_objects
from leaveout.metrics import auprc_top_bottom, average_precision, precision_at, recall_at

METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "average_precision": lambda scores, relevant, k: average_precision(scores, relevant),
    "precision": precision_at,
    "recall": recall_at,
    "auprc": auprc_top_bottom,
}


def retrieval(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Each metric [query] of scores [query, unit]; nan for a query without a relevant unit."""
    known = relevant.any(1)
    out = {name: np.full(len(scores), np.nan) for name in METRICS}
    for name, metric in METRICS.items():
        out[name][known] = metric(scores[known], relevant[known], k)
    return out


def load_relevant(path: str | Path, query_ids: Sequence[str], train_ids: Sequence[str]) -> np.ndarray:
    """Which rows are relevant, bool [query, train], from JSONL with one pair a line: {"query": ..., "id": ...}.

    Raises: FormatError for another form or a file without pairs; MismatchError for a query or row that is not there;
            ValueError if an id is asked for twice.
    """
    path = Path(path)
    places = numbers_of("query", query_ids), numbers_of("train", train_ids)
    relevant = np.zeros((len(query_ids), len(train_ids)), bool)
    for line, names in read_objects(path, ("query", "id")):
        for known, name in zip(places, names, strict=True):
            if str(name) not in known:
                raise MismatchError(
                    f"{path}, line {line}: {str(name)!r} is not there: name queries and rows as in this evaluation."
                )
        relevant[tuple(known[str(name)] for known, name in zip(places, names, strict=True))] = True
    if not relevant.any():
        raise FormatError(f"{path} has no pair: give a line for each relevant row of a query.")
    return relevant
