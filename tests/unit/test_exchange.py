"""Orders out, answers in: what is late, what is offline, and what arrived just in time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from common.flower import ErrorCode, WaitingGrid, identify_task
from server.exchange import exchange, readable


class Post(WaitingGrid):
    """A grid that answers as told: at once, never, or with an error."""

    run: Any = None

    def __init__(self, answers: dict[str, int | None]) -> None:
        self.answers, self.pushed, self.abandoned = answers, dict[str, Message](), list[str]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = message.metadata.group_id
            message.metadata.__dict__["_message_id"] = name
            self.pushed[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for name in message_ids:
            if name in self.answers and name in self.pushed:
                message, code = self.pushed.pop(name), self.answers[name]
                content = RecordDict() if code is None else Error(code, f"{name} says no")
                found.append(Message(content, reply_to=message))
        return found

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        pass

    def abandon(self, message_ids: Iterable[str]) -> None:
        self.abandoned += message_ids

    def set_run(self, run: Any) -> None: ...
    def create_message(self, *arguments: Any, **options: Any) -> Any: ...
    def get_node_ids(self) -> list[int]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return []


@dataclass(frozen=True)
class Letter:
    """Anything addressed to a client."""

    client: str
    message: Message


def letter(name: str) -> Letter:
    return Letter(name, Message(RecordDict(), 1, "train", ttl=1, group_id=name))


def exchanged(grid: Post, names: str, deadline: float = 0.05, meanwhile: Any = None) -> dict[str, tuple[str, str]]:
    """Exchange one order per letter; return how each ended."""
    ends: dict[str, tuple[str, str]] = {}

    def answered(done: Letter, reply: Message) -> None:
        ends[done.client] = ("answered", "")

    def failed(lost: Letter, status: str, reason: str) -> None:
        ends[lost.client] = (status, reason)

    exchange(grid, [letter(name) for name in names], deadline, answered, failed, meanwhile)
    return ends


@pytest.fixture(autouse=True)
def _task() -> None:
    identify_task(1)


LATE = ("late", "no answer within the deadline of 0.05 s")


def test_every_order_ends_one_way() -> None:
    codes = {
        "a": None,
        "b": ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        "c": ErrorCode.MESSAGE_UNAVAILABLE,
        "d": ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        "e": ErrorCode.NODE_UNAVAILABLE,
        "f": ErrorCode.UNKNOWN,
    }
    grid = Post(codes)
    assert exchanged(grid, "abcdefg") == {
        "a": ("answered", ""),
        "b": ("failed", "b says no"),
        "c": LATE,
        "d": LATE,
        "e": ("offline", "e says no"),
        "f": ("failed", "f says no"),
        "g": LATE,
    }
    assert grid.abandoned == ["g"]


def test_nothing_to_send_needs_no_wait() -> None:
    assert exchanged(Post({}), "", deadline=100) == {}


def test_what_arrived_while_the_server_was_busy_counts_even_past_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's own evaluation may take longer than the clients are given."""
    clock = [0.0]
    monkeypatch.setattr("server.exchange.time.monotonic", lambda: clock[0])
    ends = exchanged(Post({"a": None}), "ab", deadline=60, meanwhile=lambda: clock.__setitem__(0, 100.0))
    assert ends == {"a": ("answered", ""), "b": ("late", "no answer within the deadline of 60 s")}


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (2, "<class 'builtins.ValueError'>:<'no data here'>", "ValueError: no data here"),
        (2, "Traceback\n  <class 'common.errors.DataError'>:<'two\nlines'>", "DataError: two lines"),
        (5, None, "node_unavailable"),
        (5, "", "node_unavailable"),
        (99, None, "error_99"),
        (2, "plain words", "plain words"),
        (2, "x" * 900, "x" * 500),
    ],
)
def test_errors_are_told_in_one_line(code: int, reason: str | None, words: str) -> None:
    assert readable(code, reason) == words
