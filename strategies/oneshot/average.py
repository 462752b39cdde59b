"""Average: the weighted mean of each factor by itself.

``W b̄ ā`` with ``ā = Σ wᵢ aᵢ / W``, ``b̄ = Σ wᵢ bᵢ / W``, ``W = Σ wᵢ``: the rank stays, but the product of means is not
the mean of products unless the adapters share a factor (Zhang et al.: FedIT, arXiv 2305.05644). PEFT's ``linear``
combination is another one: it takes ``√wᵢ`` of both factors, so that N identical adapters of weight 1/N come out N
times too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.lowrank import LowRank
from strategies.oneshot import OneShotMerge


class Average(OneShotMerge):
    """The mean of each factor; needs equal ranks, and adapters that began alike."""

    needs_equal_ranks: ClassVar[bool] = True

    def merge(self, parts: Sequence[LowRank], weights: Sequence[float], seed: int) -> LowRank:
        """Average the factors.

        Raises
        ------
        ConfigurationError
            If ranks differ.
        """
        ranks = sorted({part.rank for part in parts})
        if len(ranks) > 1:
            raise ConfigurationError(f"average needs equal ranks, not {ranks}; use svd, stack or lora_lego")
        whole = sum(weights)
        shares = torch.tensor([weight / whole for weight in weights], dtype=torch.float64)
        b, a = (_mean(factors, shares) for factors in ([part.b for part in parts], [part.a for part in parts]))
        return LowRank(b * whole, a)


def _mean(factors: Sequence[Tensor], shares: Tensor) -> Tensor:
    mean: Tensor = torch.tensordot(shares, torch.stack([factor.double() for factor in factors]), dims=1)
    return mean.to(torch.promote_types(factors[0].dtype, torch.float32))
