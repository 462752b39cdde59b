"""What is sent: the strategy's dispatch, completed to Flower messages; each adapter is encoded once a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message, MessageType

from common.adapter import Adapter
from common.errors import ClientError, ConfigurationError, RunError
from common.experiment import Experiment
from common.federation import ClientInfo, Dispatch, ModelSpec, Part, ServerState
from common.fingerprint import code_fingerprint
from common.messages import EvaluateOrder, Masking, TrainOrder
from common.quantize import is_quantized
from common.start import starting_adapter
from common.travel import complete, take
from common.wire import DTYPES, FloatFormat, Parcel, seal, unseal, write_message
from server.bounds import cut, download_bound, rank_limit
from strategies import AggregationStrategy


@dataclass(frozen=True, eq=False)
class Order:
    """One message to one client, with what is needed to judge the answer.

    Parameters
    ----------
    client : str
        Name of the client.
    message : Message
        What is sent.
    header : TrainOrder or EvaluateOrder
        Its header.
    dispatch : Dispatch
        What the strategy decided; its start is the one before encoding.
    sent : Parcel
        The start as it is sent.
    spec : ModelSpec
        The model.
    lost : float
        Share of the squared norm that a bound on the download cut off.
    """

    client: str
    message: Message
    header: TrainOrder | EvaluateOrder
    dispatch: Dispatch
    sent: Parcel
    spec: ModelSpec
    lost: float = 0.0

    @property
    def start(self) -> Adapter:
        """What the client's training begins with, whole, as the client works it out from what it gets.

        Worked out at every call: kept, one per client would make memory grow with the cohort.

        What the client keeps to itself, and nobody here knows, is zero.
        """
        given = replace(self.dispatch, start=unseal(self.sent, self.dispatch))
        start = starting_adapter(given, self.spec)
        return complete(take(start, "inner"), start.layout, "inner") if self.dispatch.keeps_b else start


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
    holdings : mapping of str to tuple of str
        Hashes of the global adapter and the frames each client says it holds; those are not sent again.
    """

    run: str
    experiment: Experiment
    strategy: AggregationStrategy
    state: ServerState
    holdings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _cuts: dict[tuple[int, int | None, float | None], tuple[Adapter, Adapter, float]] = field(default_factory=dict)
    _sealed: dict[tuple[int, str], tuple[Adapter, Parcel]] = field(default_factory=dict)

    def train(self, number: int, attempt: int, client: ClientInfo, node: int, masking: Masking | None = None) -> Order:
        """Order a round of training."""
        dispatch, merged, lost = self._bounded(client.name, self.strategy.dispatch(self.state, client))
        header = TrainOrder(
            **self._known(number, client.name, dispatch, merged),
            attempt=attempt,
            rounds=self.experiment.federation.rounds,
            trains=dispatch.trains,
            tail=dispatch.tail,
            masking=masking,
            feedback=self._feedback,
        )
        return self._order(header, dispatch, merged, lost, node, MessageType.TRAIN)

    def evaluate(self, number: int, client: str, node: int) -> Order:
        """Order an evaluation of the state's model."""
        known = replace(self.strategy.dispatch(self.state, ClientInfo(client, 1)), start=self.state.start)
        dispatch, merged, lost = self._bounded(client, known)
        header = EvaluateOrder(**self._known(number, client, dispatch, merged))
        return self._order(header, dispatch, merged, lost, node, MessageType.EVALUATE)

    def _bounded(self, client: str, dispatch: Dispatch) -> tuple[Dispatch, Adapter, float]:
        """Return the dispatch and the global adapter as the client may get them, and what that loses.

        A start whose numbers mean the same from round to round is never cut: all clients must hold the same ones.
        """
        bound, merged, start = download_bound(self.experiment, client), self.state.global_adapter, dispatch.start
        if bound.is_none:
            return dispatch, merged, 0.0
        free = dispatch.receives == "ab" and not self.strategy.capabilities.same_coordinates
        wire = self.experiment.federation.wire_down
        fixed = 0 if free else self._seal(start, dispatch, hashed=False).nbytes
        if (frames := self._frames(dispatch)) is not None and frames.digest not in self.holdings.get(client, ()):
            fixed += frames.nbytes
        layouts = [merged.layout, start.layout] if free else [merged.layout]
        try:
            limit = rank_limit(layouts, fixed, bound, wire)
        except ConfigurationError as error:
            raise RunError(f"client {client}: {error}") from None
        merged, lost = self._cut(merged, limit, bound.energy)
        start, missed = self._cut(start, limit, bound.energy) if free else (start, 0.0)
        return replace(dispatch, start=start), merged, max(lost, missed)

    def _cut(self, adapter: Adapter, rank: int | None, energy: float | None) -> tuple[Adapter, float]:
        """Cut an adapter, the same one for all clients of one bound."""
        key = (id(adapter), rank, energy)
        if key not in self._cuts:
            self._cuts[key] = (adapter, *cut(adapter, rank, energy))
        _, smaller, lost = self._cuts[key]
        return smaller, lost

    def _frames(self, dispatch: Dispatch) -> Parcel | None:
        """Return the frames of a core, always in fp32: what is rounded is no longer orthonormal, and they go once."""
        return None if dispatch.frames is None else self._seal(dispatch.frames, wire="fp32")

    def _known(self, number: int, client: str, dispatch: Dispatch, merged: Adapter) -> dict[str, Any]:
        """Return what both kinds of order say of the model, beside its numbers."""
        return {
            "run": self.run,
            "round": number,
            "fingerprint": code_fingerprint(),
            "client": client,
            "base_version": self.state.base_version,
            "global_hash": self._seal(merged).digest,
            "rank": dispatch.rank,
            "seed": dispatch.seed,
            "frozen_a": dispatch.frozen_a,
            "frames_hash": frames.digest if (frames := self._frames(dispatch)) is not None else "",
            "keeps_b": dispatch.keeps_b,
            "density": dispatch.density,
        }

    def _order(
        self,
        header: TrainOrder | EvaluateOrder,
        dispatch: Dispatch,
        merged: Adapter,
        lost: float,
        node: int,
        kind: str,
    ) -> Order:
        sent = self._seal(dispatch.start, dispatch, hashed=False)
        parcels = {"start": sent}
        held = self.holdings.get(header.client, ())
        if header.global_hash not in held:
            parcels["global"] = self._seal(merged)
        if (frames := self._frames(dispatch)) is not None and frames.digest not in held:
            parcels["frames"] = frames
        message = Message(
            write_message(header, parcels),
            node,
            kind,
            ttl=self.experiment.federation.deadline_s,
            group_id=str(header.round),
        )
        return Order(header.client, message, header, dispatch, sent, self.state.spec, lost)

    @property
    def _feedback(self) -> bool:
        """Tell whether what an upload lost may be added to the next one."""
        settings = self.experiment.federation
        return settings.error_feedback and is_quantized(settings.wire) and self.strategy.capabilities.same_coordinates

    def _seal(
        self, adapter: Adapter, dispatch: Dispatch | None = None, hashed: bool = True, wire: FloatFormat | None = None
    ) -> Parcel:
        """Encode what of an adapter a client needs: all of it, or of a start what its dispatch does not tell."""
        part: Part = "ab" if dispatch is None else dispatch.receives
        # The adapter is kept beside its parcel, so that its id is not given to another one meanwhile.
        key = (id(adapter), part)
        if key not in self._sealed:
            try:
                sealed = seal(adapter, wire or self.experiment.federation.wire_down, part, dispatch, hashed)
            except ClientError as error:
                raise RunError(f"the merged adapter cannot be sent: {error}") from None
            self._sealed[key] = (adapter, sealed)
        return self._sealed[key][1]


def as_sent(state: ServerState, strategy: AggregationStrategy, wire: FloatFormat) -> ServerState:
    """Round the start adapter to what clients will get of it, so that server and clients speak of the same numbers."""
    if wire == "fp32":
        return state
    dispatch = strategy.dispatch(state, ClientInfo("", 1))
    numbers = take(state.start, dispatch.receives, dispatch)
    rounded = numbers.to(DTYPES[wire]).to(numbers.dtype)
    start = complete(rounded, state.start.layout, dispatch.receives, dispatch, state.start)
    return replace(state, start=start)
