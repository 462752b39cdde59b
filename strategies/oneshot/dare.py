"""DARE: drop entries of each update at random, scale up the others, and sum.

``Σ wᵢ mᵢ ∘ (bᵢ aᵢ) / p``, masks ``mᵢ`` that keep a share p of the entries: the expected value is the exact sum.

Yu, Yu, Yu, Huang, Li: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML
2024, arXiv 2311.03099. The arithmetic is PEFT's ``dare_linear``, on the updates ``b a`` themselves; the result is cut
to a rank by SVD. Departures: masks follow from a seed; half of the entries are kept, not the paper's tenth, since most
of what remains of a thin update after the paper's masks is noise, which no few singular values hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import dare_linear
from pydantic import Field

from common.lowrank import LowRank
from strategies.oneshot import OneShotMerge, bounded_rank
from strategies.sparse_svd import leading_part


class Dare(OneShotMerge):
    """Drop entries at random and scale up the rest; cut to a rank."""

    density: float = Field(0.5, gt=0, lt=1, description="Share of each update's entries that is kept, at random.")
    rank: int | None = Field(None, ge=1, description="Rank of the result; none: the largest of the adapters'.")

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Merge the matrices and factor the result."""
        with torch.random.fork_rng(devices=[]):  # PEFT draws from torch's own generator
            torch.manual_seed(seed)
            merged = dare_linear([part.dense() for part in parts], torch.tensor(list(weights)), self.density)
        return leading_part(merged, bounded_rank(self.rank, parts), seed)
