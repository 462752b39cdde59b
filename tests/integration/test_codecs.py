"""Runs whose updates travel in few bits: what they cost, what they lose, and what clients remember of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType

from client.app import app as client_app
from client.memory import recall
from client.upload import OWED
from common.adapter import Adapter
from common.federation import ClientInfo
from common.flower import identify_task
from common.lowrank import LowRank
from common.messages import TrainAnswer, TrainOrder
from common.start import starting_adapter
from common.store import RunStore
from common.wire import read_message, seal_numbers, unseal
from common.workspace import model_spec
from server.orders import OrderBook
from server.plan import make_plan
from server.progress import Progress, listening
from server.screening import screen
from simulations import resume, simulate
from simulations.run import FinishedRun
from strategies import AGGREGATION, aggregation_strategy
from tests.tiny import RANKS, drive, tiny

EQUAL = dict.fromkeys(RANKS, 4)
FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")


def rejected(run: FinishedRun) -> list[str]:
    with RunStore.open(run.home, read_only=True) as store:
        rows = [row for number in range(1, len(run.rounds)) for row in store.client_rounds(run.run.id, number)]
    return [f"{row.client}: {row.reason}" for row in rows if row.status != "accepted"]


def memory(run: FinishedRun, client: str) -> Path:
    return run.home / "runs" / run.run.id / "clients" / client


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Final losses of one small federation in every format, and in int4 without feedback."""
    folder = tmp_path_factory.mktemp("losses")
    found = {}
    for wire in (*FORMATS, "int4 without"):
        options = [
            f'federation.wire="{wire.split()[0]}"',
            f"federation.error_feedback={'false' if ' ' in wire else 'true'}",
        ]
        shape = ["strategy.name=fedavg", "federation.rounds=4", "training.steps=3"]
        found[wire] = simulate(tiny(folder, *shape, *options, ranks=EQUAL), folder).metrics["held_out_loss"][-1]
    return found


@pytest.mark.parametrize(("wire", "bound"), [("fp16", 1e-4), ("bf16", 1e-3), ("int8", 5e-3), ("int4", 2e-2)])
@pytest.mark.long
def test_few_bits_cost_little_loss(losses: dict[str, float], wire: str, bound: float) -> None:
    assert losses[wire] == pytest.approx(losses["fp32"], rel=bound)
    assert losses[wire] != losses["fp32"]


def test_feedback_is_a_setting(losses: dict[str, float]) -> None:
    assert losses["int4"] != losses["int4 without"]


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("strategy", ["flora", "ffa_lora"])
def test_an_update_has_exactly_the_bytes_of_the_plan(tmp_path: Path, strategy: str, wire: str) -> None:
    experiment = tiny(tmp_path, f"strategy.name={strategy}", f'federation.wire="{wire}"', "clients.dot.rank=7")
    seen: dict[str, set[int]] = {}

    def noting(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            answer, parcels = read_message(reply.content, TrainAnswer)
            seen.setdefault(answer.client, set()).add(parcels["update"].nbytes)
        return reply

    drive(experiment, tmp_path, noting)
    assert seen == {client.name: {client.bytes_up} for client in make_plan(experiment).clients}


@pytest.mark.parametrize("name", AGGREGATION.names())
def test_every_strategy_takes_what_arrives(tmp_path: Path, name: str) -> None:
    """Downloads are in bf16 besides: the server must decode from the start that arrived, not from the one it has."""
    wires = ['federation.wire="int4"', 'federation.wire_down="bf16"']
    options = [f"strategy.name={name}", "federation.rounds=3", "evaluation.every=3"]
    run = simulate(tiny(tmp_path, *options, *wires, ranks=EQUAL), tmp_path)
    assert run.run.status == "completed"
    assert not rejected(run)
    kept = sorted(path.name for path in (memory(run, "ada") / "memory").glob(f"{OWED}-*"))
    remembers = AGGREGATION.plugin(name).capabilities.same_coordinates
    assert kept == ([f"{OWED}-{number:08d}.safetensors" for number in (2, 3)] if remembers else [])


@pytest.mark.parametrize(
    "options", [('federation.wire="fp32"',), ('federation.wire="int4"', "federation.error_feedback=false")], ids=str
)
def test_who_owes_nothing_keeps_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = simulate(tiny(tmp_path, "strategy.name=ffa_lora", *options), tmp_path)
    assert not (memory(run, "ada") / "memory").exists()


def test_the_server_decodes_from_the_start_that_arrived(tmp_path: Path) -> None:
    """A change of nothing is the start as the client has it, rounded on its way down."""
    identify_task(1)
    experiment = tiny(tmp_path, 'federation.wire="int8"', 'federation.wire_down="bf16"', ranks=EQUAL)
    strategy, spec = aggregation_strategy("fedavg"), model_spec(experiment)
    state = strategy.init(spec)
    layers = {
        name: LowRank(torch.full((out, 4), 0.3), torch.full((4, inn), 0.7)) for name, (out, inn) in spec.layers.items()
    }
    state = replace(state, start=Adapter.pack(layers))
    order = OrderBook("r", experiment, strategy, state).train(1, 1, ClientInfo("ada", 4), 7)
    _, parcels = read_message(order.message.content, TrainOrder)
    given = starting_adapter(replace(order.dispatch, start=unseal(parcels["start"])), spec)
    update = seal_numbers(torch.zeros(given.layout.numel), given.layout, "int8")
    answer = TrainAnswer(client="ada", round=1, base_version=0, num_examples=1, seconds=0)
    screened = screen(order, answer, {"update": update}, state, experiment.federation)
    assert torch.equal(screened.adapter.flat, given.flat)
    assert not torch.equal(given.flat, state.start.flat)


FEEDBACK = ("strategy.name=ffa_lora", 'federation.wire="int4"', "federation.rounds=3")


def test_every_order_says_whether_errors_are_fed_back(tmp_path: Path) -> None:
    said: dict[str, set[bool]] = {"flora": set(), "ffa_lora": set()}
    for strategy, orders in said.items():

        def noting(message: Message, context: Context, orders: set[bool] = orders) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                orders.add(read_message(message.content, TrainOrder)[0].feedback)
            return client_app(message, context)

        drive(tiny(tmp_path, *FEEDBACK, f"strategy.name={strategy}"), tmp_path, noting)
    assert said == {"flora": {False}, "ffa_lora": {True}}


@pytest.mark.parametrize("where", [("reply", 2), ("aggregated", 2), ("dispatched", 3)], ids=str)
def test_a_run_that_was_interrupted_owes_what_it_would_have_owed(tmp_path: Path, where: tuple[str, int]) -> None:
    whole = simulate(tiny(tmp_path, *FEEDBACK), tmp_path / "whole")

    def stop(step: Progress) -> None:
        if (step.kind, step.round) == where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(stop):
        simulate(tiny(tmp_path, *FEEDBACK), tmp_path)
    resumed = resume("last", tmp_path)
    assert resumed.run.adapter_sha256 == whole.run.adapter_sha256
    for client in RANKS:
        left, right = (recall(memory(run, client), OWED, 9) for run in (resumed, whole))
        assert left is not None
        assert right is not None
        assert torch.equal(left["b"], right["b"])


def test_a_client_that_lost_its_answer_trains_again_from_what_it_owed_then(tmp_path: Path) -> None:
    """Killed between keeping its memory and keeping its answer, or with the answer damaged."""
    whole = simulate(tiny(tmp_path, *FEEDBACK), tmp_path / "whole")

    def forgetful(message: Message, context: Context) -> Message:
        client_app(message, context)
        for answer in (tmp_path / "forgetful").rglob("answer.safetensors"):
            answer.unlink(missing_ok=True)
        return client_app(message, context)

    run = drive(tiny(tmp_path, *FEEDBACK, "simulation.workers=1"), tmp_path / "forgetful", forgetful)
    assert run.run.adapter_sha256 == whole.run.adapter_sha256


def test_a_damaged_memory_does_not_stop_a_client(tmp_path: Path) -> None:
    def damaging(message: Message, context: Context) -> Message:
        for kept in (tmp_path / "home").rglob(f"{OWED}-*.safetensors"):
            kept.write_bytes(b"damaged")
        return client_app(message, context)

    run = drive(tiny(tmp_path, *FEEDBACK), tmp_path / "home", damaging)
    assert run.run.status == "completed"
    assert not rejected(run)
