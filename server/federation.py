"""What every phase of a round needs to know of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from common.experiment import ClientSettings, Experiment
from common.federation import ClientInfo, ModelSpec, ServerState
from server.cohort import DEFAULTS
from server.journal import Journal
from server.nodes import Nodes
from server.orders import OrderBook
from server.ranks import RankChoice, choose_rank
from strategies import AggregationStrategy
from strategies.optimizers import OPTIMIZERS, ServerOptimizer
from strategies.robust import ROBUST, RobustRule

if TYPE_CHECKING:
    from server.privacy.account import ClientAccount


@dataclass(frozen=True, eq=False)
class Federation:
    """A run's fixed parts.

    Parameters
    ----------
    run : str
        Id of the run.
    experiment : Experiment
        Its settings.
    strategy : AggregationStrategy
        How replies are merged.
    clients : mapping of str to ClientSettings
        The clients the experiment knows.
    spec : ModelSpec
        What strategies know of the model.
    default_rank : int
        Rank of clients that name none.
    grid : Grid
        Flower's way to the nodes.
    nodes : Nodes
        Who is online.
    journal : Journal
        What is remembered.
    holdings : dict of str to tuple of str
        Hashes of the global adapter and the frames each client said it holds; forgotten when the server restarts.
    met : set of str
        Clients that were recorded as members.
    exhausted : set of str
        Clients that said their privacy budget is spent, or planned to its end; forgotten when the server restarts.
    """

    run: str
    experiment: Experiment
    strategy: AggregationStrategy
    clients: Mapping[str, ClientSettings]
    spec: ModelSpec
    default_rank: int
    grid: Grid
    nodes: Nodes
    journal: Journal
    holdings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    exhausted: set[str] = field(default_factory=set)

    @cached_property
    def rule(self) -> RobustRule:
        """What is done against bad clients before merging."""
        return ROBUST.create(self.experiment.robust.name, self.experiment.robust.options)

    @cached_property
    def optimizer(self) -> ServerOptimizer:
        """What is done with the merged update."""
        choice = self.experiment.server_optimizer
        return OPTIMIZERS.create(choice.name, choice.options)

    @cached_property
    def account(self) -> ClientAccount:
        """What protecting clients has cost them, read from the journal once."""
        from server.privacy.account import ClientAccount  # accountants take more than a second to import

        known = {name for name, settings in self.clients.items() if settings.trains}
        return ClientAccount(self.experiment, known, self.journal.released())

    @property
    def gathers(self) -> bool:
        """Whether the replies of a round are merged all at once, as a rule or a cap on weights must see them all."""
        return not self.rule.passes_all or self.experiment.federation.max_weight_share is not None

    def fate(self, client: str, status: str) -> str:
        """Return the status a client's round ends with; one whose privacy budget is spent is not asked again."""
        if status != "exhausted":
            return status
        self.exhausted.add(client)
        return "failed"

    def order_book(self, state: ServerState) -> OrderBook:
        """Open the orders of one round on one state."""
        return OrderBook(self.run, self.experiment, self.strategy, state, self.holdings)

    def client(self, name: str) -> ClientInfo:
        """Describe a client to the strategy."""
        return ClientInfo(name, self.rank(name).rank)

    def rank(self, name: str) -> RankChoice:
        """Return the rank a client trains with, and why."""
        settings, node = self.clients.get(name, DEFAULTS), self.nodes.presence(name)
        return choose_rank(self.experiment, self.strategy, self.spec, settings, self.default_rank, node)
