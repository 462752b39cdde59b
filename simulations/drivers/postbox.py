"""The post of an in-process federation: messages waiting, messages at work, replies and deadlines."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable

from flwr.app import Error, Message

from common.flower import ErrorCode, set_message_id


class Postbox:
    """Hand messages to workers in the order they came, one per node at a time, and keep the replies.

    All methods may be called from any thread. A message is queued, at work, or answered, and in none of
    these after it was pulled or abandoned; one that is not answered within its time to live is answered
    here, with the error a deployed SuperLink would give.

    Parameters
    ----------
    on_worker_lost : callable
        Called when a message at work was given up: its worker does not come back.
    """

    def __init__(self, on_worker_lost: Callable[[], None]) -> None:
        self._on_worker_lost = on_worker_lost
        lock = threading.RLock()
        self._startable = threading.Condition(lock)
        self._answered = threading.Condition(lock)
        self._ids = (f"message-{number}" for number in itertools.count(1))
        self._queued: dict[str, Message] = {}
        self._at_work: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._deadlines: dict[str, float] = {}
        self._next_deadline = math.inf  # or earlier: a thousand messages are not searched at every step
        self._busy_nodes: set[int] = set()
        self._closed = False

    def put(self, message: Message) -> str:
        """Queue a message and return the id it was given.

        Raises
        ------
        RuntimeError
            The postbox is closed.
        """
        remaining = message.metadata.created_at + message.metadata.ttl - time.time()
        with self._startable:
            if self._closed:
                raise RuntimeError("the grid is closed")
            message_id = next(self._ids)
            set_message_id(message, message_id)
            self._queued[message_id] = message
            self._deadlines[message_id] = deadline = time.monotonic() + remaining
            self._next_deadline = min(self._next_deadline, deadline)
            self._startable.notify()
        return message_id

    def take(self) -> Message | None:
        """Block until a message can be worked on; None when the postbox is closed."""
        with self._startable:
            while not self._closed:
                self._expire()
                for message_id, message in self._queued.items():
                    if message.metadata.dst_node_id not in self._busy_nodes:
                        self._at_work[message_id] = self._queued.pop(message_id)
                        self._busy_nodes.add(message.metadata.dst_node_id)
                        return message
                self._startable.wait()
        return None

    def give_back(self, message: Message, reply: Message) -> bool:
        """Keep the reply; False when the message had been given up and the worker was replaced."""
        message_id = message.metadata.message_id
        with self._startable:
            self._busy_nodes.discard(message.metadata.dst_node_id)
            self._startable.notify()
            if self._at_work.pop(message_id, None) is None:
                return False
            del self._deadlines[message_id]
            self._replies[message_id] = reply
            self._answered.notify_all()
            return True

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Return and forget the replies that are there, in the order of the ids."""
        with self._answered:
            self._expire()
            return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Block until a reply to one of the messages is there, at most `timeout` seconds."""
        wanted = set(message_ids)
        end = time.monotonic() + timeout
        with self._answered:
            self._expire()
            while self._replies.keys().isdisjoint(wanted) and (now := time.monotonic()) < end:
                self._answered.wait(min(end - now, self._next_deadline - now, threading.TIMEOUT_MAX))
                self._expire()

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Give messages up: queued ones never start, replies are dropped, also later ones."""
        with self._startable:
            for message_id in message_ids:
                self._replies.pop(message_id, None)
                self._give_up(message_id)

    def close(self) -> None:
        """Drop what is queued and let every waiting worker go."""
        with self._startable:
            self._closed = True
            for message_id in self._queued:
                del self._deadlines[message_id]
            self._queued.clear()
            self._startable.notify_all()

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._next_deadline:
            return
        for message_id in [i for i, deadline in self._deadlines.items() if deadline <= now]:
            message = self._give_up(message_id)
            if message is not None:
                reason = f"no reply within the message's time to live of {message.metadata.ttl:g} s"
                self._replies[message_id] = error_reply(message, ErrorCode.MESSAGE_UNAVAILABLE, reason)
                self._answered.notify_all()
        self._next_deadline = min(self._deadlines.values(), default=math.inf)

    def _give_up(self, message_id: str) -> Message | None:
        self._deadlines.pop(message_id, None)
        if message_id in self._queued:
            return self._queued.pop(message_id)
        message = self._at_work.pop(message_id, None)
        if message is not None:
            self._on_worker_lost()
        return message


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Answer a message with an error, in the place of its node."""
    return Message(Error(code, reason), reply_to=message)
