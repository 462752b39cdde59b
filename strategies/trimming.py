"""Merging number by number: sort what the clients say about each number, and average the middle of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientUpdate
from strategies.robust import Judgement
from strategies.updates import COHORT

BLOCK = 1 << 18
"""Numbers sorted at a time: memory does not grow with the adapter."""


def trimmed_mean(updates: Sequence[ClientUpdate], cut: int) -> Judgement:
    """Put one update in the place of all: the mean of each number without its ``cut`` lowest and highest values.

    Every client counts once, as weights are claims. A number that all clients agree on keeps its bits, so a frozen
    factor stays what it was.

    Parameters
    ----------
    updates : sequence of ClientUpdate
        At least one.
    cut : int
        Values left out at each end; less than half of the clients.

    Returns
    -------
    Judgement
        One update, of the client ``cohort`` with the weight of all; as trust each client's share of the numbers, of
        those not all agree on, that it had a say in.

    Raises
    ------
    RejectedUpdate
        If a client's layers, ranks or heads differ from the first one's.
    """
    first = updates[0]
    for update in updates:
        if update.adapter.layout != first.adapter.layout:
            raise RejectedUpdate(
                f"client {update.client} sent other layers, ranks or heads than {first.client}; "
                "numbers can only be compared where all are equal"
            )
    flats = [update.adapter.flat for update in updates]
    merged = torch.empty_like(first.adapter.flat, dtype=torch.promote_types(flats[0].dtype, torch.float32))
    heard, disputed = torch.zeros(len(updates), dtype=torch.int64), 0
    for begin in range(0, len(merged), BLOCK):
        block = torch.stack([flat[begin : begin + BLOCK] for flat in flats], dim=1).to(merged.dtype)
        merged[begin : begin + BLOCK], inside, differ = _middle(block, cut)
        heard += (inside & differ).sum(0)
        disputed += int(differ.sum())
    weight = math.fsum(update.num_examples for update in updates)
    cohort = ClientUpdate(COHORT, Adapter(merged, first.adapter.layout), weight, first.base_version)
    said = (heard / disputed).tolist() if disputed else [1.0] * len(updates)
    return Judgement([cohort], dict(zip((update.client for update in updates), said, strict=True)))


def _middle(block: Tensor, cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of each row's middle, whose values lie in it, and which rows hold different values."""
    ranked = block.sort(dim=1).values
    kept = ranked[:, cut : block.shape[1] - cut]
    low, high = kept[:, :1], kept[:, -1:]
    mean = low[:, 0] + (kept - low).mean(1)  # equal values keep their bits
    return mean, (block >= low) & (block <= high), ranked[:, :1] != ranked[:, -1:]
