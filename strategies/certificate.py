"""How far a merge is from the exact average of its updates, measured in factor space.

With all factors of a layer side by side, ``H = (bᵀb) ∘ (a aᵀ)`` holds the inner products of all rank-1 parts;
every norm, cosine and distance is a sum over blocks of ``H``. No matrix of a low-rank layer is built, and
only one layer of all clients is looked at a time. Differences of nearly equal updates cancel, so what is
below about 3e-8 of the clients' updates reads as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter import Adapter
from common.lowrank import LowRank, Update, inner

ENERGY = 0.95
"""Share of the squared norm that the effective rank must hold."""
NOISE = 1e-15
"""Share of the clients' mean squared norm below which a squared norm is only rounding."""


@dataclass(frozen=True)
class Certificate:
    """Numbers about one merge; layers and clients by name.

    Parameters
    ----------
    error : float
        ``‖merged − Σ wᵢ ΔWᵢ‖ / ‖Σ wᵢ ΔWᵢ‖`` over all layers; 0 if both are zero, infinite if only the average
        is.
    effective_rank : mapping of str to int
        Per layer, the fewest singular values of the merge that hold 95 % of its squared norm.
    norm : mapping of str to float
        Frobenius norm of the merge per layer.
    client_norm : mapping of str to float
        Frobenius norm of each client's whole update.
    cosine : mapping of str to float
        Cosine of each client's whole update to the average, in [-1, 1]; 0 where one of them is zero.
    """

    error: float
    effective_rank: Mapping[str, int]
    norm: Mapping[str, float]
    client_norm: Mapping[str, float]
    cosine: Mapping[str, float]


def certificate(
    merged: Adapter, layers: Iterable[tuple[str, Mapping[str, Update]]], weights: Mapping[str, float]
) -> Certificate:
    """Compare a merge with the exact average of what was merged.

    Parameters
    ----------
    merged : Adapter
        What the replies became.
    layers : iterable of (layer, mapping of client to its update)
        One layer at a time, so that a generator may load it from disk; ``parts_by_layer(updates).items()`` where
        all is in memory. A client without the layer contributes nothing there.
    weights : mapping of str to float
        ``num_examples`` by client; normalised over all clients here.
    """
    place = {client: i for i, client in enumerate(weights)}
    share = torch.tensor(list(weights.values()), dtype=torch.float64)
    share /= share.sum()
    products = torch.zeros(len(place), len(place), dtype=torch.float64)
    crossed = torch.zeros(len(place), dtype=torch.float64)
    for layer, parts in layers:
        at = torch.tensor([place[client] for client in parts])
        own, with_merged = _inner_products(list(parts.values()), merged.layers.get(layer))
        products[at[:, None], at] += own
        crossed[at] += with_merged
    spectra = {layer: squared_spectrum(update) for layer, update in merged.layers.items()}
    squares = {layer: float(square.sum()) for layer, square in spectra.items()}

    least = NOISE * float(share @ products.diagonal())
    mean = _root(float(share @ products @ share), least)
    apart = _root(math.fsum(squares.values()) - 2 * float(share @ crossed) + mean**2, least)
    norms = products.diagonal().clamp_min(0).sqrt()
    cosine = torch.where(norms * mean > 0, (products @ share) / (norms * mean), 0.0).clamp(-1, 1)
    return Certificate(
        error=apart / mean if mean else math.inf if apart else 0.0,
        effective_rank={layer: energy_rank(square) for layer, square in spectra.items()},
        norm={layer: math.sqrt(square) for layer, square in squares.items()},
        client_norm=dict(zip(place, norms.tolist(), strict=True)),
        cosine=dict(zip(place, cosine.tolist(), strict=True)),
    )


def squared_spectrum(update: Update) -> Tensor:
    """Return the squared singular values, falling, float64, from Gram matrices."""
    if isinstance(update, LowRank):
        a = update.a.double()
        values, vectors = torch.linalg.eigh(update.b.double().T @ update.b.double())
        root = vectors * values.clamp_min(0).sqrt()
        gram: Tensor = root.T @ (a @ a.T) @ root
    else:
        thin = update.w.double() if update.shape[0] <= update.shape[1] else update.w.double().T
        gram = thin @ thin.T
    spectrum: Tensor = torch.linalg.eigvalsh(gram)
    return spectrum.flip(0).clamp_min(0)


def energy_rank(square: Tensor, energy: float = ENERGY) -> int:
    """Count the fewest values of a falling squared spectrum that hold a share of its sum."""
    total = float(square.sum())
    return int((square.cumsum(0) < energy * total).sum()) + 1 if total > 0 else 0


def _inner_products(parts: Sequence[Update], merged: Update | None) -> tuple[Tensor, Tensor]:
    """Return one layer's inner products of the parts with each other, and with the merge."""
    factors = [part for part in parts if isinstance(part, LowRank)]
    if len(factors) < len(parts):
        own = torch.tensor([[inner(x, y) for y in parts] for x in parts], dtype=torch.float64)
        return own, torch.tensor([0.0 if merged is None else inner(x, merged) for x in parts], dtype=torch.float64)
    b = torch.cat([part.b.double() for part in factors], dim=1)
    a = torch.cat([part.a.double() for part in factors], dim=0)
    owner = torch.repeat_interleave(torch.tensor([part.rank for part in factors]))
    block = torch.nn.functional.one_hot(owner, len(factors)).double()
    own = block.T @ ((b.T @ b) * (a @ a.T)) @ block
    if merged is None:
        return own, own.new_zeros(len(parts))
    if isinstance(merged, LowRank):
        slots = ((b.T @ merged.b.double()) * (a @ merged.a.double().T)).sum(1)
    else:
        slots = ((b.T @ merged.w.double()) * a).sum(1)
    return own, block.T @ slots


def _root(square: float, least: float) -> float:
    return math.sqrt(square) if square > least else 0.0
