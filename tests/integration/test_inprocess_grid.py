"""The in-process grid: order, errors, deadlines, one message per node, and an end without threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.flower import ErrorCode, abandon_messages, wait_for_replies
from simulations.drivers import inprocess
from simulations.drivers.inprocess import FIRST_NODE_ID, InProcessGrid

#: Seconds after which a test that waits for a thread has failed.
LONG = 20.0


def client_app(train: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def echo(message: Message, context: Context) -> Message:
    """Reply with what was sent, who replied, and how often this node was asked."""
    count = context.state.get("count", MetricRecord({"n": 0}))
    assert isinstance(count, MetricRecord)
    asked = count["n"]
    assert isinstance(asked, int)
    context.state["count"] = MetricRecord({"n": asked + 1})
    about = MetricRecord({"count": asked + 1, "partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"sent": message.content["sent"], "about": about}), reply_to=message)


def request(position: int, tag: str = "", ttl: float | None = None) -> Message:
    content = RecordDict({"sent": ConfigRecord({"tag": tag})})
    return Message(content, FIRST_NODE_ID + position, "train", ttl=ttl)


def tag_of(message: Message) -> str:
    return str(message.content["sent"]["tag"])


def collect(grid: Grid, ids: Iterable[str]) -> dict[str, Message]:
    """Wait until every message is answered."""
    missing, replies = set(ids), {}
    while missing:
        arrived = wait_for_replies(grid, sorted(missing), LONG)
        assert arrived, f"no reply to {missing} within {LONG} s"
        for reply in arrived:
            replies[reply.metadata.reply_to_message_id] = reply
            missing.discard(reply.metadata.reply_to_message_id)
    return replies


class Gate:
    """A client that stays in the messages with a given tag until the test opens the gate."""

    def __init__(self, held: str) -> None:
        self.held = held
        self.entered, self.opened = threading.Event(), threading.Event()
        self.started: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.started.append(tag_of(message))
        if tag_of(message) == self.held:
            self.entered.set()
            assert self.opened.wait(LONG)
        return echo(message, context)


@contextmanager
def gated_grid(held: str, nodes: int, workers: int) -> Iterator[tuple[Gate, InProcessGrid]]:
    gate = Gate(held)
    with InProcessGrid(client_app(gate), [{}] * nodes, {}, workers) as grid:
        try:
            yield gate, grid
        finally:
            gate.opened.set()


def test_every_node_answers_its_own_message() -> None:
    with InProcessGrid(client_app(echo), [{}] * 5, {}, workers=2) as grid:
        ids = grid.push_messages(request(i, tag=f"to {i}") for i in range(5))
        replies = collect(grid, ids)
    for position, message_id in enumerate(ids):
        reply = replies[message_id]
        assert tag_of(reply) == f"to {position}"
        assert reply.content["about"]["partition"] == position
        assert reply.metadata.src_node_id == FIRST_NODE_ID + position


def test_node_ids_follow_the_positions() -> None:
    with InProcessGrid(client_app(echo), [{}] * 3, {}, workers=1) as grid:
        assert grid.get_node_ids() == [FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2]
        assert [node.node_id for node in grid.get_nodes()] == grid.get_node_ids()


def test_contexts_carry_the_configuration() -> None:
    seen: list[Context] = []

    def train(message: Message, context: Context) -> Message:
        seen.append(context)
        return echo(message, context)

    with InProcessGrid(client_app(train), [{}, {"name": "b"}], {"experiment": "text"}, workers=1) as grid:
        collect(grid, grid.push_messages([request(1)]))
    assert seen[0].node_config == {"partition-id": 1, "num-partitions": 2, "name": "b"}
    assert seen[0].run_config == {"experiment": "text"}
    assert seen[0].node_id == FIRST_NODE_ID + 1


def test_one_worker_starts_messages_in_the_order_they_were_pushed() -> None:
    with gated_grid("first", nodes=8, workers=1) as (gate, grid):
        tags = ["first", "b", "a", "d", "c"]
        ids = grid.push_messages(request(7 - i, tag=tag) for i, tag in enumerate(tags))
        gate.opened.set()
        collect(grid, ids)
    assert gate.started == tags


def test_contexts_persist_over_the_run() -> None:
    with InProcessGrid(client_app(echo), [{}] * 2, {}, workers=2) as grid:
        for expected in (1, 2, 3):
            (reply,) = grid.send_and_receive([request(0)], timeout=LONG)
            assert reply.content["about"]["count"] == expected


def test_a_thousand_nodes_have_contexts_only_when_addressed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(run_id: int, node_id: int, *rest: Any) -> Context:
        made.append(node_id)
        return Context(run_id, node_id, *rest)

    monkeypatch.setattr(inprocess, "Context", counting)
    with InProcessGrid(client_app(echo), [{}] * 1000, {}, workers=2) as grid:
        assert len(grid.get_node_ids()) == 1000
        for _ in range(2):
            assert len(list(grid.send_and_receive([request(3), request(999)], timeout=LONG))) == 2
    assert sorted(made) == [FIRST_NODE_ID + 3, FIRST_NODE_ID + 999]


def failing(message: Message, context: Context) -> Message:
    if tag_of(message) == "exception":
        raise ValueError("no data here")
    if tag_of(message) == "exit":
        raise SystemExit(3)
    if tag_of(message) == "nothing":
        return None  # type: ignore[return-value]
    return echo(message, context)


@pytest.mark.parametrize(
    ("tag", "words"),
    [("exception", "ValueError.*no data here"), ("exit", "SystemExit.*3"), ("nothing", "NoneType")],
)
def test_a_failure_comes_back_as_an_error_and_the_worker_goes_on(tag: str, words: str) -> None:
    with InProcessGrid(client_app(failing), [{}] * 2, {}, workers=1) as grid:
        bad, good = grid.push_messages([request(0, tag=tag), request(1, tag="good")])
        replies = collect(grid, [bad, good])
    assert replies[bad].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[bad].metadata.src_node_id == FIRST_NODE_ID
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(replies[bad].error.reason)
    assert tag_of(replies[good]) == "good"


def test_a_message_whose_time_is_over_never_starts() -> None:
    with gated_grid("", nodes=1, workers=1) as (gate, grid):
        (reply,) = grid.send_and_receive([request(0, tag="late", ttl=1e-6)], timeout=LONG)
    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert gate.started == []


def test_a_message_whose_time_ends_at_work_is_answered_for_its_node() -> None:
    with gated_grid("slow", nodes=2, workers=1) as (gate, grid):
        slow = grid.push_messages([request(0, tag="slow", ttl=0.2)])
        assert gate.entered.wait(LONG)
        replies = collect(grid, slow)
        assert replies[slow[0]].error.code == ErrorCode.MESSAGE_UNAVAILABLE
        # The only worker is still inside the slow client: a fresh one serves the other node.
        (other,) = grid.send_and_receive([request(1, tag="other")], timeout=LONG)
        assert tag_of(other) == "other"
        gate.opened.set()
        # The slow node is free again once its client has ended; what that one said is gone.
        (again,) = grid.send_and_receive([request(0, tag="again")], timeout=LONG)
        assert tag_of(again) == "again"
        assert grid.pull_messages(slow) == []


def test_waiting_ends_with_the_timeout() -> None:
    with gated_grid("slow", nodes=1, workers=1) as (gate, grid):
        ids = grid.push_messages([request(0, tag="slow")])
        assert wait_for_replies(grid, ids, 0.01) == []
        gate.opened.set()
        assert len(collect(grid, ids)) == 1


def test_abandoned_messages_never_start_and_their_worker_is_replaced() -> None:
    with gated_grid("slow", nodes=3, workers=1) as (gate, grid):
        ids = grid.push_messages([request(0, tag="slow"), request(1, tag="queued")])
        assert gate.entered.wait(LONG)
        abandon_messages(grid, ids)
        (reply,) = grid.send_and_receive([request(2, tag="next")], timeout=LONG)
        assert tag_of(reply) == "next"
        gate.opened.set()
        (again,) = grid.send_and_receive([request(0, tag="again")], timeout=LONG)
        assert tag_of(again) == "again"
        assert grid.pull_messages(ids) == []
    assert gate.started == ["slow", "next", "again"]


def test_a_reply_that_is_already_there_can_be_abandoned() -> None:
    with InProcessGrid(client_app(echo), [{}], {}, workers=1) as grid:
        ids = grid.push_messages([request(0)])
        grid.wait(ids, LONG)
        grid.abandon(ids)
        assert grid.pull_messages(ids) == []


def test_replacing_a_worker_does_not_add_one() -> None:
    with gated_grid("slow", nodes=3, workers=1) as (gate, grid):
        ids = grid.push_messages([request(0, tag="slow")])
        assert gate.entered.wait(LONG)
        stuck = [thread for thread in threading.enumerate() if thread.name.startswith("client-worker")]
        grid.abandon(ids)
        gate.opened.set()
        stuck[0].join(LONG)
        assert len(collect(grid, grid.push_messages([request(1), request(2)]))) == 2
        alive = [thread for thread in threading.enumerate() if thread.name.startswith("client-worker")]
        assert len(alive) == 1


def test_a_node_works_on_one_message_at_a_time() -> None:
    with gated_grid("one", nodes=2, workers=2) as (gate, grid):
        one, two, other = grid.push_messages([request(0, tag="one"), request(0, tag="two"), request(1, tag="other")])
        assert gate.entered.wait(LONG)
        collect(grid, [other])
        assert gate.started == ["one", "other"]
        gate.opened.set()
        collect(grid, [one, two])
    assert gate.started == ["one", "other", "two"]


def test_sending_and_receiving_gives_up_at_the_timeout() -> None:
    with gated_grid("slow", nodes=2, workers=2) as (gate, grid):
        messages = [request(0, tag="slow"), request(1, tag="quick")]
        (reply,) = grid.send_and_receive(messages, timeout=1.0)
        assert tag_of(reply) == "quick"
        gate.opened.set()
        # Its node is free again, so its client has ended, and nobody kept what it said.
        grid.send_and_receive([request(0)], timeout=LONG)
        assert grid.pull_messages([message.metadata.message_id for message in messages]) == []


def test_closing_interrupts_a_client_at_work() -> None:
    entered = threading.Event()

    def endless(message: Message, context: Context) -> Message:
        entered.set()
        while True:
            threading.Event().wait(0.001)

    grid = InProcessGrid(client_app(endless), [{}] * 2, {}, workers=1)
    ids = grid.push_messages([request(0), request(1)])
    assert entered.wait(LONG)
    grid.abandon(ids[:1])
    grid.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("client-worker")]
    with pytest.raises(RuntimeError, match="closed"):
        grid.push_messages([request(0)])


def test_a_message_for_a_stranger_is_refused() -> None:
    with (
        InProcessGrid(client_app(echo), [{}] * 2, {}, workers=1) as grid,
        pytest.raises(ValueError, match="no node 1002"),
    ):
        grid.push_messages([request(2)])


def test_the_same_server_app_runs_on_it() -> None:
    app = ServerApp()
    results: list[Message] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        messages = [Message(RecordDict({"sent": ConfigRecord({"tag": "x"})}), i, "train") for i in grid.get_node_ids()]
        results.extend(grid.send_and_receive(messages))

    with InProcessGrid(client_app(echo), [{}] * 3, {}, workers=2) as grid:
        app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), {}))
    assert len(results) == 3


class Polled(Grid):
    """A grid like Ray's or a deployment's: there is only pulling."""

    pull_interval = 0.001

    def __init__(self, replies: list[list[Message]]) -> None:
        self.replies, self.asked = replies, 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked += 1
        return self.replies.pop(0) if self.replies else []

    run = property(lambda self: None)

    def set_run(self, run: Any) -> None: ...
    def create_message(self, *arguments: Any, **options: Any) -> Any: ...
    def get_node_ids(self) -> list[int]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return []


def test_other_grids_are_asked_until_there_is_a_reply() -> None:
    with InProcessGrid(client_app(echo), [{}], {}, workers=1):
        reply = request(0)
    grid = Polled([[], [], [reply]])
    assert wait_for_replies(grid, ["message-1"], LONG) == [reply]
    assert grid.asked == 3


def test_other_grids_are_asked_until_the_timeout() -> None:
    grid = Polled([])
    assert wait_for_replies(grid, ["message-1"], 0.01) == []
    assert grid.asked > 1


def test_other_grids_cannot_take_messages_back() -> None:
    abandon_messages(Polled([]), ["message-1"])
