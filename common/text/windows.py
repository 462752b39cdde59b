"""Rows of tokens for language-model training, cut from tokenised documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError

IGNORED = -100
"""Label of a position that has no loss (the convention of torch and transformers)."""


@dataclass(frozen=True)
class TokenRows:
    """Rows of equal length, with labels as transformers' causal models take them (not shifted).

    Padding stands at the end of a row and has the label `IGNORED`; causal attention never looks ahead, so no
    attention mask is needed.

    Attributes
    ----------
    input_ids : Tensor, shape (rows, length), int64
    labels : Tensor, shape (rows, length), int64
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.input_ids)


def pack(token_ids: Sequence[Sequence[int]], length: int, eos: int) -> TokenRows:
    """Join documents end to end, ``eos`` after each, and cut the stream into full rows.

    The remainder that fills no row is dropped, unless it is all there is: then it is one padded row.

    Parameters
    ----------
    token_ids : sequence of sequences of int
        One sequence per document.
    length : int >= 2
        Tokens per row.
    eos : int
        Token that ends a document; also fills the padding.

    Raises
    ------
    DataError
        If there is no token to train on.
    """
    _require_tokens(token_ids)
    stream = [token for document in token_ids for token in (*document, eos)]
    if len(stream) < length:
        return _padded([stream], length, eos)
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return TokenRows(rows, rows.clone())


def per_document(token_ids: Sequence[Sequence[int]], length: int, eos: int) -> TokenRows:
    """Cut each document by itself: one row is one window of one document, the last one padded.

    A window of a single token is left out, since nothing in it is predicted. Parameters and errors are those
    of `pack`.
    """
    _require_tokens(token_ids)
    ended = [[*document, eos] for document in token_ids if len(document)]
    windows = [document[start : start + length] for document in ended for start in range(0, len(document), length)]
    return _padded([window for window in windows if len(window) > 1], length, eos)


def _padded(windows: Sequence[Sequence[int]], length: int, eos: int) -> TokenRows:
    input_ids = torch.full((len(windows), length), eos)
    labels = torch.full((len(windows), length), IGNORED)
    for row, window in enumerate(windows):
        input_ids[row, : len(window)] = labels[row, : len(window)] = torch.tensor(window)
    return TokenRows(input_ids, labels)


def _require_tokens(token_ids: Sequence[Sequence[int]]) -> None:
    if not any(len(document) for document in token_ids):
        raise DataError("the documents hold no token to train on; give at least one that is not empty")
