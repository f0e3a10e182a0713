"""Has the model learned the rows to almost no loss? Products of gradients rank such rows last, however much they taught."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus import Corpus, Row
from leaveout.readout.model import Readout
from leaveout.readout.opened import OpenIndex, row_of, spread
from leaveout.readout.settings import SignatureSettings, resolve_settings
from leaveout.readout.signature import Signer
from leaveout.readout.tokens import tokenise
from leaveout.tables import Check

ROWS = 64  # that are looked at, evenly over the index or the corpus
LEARNED = 0.1  # nats a token


def learned_rows(index: OpenIndex) -> Check:
    """What the model of an index makes of its rows. Cost: a forward pass for each of at most 64 rows."""
    records = index.store.rows(index.spread_rows(ROWS))
    return _check(index.unchanged(), [row_of(record) for record in records], index.settings)


def learned_corpus(readout: Readout, corpus: Any) -> Check:
    """The same of rows that have no index yet: anything that `Corpus.open` takes."""
    corpus = Corpus.open(corpus)
    wanted = set(spread(len(corpus), ROWS).tolist())
    rows = list(compress(corpus, (number in wanted for number in range(len(corpus)))))
    return _check(readout, rows, resolve_settings("default"))


def _check(readout: Readout, rows: Sequence[Row], settings: SignatureSettings) -> Check:
    losses = np.array([mean_losses(readout, row, settings) for row in rows])
    details, share = [], 0.0
    for name, found in zip(("rows", "prompts"), losses.T, strict=False):
        found = found[~np.isnan(found)]
        if len(found):
            low = float((found < LEARNED).mean())
            details.append(
                f"{low:.0%} of {len(found)} {name} have less than {LEARNED:g} nats a token, the median {np.median(found):.2g}"
            )
            share = low if name == "rows" else share
    detail = "; ".join(details)
    if share > 0.5:
        detail += (
            ": find culprits by cosine, as `search` does; products, as of `score`, `select` and `attribute`, rank those "
            "first that are learned badly"
        )
    return Check("learned rows", None, detail)


@torch.no_grad()
def mean_losses(readout: Readout, row: Row, settings: SignatureSettings) -> list[float]:
    """Mean loss in nats over the tokens of each side of a row that an index with these settings learns; nan for none."""
    signer = Signer(readout, SignatureSettings(resolve_settings("similarity").channels, targets=settings.targets))
    losses: list[list[Tensor]] = [[torch.empty(0)] for _ in range(settings.sides)]
    for window in tokenise(row, 0, readout.tokenizer, settings, readout.context).windows:
        positions, found = signer.positions([window]), []
        for piece, logits in signer.head.blocks(positions.hidden):
            found.append(torch.nn.functional.cross_entropy(logits, positions.target[piece], reduction="none"))
        for side, span in zip(losses, positions.spans, strict=True):
            side.append(torch.cat(found)[span].float().cpu())
    return [float(torch.cat(side).mean()) for side in losses]
