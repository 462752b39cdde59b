"""The node's ClientApp, asked directly: what it answers, what it keeps, and which orders it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import app as client_app
from client.device import device_name, free_memory, largest_rank
from client.node import node_of
from common.adapter import Adapter
from common.errors import ClientError, RunError
from common.experiment import Experiment
from common.federation import ClientInfo, ModelSpec, ServerState
from common.fingerprint import code_fingerprint
from common.flower import identify_task
from common.lowrank import LowRank
from common.messages import EvaluateAnswer, Presence, Query, TrainAnswer, TrainOrder
from common.wire import read_message, unseal, write_message
from common.workspace import model_spec
from server.orders import OrderBook
from strategies import aggregation_strategy
from tests.tiny import tiny

NODE = 7


@dataclass(frozen=True)
class Bench:
    """A server's half, by hand: orders for the second client, ben."""

    experiment: Experiment
    home: str

    @property
    def state(self) -> ServerState:
        return aggregation_strategy("flora").init(model_spec(self.experiment))

    def order(self, **changes: Any) -> Message:
        """Build a training order, with other values in its header."""
        book = OrderBook("r", self.experiment, aggregation_strategy("flora"), self.state)
        message = book.train(1, 1, ClientInfo("ben", 4), NODE).message
        order, parcels = read_message(message.content, TrainOrder)
        changed = order.model_copy(update=changes)
        return Message(write_message(changed, parcels), NODE, MessageType.TRAIN, ttl=60)

    def context(self, partition: int = 1, **node_config: Any) -> Context:
        config = {"experiment": self.experiment.model_dump_json(), "run-id": "r", "home": self.home}
        node = {"partition-id": partition, "num-partitions": 4} | node_config
        return Context(1, NODE, node, RecordDict(), config)  # type: ignore[arg-type]

    def refusal(self, message: Message) -> str:
        """Return why an order is refused; it must not cost an exception."""
        reply = client_app(message, self.context())
        assert reply.has_error()
        return reply.error.reason


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    identify_task(1)
    return Bench(tiny(tmp_path), str(tmp_path / "home"))


def test_a_node_says_who_it_is(bench: Bench) -> None:
    content = write_message(Query(run="r", fingerprint=code_fingerprint()))
    reply = client_app(Message(content, NODE, MessageType.QUERY), bench.context())
    presence, _ = read_message(reply.content, Presence)
    assert presence.client == "ben"
    assert presence.device.startswith(("CPU", "NVIDIA"))
    assert presence.memory_bytes > 0
    assert presence.max_rank == 192


def test_an_order_is_trained_once_and_answered_alike_for_ever(bench: Bench) -> None:
    first = client_app(bench.order(), bench.context())
    answer, parcels = read_message(first.content, TrainAnswer)
    again, same = read_message(client_app(bench.order(attempt=2), bench.context()).content, TrainAnswer)
    assert again == answer  # the seconds it took, too
    assert bytes(same["update"].data) == bytes(parcels["update"].data)
    other, _ = read_message(client_app(bench.order(round=2), bench.context()).content, TrainAnswer)
    assert (other.round, answer.round) == (2, 1)
    assert other.seconds != answer.seconds


def test_a_node_without_a_home_keeps_nothing_and_answers_alike(bench: Bench, tmp_path: Path) -> None:
    homeless = Bench(bench.experiment, "")
    one, two = (client_app(where.order(), where.context()) for where in (bench, homeless))
    (kept, first), (bare, second) = (read_message(reply.content, TrainAnswer) for reply in (one, two))
    assert torch.equal(unseal(first["update"]).flat, unseal(second["update"]).flat)
    assert kept.holds
    assert not bare.holds
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "home"}


def test_an_order_for_another_client_is_refused(bench: Bench) -> None:
    assert bench.refusal(bench.order(client="ada")) == "the order is for client ada, this is ben"


def test_an_order_of_other_code_is_refused(bench: Bench) -> None:
    assert bench.refusal(bench.order(fingerprint="feed")).startswith("the server runs code feed, this node ")


def test_an_order_with_another_global_adapter_is_refused(bench: Bench) -> None:
    reason = bench.refusal(bench.order(global_hash="0" * 64))
    assert reason == "the global adapter is not the one the order names"


def test_an_order_without_its_start_is_refused(bench: Bench) -> None:
    order, parcels = read_message(bench.order().content, TrainOrder)
    del parcels["start"]
    message = Message(write_message(order, parcels), NODE, MessageType.TRAIN)
    assert bench.refusal(message) == "the order came without its start adapter"


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_what_is_no_order_is_refused(bench: Bench, kind: str) -> None:
    assert bench.refusal(Message(RecordDict(), NODE, kind)) == "the message lacks its header or its arrays"


def test_a_training_that_fails_is_told_in_one_line(bench: Bench) -> None:
    hot = Bench(tiny(Path(bench.home).parent, "training.learning_rate=1e30", "training.steps=3"), "")
    assert "lower training.learning_rate" in hot.refusal(hot.order())


def test_an_evaluation_counts_the_held_out_rows(bench: Bench) -> None:
    book = OrderBook("r", bench.experiment, aggregation_strategy("flora"), bench.state)
    message = book.evaluate(0, "ben", NODE).message
    answer, parcels = read_message(client_app(message, bench.context()).content, EvaluateAnswer)
    assert not parcels
    assert (answer.client, answer.round) == ("ben", 0)
    assert answer.num_examples >= 2
    assert answer.metrics["loss"] > 0


def test_a_real_node_has_its_name_from_its_own_configuration(bench: Bench) -> None:
    assert node_of(bench.context(name="zoe")).name == "zoe"
    assert node_of(bench.context(3)).name == "dot"
    with pytest.raises(ClientError, match="node 4 is none of the 4 clients"):
        node_of(bench.context(4))


def test_a_merged_adapter_that_no_longer_fits_fp16_stops_the_run(bench: Bench) -> None:
    experiment = tiny(Path(bench.home).parent, 'federation.wire_down="fp16"')
    state = bench.state
    name, (out, inn) = next(iter(state.spec.layers.items()))
    large = Adapter.pack({name: LowRank(torch.full((out, 1), 1e5), torch.ones(1, inn))})
    book = OrderBook("r", experiment, aggregation_strategy("flora"), ServerState(state.spec, state.start, large))
    with pytest.raises(RunError, match=r'the merged adapter cannot be sent: .* federation\.wire_down to "bf16"'):
        book.train(1, 1, ClientInfo("ben", 4), NODE)


@pytest.mark.parametrize(
    ("memory", "rank"), [(0, 1), (10**12, 6), (3 * 4 * 16 * (10 + 14), 3)], ids=["none", "plenty", "for three"]
)
def test_the_largest_rank_fits_a_quarter_of_the_memory(memory: int, rank: int) -> None:
    spec = ModelSpec({"x": (4, 6), "y": (6, 8)}, seed=0)
    assert largest_rank(spec, memory) == rank


def test_the_device_is_described() -> None:
    cpu = torch.device("cpu")
    assert "cores" in device_name(cpu)
    assert free_memory(cpu) > 2**20


def test_the_order_travels_as_plain_text_and_numbers(bench: Bench) -> None:
    content = bench.order().content
    header = json.loads(str(content.config_records["header"]["json"]))
    assert (header["client"], header["round"], header["attempt"], header["rounds"]) == ("ben", 1, 1, 2)
