"""How far a merge is from the exact average of its updates, measured in factor space.

With all factors of a layer side by side, ``H = (bᵀb) ∘ (a aᵀ)`` holds the inner products of all rank-1 parts;
every norm, cosine and distance is a sum over blocks of ``H``. No matrix of a low-rank layer is built, and
only one layer of all clients is looked at a time. Differences of nearly equal updates cancel, so what is
below about 3e-8 of the clients' updates reads as 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

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
    similarity : Tensor, shape (K, K), float64
        Cosine of the clients' whole updates to each other, in the order of ``client_norm``; 0 where one is zero.
    ranks : mapping of str to tuple of int or None
        Per layer, the rank of each client's update in the same order; None without the layer, or as a matrix.
    energy_ranks : mapping of str to tuple of int or None
        Per layer, the effective rank of each client's update; None as above, and all where one of them is a matrix.
    """

    error: float
    effective_rank: Mapping[str, int]
    norm: Mapping[str, float]
    client_norm: Mapping[str, float]
    cosine: Mapping[str, float]
    similarity: Tensor = field(compare=False)
    ranks: Mapping[str, tuple[int | None, ...]]
    energy_ranks: Mapping[str, tuple[int | None, ...]]


class _Layer(NamedTuple):
    """One layer's inner products of the parts with each other and with the merge, and the parts' effective ranks."""

    own: Tensor
    with_merged: Tensor
    energy_ranks: Sequence[int | None]


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
    ranks: dict[str, tuple[int | None, ...]] = {}
    energy_ranks: dict[str, tuple[int | None, ...]] = {}
    for layer, parts in layers:
        at = torch.tensor([place[client] for client in parts])
        found = _measured(list(parts.values()), merged.layers.get(layer))
        products[at[:, None], at] += found.own
        crossed[at] += found.with_merged
        own_ranks = [part.rank if isinstance(part, LowRank) else None for part in parts.values()]
        ranks[layer] = _spread(place, parts, own_ranks)
        energy_ranks[layer] = _spread(place, parts, found.energy_ranks)
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
        similarity=_similarity(products, norms),
        ranks=ranks,
        energy_ranks=energy_ranks,
    )


def squared_spectrum(update: Update) -> Tensor:
    """Return the squared singular values, falling, float64, from Gram matrices."""
    if isinstance(update, LowRank):
        b, a = update.b.double(), update.a.double()
        return _squared_spectra(_eigen_root(b.T @ b), a @ a.T)
    thin = update.w.double() if update.shape[0] <= update.shape[1] else update.w.double().T
    return _falling(torch.linalg.eigvalsh(thin @ thin.T))


def energy_rank(square: Tensor, energy: float = ENERGY) -> int:
    """Count the fewest values of a falling squared spectrum that hold a share of its sum."""
    return int(_energy_ranks(square, energy))


def _energy_ranks(squares: Tensor, energy: float = ENERGY) -> Tensor:
    """Count for each spectrum of a batch, shape (..., r)."""
    total = squares.sum(-1)
    counted = (squares.cumsum(-1) < energy * total[..., None]).sum(-1) + 1
    return torch.where(total > 0, counted, 0)


def _squared_spectra(root: Tensor, a_gram: Tensor) -> Tensor:
    """Return the squared singular values of ``b a``, falling, where ``root rootᵀ = bᵀb``; batches of them too."""
    return _falling(torch.linalg.eigvalsh(root.mT @ a_gram @ root))


def _eigen_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return root


def _quick_root(gram: Tensor) -> Tensor:
    """Return a root in a tenth of the time; not for an error, which needs the last digits of a norm."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():  # slots that depend on each other, or were never trained
        root = torch.where(failed[..., None, None] > 0, _eigen_root(gram), root)
    return root


def _falling(rising: Tensor) -> Tensor:
    return rising.flip(-1).clamp_min(0)


def _measured(parts: Sequence[Update], merged: Update | None) -> _Layer:
    factors = [part for part in parts if isinstance(part, LowRank)]
    if len(factors) < len(parts):
        own = torch.tensor([[inner(x, y) for y in parts] for x in parts], dtype=torch.float64)
        crossed = [0.0 if merged is None else inner(x, merged) for x in parts]
        return _Layer(own, torch.tensor(crossed, dtype=torch.float64), [None] * len(parts))
    b = torch.cat([part.b.double() for part in factors], dim=1)
    a = torch.cat([part.a.double() for part in factors], dim=0)
    owner = torch.repeat_interleave(torch.tensor([part.rank for part in factors]))
    block = torch.nn.functional.one_hot(owner, len(factors)).double()
    b_gram, a_gram = b.T @ b, a @ a.T
    energy_ranks = _block_energy_ranks(b_gram, a_gram, [part.rank for part in factors])
    own = block.T @ (b_gram * a_gram) @ block
    if merged is None:
        return _Layer(own, own.new_zeros(len(parts)), energy_ranks)
    if isinstance(merged, LowRank):
        slots = ((b.T @ merged.b.double()) * (a @ merged.a.double().T)).sum(1)
    else:
        slots = ((b.T @ merged.w.double()) * a).sum(1)
    return _Layer(own, block.T @ slots, energy_ranks)


def _block_energy_ranks(b_gram: Tensor, a_gram: Tensor, ranks: Sequence[int]) -> list[int]:
    """Return the effective rank of each part from the blocks on the diagonal, those of one rank at once."""
    alike: defaultdict[int, list[int]] = defaultdict(list)
    for part, rank in enumerate(ranks):
        alike[rank].append(part)
    blocks = list(zip(_diagonal_blocks(b_gram, ranks), _diagonal_blocks(a_gram, ranks), strict=True))
    spectra = b_gram.new_zeros(len(ranks), max(ranks, default=0))
    for rank, members in alike.items():
        b_blocks, a_blocks = zip(*(blocks[part] for part in members), strict=True)
        spectra[members, :rank] = _squared_spectra(_quick_root(torch.stack(b_blocks)), torch.stack(a_blocks))
    return [int(count) for count in _energy_ranks(spectra).tolist()]


def _diagonal_blocks(gram: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = list(accumulate(sizes))
    return [gram[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _spread(place: Mapping[str, int], parts: Iterable[str], values: Iterable[int | None]) -> tuple[int | None, ...]:
    """Return the parts' values in the order of all clients, None for the others."""
    held = dict(zip(parts, values, strict=True))
    return tuple(held.get(client) for client in place)


def _similarity(products: Tensor, norms: Tensor) -> Tensor:
    """Turn inner products into cosines, in place: of many clients they are large."""
    lengths = torch.where(norms > 0, norms, math.inf)
    return products.div_(lengths).div_(lengths[:, None]).clamp_(-1, 1)


def _root(square: float, least: float) -> float:
    return math.sqrt(square) if square > least else 0.0
