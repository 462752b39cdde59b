"""Stacking: the exact sum, its rank the sum of all ranks.

``Σ wᵢ bᵢ aᵢ = [w₁b₁ … w_K b_K] [a₁; …; a_K]`` (Wang et al.: FLoRA, arXiv 2409.05976). More slots than the layer can use
are refactored by QR and a small SVD, to the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.lowrank import LowRank, stack
from strategies.oneshot import OneShotMerge


class Stack(OneShotMerge):
    """The exact sum; its rank is the sum of all ranks."""

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Put the factors side by side."""
        whole = stack(parts, weights)
        return whole if whole.rank <= min(whole.shape) else whole.truncate()[0]
