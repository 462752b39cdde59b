"""The exact average of the clients' products, and the nearest thing to it that is thin enough to be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.federation import ClientUpdate
from common.lowrank import LowRank, stack
from strategies.updates import by_layer, shares


def exact_average(updates: Sequence[ClientUpdate]) -> dict[str, LowRank]:
    """Return ``Σ wᵢ bᵢ aᵢ`` of every layer, the clients' factors side by side: refactor it before it is sent.

    Raises
    ------
    ConfigurationError
        If there is no update.
    """
    weights = shares(updates)
    return {
        layer: stack(list(parts.values()), [weights[client] for client in parts])
        for layer, parts in by_layer(updates).items()
    }


def client_ranks(updates: Sequence[ClientUpdate]) -> list[int]:
    """Return the rank each client trained: its largest, since small layers clamp it."""
    return [max((rank for *_, rank in update.adapter.layout.layers), default=0) for update in updates]


def nearest(layers: Mapping[str, LowRank], rank: int | None = None) -> tuple[dict[str, LowRank], float]:
    """Return each layer's best approximation of a rank, in singular vectors (Eckart and Young).

    Parameters
    ----------
    layers : mapping of str to LowRank
        By name, of any rank; a layer that is zero comes back with rank 0.
    rank : int, optional
        Largest rank of each; none drops rounding noise only.

    Returns
    -------
    dict of str to LowRank, float
        The layers cut; the share of the squared norm of all of them that the bound leaves out, in [0, 1).
    """
    kept: dict[str, LowRank] = {}
    left_out = whole = 0.0
    for layer, part in layers.items():
        kept[layer], share = part.truncate(rank)
        square = kept[layer].norm() ** 2 / (1 - share)
        left_out, whole = left_out + share * square, whole + square
    return kept, left_out / whole if whole else 0.0


def without_empty(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Leave out the layers of rank 0: a client starts these as if they had never been trained."""
    return {layer: part for layer, part in layers.items() if part.rank}
