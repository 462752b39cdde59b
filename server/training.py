"""The training phase of a round: orders out, answers in, screened, kept, and merged in the order of names.

Answers arrive in any order, but float sums must not depend on it. An answer is kept on disk as soon as it passed the
screening, and added to the strategy's accumulator when it is its name's turn, so memory does not grow with the cohort.
Where a robust rule must see all answers at once, that only tells which fit, and they are read again in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from common.errors import ClientError
from common.federation import ClientUpdate, ServerState
from common.messages import TrainAnswer
from common.wire import Parcel, message_bytes, read_message, write_message
from server.exchange import exchange
from server.federation import Federation
from server.orders import Order
from server.privacy.release import Release
from server.progress import announce
from server.record import RoundRecord
from server.screening import screen
from server.spending import check_report, record_report
from server.timeline import Told
from strategies.merging import merge_gathered


@dataclass
class Collection:
    """The answers of one round as they come in.

    Parameters
    ----------
    federation : Federation
        The run.
    state : ServerState
        What clients train on.
    record : RoundRecord
        Where every client's fate is written.
    orders : dict
        One order per client of the cohort, by name.
    """

    federation: Federation
    state: ServerState
    record: RoundRecord
    orders: dict[str, Order]
    accumulated: Any = None
    accepted: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    judged: Sequence[ClientUpdate] = ()
    release: Release | None = None
    _settled: dict[str, bool] = field(default_factory=dict)
    _held: dict[str, ClientUpdate] = field(default_factory=dict)
    _next: int = 0

    def __post_init__(self) -> None:
        if self.federation.experiment.privacy.protects_clients:
            self.release = Release(self.federation, self.state, self.orders)
        self.accumulated = self.federation.strategy.begin(self.state)
        self._names = sorted(self.orders)

    def take(self, order: Order, message: Message) -> None:
        """Take a reply that just arrived."""
        received = self.record.timeline.now()
        self.record.bytes_up += (size := message_bytes(message.content))
        try:
            answer, parcels = read_message(message.content, TrainAnswer)
            update = self._screened(order, answer, parcels)
            self.federation.journal.keep(self.record.number, answer, parcels["update"], order.dispatch.rank)
        except ClientError as error:
            self.leave_out(order, "rejected", str(error), size)
            return
        self.federation.holdings[order.client] = answer.holds
        told = Told(answer.began, answer.seconds, answer.ready)
        self.record.timeline.answered(order.client, "train", told, received)
        self._accept(order, update, answer, size)

    def take_kept(self, order: Order, answer: TrainAnswer, parcel: Parcel) -> bool:
        """Take a reply kept before the run was interrupted; False if it does not fit this order."""
        try:
            update = self._screened(order, answer, {"update": parcel})
        except ClientError as error:
            announce("notice", f"{order.client}'s kept reply is not used: {error}", self.record.number)
            return False
        size = message_bytes(write_message(answer, {"update": parcel}))
        self.record.bytes_up += size
        self.record.bytes_down += message_bytes(order.message.content)
        self._accept(order, update, answer, size)
        return True

    def leave_out(self, order: Order, status: str, reason: str, size: int = 0) -> None:
        """Go on without a client, keeping the reason."""
        status = self.federation.fate(order.client, status)
        self.federation.holdings.pop(order.client, None)
        self.record.timeline.lose(order.client)
        self.record.clients[order.client] = {
            "status": status,
            "reason": reason,
            "rank": order.dispatch.rank,
            "bytes_up": size,
            "bytes_down": 0 if status == "offline" else message_bytes(order.message.content),
        }
        announce(
            "left_out",
            f"{order.client} is left out: {reason}",
            self.record.number,
            order.client,
            status=status,
        )
        self._settle(order.client, None)

    def update(self, client: str) -> ClientUpdate:
        """Read an accepted update again."""
        answer, parcel = self.federation.journal.reply(self.record.number, client)
        return self._screened(self.orders[client], answer, {"update": parcel})

    def merge(self) -> ServerState:
        """Merge what was accepted, and record what is left of each client's weight."""
        federation = self.federation
        if self.release is not None:
            return self.release.merged(self.record, self.accepted)
        if not federation.gathers:
            accumulated, self.accumulated = self.accumulated, None
            merged = federation.strategy.finish(self.state, accumulated)
            del accumulated
            return federation.optimizer.step(self.state, merged, federation.strategy)
        self.accumulated = None
        after, judgement = merge_gathered(
            federation.strategy,
            federation.rule,
            federation.optimizer,
            self.state,
            [self.update(name) for name in self.accepted],
            {name: self.orders[name].start for name in self.accepted},
            federation.experiment.federation.max_weight_share,
        )
        self.judged = judgement.updates
        for name, share in judgement.trust.items():
            self.record.measure("trust", share, name)
        return after

    def _screened(self, order: Order, answer: TrainAnswer, parcels: dict[str, Parcel]) -> ClientUpdate:
        check_report(answer, self.federation.experiment)
        return screen(order, answer, parcels, self.state, self.federation.experiment.federation)

    def _accept(self, order: Order, update: ClientUpdate, answer: TrainAnswer, size: int) -> None:
        name = order.client
        self.weights[name] = update.num_examples
        self.record.clients[name] = {
            "status": "accepted",
            "rank": order.dispatch.rank,
            "num_examples": 0 if self.federation.experiment.privacy.hides_counts else int(answer.num_examples),
            "bytes_up": size,
            "bytes_down": message_bytes(order.message.content),
            "seconds": answer.seconds,
        }
        for key, value in update.metrics.items():
            self.record.measure(key, value, name)
        record_report(self.federation, self.record, name, answer.privacy)
        loss = update.metrics.get("train_loss")
        took = f" in {answer.seconds:.1f} s" if answer.seconds else ""
        told = {"seconds": answer.seconds, "train_loss": loss}
        if answer.privacy is not None:
            told["epsilon"] = answer.privacy.epsilon
        announce("reply", f"{name} trained{took}", self.record.number, name, **told)
        self._settle(name, update)

    def _settle(self, name: str, update: ClientUpdate | None) -> None:
        """Add every update whose turn has come; of those that must wait one stays in memory, others are read again."""
        self._settled[name] = update is not None
        if update is not None and (not self._held or name == self._names[self._next]):
            self._held[name] = update
        while self._next < len(self._names) and (current := self._names[self._next]) in self._settled:
            self._next += 1
            if self._settled[current]:
                self._add(current, self._held.pop(current) if current in self._held else self.update(current))

    def _add(self, name: str, update: ClientUpdate) -> None:
        try:
            if self.release is not None:
                self.release.add(update)
            else:
                self.accumulated = self.federation.strategy.add(self.accumulated, update)
            self.accepted.append(name)
        except ClientError as error:
            self.leave_out(self.orders[name], "rejected", str(error), self.record.clients[name]["bytes_up"])


def training_phase(
    federation: Federation, state: ServerState, record: RoundRecord, online: dict[str, int]
) -> Collection:
    """Let the cohort train and collect what it gives."""
    kept = federation.journal.kept(record.number)
    book = federation.order_book(state)
    orders = {
        name: book.train(record.number, record.attempt, federation.client(name), online.get(name, 0))
        for name in record.cohort
    }
    for order in orders.values():
        if order.lost:
            record.measure("download_discarded_energy", order.lost, order.client)
    collection = Collection(federation, state, record, orders)
    used = {name for name in sorted(set(kept) & set(orders)) if collection.take_kept(orders[name], *kept[name])}
    _send([orders[name] for name in record.cohort if name not in used], collection, online)
    return collection


def _send(orders: Sequence[Order], collection: Collection, online: dict[str, int]) -> None:
    federation, record = collection.federation, collection.record
    for order in orders:
        if order.client not in online:
            collection.leave_out(order, "offline", "offline since the round began")
    asked = [order for order in orders if order.client in online]
    record.bytes_down += sum(message_bytes(order.message.content) for order in asked)
    names = [order.client for order in asked]
    words = f"{len(asked)} clients train"
    announce("dispatched", words, record.number, clients=names, k=len(asked), n=len(record.cohort))
    record.timeline.ask(names)
    exchange(
        federation.grid,
        asked,
        federation.experiment.federation.deadline_s,
        collection.take,
        collection.leave_out,
    )
