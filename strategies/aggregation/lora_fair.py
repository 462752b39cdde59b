"""LoRA-FAIR: average both factors, then correct ``b`` so that the product comes near the exact average.

``ā = Σ wᵢ aᵢ``, ``b̄ = Σ wᵢ bᵢ``, ``wᵢ = nᵢ / Σ n``. With ``E = Σ wᵢ bᵢ aᵢ − b̄ ā``, what the means miss, the correction
``Δb = argmin ‖E − Δb ā‖² + λ ‖Δb‖² = E āᵀ (ā āᵀ + λ I)⁻¹`` is added to ``b̄``; clients go on from ``ā`` and ``b̄ + Δb``.
``λ → ∞`` is the plain mean; at ``λ`` = 0 only what lies outside ``ā``'s row space is missed.

Bian, Wang, Zhang, Xu: LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, ICCV 2025,
arXiv 2411.14961. Departures: the paper minimises one minus a cosine by gradient steps on the server; here the distance
is the Frobenius norm, whose optimum is closed, computed without the matrix ``E``. Our ``λ`` is relative to the mean
squared length of ``ā``'s rows, so that it means the same at every scale. The model's scale is part of ``b``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from common.adapter import Adapter
from common.federation import ServerState
from common.lowrank import LowRank, resolution
from strategies.aggregation import Capabilities
from strategies.residual import MeanAndReplies, MeanWithReplies, residuals


class LoRAFair(MeanWithReplies):
    """Mean of the factors with a corrected ``b``; needs equal ranks."""

    capabilities: ClassVar[Capabilities] = Capabilities(mixed_ranks=False, linear_uplink=False, same_coordinates=True)

    ridge: float = Field(
        0.01, ge=0, description="λ over the mean squared length of the rows of the mean a; 0 is least squares."
    )

    def finish(self, state: ServerState, accumulated: MeanAndReplies) -> ServerState:
        """Replace the start adapter by the corrected mean."""
        mean = accumulated.total.mean()
        missed = residuals(accumulated.updates, mean)
        layers = {
            layer: corrected(part, missed[layer], self.ridge)
            for layer, part in mean.layers.items()
            if isinstance(part, LowRank)
        }
        start = Adapter.pack(layers, mean.extras, state.spec.method)
        return replace(state, start=start, round=state.round + 1, merged=start)


def corrected(mean: LowRank, residual: LowRank, ridge: float) -> LowRank:
    """Add the correction to the mean's ``b``, at a ``ridge`` relative to the mean squared length of ``a``'s rows."""
    penalty = ridge * float(mean.a.double().square().sum()) / max(mean.rank, 1)
    return LowRank(mean.b + correction(residual, mean.a, penalty).to(mean.b.dtype), mean.a)


def correction(residual: LowRank, a: Tensor, penalty: float) -> Tensor:
    """Return ``Δb = argmin ‖E − Δb a‖² + λ ‖Δb‖²``, shape (out, rank), float64; the smallest one if many are best.

    Parameters
    ----------
    residual : LowRank
        ``E``, shape (out, in).
    a : Tensor, shape (rank, in)
        The mean input factor.
    penalty : float
        λ, at least 0.
    """
    rows = a.double()
    gram = rows @ rows.T + penalty * torch.eye(len(rows), dtype=torch.float64)
    crossed = residual.b.double() @ (residual.a.double() @ rows.T)
    inverse: Tensor = torch.linalg.pinv(gram, rtol=resolution(a.dtype, (1, len(rows))), hermitian=True)
    return crossed @ inverse
