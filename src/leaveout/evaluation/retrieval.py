"""Retrieval: do scores rank the rows that are known to be relevant first? Nothing is trained for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from leaveout.errors import FormatError, MismatchError
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
    places = []
    for what, ids in (("query", query_ids), ("train", train_ids)):
        places.append({str(name): i for i, name in enumerate(ids)})
        if len(places[-1]) != len(ids):
            raise ValueError(f"a {what} id stands twice among those asked for: ids must tell rows apart.")
    relevant = np.zeros((len(query_ids), len(train_ids)), bool)
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                pair = str(record["query"]), str(record["id"])
            except (ValueError, TypeError, KeyError):
                raise FormatError(f"{path}, line {line} is no object with query and id.") from None
            for known, name in zip(places, pair, strict=True):
                if name not in known:
                    raise MismatchError(
                        f"{path}, line {line}: {name!r} is not there: name queries and rows as in this evaluation."
                    )
            relevant[places[0][pair[0]], places[1][pair[1]]] = True
    if not relevant.any():
        raise FormatError(f"{path} has no pair: give a line for each relevant row of a query.")
    return relevant
