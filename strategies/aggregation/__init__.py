"""Aggregation strategies: how the replies of a round become the next state.

Each module of this package is one strategy, named after its file. A strategy keeps nothing between calls:
state goes in, state comes out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from common.adapter import Adapter
from common.errors import ConfigurationError
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, Part, ServerState
from common.plugins import Family, Plugin
from strategies.updates import NO_UPDATE, check_update


@dataclass(frozen=True)
class Capabilities:
    """What a strategy can do; checked against the experiment before round 1.

    Parameters
    ----------
    mixed_ranks : bool
        Clients may train different ranks.
    linear_uplink : bool
        The server only needs a weighted sum of the replies: secure aggregation and central privacy are
        possible.
    shared_frozen_factor : bool
        All clients hold one frozen ``a``, checked by hash.
    client_memory : bool
        Clients must keep something of their own between rounds: there is no one global model.
    same_coordinates : bool
        The numbers of the start adapter mean the same from round to round: what compression lost may be added to the
        next upload, and a server optimizer may act on them.
    exact : bool
        The merged update equals the exact average of the clients' updates at the default options.
    """

    mixed_ranks: bool
    linear_uplink: bool
    shared_frozen_factor: bool = False
    client_memory: bool = False
    same_coordinates: bool = False
    exact: bool = False

    def as_dict(self) -> dict[str, bool]:
        """Return the capabilities by name, for tables and JSON."""
        return asdict(self)


class Travel(NamedTuple):
    """What of the adapters travels in a round of training: of the start adapter, and of the trained one."""

    down: Part = "ab"
    up: Part = "ab"


class AggregationStrategy(Plugin):
    """Base of the aggregation strategies.

    The server calls ``begin``, then ``add`` once per accepted reply in the order of the clients' names, then
    ``finish``. The accumulator is the strategy's own: linear strategies keep one running sum, the others a
    list.
    """

    capabilities: ClassVar[Capabilities]

    def init(self, spec: ModelSpec) -> ServerState:
        """Build the state before round 1: the initial heads, no layer yet."""
        return ServerState(spec, Adapter.pack({}, spec.heads, spec.method), Adapter.empty(spec.method))

    @abstractmethod
    def dispatch(self, state: ServerState, client: ClientInfo) -> Dispatch:
        """Tell one client where to start and what to train."""

    @abstractmethod
    def begin(self, state: ServerState) -> Any:
        """Open an empty accumulator for a round."""

    @abstractmethod
    def add(self, accumulated: Any, update: ClientUpdate) -> Any:
        """Take one reply into the accumulator and return it.

        Raises
        ------
        RejectedUpdate
            If the reply does not fit the strategy; the accumulator is then as before.
        """

    @abstractmethod
    def finish(self, state: ServerState, accumulated: Any) -> ServerState:
        """Merge what was accumulated into the next state."""

    def is_exact(self) -> bool:
        """Tell whether these options merge to the exact average by construction."""
        return self.capabilities.exact

    def weighs_examples(self) -> bool:
        """Tell whether clients count by their ``num_examples``; otherwise no weight can be capped or changed."""
        return True

    def expected_ranks(self, rank: int, cohort: Sequence[int], merges: int) -> tuple[int, int]:
        """Tell how large downloads become, for the plan.

        Parameters
        ----------
        rank : int
            Of the client; with more than the start adapter has, all of it is sent.
        cohort : sequence of int
            Ranks of a round's clients.
        merges : int
            Rounds merged before.

        Returns
        -------
        int, int
            Rank of the start adapter that is sent, and the highest rank of the global adapter.
        """
        return (min(rank, max(cohort)) if merges else 0), 0

    def travels(self, number: int) -> Travel:
        """Tell what travels in training round ``number``, from 1, for the plan; `dispatch` must agree."""
        return Travel()

    def refusals(self, ranks: Mapping[str, int]) -> list[str]:
        """List, in sentences, why this strategy cannot serve clients of these ranks; empty if it can."""
        if self.capabilities.mixed_ranks or len(set(ranks.values())) <= 1:
            return []
        common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        others = ", ".join(f"{name} ({rank})" for name, rank in sorted(ranks.items()) if rank != common)
        fitting = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.mixed_ranks]
        return [
            f"strategy {self.plugin_name} needs equal ranks: {others} differ from rank {common}; "
            f"give them rank {common} or use a strategy for mixed ranks: {', '.join(fitting)}"
        ]

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """Merge a whole round at once, in the order of the clients' names.

        Raises
        ------
        ConfigurationError
            If there is no update, or two are of one client.
        RejectedUpdate
            If an update cannot be merged; names the client.
        """
        if not updates:
            raise ConfigurationError(NO_UPDATE)
        ordered = sorted(updates, key=lambda update: update.client)
        for one, other in pairwise(ordered):
            if one.client == other.client:
                raise ConfigurationError(f"client {one.client} sent two updates; expected one of each client")
        accumulated = self.begin(state)
        for update in ordered:
            check_update(update, state)
            accumulated = self.add(accumulated, update)
        return self.finish(state, accumulated)


AGGREGATION: Family[AggregationStrategy] = Family(
    "strategies.aggregation",
    AggregationStrategy,  # type: ignore[type-abstract]
    "aggregation strategy",
)
