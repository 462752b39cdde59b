"""How one step of a secure sum is asked of clients: whatever is here already is not asked for again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict

from common.errors import ClientError, SumFailed
from common.fingerprint import code_fingerprint
from common.messages import SecureAnswer, SecureOrder, SecureSession
from common.wire import message_bytes, write_message
from server.exchange import exchange
from server.federation import Federation
from server.progress import announce
from server.record import RoundRecord
from server.secure.desk import Desk, Outcome, Step


@dataclass(frozen=True, eq=False)
class Ask:
    """A message of one step to one client."""

    client: str
    message: Message


@dataclass
class Asking:
    """Asks the clients of one secure sum, step by step.

    Parameters
    ----------
    federation, record : Federation, RoundRecord
        The run, and where every client's fate is written.
    online : mapping of str to int
        Node ids by client.
    desk : Desk
        Where answers are kept.
    session : SecureSession
        What clients know the sum by.
    """

    federation: Federation
    record: RoundRecord
    online: Mapping[str, int]
    desk: Desk
    session: SecureSession
    _lost: dict[str, tuple[str, str]] = field(default_factory=dict)
    _traffic: dict[str, dict[str, int]] = field(default_factory=dict)

    def ask(
        self,
        step: Step,
        names: Sequence[str],
        request: Callable[[str], Message],
        take: Callable[[str, RecordDict], None],
    ) -> list[str]:
        """Ask clients for a step and return who has answered, sorted.

        Parameters
        ----------
        step : Step
            Name of the step.
        names : sequence of str
            The clients.
        request : callable
            Builds a client's message.
        take : callable
            Checks and keeps a client's answer, or raises a `ClientError`.
        """
        here, outcome, self._lost = self.desk.clients(step), self.desk.closed(step), {}
        for name in here:
            self._count(name, request(name).content, self._kept_bytes(step, name))
        if outcome is None:
            self._exchange(step, [name for name in names if name not in here], request, take)
            outcome = Outcome([name for name in sorted(names) if name not in self._lost], self._lost)
            self.desk.close(step, outcome)
        for name, (status, reason) in outcome.lost.items():
            if step == "unmask":  # its update stays in the sum
                announce("notice", f"{name} did not help to lift the masks: {reason}", self.record.number, name)
            else:
                self._leave_out(name, status, reason)
        return list(outcome.answered)

    def head(self, client: str) -> dict[str, Any]:
        """Return what every order of this sum begins with."""
        return {"session": self.session, "fingerprint": code_fingerprint(), "client": client}

    def query(self, action: str, order: SecureOrder) -> Message:
        """Build the message of a step that is no training."""
        return Message(
            write_message(order),
            self.online.get(order.client, 0),
            f"{MessageType.QUERY}.{action}",
            ttl=self.federation.experiment.federation.deadline_s,
            group_id=str(self.record.number),
        )

    def check(self, client: str, answer: SecureAnswer) -> None:
        """Refuse an answer of another client or session.

        Raises
        ------
        ClientError
            With the reason.
        """
        if answer.client != client:
            raise ClientError(f"the answer is signed {answer.client!r}, expected {client!r}")
        if answer.session != self.session:
            raise ClientError("the answer is of another secure session: it is late, or sent again")

    def require(self, clients: int, needed: int, what: str) -> None:
        """Give the sum up if too few clients are left.

        Raises
        ------
        SumFailed
            Then nothing is revealed.
        """
        if clients < needed:
            raise SumFailed(f"{clients} clients {what}, {needed} are needed for a secure sum; nothing was revealed")

    def accept(self, client: str, rank: int, seconds: float) -> None:
        """Enter a client whose update is in the sum into the record."""
        counted = self._traffic[client]
        self.record.clients[client] = {"status": "accepted", "rank": rank, "seconds": seconds, **counted}

    def _exchange(
        self,
        step: Step,
        names: Sequence[str],
        request: Callable[[str], Message],
        take: Callable[[str, RecordDict], None],
    ) -> None:
        def lose(client: str, status: str, reason: str) -> None:
            self._lost[client] = (self.federation.fate(client, status), reason)
            if step == "uploads":
                self.record.timeline.lose(client)

        def answered(asked: Ask, reply: Message) -> None:
            self._count(asked.client, asked.message.content, message_bytes(reply.content))
            try:
                take(asked.client, reply.content)
            except ClientError as error:
                lose(asked.client, "rejected", str(error))

        def failed(asked: Ask, status: str, reason: str) -> None:
            self._count(asked.client, asked.message.content, 0)
            lose(asked.client, status, reason)

        away = [name for name in names if name not in self.online]
        self._lost |= dict.fromkeys(away, ("offline", "offline since the round began"))
        asks = [Ask(name, request(name)) for name in names if name in self.online]
        if step == "uploads":
            self.record.timeline.ask(ask.client for ask in asks)
        exchange(self.federation.grid, asks, self.federation.experiment.federation.deadline_s, answered, failed)

    def _count(self, client: str, sent: RecordDict, received: int) -> None:
        counted = self._traffic.setdefault(client, {"bytes_up": 0, "bytes_down": 0})
        counted["bytes_up"] += received
        counted["bytes_down"] += (down := message_bytes(sent))
        self.record.bytes_up += received
        self.record.bytes_down += down

    def _kept_bytes(self, step: Step, client: str) -> int:
        if step != "uploads":
            return self.desk.nbytes(step, client)
        answer, parcel = self.desk.upload(client)
        return message_bytes(write_message(answer, {"update": parcel}))

    def _leave_out(self, client: str, status: str, reason: str) -> None:
        self.federation.holdings.pop(client, None)
        counted = self._traffic.get(client, {})
        self.record.clients[client] = {"status": status, "reason": reason, **counted}
        text = f"{client} is left out: {reason}"
        announce("left_out", text, self.record.number, client, status=status)
