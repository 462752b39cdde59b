"""How many bytes a run will move, worked out from shapes and ranks; headers aside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.adapter import Layout
from common.experiment import Experiment
from common.federation import ModelSpec
from server.evaluation import is_evaluated
from strategies import AggregationStrategy

NUMBER_BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes of adapters, from the ranks a strategy expects.

    Parameters
    ----------
    experiment : Experiment
        Rounds, wire format and evaluation.
    strategy : AggregationStrategy
        Tells how start and global adapter grow.
    spec : ModelSpec
        Shapes.
    cohort : sequence of int
        Ranks of a round's clients.
    begun : Layout
        Of the global adapter before round 1.
    """

    experiment: Experiment
    strategy: AggregationStrategy
    spec: ModelSpec
    cohort: Sequence[int]
    begun: Layout

    def upload(self, rank: int) -> int:
        """Bytes of one trained update."""
        return self._bytes(self._factors(rank) + self._heads)

    def start(self, rank: int, merges: int) -> int:
        """Bytes of the start adapter a client of this rank gets after so many merges."""
        return self._bytes(self._factors(self._expected(rank, merges)[0]) + self._heads)

    def whole_start(self, merges: int) -> int:
        """Bytes of the whole start adapter, as evaluation needs it."""
        return self.start(sum(self.cohort), merges)

    def merged(self, merges: int) -> int:
        """Bytes of the global adapter after so many merges, each layer in its smaller form."""
        grown = self._expected(1, merges)[1]
        ranks = dict.fromkeys(self.spec.layers, grown)
        for name, out, inn, rank in self.begun.layers:
            ranks[name] = grown + (rank if rank >= 0 else min(out, inn))
        sizes = self.spec.layers
        return self._bytes(sum(min(rank * sum(sizes[name]), math.prod(sizes[name])) for name, rank in ranks.items()))

    def training(self, rank: int, number: int, evaluates: bool) -> int:
        """Bytes sent for one round of training; a client that evaluated the model already holds the global adapter."""
        holds = evaluates and is_evaluated(self.experiment, number - 1)
        return self.start(rank, number - 1) + (0 if holds else self.merged(number - 1))

    def evaluation(self, number: int) -> int:
        """Bytes sent for one evaluation."""
        if not is_evaluated(self.experiment, number):
            return 0
        return self.whole_start(number) + self.merged(number)

    @property
    def _heads(self) -> int:
        return sum(head.numel() for head in self.spec.heads.values())

    def _expected(self, rank: int, merges: int) -> tuple[int, int]:
        return self.strategy.expected_ranks(rank, self.cohort, merges)

    def _factors(self, rank: int) -> int:
        """Numbers in the factors that travel: ``a`` stays away where it is frozen and shared."""
        frozen = self.strategy.capabilities.shared_frozen_factor
        return sum(
            self.spec.layer_rank(layer, rank) * (out if frozen else out + inn)
            for layer, (out, inn) in self.spec.layers.items()
        )

    def _bytes(self, numbers: int) -> int:
        return numbers * NUMBER_BYTES[self.experiment.federation.wire]
