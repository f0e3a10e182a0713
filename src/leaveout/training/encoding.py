"""Rows of a recipe to tensors: examples are cut at a limit, which is counted, and queries never are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leaveout.corpus import Corpus, Row
from leaveout.corpus.chat import Template
from leaveout.corpus.tokens import RowTokens, tokens_of
from leaveout.errors import FormatError

IGNORED = -100


@dataclass(frozen=True)
class Asked:
    """A row, in the form of the examples, that is a query: it is never cut."""

    row: Any


def asked(rows: Sequence[Any]) -> list[Asked]:
    """The rows as queries."""
    return [row if isinstance(row, Asked) else Asked(row) for row in rows]


def unmarked(row: Any) -> Any:
    """A row or query as it was given."""
    return row.row if isinstance(row, Asked) else row


def as_row(row: Any) -> Row:
    """A row of text, given as such, as a text, or as a dictionary."""
    row = unmarked(row)
    return row if isinstance(row, Row) else next(iter(Corpus.open([row])))


@dataclass(frozen=True)
class RowEncoder:
    """How the rows of a language model's recipe become token ids and labels [examples, tokens].

    limit    tokens of an example, the recipe's `max_tokens`
    context  tokens that the model reads
    """

    tokenizer: Any
    template: Template
    limit: int
    context: int

    def tokens(self, row: Any) -> RowTokens:
        """The tokens of an example, cut at the limit, or of a query.

        Raises: FormatError for one without a token to learn, or longer than the model's context.
        """
        limit = None if isinstance(row, Asked) else self.limit
        found = tokens_of(as_row(row), self.tokenizer, self.template, limit)
        if (length := len(found.ids)) > self.context:
            if limit is None:
                raise too_long(found.row, f"{length} tokens", self.context)
            raise FormatError(
                f"Row {found.row.id} has {length} tokens within max_tokens = {limit}, but the model reads at most "
                f"{self.context}: set max_tokens to {self.context} or less."
            )
        return found

    def encode(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Ids and labels of examples and queries, labels only where a row is learned."""
        return self._padded([self.tokens(row) for row in rows])

    def _padded(self, rows: Sequence[RowTokens]) -> tuple[Tensor, Tensor]:
        """Ids and labels, which are IGNORED where nothing is learned; padding stands at the end."""
        longest, fill = max(len(row.ids) for row in rows), self.tokenizer.pad_token_id or 0
        labels = [[IGNORED] * longest for _ in rows]
        for row, own in zip(rows, labels, strict=True):
            for place in row.learned:
                own[place] = row.ids[place]
        return torch.tensor([row.ids + [fill] * (longest - len(row.ids)) for row in rows]), torch.tensor(labels)


def too_long(query: Row, length: str, most: int) -> FormatError:
    """The refusal of a query that would have to be cut; with both numbers."""
    name = query.text if len(query.text) <= 40 else f"{query.text[:37]}..."
    return FormatError(f"The query {name!r} has {length}, but the model reads at most {most}: ask a shorter one.")
