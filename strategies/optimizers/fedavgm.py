"""FedAvgM: momentum on the server.

``m ← β m + Δ``, ``x ← x + η m``, where Δ is what the round's merge changed; η = 1 and β = 0 take the merge as it is.

Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019,
arXiv 1909.06335 (β 0.9); the learning rate η is that of Reddi et al., arXiv 2003.00295. A settled step is η / (1 − β)
times a merge long: clients want smaller learning rates than without. Departures: no Nesterov look-ahead; the first
round's factors, which replace random ones, are taken as merged; what Δ is where coordinates change their meaning from
round to round, `strategies.product_step` says.
"""

from __future__ import annotations

from pydantic import Field

from common.federation import ServerState
from strategies.aggregation import AggregationStrategy
from strategies.optimizers import ServerOptimizer
from strategies.server_rule import Rule
from strategies.server_step import server_step


class FedAvgM(ServerOptimizer):
    """Server momentum."""

    learning_rate: float = Field(1.0, gt=0, description="η: what the momentum is multiplied by.")
    momentum: float = Field(0.9, ge=0, lt=1, description="β: what is left of the momentum after a round.")

    def step(self, before: ServerState, after: ServerState, strategy: AggregationStrategy) -> ServerState:
        """Move by ``η m``."""
        return server_step(before, after, strategy, Rule(self.learning_rate, self.momentum))
