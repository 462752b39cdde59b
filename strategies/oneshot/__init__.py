"""One-shot merges: finished adapters become one, outside any federation.

Each module of this package is one merge, named after its file. All of them aim at ``Σ wᵢ bᵢ aᵢ`` with the weights as
they are given, and leave something out or change something on the way; identical adapters come out as themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from common.lowrank import LowRank
from common.plugins import Family, Plugin


class OneShotMerge(Plugin):
    """Base of the one-shot merges."""

    needs_equal_ranks: ClassVar[bool] = False
    """Averages factor by factor."""

    @abstractmethod
    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Merge one layer.

        Parameters
        ----------
        parts : sequence of LowRank
            The layer of each adapter, all of one shape, every scale in ``b``; at least one.
        weights : sequence of float
            Of each adapter, positive; they need not sum to 1.
        seed : int
            For merges that draw: the same one gives the same bits.
        """


ONESHOT: Family[OneShotMerge] = Family(
    "strategies.oneshot",
    OneShotMerge,  # type: ignore[type-abstract]
    "one-shot merge",
)


def bounded_rank(rank: int | None, parts: Sequence[LowRank]) -> int:
    """Return the rank of a merged layer: the one asked for, or the largest part's; at most what the layer can hold."""
    return min(rank or max(part.rank for part in parts), *parts[0].shape)
