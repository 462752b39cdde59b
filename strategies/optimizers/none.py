"""No optimizer: the merged update is taken as it is."""

from __future__ import annotations

from collections.abc import Sequence

from common.federation import ServerState
from strategies.aggregation import AggregationStrategy
from strategies.optimizers import ServerOptimizer


class NoOptimizer(ServerOptimizer):
    """Take the merged update as it is."""

    def step(self, before: ServerState, after: ServerState, strategy: AggregationStrategy) -> ServerState:
        """Return what was merged."""
        return after

    def expected_ranks(
        self, strategy: AggregationStrategy, rank: int, cohort: Sequence[int], merges: int
    ) -> tuple[int, int]:
        """Expect what the strategy expects."""
        return strategy.expected_ranks(rank, cohort, merges)
