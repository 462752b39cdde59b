"""Bounded downloads: what a client gets is cut to a rank, a share of the energy, or a number of bytes.

Cut is by exact SVD of the factors, so what is left is the nearest adapter of its rank. The server's own adapter stays
whole. A start adapter whose numbers mean the same from round to round is never cut: all clients must hold the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from common.adapter import Adapter, Layout
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.lowrank import Dense, LowRank, Update
from common.wire import WireFormat, wire_bytes
from server.cohort import DEFAULTS


@dataclass(frozen=True)
class Bound:
    """What one client's download may hold; all of it must hold at once.

    Parameters
    ----------
    rank : int, optional
        Of every layer.
    energy : float in (0, 1), optional
        Share of each layer's squared norm that is kept.
    nbytes : int, optional
        Of start and global adapter together.
    """

    rank: int | None = None
    energy: float | None = None
    nbytes: int | None = None

    @property
    def is_none(self) -> bool:
        """Tell whether nothing is bounded."""
        return self.rank is None and self.energy is None and self.nbytes is None


def download_bound(experiment: Experiment, client: str) -> Bound:
    """Return the bound of a client's downloads: the federation's, bytes by its own setting if it has one."""
    federation = experiment.federation
    own = experiment.clients.get(client, DEFAULTS).download_bytes
    return Bound(federation.download_rank, federation.download_energy, own or federation.download_bytes)


def cut(adapter: Adapter, rank: int | None, energy: float | None) -> tuple[Adapter, float]:
    """Return the nearest adapter under a cap on rank or energy, and the share of its squared norm that is lost."""
    layers: dict[str, Update] = {}
    lost = whole = 0.0
    for name, update in adapter.layers.items():
        square = update.norm() ** 2
        kept, share = (update if isinstance(update, LowRank) else update.low_rank()).truncate(rank, energy)
        out, inn = update.shape
        if isinstance(update, Dense) and kept.rank * (out + inn) >= out * inn:
            layers[name] = update
            share = 0.0
        else:
            layers[name] = kept
        lost, whole = lost + share * square, whole + square
    return Adapter.pack(layers, adapter.extras, adapter.method), lost / whole if whole else 0.0


def numbers_at(layout: Layout, rank: int | None) -> int:
    """Count the numbers of an adapter whose layers are cut to a rank, where that makes them smaller."""
    heads = layout.head_numel - layout.outer_numel
    total = heads
    for _, out, inn, held in layout.layers:
        size = out * inn if held < 0 else held * (out + inn)
        total += size if rank is None else min(size, rank * (out + inn))
    return total


def fitting_rank(numbers: Callable[[int], int], most: int, nbytes: int, wire: WireFormat) -> int:
    """Return the largest rank whose numbers fit the bytes; 0 if not even rank 1 does.

    Parameters
    ----------
    numbers : callable
        Numbers that travel at a rank; never fewer at a higher one.
    most : int
        Highest rank worth trying.
    nbytes : int
        What there is room for.
    wire : WireFormat
        Number format.
    """
    low, high = 0, most
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if wire_bytes(numbers(middle), wire) <= nbytes else (low, middle - 1)
    return low


def widest(layout: Layout) -> int:
    """Return the highest rank in a layout; a dense layer counts as its smaller side."""
    return max((held if held >= 0 else min(out, inn) for _, out, inn, held in layout.layers), default=0)


def rank_limit(merged: Layout, start: Layout, bound: Bound, wire: WireFormat, may_cut_start: bool) -> int | None:
    """Return the rank a download must be cut to; None if no rank is too high.

    Parameters
    ----------
    merged, start : Layout
        Of the global and the start adapter a client would get.
    bound : Bound
        What it may get.
    wire : WireFormat
        Number format of downloads.
    may_cut_start : bool
        Whether the start's factors may be replaced by others of the same product.

    Raises
    ------
    ConfigurationError
        If not even rank 1 fits the bytes.
    """
    if bound.nbytes is None:
        return bound.rank
    moving = [merged, start] if may_cut_start else [merged]
    fixed = 0 if may_cut_start else wire_bytes(start.numel, wire)
    most = max(widest(layout) for layout in moving)
    fits = fitting_rank(lambda k: sum(numbers_at(layout, k) for layout in moving), most, bound.nbytes - fixed, wire)
    if fixed > bound.nbytes or (most and not fits):
        raise ConfigurationError(
            f"a download of {bound.nbytes} bytes holds not even rank 1 beside a start of {fixed} bytes; raise "
            "download_bytes or lower the client's rank"
        )
    if fits == most:
        return bound.rank
    return fits if bound.rank is None else min(fits, bound.rank)


def bounded(
    merged: Adapter, start: Adapter, bound: Bound, wire: WireFormat, may_cut_start: bool
) -> tuple[Adapter, Adapter, float]:
    """Cut a client's download to its bound; the parameters are those of `rank_limit`.

    Returns
    -------
    Adapter, Adapter, float
        Global and start adapter; the share of their squared norm that is lost, the larger one.
    """
    rank = rank_limit(merged.layout, start.layout, bound, wire, may_cut_start)
    small, lost = _cut_if_wider(merged, rank, bound.energy)
    first, missed = _cut_if_wider(start, rank, bound.energy) if may_cut_start else (start, 0.0)
    return small, first, max(lost, missed)


def _cut_if_wider(adapter: Adapter, rank: int | None, energy: float | None) -> tuple[Adapter, float]:
    if energy is None and (rank is None or widest(adapter.layout) <= rank):
        return adapter, 0.0
    return cut(adapter, rank, energy) if adapter.layout.layers else (adapter, 0.0)
