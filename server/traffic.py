"""How many bytes a run will move, worked out from shapes and ranks; headers aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from common.adapter import Layout
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.federation import ModelSpec, Part
from common.secure.upload import masked_bytes
from common.travel import part_numel
from common.wire import wire_bytes
from server.bounds import download_bound, numbers_at, rank_limit
from server.cohort import is_evaluated
from strategies import AggregationStrategy
from strategies.optimizers import OPTIMIZERS, ServerOptimizer

WHOLE = 1 << 30
"""A rank that no adapter exceeds."""


def adapter_layout(spec: ModelSpec, rank: int, dense: bool = False) -> Layout:
    """Return the layout of an adapter of this rank for a model."""
    layers = tuple(
        (name, out, inn, -1 if dense else spec.layer_rank(name, rank))
        for name, (out, inn) in sorted(spec.layers.items())
    )
    heads = tuple((name, tuple(head.shape)) for name, head in sorted(spec.heads.items()))
    return Layout(layers, heads, spec.method)


def sent_parts(strategy: AggregationStrategy, rounds: int) -> set[Part]:
    """Return what clients send up in the rounds of a run."""
    return {strategy.travels(number).up for number in range(1, rounds + 1)}


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

    def upload(self, rank: int, number: int) -> int:
        """Bytes of one update trained in round ``number``; masked, it is as wide as the widest of the cohort."""
        if self.experiment.secure_aggregation.enabled:
            return masked_bytes(self._numbers(max(rank, *self.cohort), self.strategy.travels(number).up))
        return wire_bytes(self._numbers(rank, self.strategy.travels(number).up), self.experiment.federation.wire)

    def training(self, client: str, rank: int, number: int, evaluates: bool) -> int:
        """Bytes sent for one round of training; a client that evaluated the model already holds the global adapter."""
        start, held = self.download(client, rank, number - 1)
        return start if evaluates and is_evaluated(self.experiment, number - 1) else start + held

    def evaluation(self, client: str, number: int) -> int:
        """Bytes sent for one evaluation, which needs the whole start adapter."""
        return sum(self.download(client, WHOLE, number)) if is_evaluated(self.experiment, number) else 0

    def download(self, client: str, rank: int, merges: int) -> tuple[int, int]:
        """Bytes of the start adapter, and of what a node holds on to (global adapter, frames), after so many merges.

        Parameters
        ----------
        client : str
            Its download may be bounded.
        rank : int
            Of the client; with more than the start adapter has, all of it is sent.
        merges : int
            Rounds merged before.
        """
        strategy, wire = self.strategy, self.experiment.federation.wire_down
        part = strategy.travels(merges + 1).down
        held, grown = self._optimizer.expected_ranks(strategy, rank, self.cohort, merges)
        start, merged = adapter_layout(self.spec, held, dense=part == "sparse"), self._merged(grown)
        bound, frames = download_bound(self.experiment, client), self._frames(merges)
        free = part == "ab" and not strategy.capabilities.same_coordinates
        whole = wire_bytes(part_numel(start, part, self._density(part)), wire)
        try:
            limit = rank_limit([merged, *[start] * free], frames + whole * (not free), bound, wire)
        except ConfigurationError as error:
            raise ConfigurationError(f"client {client}: {error}") from None
        first = wire_bytes(numbers_at(start, limit), wire) if free else whole
        return first, wire_bytes(numbers_at(merged, limit), wire) + frames

    def _frames(self, merges: int) -> int:
        """Bytes of the frames that a client first needs after so many merges; they travel in fp32."""
        if [self.strategy.travels(number).down == "core" for number in (merges, merges + 1)] != [False, True]:
            return 0
        rank = self.strategy.expected_ranks(WHOLE, self.cohort, merges)[0]
        return wire_bytes(adapter_layout(self.spec, rank).numel - self._heads, "fp32")

    def _merged(self, grown: int) -> Layout:
        """Return the layout of the global adapter, each layer in its smaller form."""
        layers = []
        begun = {name: (rank if rank >= 0 else min(out, inn)) for name, out, inn, rank in self.begun.layers}
        for name, (out, inn) in sorted(self.spec.layers.items()):
            rank = grown + begun.get(name, 0)
            if rank:
                layers.append((name, out, inn, rank if rank * (out + inn) < out * inn else -1))
        return Layout(tuple(layers), (), self.spec.method)

    @cached_property
    def _optimizer(self) -> ServerOptimizer:
        choice = self.experiment.server_optimizer
        return OPTIMIZERS.create(choice.name, choice.options)

    @property
    def _heads(self) -> int:
        return sum(head.numel() for head in self.spec.heads.values())

    def _numbers(self, rank: int, part: Part) -> int:
        return part_numel(adapter_layout(self.spec, rank, part == "sparse"), part, self._density(part))

    def _density(self, part: Part) -> float | None:
        """Return the share of the entries that a sparse part holds, an option of the strategies that send one."""
        return getattr(self.strategy, "density", None) if part == "sparse" else None
