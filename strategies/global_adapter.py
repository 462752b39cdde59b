"""The global adapter: the exact sum of all updates merged so far.

Per layer, factors are put side by side and recompressed by QR in float64, which drops nothing but rounding,
until ``R (out + in) ≥ out · in``; from then on the layer is a dense float32 *sum*. Base weights are never
added to. A cap on rank or energy keeps the factors thin at the cost of a recorded share of the squared norm;
where capped factors would be no smaller than the matrix, the layer becomes dense and loses nothing.
"""

from __future__ import annotations

import torch

from common.adapter import Adapter
from common.lowrank import Dense, LowRank, Update, add, kept_rank, resolution


def compact(update: LowRank) -> Update:
    """Refactor an update into its own singular vectors, or build its matrix where that is the smaller form.

    The sum is the same; the factors it was stacked from cannot be read off any more.
    """
    if pays(update):
        return update.truncate()[0]
    return Dense(update.dense())


def pays(update: LowRank) -> bool:
    """Tell whether two factors hold fewer numbers than the matrix."""
    out, inn = update.shape
    return update.rank * (out + inn) < out * inn


def grow(
    total: Adapter, update: Adapter, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, float]:
    """Add one round's merged update to the global adapter.

    Parameters
    ----------
    total, update : Adapter
        Global adapter so far and merged update; layers missing in one of them count as zero there.
    rank : int, optional
        Cap on the rank of each layer.
    energy : float in (0, 1), optional
        Keep the fewest singular values that hold this share of a layer's squared norm.

    Returns
    -------
    Adapter, float
        The new global adapter, layers that are zero left out; the share of ``‖·‖²`` the caps discarded from
        the layers that grew, in [0, 1).
    """
    layers: dict[str, Update] = dict(total.layers)
    lost = whole = 0.0
    for name, part in update.layers.items():
        joined = add(layers[name], part) if name in layers else part
        layers[name], discarded, squared = _recompressed(joined, rank, energy)
        lost, whole = lost + discarded, whole + squared
    used = {name: layer for name, layer in layers.items() if not (isinstance(layer, LowRank) and layer.rank == 0)}
    return Adapter.pack(used, method=total.method), lost / whole if lost else 0.0


def change(after: Adapter, before: Adapter) -> Adapter:
    """Return ``after − before``, layer by layer, without building a matrix for factors."""
    layers: dict[str, Update] = dict(after.layers)
    for name, layer in before.layers.items():
        minus = layer.scaled(-1.0)
        layers[name] = add(layers[name], minus) if name in layers else minus
    return Adapter.pack(layers, method=after.method)


def _recompressed(joined: Update, rank: int | None, energy: float | None) -> tuple[Update, float, float]:
    """Return the layer in its smaller form, the squared norm its caps discard, the squared norm before."""
    if isinstance(joined, Dense):
        return joined, 0.0, joined.norm() ** 2
    if rank is None and energy is None and joined.rank >= min(joined.shape):
        return Dense(joined.dense()), 0.0, 0.0
    svd = joined.svd()
    square = svd.s.square()
    dtype = torch.promote_types(joined.a.dtype, torch.float32)
    noise = resolution(dtype, joined.shape)
    significant = kept_rank(svd.s, None, None, noise)
    keep = kept_rank(svd.s, rank, energy, noise)
    kept = svd.factors(keep, dtype)
    if not pays(kept):
        return Dense(joined.dense()), 0.0, float(square.sum())
    return kept, float(square[keep:significant].sum()), float(square.sum())
