"""What is sent: the strategy's dispatch, completed to Flower messages; each adapter is encoded once a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType

from common.adapter import Adapter
from common.errors import ClientError, RunError
from common.experiment import Experiment
from common.federation import ClientInfo, Dispatch, ServerState
from common.fingerprint import code_fingerprint
from common.messages import EvaluateOrder, TrainOrder
from common.wire import Parcel, seal, write_message
from strategies import AggregationStrategy


@dataclass(frozen=True, eq=False)
class Order:
    """One message to one client, with what is needed to judge the answer."""

    client: str
    message: Message
    header: TrainOrder | EvaluateOrder
    dispatch: Dispatch


@dataclass
class OrderBook:
    """Builds the orders of one round from one state.

    Parameters
    ----------
    run : str
        Id of the run.
    experiment : Experiment
        Its settings.
    strategy : AggregationStrategy
        Decides where each client starts.
    state : ServerState
        The model to train on or to evaluate.
    holdings : mapping of str to str
        Hash of the global adapter each client says it holds; that one is not sent again.
    """

    run: str
    experiment: Experiment
    strategy: AggregationStrategy
    state: ServerState
    holdings: Mapping[str, str] = field(default_factory=dict)
    _sealed: dict[tuple[int, bool], tuple[Adapter, Parcel]] = field(default_factory=dict)

    def train(self, number: int, attempt: int, client: ClientInfo, node: int) -> Order:
        """Order a round of training."""
        dispatch = self.strategy.dispatch(self.state, client)
        header = TrainOrder(
            run=self.run,
            round=number,
            attempt=attempt,
            rounds=self.experiment.federation.rounds,
            fingerprint=code_fingerprint(),
            client=client.name,
            base_version=self.state.base_version,
            global_hash=self._global.digest,
            rank=dispatch.rank,
            seed=dispatch.seed,
            trains=dispatch.trains,
            frozen_a=dispatch.frozen_a,
        )
        return self._order(header, dispatch, dispatch.start, node, MessageType.TRAIN)

    def evaluate(self, number: int, client: str, node: int) -> Order:
        """Order an evaluation of the state's model."""
        dispatch = self.strategy.dispatch(self.state, ClientInfo(client, 1))
        header = EvaluateOrder(
            run=self.run,
            round=number,
            fingerprint=code_fingerprint(),
            client=client,
            base_version=self.state.base_version,
            global_hash=self._global.digest,
            frozen_a=dispatch.frozen_a,
        )
        return self._order(header, dispatch, self.state.start, node, MessageType.EVALUATE)

    def _order(
        self, header: TrainOrder | EvaluateOrder, dispatch: Dispatch, start: Adapter, node: int, kind: str
    ) -> Order:
        parcels = {"start": self._seal(start, whole=dispatch.frozen_a is None, hashed=False)}
        if self.holdings.get(header.client) != header.global_hash:
            parcels["global"] = self._global
        message = Message(
            write_message(header, parcels),
            node,
            kind,
            ttl=self.experiment.federation.deadline_s,
            group_id=str(header.round),
        )
        return Order(header.client, message, header, dispatch)

    @property
    def _global(self) -> Parcel:
        return self._seal(self.state.global_adapter, whole=True, hashed=True)

    def _seal(self, adapter: Adapter, whole: bool, hashed: bool) -> Parcel:
        # The adapter is kept beside its parcel, so that its id is not given to another one meanwhile.
        key = (id(adapter), whole)
        if key not in self._sealed:
            self._sealed[key] = (adapter, self._encoded(adapter, whole, hashed))
        return self._sealed[key][1]

    def _encoded(self, adapter: Adapter, whole: bool, hashed: bool) -> Parcel:
        try:
            return seal(adapter, self.experiment.federation.wire, whole, hashed)
        except ClientError as error:
            raise RunError(f"the merged adapter cannot be sent: {error}") from None
