"""A score split over pairs of tokens: which words of a row answer which words of a query.

A signature is a sum over positions of outer products, so that a score is the sum over pairs of positions of
<left, left'> <right, right'>, added over the parts. Both texts pass the model anew. The pair of positions is filed
under the tokens that the positions predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from leaveout.corpus.behaviour import measures_of, terms_of, texts_of
from leaveout.corpus.rows import CHOSEN, SEAM, answer_places
from leaveout.readout.forms import pairs
from leaveout.readout.opened import OpenIndex, QueryRow, row_of
from leaveout.readout.scan import Length, check_length, counted
from leaveout.readout.signature import SIDES, Signer
from leaveout.readout.tokens import TokenisedRow, Window, batches, tokenise


@dataclass(frozen=True)
class Explanation:
    """pairs [query tokens, row tokens] float64 sum to `score`, the exact product of the two signatures, over the row's
    stored length where a search goes by cosine.

    `stored_score` is what a search shows: the same up to the projection and rounding of the stored form.
    Tokens are given as pieces of the texts; tokens that are only context have zeros. Of a contrast or behaviour the tokens of all
    texts follow each other, and what a text of negative weight adds is negative where the row favours that.
    """

    id: str
    query_tokens: list[str]
    row_tokens: list[str]
    pairs: np.ndarray
    score: float
    stored_score: float

    @property
    def row_weights(self) -> np.ndarray:
        """What each token of the row adds to the score [row tokens]."""
        return self.pairs.sum(0)

    @property
    def query_weights(self) -> np.ndarray:
        """What each token of the query adds to the score [query tokens]."""
        return self.pairs.sum(1)


@dataclass(frozen=True)
class TextFactors:
    """Factors of all target positions of one text: their tokens, scales and (left, right) per part."""

    tokens: Tensor
    scale: Tensor
    factors: list[tuple[Tensor, Tensor]]


def explain_rows(
    index: OpenIndex, query: QueryRow, ids: Sequence[str], length: Length = "cosine", prompt_weight: float | None = None
) -> list[Explanation]:
    """Explanations of several rows for one query. Cost: a forward pass per row and one for the query.

    Raises: ValueError for an id that is not in the index.
    """
    check_length(length)
    index.checked_weight(length, prompt_weight)
    records, numbers = index.records(ids), index.store.numbers(ids)
    weights, rows = zip(*terms_of(query), strict=True)
    sides, measures = index.tokenised(rows), measures_of([query])
    query_tokens = [piece for side in sides for piece in token_pieces(side)]
    vectors = index.encode([query]).vectors
    scales = index.scales(vectors, length, prompt_weight)
    stored = index.scores_of(index.weighed(vectors, scales), numbers, length=length)[:, 0]
    lengths = np.stack([index.lengths_of(numbers, side) for side in SIDES[: len(scales)]], 1)
    asked = [
        [
            text_factors(index.asking(side, by), side.of_side(n)) if not n or by is None else None
            for n in range(len(scales))
        ]
        for side, by in zip(sides, measures, strict=True)
    ]
    found = []
    for record, stored_score, by in zip(records, stored, lengths, strict=True):
        readout = index.readout
        row_tokens = tokenise(row_of(record), 0, readout.tokenizer, index.signer.settings, readout.context)
        answer = [text_factors(index.signer, row_tokens.of_side(n)) for n in range(len(scales))]
        split = np.concatenate([
            [weight * token_pairs(*pair, len(side.ids), len(row_tokens.ids)) for pair in zip(factors, answer, strict=True)]
            for weight, factors, side in zip(weights, asked, sides, strict=True)
        ], 1)  # fmt: skip
        split = (counted(split, by, length) * scales.numpy()[:, :, None]).sum(0)
        pieces = token_pieces(row_tokens)
        found.append(Explanation(record.id, query_tokens, pieces, split, float(split.sum()), float(stored_score)))
    return found


def text_starts(index: OpenIndex, query: QueryRow) -> list[int]:
    """The query's tokens at which its second, third, ... text begins: of a contrast or behaviour."""
    counts = [len(text.ids) for text in index.tokenised(texts_of([query]))]
    return [sum(counts[: n + 1]) for n in range(len(counts) - 1)]


@torch.no_grad()
def text_factors(signer: Signer, tokens: TokenisedRow) -> TextFactors | None:
    """Factors of one text's target positions, scaled so that their sum over positions is its signature; None if it has none."""
    if not tokens.windows:
        return None
    windows = [replace(window, row=number) for number, window in enumerate(tokens.windows)]
    places, scales, factors = [], [], []
    for batch in batches(windows, signer.readout.batch_class, signer.limits):
        positions = signer.positions(batch)
        parts = [signer.factors(positions, part) for part in signer.parts]
        factors.append(parts)
        places += [window.start + position + 1 for window in batch for position in window.positions]
        scales += _window_scales(signer, parts, positions.spans, batch)
    scale = torch.tensor(scales, dtype=torch.float64)
    joined = [
        (torch.cat([piece[n][0] for piece in factors]).double(), torch.cat([piece[n][1] for piece in factors]).double())
        for n in range(len(signer.parts))
    ]
    if signer.settings.unit_length:
        scale /= len(windows)
        length = _pair_sums(joined, joined, scale, scale).sum().clamp_min(0).sqrt()
        scale /= length.clamp_min(1e-30)
    else:
        scale /= signer.divisors(tokens.windows)[tokens.windows[0].row]
    return TextFactors(torch.tensor(places), scale, joined)


def _window_scales(
    signer: Signer, parts: list[tuple[Tensor, Tensor]], spans: Sequence[slice], batch: Sequence[Window]
) -> list[float]:
    """One number per position: 1, or 1 / length of its window's signature."""
    if not signer.settings.unit_length:
        return [1.0 for window in batch for _ in window.positions]
    scales = []
    for span, window in zip(spans, batch, strict=True):
        square = sum(float(pairs(left[span], left[span], right[span], right[span]).sum()) for left, right in parts)
        scales += [1 / max(square, 1e-60) ** 0.5] * len(window.positions)
    return scales


def _pair_sums(
    a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]], scale_a: Tensor, scale_b: Tensor
) -> Tensor:
    total = sum(pairs(la, lb, ra, rb) for (la, ra), (lb, rb) in zip(a, b, strict=True))
    assert isinstance(total, Tensor)
    return total.cpu() * scale_a[:, None] * scale_b[None, :]


def token_pairs(query: TextFactors | None, row: TextFactors | None, n_query: int, n_row: int) -> np.ndarray:
    """Contributions [query tokens, row tokens] to the score; positions of overlapping windows are added up."""
    if query is None or row is None:
        return np.zeros((n_query, n_row))
    split = _pair_sums(query.factors, row.factors, query.scale, row.scale)
    by_row = torch.zeros(len(split), n_row, dtype=split.dtype).index_add_(1, row.tokens, split)
    return torch.zeros(n_query, n_row, dtype=split.dtype).index_add_(0, query.tokens, by_row).numpy()


def token_pieces(tokens: TokenisedRow) -> list[str]:
    """The piece of text behind each token; characters that several tokens share go to the first of them.

    Of a preference row the first piece of each answer begins with its label, and a prompt that both have is there once.
    """
    labels: list[tuple[int, str]] = []
    repeated = range(0)
    if tokens.chosen is not None:
        first, repeated = answer_places(tokens.text, tokens.responses, tokens.chosen)
        labels = [(first, CHOSEN), (repeated.stop, SEAM)]
    pieces, reached = [], 0
    for start, end in tokens.offsets:
        start = max(start, reached)
        piece = "" if start >= end or (start in repeated and end <= repeated.stop) else tokens.text[start:end]
        if piece and labels and end > labels[0][0]:
            piece = labels.pop(0)[1] + piece
        pieces.append(piece)
        reached = max(reached, end)
    return pieces
