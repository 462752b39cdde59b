"""FedYogi: Yogi on the server, whose mean square grows and falls by steps of one size.

``m ← β₁ m + (1 − β₁) Δ``, ``v ← v − (1 − β₂) Δ² sign(v − Δ²)``, ``x ← x + η m / (√v + τ)``, where Δ is what the round's
merge changed; v begins at τ².

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021, arXiv
2003.00295, algorithm 2 (β₁ 0.9, β₂ 0.99, τ 1e-3; η is tuned there, 0.01 being the commonest best). As there, moments
are not corrected for their beginning. Departures: the first round's factors, which replace random ones, are taken as
merged; what Δ and Δ² are where coordinates change their meaning from round to round, `strategies.product_step` says.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from common.federation import ServerState
from strategies.aggregation import AggregationStrategy
from strategies.optimizers import ServerOptimizer
from strategies.server_rule import Rule
from strategies.server_step import server_step


class FedYogi(ServerOptimizer):
    """Yogi on the merged update."""

    learning_rate: float = Field(0.01, gt=0, description="η: about how far a settled step moves each number.")
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁: what is left of the momentum after a round.")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂: the smaller, the quicker the mean square moves.")
    tau: float = Field(1e-3, gt=0, description="τ: changes much smaller than this are not blown up to full steps.")

    def step(self, before: ServerState, after: ServerState, strategy: AggregationStrategy) -> ServerState:
        """Move by ``η m / (√v + τ)``."""
        rule = Rule(self.learning_rate, self.beta1, 1 - self.beta1, self.tau, self._second)
        return server_step(before, after, strategy, rule)

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()
