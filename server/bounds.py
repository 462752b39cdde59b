"""Bounded downloads: what a client gets is cut to a rank, a share of the energy, or a number of bytes.

Cut is by exact SVD of the factors, so what is left is the nearest adapter of its rank. The server's own adapter stays
whole. A start adapter whose numbers mean the same from round to round is never cut: all clients must hold the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.adapter import Adapter, Layout
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.lowrank import Dense, Update
from common.wire import WireFormat, wire_bytes
from server.cohort import DEFAULTS
from strategies import AGGREGATION, AggregationStrategy


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
        Of start and global adapter together, and of frames a client does not hold yet.
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
    """Return the nearest adapter under a cap on rank or energy, and the share of its squared norm that is lost.

    A matrix that factors of its rank would not make smaller stays as it is.
    """
    if energy is None and (rank is None or widest(adapter.layout) <= rank):
        return adapter, 0.0
    layers: dict[str, Update] = {}
    lost = whole = 0.0
    for name, update in adapter.layers.items():
        square = update.norm() ** 2
        layers[name], share = _cut_layer(update, rank, energy)
        lost, whole = lost + share * square, whole + square
    return Adapter.pack(layers, adapter.extras, adapter.method), lost / whole if whole else 0.0


def _cut_layer(update: Update, rank: int | None, energy: float | None) -> tuple[Update, float]:
    out, inn = update.shape
    if isinstance(update, Dense) and energy is None and rank is not None and rank * (out + inn) >= out * inn:
        return update, 0.0
    kept, share = update.truncate(rank, energy)
    return (update, 0.0) if isinstance(update, Dense) and kept.rank * (out + inn) >= out * inn else (kept, share)


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


def rank_limit(layouts: Sequence[Layout], fixed: int, bound: Bound, wire: WireFormat) -> int | None:
    """Return the rank a download must be cut to; None if no rank is too high.

    Parameters
    ----------
    layouts : sequence of Layout
        Of the adapters that may be cut.
    fixed : int
        Bytes of what may not: a start whose numbers mean something, frames.
    bound : Bound
        What the client may get.
    wire : WireFormat
        Number format of downloads.

    Raises
    ------
    ConfigurationError
        If not even rank 1 fits the bytes.
    """
    if bound.nbytes is None:
        return bound.rank
    room = bound.nbytes - fixed
    most = max((widest(layout) for layout in layouts), default=0)
    fits = fitting_rank(lambda k: sum(numbers_at(layout, k) for layout in layouts), most, room, wire)
    if room < 0 or (most and not fits):
        raise ConfigurationError(
            f"download_bytes = {bound.nbytes} holds not even rank 1 beside {fixed} bytes that cannot be cut; raise it "
            "or lower the client's rank"
        )
    if fits == most:
        return bound.rank
    return fits if bound.rank is None else min(fits, bound.rank)


def bound_refusals(experiment: Experiment, strategy: AggregationStrategy, ranks: Sequence[int]) -> list[str]:
    """List, in sentences, why downloads of this strategy cannot be cut as they should be; empty if they can.

    Parameters
    ----------
    experiment : Experiment
        The settings.
    strategy : AggregationStrategy
        One whose start adapter is the same for all cannot have it cut.
    ranks : sequence of int
        Of the clients that train.
    """
    if not strategy.capabilities.same_coordinates:
        return []
    federation, found = experiment.federation, []
    cutting = [name for name in AGGREGATION.names() if not AGGREGATION.plugin(name).capabilities.same_coordinates]
    advice = f"or use a strategy whose downloads can be cut: {', '.join(cutting)}"
    why = f"strategy {strategy.plugin_name} starts every client from the same numbers, so"
    if federation.download_rank is not None and federation.download_rank < max(ranks):
        found.append(
            f"{why} federation.download_rank = {federation.download_rank} cannot be below the clients' rank "
            f"{max(ranks)}; give the clients that rank, {advice}"
        )
    if federation.download_energy is not None and not strategy.expected_ranks(max(ranks), ranks, 1)[1]:
        found.append(f"{why} federation.download_energy would cut nothing; leave it out, {advice}")
    return found
