"""FedAdam: Adam on the server.

``m ← β₁ m + (1 − β₁) Δ``, ``v ← β₂ v + (1 − β₂) Δ²``, ``x ← x + η m / (√v + τ)``, where Δ is what the round's merge
changed; v begins at τ².

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021, arXiv
2003.00295, algorithm 2 (β₁ 0.9, β₂ 0.99, τ 1e-3; η is tuned there, 0.01 being the commonest best). As there, moments
are not corrected for their beginning. Departures: the first round's factors, which replace random ones, are taken as
merged; what Δ and Δ² are where coordinates change their meaning from round to round, `strategies.product_step` says.
"""

from __future__ import annotations

from torch import Tensor

from strategies.adaptive_step import AdaptiveOptimizer


class FedAdam(AdaptiveOptimizer):
    """Adam on the merged update."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return ``β₂ v + (1 − β₂) Δ²``."""
        return self.beta2 * v + (1 - self.beta2) * square
