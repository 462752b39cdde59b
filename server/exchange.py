"""Sends orders and takes the answers as they come, until all are there or the deadline is over."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from common.flower import ErrorCode, abandon_messages, error_name, wait_for_replies
from common.messages import BUDGET_EXHAUSTED


class Addressed(Protocol):
    """A message to a client."""

    @property
    def client(self) -> str:
        """Name of the client."""

    @property
    def message(self) -> Message:
        """What is sent."""


A = TypeVar("A", bound=Addressed)

# A message's time to live is the deadline: whichever clock ends first, the client is late.
_FATES = {
    ErrorCode.MESSAGE_UNAVAILABLE: "late",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "late",
    ErrorCode.NODE_UNAVAILABLE: "offline",
    BUDGET_EXHAUSTED: "exhausted",
}
_RAISED = re.compile(r"<class '(?P<kind>[\w.]+)'>:<'(?P<text>.*)'>", re.DOTALL)


def exchange(
    grid: Grid,
    orders: Sequence[A],
    deadline_s: float,
    answered: Callable[[A, Message], None],
    failed: Callable[[A, str, str], None],
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Send orders and hand over each answer as it arrives.

    Parameters
    ----------
    grid : Grid
        Flower's grid, of any driver.
    orders : sequence of Order
        One per client.
    deadline_s : float, seconds
        Clients that have not answered by then are late.
    answered : callable
        Gets the order and the reply's message.
    failed : callable
        Gets the order, ``failed``, ``late``, ``offline`` or ``exhausted`` (its privacy budget), and the reason.
    meanwhile : callable, optional
        Work for this process while the clients are busy.
    """
    ids = list(grid.push_messages([order.message for order in orders]))
    waiting = dict(zip(ids, orders, strict=True))
    end = time.monotonic() + deadline_s
    if meanwhile is not None:
        meanwhile()
    late = f"no answer within the deadline of {deadline_s:g} s"
    left = deadline_s
    while waiting and left > 0:
        # What arrived during ``meanwhile`` was in time: there is one look, even when the deadline is over by now.
        left = end - time.monotonic()
        for reply in wait_for_replies(grid, list(waiting), max(left, 0.0)):
            order = waiting.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                answered(order, reply)
            elif (status := _FATES.get(reply.error.code, "failed")) == "late":
                failed(order, status, late)
            else:
                failed(order, status, readable(reply.error.code, reply.error.reason))
    abandon_messages(grid, list(waiting))
    for order in waiting.values():
        failed(order, "late", late)


def readable(code: int, reason: str | None) -> str:
    """Turn Flower's error into one line for people."""
    text = " ".join((reason or error_name(code)).split())
    if match := _RAISED.search(text):
        text = f"{match['kind'].rpartition('.')[2]}: {match['text']}"
    return text[:500]
