"""SVD: the nearest adapter of a rank to the exact sum.

``Σ wᵢ bᵢ aᵢ`` is stacked and cut to its largest singular values through QR of the factors, without building the matrix;
no adapter of this rank is nearer (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from common.lowrank import LowRank, stack
from strategies.oneshot import OneShotMerge, bounded_rank


class Svd(OneShotMerge):
    """The nearest adapter of a rank to the exact sum."""

    rank: int | None = Field(None, ge=1, description="Rank of the result; none: the largest of the adapters'.")

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Stack, and cut."""
        return stack(parts, weights).truncate(bounded_rank(self.rank, parts))[0]
