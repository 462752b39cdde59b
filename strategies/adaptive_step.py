"""What the adaptive server optimizers share: all of their step but how the mean square moves."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field
from torch import Tensor

from common.federation import ServerState
from strategies.aggregation import AggregationStrategy
from strategies.optimizers import ServerOptimizer
from strategies.server_rule import Rule
from strategies.server_step import server_step


class AdaptiveOptimizer(ServerOptimizer):
    """Base of the optimizers that divide the momentum by a root mean square (Reddi et al., arXiv 2003.00295)."""

    learning_rate: float = Field(0.01, gt=0, description="η: about how far a settled step moves each number.")
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁: what is left of the momentum after a round.")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂: the smaller, the quicker the mean square moves.")
    tau: float = Field(1e-3, gt=0, description="τ: changes much smaller than this are not blown up to full steps.")

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the new mean square from the held one and Δ²."""

    def step(self, before: ServerState, after: ServerState, strategy: AggregationStrategy) -> ServerState:
        """Move by ``η m / (√v + τ)``."""
        rule = Rule(self.learning_rate, self.beta1, 1 - self.beta1, self.tau, self.second)
        return server_step(before, after, strategy, rule)
