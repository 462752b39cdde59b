"""A training round whose updates the server never sees: keys, shares, masked uploads, and their sum without masks.

Each of the four steps asks the clients that finished the one before, and ends with those that answered. If they become
too few, the round fails before anything is revealed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from common.errors import ClientError, RejectedUpdate, SumFailed
from common.experiment import quorum
from common.federation import ServerState
from common.messages import (
    KeysAnswer,
    KeysOrder,
    Masking,
    PublicKeys,
    SecureSession,
    SharesAnswer,
    SharesOrder,
    TrainAnswer,
    UnmaskAnswer,
    UnmaskOrder,
)
from common.secure.keys import Session
from common.secure.masks import Words
from common.secure.upload import masked_words, threshold
from common.travel import part_numel, untrained_hash
from common.wire import Parcel, read_message
from server.federation import Federation
from server.orders import Order
from server.privacy.release import Release
from server.progress import announce
from server.record import RoundRecord
from server.secure.asking import Asking
from server.secure.desk import Desk
from server.secure.recovery import check_sealed, check_shares, lift_masks, mean_update, unmasked
from server.spending import check_report, record_report
from server.timeline import Told
from server.training import Collection

Keys = dict[str, PublicKeys]
Sealed = dict[str, dict[str, str]]
"""Sealed shares by sender and receiver."""


def secure_phase(federation: Federation, state: ServerState, record: RoundRecord, online: dict[str, int]) -> Collection:
    """Let the cohort train and collect the mean of what it gives as one update; the record says if there is none."""
    collection = Collection(federation, state, record, {})
    desk = federation.journal.desk(record.number)
    try:
        asking = Asking(federation, record, online, desk, _session(federation, record, desk))
        _take(collection, SecureSum(federation, state, record, asking).run())
    except (SumFailed, ClientError) as error:
        record.status, record.reason = "failed", str(error)
        for name in sorted(set(record.cohort) - set(record.clients)):
            record.clients[name] = {"status": "failed", "reason": record.reason}
        desk.discard()
    return collection


def _take(collection: Collection, total: Unmasked) -> None:
    """Put a sum where the round is merged from."""
    federation, record = collection.federation, collection.record
    if federation.experiment.privacy.protects_clients:
        book = federation.order_book(collection.state)
        starts = {name: book.train(record.number, record.attempt, federation.client(name), 0) for name in record.cohort}
        collection.release = Release(federation, collection.state, starts)
        collection.release.add_sum(torch.from_numpy(total.numbers), total.wide, total.survivors)
    else:
        ranks = [federation.client(name).rank for name in total.survivors]
        update = mean_update(total.numbers, total.weight, total.wide, ranks, collection.state)
        collection.accumulated = federation.strategy.add(collection.accumulated, update)
    collection.accepted = total.survivors


def _session(federation: Federation, record: RoundRecord, desk: Desk) -> SecureSession:
    """Go on with the round's session, or begin one."""
    session = desk.session()
    if session is None:
        token = secrets.token_hex(32)
        session = SecureSession(run=federation.run, round=record.number, attempt=record.attempt, id=token)
        desk.begin(session)
    return session


class Unmasked(NamedTuple):
    """A sum without masks: ``Σ n x`` as wide as the widest client's order, ``Σ n``, and who is in it."""

    numbers: NDArray[np.float64]
    weight: float
    wide: Order
    survivors: list[str]


@dataclass
class SecureSum:
    """The four steps of one secure sum.

    Parameters
    ----------
    federation, state, record : Federation, ServerState, RoundRecord
        As for any round.
    asking : Asking
        The way to the clients.
    """

    federation: Federation
    state: ServerState
    record: RoundRecord
    asking: Asking

    def run(self) -> Unmasked:
        """Return the sum of the survivors' updates.

        Raises
        ------
        SumFailed
            If too few clients finish a step.
        ClientError
            If the sum is no update.
        """
        keys = self._keys()
        sealed = self._shares(keys)
        widest = max(sealed, key=lambda name: (self.federation.client(name).rank, name))
        wide = self.federation.order_book(self.state).train(
            self.record.number, self.record.attempt, self.federation.client(widest), 0
        )
        survivors = self._uploads(keys, sealed, wide)
        answers = self._unmask(keys, set(sealed), survivors)
        total = self._summed(survivors, _words(wide))
        session = self.asking.session
        lift_masks(total, Session(session.run, session.round, session.id), answers, keys, self._needed(keys))
        most = self.federation.experiment.federation.max_num_examples
        return Unmasked(*unmasked(total, len(survivors), most), wide, survivors)

    def _keys(self) -> Keys:
        """Ask for public keys."""

        def request(name: str) -> Message:
            return self.asking.query("keys", KeysOrder(**self.asking.head(name)))

        def take(name: str, content: RecordDict) -> None:
            answer, _ = read_message(content, KeysAnswer)
            self.asking.check(name, answer)
            self.asking.desk.keep("keys", name, answer)

        names = self.asking.ask("keys", self.record.cohort, request, take)
        keys = {name: self.asking.desk.answer("keys", name, KeysAnswer).keys for name in names}
        self.asking.require(len(keys), self._needed(keys), "sent keys")
        return keys

    def _shares(self, keys: Keys) -> Sealed:
        """Have every client share its secrets with all others."""

        def request(name: str) -> Message:
            return self.asking.query("shares", SharesOrder(**self.asking.head(name), keys=keys))

        def take(name: str, content: RecordDict) -> None:
            answer, _ = read_message(content, SharesAnswer)
            self.asking.check(name, answer)
            check_sealed(answer, keys.keys() - {name})
            self.asking.desk.keep("shares", name, answer)

        names = self.asking.ask("shares", sorted(keys), request, take)
        self.asking.require(len(names), self._needed(keys), "shared their secrets")
        return {name: self.asking.desk.answer("shares", name, SharesAnswer).shares for name in names}

    def _uploads(self, keys: Keys, sealed: Sealed, wide: Order) -> list[str]:
        """Let clients train and upload what they learned, masked; return who did."""
        book, layout = self.federation.order_book(self.state), wide.start.layout.to_json()
        orders: dict[str, Order] = {}

        def request(name: str) -> Message:
            shares = {sender: each[name] for sender, each in sorted(sealed.items()) if sender != name}
            masking = Masking(session=self.asking.session, shares=shares, layout=layout)
            client, node = self.federation.client(name), self.asking.online.get(name, 0)
            orders[name] = book.train(self.record.number, self.record.attempt, client, node, masking)
            return orders[name].message

        def take(name: str, content: RecordDict) -> None:
            received = self.record.timeline.now()
            answer, parcels = read_message(content, TrainAnswer)
            self._check_upload(orders[name], answer, parcels, _words(wide))
            self.asking.desk.keep_upload(name, answer, parcels["update"])
            self.federation.holdings[name] = answer.holds
            told = Told(answer.began, answer.seconds, answer.ready)
            self.record.timeline.answered(name, "train", told, received)
            text = f"{name} trained in {answer.seconds:.1f} s"
            announce("reply", text, self.record.number, name, seconds=answer.seconds, train_loss=None)

        words, cohort = f"{len(sealed)} clients train", len(self.record.cohort)
        announce("dispatched", words, self.record.number, clients=sorted(sealed), k=len(sealed), n=cohort)
        names = self.asking.ask("uploads", sorted(sealed), request, take)
        needed = quorum(self.federation.experiment.federation.min_completion, cohort)
        self.asking.require(len(names), max(needed, self._needed(keys)), "uploaded a masked update")
        return names

    def _unmask(self, keys: Keys, participants: set[str], survivors: Sequence[str]) -> dict[str, UnmaskAnswer]:
        """Ask the survivors for what lifts the masks of their sum."""

        def request(name: str) -> Message:
            return self.asking.query("unmask", UnmaskOrder(**self.asking.head(name), survivors=tuple(survivors)))

        def take(name: str, content: RecordDict) -> None:
            answer, _ = read_message(content, UnmaskAnswer)
            self.asking.check(name, answer)
            check_shares(answer, set(survivors), participants - set(survivors))
            self.asking.desk.keep("unmask", name, answer)

        names = self.asking.ask("unmask", survivors, request, take)
        self.asking.require(len(names), self._needed(keys), "helped to lift the masks")
        return {name: self.asking.desk.answer("unmask", name, UnmaskAnswer) for name in names}

    def _needed(self, keys: Keys) -> int:
        settings = self.federation.experiment.secure_aggregation
        return threshold(settings.threshold, settings.min_cohort, len(keys))

    def _check_upload(self, order: Order, answer: TrainAnswer, parcels: dict[str, Parcel], words: int) -> None:
        """Refuse an upload that is not this client's part in this sum; what is in it nobody can see."""
        if (answer.client, answer.round, answer.session) != (order.client, order.header.round, self.asking.session.id):
            raise RejectedUpdate("the masked update is of another client, round or secure session; it is not used")
        if answer.base_version != self.state.base_version:
            raise RejectedUpdate(f"it trained on base version {answer.base_version}, not on {self.state.base_version}")
        if answer.frozen_hash != untrained_hash(order.start, order.dispatch):
            raise RejectedUpdate("frozen factor differs: the update was not trained on the factor it was given")
        check_report(answer, self.federation.experiment)
        masked_words(parcels, words)

    def _summed(self, survivors: Sequence[str], words: int) -> Words:
        """Add the uploads up, one at a time; whole numbers do not mind the order."""
        total: Words = np.zeros(words, np.uint64)
        for name in survivors:
            answer, parcel = self.asking.desk.upload(name)
            total += masked_words({"update": parcel}, words)
            self.asking.accept(name, self.federation.client(name).rank, answer.seconds)
            record_report(self.federation, self.record, name, answer.privacy)
        return total


def _words(wide: Order) -> int:
    """Count the words of an upload: the numbers of the widest client's part, and the weight."""
    return part_numel(wide.start.layout, wide.dispatch.sends, wide.dispatch.density) + 1
