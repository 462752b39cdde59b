"""What every phase of a round needs to know of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.experiment import ClientSettings, Experiment
from common.federation import ClientInfo, ModelSpec, ServerState
from server.cohort import DEFAULTS
from server.journal import Journal
from server.nodes import Nodes
from server.orders import OrderBook
from strategies import AggregationStrategy


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
    holdings : dict of str to str
        Hash of the global adapter each client said it holds; forgotten when the server restarts.
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
    holdings: dict[str, str] = field(default_factory=dict)

    def order_book(self, state: ServerState) -> OrderBook:
        """Open the orders of one round on one state."""
        return OrderBook(self.run, self.experiment, self.strategy, state, self.holdings)

    def client(self, name: str) -> ClientInfo:
        """Describe a client to the strategy."""
        rank = self.clients.get(name, DEFAULTS).rank
        if rank == "auto":
            rank = min(self.nodes.max_rank(name) or self.default_rank, self.default_rank)
        return ClientInfo(name, rank or self.default_rank)
