"""Bytes on the wire of every strategy, counted blob by blob: those of the plan, and never above a bound."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import app as client_app
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.messages import EvaluateOrder, TrainAnswer, TrainOrder
from common.store import RunStore
from common.wire import read_message
from server.plan import make_plan
from simulations.run import FinishedRun
from strategies import AGGREGATION
from tests.tiny import drive, name_of, synthetic

DENSE_ENOUGH = "strategy.options.density=0.5"
"""For slora: with a few entries of such small matrices, the SVD would have no more slots than entries."""

SAME = {name: AGGREGATION.plugin(name).capabilities.same_coordinates for name in AGGREGATION.names()}

SMALLER = ("florist", "fedex_lora", "lora_lego")
"""What they send depends on the numbers, not on ranks alone; the plan names the most it can be."""


class Scale:
    """A client app that weighs the adapters of all messages, by client."""

    def __init__(self, experiment: Experiment) -> None:
        self._lock, self._experiment = threading.Lock(), experiment
        self.down: dict[str, list[int]] = {}
        self.up: dict[str, list[int]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        if message.metadata.message_type in (MessageType.TRAIN, MessageType.EVALUATE) and not answer.has_error():
            name = name_of(self._experiment, context)
            with self._lock:
                self.down.setdefault(name, []).append(blobs(message.content))
                self.up.setdefault(name, []).append(blobs(answer.content))
        return answer


def blobs(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def total(weights: dict[str, list[int]]) -> int:
    return sum(map(sum, weights.values()))


def build(name: str, *options: str) -> Experiment:
    equal = not AGGREGATION.plugin(name).capabilities.mixed_ranks
    own = [DENSE_ENOUGH] if name == "slora" else []
    return synthetic(f"strategy.name={name}", *own, *options, ranks=(4,) * 4 if equal else (2, 4, 4, 8))


def left_out(run: FinishedRun) -> list[str]:
    with RunStore.open(run.home, read_only=True) as store:
        rows = [row for number in range(1, len(run.rounds)) for row in store.client_rounds(run.run.id, number)]
    return [f"{row.client}: {row.reason}" for row in rows if row.status != "accepted"]


def budgets(name: str) -> tuple[str, ...]:
    """Leave two clients fewer bytes to send than their rank takes; all of them where ranks must be equal."""
    able = AGGREGATION.plugin(name).capabilities
    numbers, budget = (range(1, 3), 1000) if able.mixed_ranks else (range(1, 5), 3100 if name == "slora" else 1200)
    return tuple(f"clients.client-{number}.upload_bytes={budget}" for number in numbers)


@pytest.mark.parametrize(
    "options",
    [
        ('federation.wire="int8"', 'federation.wire_down="bf16"', "evaluation.every=2"),
        pytest.param((), marks=pytest.mark.long),
        pytest.param(("evaluation.every=3", 'federation.wire="int4"'), marks=pytest.mark.long),
        pytest.param(("clients.client-1.evaluates=false", "clients.client-4.trains=false"), marks=pytest.mark.long),
        pytest.param(("budgets",), marks=pytest.mark.long),
    ],
    ids=["few bits", "plain", "every third", "roles", "budgets"],
)
@pytest.mark.parametrize("name", AGGREGATION.names())
def test_a_run_moves_the_bytes_of_its_plan(tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    experiment = build(name, *(budgets(name) if options == ("budgets",) else options))
    plan, scale = make_plan(experiment), Scale(experiment)
    run = drive(experiment, tmp_path, scale)
    assert not left_out(run)
    assert total(scale.up) == plan.bytes_up
    assert max(map(max, scale.down.values())) <= plan.largest_download
    assert total(scale.down) <= plan.bytes_down
    if name not in SMALLER:
        assert total(scale.down) == plan.bytes_down
    for client in plan.clients:
        assert max(scale.up[client.name]) >= client.bytes_up


@pytest.mark.parametrize("wire", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", AGGREGATION.names())
def test_no_download_is_above_its_bound(tmp_path: Path, name: str, wire: str) -> None:
    """Four clients with four bounds: where nothing can be cut, the plan says so before round 1."""
    free = make_plan(build(name, f"federation.wire_down={wire}")).largest_download
    bounds = [free // 2, free * 5 // 8, free * 3 // 4, free]
    given = [f"clients.client-{number}.download_bytes={bound}" for number, bound in enumerate(bounds, 1)]
    experiment = build(name, f"federation.wire_down={wire}", *given)
    if SAME[name] and not AGGREGATION.create(name).expected_ranks(4, [4] * 4, 4)[1]:
        with pytest.raises(ConfigurationError, match=r"client client-1: download_bytes = \d+ holds not even rank 1"):
            make_plan(experiment)
        return
    plan, scale = make_plan(experiment), Scale(experiment)
    run = drive(experiment, tmp_path, scale)
    assert not left_out(run)
    for client, bound in enumerate(bounds, 1):
        assert max(scale.down[f"client-{client}"]) <= bound
    assert total(scale.down) <= plan.bytes_down
    if name not in SMALLER:
        assert total(scale.down) == plan.bytes_down
    lost = {metric.client: metric.value for metric in run.measured if metric.name == "download_discarded_energy"}
    assert all(0 < share < 1 for share in lost.values())
    assert "client-4" not in lost
    assert "client-1" in lost or name not in ("flora", "florist")


@pytest.mark.parametrize("name", ["flora", "flexlora"])
@pytest.mark.parametrize("bound", ["download_rank=2", "download_energy=0.7"])
def test_a_cap_on_rank_or_energy_makes_downloads_smaller(tmp_path: Path, name: str, bound: str) -> None:
    weights = []
    for options in ((), (f"federation.{bound}",)):
        experiment = build(name, *options)
        scale = Scale(experiment)
        run = drive(experiment, tmp_path, scale)
        assert not left_out(run)
        weights.append(total(scale.down))
        assert run.metrics["held_out_loss"][-1] < run.metrics["held_out_loss"][0]
    assert weights[1] < weights[0]


@pytest.mark.parametrize("name", [name for name in AGGREGATION.names() if SAME[name]])
def test_a_start_whose_numbers_mean_something_is_never_cut(tmp_path: Path, name: str) -> None:
    """All clients of one rank get the same start, bit for bit, whatever their bounds are."""
    experiment = build(name, "federation.download_rank=1", "clients.client-2.download_bytes=999999")
    starts: dict[tuple[str, int], bytes] = {}

    def noting(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, parcels = read_message(message.content, TrainOrder)
            starts[order.client, order.round] = bytes(parcels["start"].data)
        return client_app(message, context)

    drive(experiment, tmp_path, noting)
    assert all(starts["client-2", number] == starts["client-3", number] for number in range(1, 5))
    assert len(starts["client-2", 4]) == len(starts["client-3", 4]) > 0


def test_frames_come_once_and_in_full_precision(tmp_path: Path) -> None:
    sent: list[tuple[str, int, str]] = []

    def noting(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind in (MessageType.TRAIN, MessageType.EVALUATE):
            order, parcels = read_message(message.content, TrainOrder if kind == MessageType.TRAIN else EvaluateOrder)
            if "frames" in parcels:
                sent.append((order.client, order.round, parcels["frames"].wire))
        return client_app(message, context)

    experiment = build("fed_sb", 'federation.wire_down="bf16"')
    assert not left_out(drive(experiment, tmp_path, noting))
    assert sorted(sent) == [(name, 2, "fp32") for name in experiment.simulated_clients()]


def test_answers_say_what_a_node_holds(tmp_path: Path) -> None:
    held: dict[int, set[int]] = {}

    def noting(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            answer, _ = read_message(reply.content, TrainAnswer)
            held.setdefault(answer.round, set()).add(len(answer.holds))
        return reply

    drive(build("fed_sb"), tmp_path, noting)
    assert held == {1: {1}, 2: {1}, 3: {2}, 4: {2}}
