"""Strategies that merge a round's replies all at once, not as one running sum."""

from __future__ import annotations

from common.federation import ClientUpdate, ServerState
from strategies.aggregation import AggregationStrategy
from strategies.updates import low_rank_layers


class Gathering(AggregationStrategy):
    """Base of the strategies whose accumulator is the list of the replies."""

    def begin(self, state: ServerState) -> list[ClientUpdate]:
        """Open an empty list."""
        return []

    def add(self, accumulated: list[ClientUpdate], update: ClientUpdate) -> list[ClientUpdate]:
        """Keep the reply."""
        low_rank_layers(update)
        accumulated.append(update)
        return accumulated
