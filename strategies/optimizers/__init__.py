"""Server optimizers: what is done with a round's merged update, for any strategy.

Each module of this package is one optimizer, named after its file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from common.federation import ServerState
from common.plugins import Family, Plugin
from strategies.aggregation import AggregationStrategy


class ServerOptimizer(Plugin):
    """Base of the server optimizers."""

    @abstractmethod
    def step(self, before: ServerState, after: ServerState, strategy: AggregationStrategy) -> ServerState:
        """Take the step from ``before`` that the strategy's merge, ``after``, points to.

        What the optimizer remembers is in the state's ``extras``, under names that begin with ``optimizer.``.
        """

    def expected_ranks(
        self, strategy: AggregationStrategy, rank: int, cohort: Sequence[int], merges: int
    ) -> tuple[int, int]:
        """Tell how large downloads become under this optimizer, for the plan; as the strategy's own method.

        A step in products is a sum over all updates so far, so that what merges replaced stays in the global adapter.
        """
        start, total = strategy.expected_ranks(rank, cohort, merges)
        if strategy.capabilities.same_coordinates:
            return start, total
        whole, _ = strategy.expected_ranks(sum(cohort), cohort, merges)
        return start, total + merges * whole


OPTIMIZERS: Family[ServerOptimizer] = Family(
    "strategies.optimizers",
    ServerOptimizer,  # type: ignore[type-abstract]
    "server optimizer",
)
