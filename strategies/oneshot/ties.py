"""TIES: trim each update to its largest entries, elect a sign for every entry, and average those that agree with it.

Yadav, Tam, Choshen, Raffel, Bansal: TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv
2306.01708. The arithmetic is PEFT's ``ties``, on the updates ``b a`` themselves: entries of factors mean nothing by
themselves, and adapters of unequal ranks have none in common. The result is cut to a rank by SVD. Departure: weights
are taken relative to their mean, and the mean given back at the end, so that adapters of weight 1/N are not divided by
N twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.merge_utils import ties
from pydantic import Field

from common.lowrank import LowRank
from strategies.oneshot import OneShotMerge, bounded_rank
from strategies.sparse_svd import leading_part


class Ties(OneShotMerge):
    """Trim, elect signs, average what agrees; cut to a rank."""

    density: float = Field(0.2, gt=0, lt=1, description="Share of each update's entries that is kept, the largest.")
    rank: int | None = Field(None, ge=1, description="Rank of the result; none: the largest of the adapters'.")

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Merge the matrices and factor the result."""
        whole = sum(weights)
        relative = torch.tensor([weight * len(parts) / whole for weight in weights])
        merged = ties([part.dense() for part in parts], relative, self.density) * whole
        return leading_part(merged, bounded_rank(self.rank, parts), seed)
