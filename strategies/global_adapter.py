"""The global adapter: the sum of all updates merged so far.

Per layer, factors are put side by side, which rounds nothing, until ``R (out + in) ≥ out · in``; from then on the
layer is a dense float32 *sum*. Base weights are never added to. A cap on rank or energy keeps the factors thin: each
round's sum is refactored by QR in float64, at the cost of a recorded share of the squared norm; where capped factors
would be no smaller than the matrix, the layer becomes dense and loses nothing.
"""

from __future__ import annotations

from common.adapter import Adapter
from common.lowrank import Dense, LowRank, Update, add


def compact(update: LowRank) -> Update:
    """Refactor an update into its own singular vectors, or build its matrix where that is the smaller form.

    The sum is the same; the factors it was stacked from cannot be read off any more.
    """
    return update.truncate()[0] if pays(update) else Dense(update.dense())


def pays(update: LowRank) -> bool:
    """Tell whether two factors hold fewer numbers than the matrix."""
    out, inn = update.shape
    return update.rank * (out + inn) < out * inn


def grow(
    total: Adapter, update: Adapter, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, float]:
    """Add one round's merged update to the global adapter.

    Without a cap the update's factors are sent to all clients as they are: `compact` those that some owner would
    recognise. With one, the sum is refactored here, once, and the update may be a plain stack.

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
    shares: dict[str, float] = {}
    for name, part in update.layers.items():
        joined = add(layers[name], part) if name in layers else part
        layers[name], shares[name] = _bounded(joined, rank, energy)
    used = {name: layer for name, layer in layers.items() if not (isinstance(layer, LowRank) and layer.rank == 0)}
    grown = Adapter.pack(used, method=total.method)
    if not any(shares.values()):
        return grown, 0.0
    squares = {name: layers[name].norm() ** 2 / (1 - share) for name, share in shares.items()}
    return grown, sum(shares[name] * square for name, square in squares.items()) / sum(squares.values())


def change(after: Adapter, before: Adapter) -> Adapter:
    """Return ``after − before``, layer by layer, without building a matrix for factors."""
    layers: dict[str, Update] = dict(after.layers)
    for name, layer in before.layers.items():
        minus = layer.scaled(-1.0)
        layers[name] = add(layers[name], minus) if name in layers else minus
    return Adapter.pack(layers, method=after.method)


def _bounded(joined: Update, rank: int | None, energy: float | None) -> tuple[Update, float]:
    """Return the layer in its smaller form, and the share of its squared norm that the caps discard."""
    if isinstance(joined, Dense):
        return joined, 0.0
    kept, share = (joined, 0.0) if rank is None and energy is None else joined.truncate(rank, energy)
    return (kept, share) if pays(kept) else (Dense(joined.dense()), 0.0)
