"""Clients that raise, hang, lie or send rubbish: left out with their reason, as if they had not been there."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict

from client.app import app as client_app
from client.held import held, hold
from common.adapter import Adapter
from common.errors import ClientError, RejectedUpdate, RunError, StoreError
from common.federation import ClientUpdate
from common.lowrank import LowRank
from common.messages import EvaluateAnswer, EvaluateOrder, TrainAnswer, TrainOrder
from common.store import RunStore
from common.wire import ARRAYS, BODY, HEADER, Parcel, read_message, seal, unseal, write_message
from server.progress import Progress, listening
from simulations import simulate
from strategies.aggregation.flora import FLoRA
from tests.tiny import drive, tiny

Tamper = Callable[[TrainAnswer, Parcel], RecordDict]
HONEST = {"honest-1": 2, "honest-2": 4}


def answering(**changes: Any) -> Tamper:
    """Lie in the answer's header."""
    return lambda answer, parcel: write_message(answer.model_copy(update=changes), {"update": parcel})


def training(change: Callable[[Adapter], Adapter]) -> Tamper:
    """Send another adapter than the one trained."""
    return lambda answer, parcel: write_message(answer, {"update": seal(change(unseal(parcel)))})


def with_number(value: float) -> Tamper:
    def change(adapter: Adapter) -> Adapter:
        flat = adapter.flat.clone()
        flat[0] = value
        return adapter.with_flat(flat)

    return training(change)


def without_first_layer(adapter: Adapter) -> Adapter:
    return Adapter.pack(dict(list(adapter.layers.items())[1:]))


def with_more_rank(adapter: Adapter) -> Adapter:
    grown = {
        name: LowRank(torch.zeros(update.shape[0], 9), torch.zeros(9, update.shape[1]))
        for name, update in adapter.layers.items()
    }
    return Adapter.pack(grown)


def described(**changes: Any) -> Tamper:
    """Lie in the manifest."""

    def tamper(answer: TrainAnswer, parcel: Parcel) -> RecordDict:
        content = write_message(answer, {"update": parcel})
        manifest = json.dumps(json.loads(parcel.manifest) | changes)
        return RecordDict(
            {
                HEADER: ConfigRecord({BODY: answer.model_dump_json(), "update": manifest}),
                ARRAYS: content.array_records[ARRAYS],
            }
        )

    return tamper


HUGE = json.dumps({"layers": [["x", 2**30, 2**30, 2**30]], "extras": [], "method": "lora"})
LIES: dict[str, tuple[Tamper, str]] = {
    "empty": (lambda answer, parcel: RecordDict(), "lacks its header or its arrays"),
    "garbage": (
        lambda answer, parcel: RecordDict({HEADER: ConfigRecord({BODY: "{"}), ARRAYS: ArrayRecord({})}),
        "the message is no TrainAnswer",
    ),
    "no-update": (lambda answer, parcel: write_message(answer), "expected one adapter named update, got: none"),
    "other-name": (answering(client="honest-1"), "the answer is signed 'honest-1', expected 'other-name'"),
    "other-round": (answering(round=7), "the answer is for round 7, this is round 1"),
    "other-base": (answering(base_version=3), "trained on base version 3, not on 0"),
    "no-weight": (answering(num_examples=0.0), "it claims 0.0 examples, expected 1 to 10000000"),
    "negative-weight": (answering(num_examples=-5.0), "it claims -5.0 examples"),
    "endless-weight": (answering(num_examples=math.inf), "it claims inf examples"),
    "unknown-weight": (answering(num_examples=math.nan), "it claims nan examples"),
    "heavy-weight": (answering(num_examples=1e12), "it claims 1000000000000.0 examples"),
    "nan": (with_number(math.nan), "NaN or infinity; it cannot be averaged"),
    "infinity": (with_number(math.inf), "NaN or infinity; it cannot be averaged"),
    "overflow": (with_number(1e30), "norm is beyond float32"),
    "large": (with_number(1e6), "exceeds federation.max_update_norm 1000.0"),
    "layer-missing": (training(without_first_layer), "the update lacks layer model.layers.0.self_attn.q_proj"),
    "other-rank": (training(with_more_rank), "is (out, in, rank) (192, 192, 9), expected (192, 192, 2)"),
    "other-method": (training(lambda a: Adapter.pack(a.layers, method="dora")), "trained the method 'dora'"),
    "other-hash": (described(sha256="0" * 64), "do not match their hash"),
    "other-size": (described(wire="fp16"), "its layout needs"),
    "huge-layout": (described(layout=HUGE), "the update lacks layer"),
    "deep-layout": (described(layout="[" * 50_000), "manifest cannot be read"),
}


def raising(error: BaseException) -> Callable[[Message], Message]:
    def client(message: Message) -> Message:
        raise error

    return client


FAILURES: dict[str, tuple[Callable[[Message], Message], str]] = {
    "raises": (raising(ValueError("no disk left")), "ValueError: no disk left"),
    "raises-lines": (raising(RuntimeError("one\ntwo")), "RuntimeError: one two"),
    "exits": (raising(SystemExit(3)), "SystemExit: 3"),
    "returns-nothing": (lambda message: None, "TypeError: the ClientApp returned NoneType"),  # type: ignore[dict-item, return-value]
    "own-error": (lambda message: Message(Error(2, "tired"), reply_to=message), "tired"),
    "unknown-error": (lambda message: Message(Error(77, ""), reply_to=message), "error_77"),
    "endless-error": (lambda message: Message(Error(2, "x" * 10_000), reply_to=message), "x" * 500),
}


def lying(message: Message, context: Context) -> Message:
    """Train honestly, then do what the client's name says."""
    if message.metadata.message_type != MessageType.TRAIN:
        return client_app(message, context)
    order, _ = read_message(message.content, TrainOrder)
    if order.client in FAILURES:
        return FAILURES[order.client][0](message)
    reply = client_app(message, context)
    if order.client in LIES:
        answer, parcels = read_message(reply.content, TrainAnswer)
        return Message(LIES[order.client][0](answer, parcels["update"]), reply_to=message)
    return reply


def test_no_bad_client_leaves_a_trace(tmp_path: Path) -> None:
    ranks = HONEST | dict.fromkeys([*LIES, *FAILURES], 2)
    options = ("federation.min_completion=0", "federation.rounds=1", "federation.max_update_norm=1000.0")
    steps: list[Progress] = []
    with listening(steps.append):
        run = drive(tiny(tmp_path, *options, "evaluation.on=[]", ranks=ranks), tmp_path, lying)
    with RunStore.open(tmp_path, read_only=True) as store:
        rows = {row.client: row for row in store.client_rounds(run.run.id, 1)}
        told = {event.client for event in store.events(run.run.id) if event.kind == "left_out"}
        kept = {artefact.path for artefact in store.artefacts(run.run.id, "reply")}
    assert set(rows) == set(ranks)
    assert {name for name, row in rows.items() if row.status == "accepted"} == set(HONEST)
    for names, status, cases in ((LIES, "rejected", LIES), (FAILURES, "failed", FAILURES)):
        for name in names:
            assert rows[name].status == status, name
            assert cases[name][1] in str(rows[name].reason), name  # type: ignore[index]
    assert told == {step.client for step in steps if step.kind == "left_out"} == set(ranks) - set(HONEST)
    assert len(str(rows["endless-error"].reason)) == 500
    assert not kept
    alone = simulate(tiny(tmp_path, *options, "evaluation.on=[]", ranks=HONEST), tmp_path)
    assert run.run.adapter_sha256 == alone.run.adapter_sha256
    assert run.round_metrics(1)["train_loss"] == alone.round_metrics(1)["train_loss"]
    assert run.rounds[1].error == alone.rounds[1].error


def test_a_frozen_a_that_was_trained_is_left_out(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            answer, parcels = read_message(reply.content, TrainAnswer)
            if answer.client == "ada":
                lied = answer.model_copy(update={"frozen_hash": "0" * 64})
                return Message(write_message(lied, parcels), reply_to=message)
        return reply

    run = drive(tiny(tmp_path, "strategy.name=ffa_lora", "federation.rounds=1"), tmp_path, client)
    with RunStore.open(tmp_path, read_only=True) as store:
        (row,) = [row for row in store.client_rounds(run.run.id, 1) if row.status != "accepted"]
    assert (row.client, row.status) == ("ada", "rejected")
    assert "frozen factor differs" in str(row.reason)


class Hanging:
    """Clients of which one stays in a message of a kind until the test, or the server, lets it go."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.released = threading.Event()

    def __call__(self, message: Message, context: Context) -> Message:
        header: type[TrainOrder] | type[EvaluateOrder] = TrainOrder
        if message.metadata.message_type == MessageType.EVALUATE:
            header = EvaluateOrder
        if message.metadata.message_type == self.kind:
            order, _ = read_message(message.content, header)
            if order.client == self.name and order.round == 1:
                assert self.released.wait(60)
        return client_app(message, context)

    def release(self, step: Progress) -> None:
        """Let the client go as soon as the server has given it up."""
        if step.client == self.name and step.kind in ("left_out", "notice"):
            self.released.set()


DEADLINE = 2.0


def test_a_client_that_hangs_past_the_deadline_is_late(tmp_path: Path) -> None:
    options = ("federation.rounds=2", f"federation.deadline_s={DEADLINE}")
    hanging = Hanging("ben", MessageType.TRAIN)
    with listening(hanging.release):
        run = drive(tiny(tmp_path, *options), tmp_path, hanging)
    with RunStore.open(tmp_path, read_only=True) as store:
        first, second = ({row.client: row for row in store.client_rounds(run.run.id, n)} for n in (1, 2))
    assert {name for name, row in first.items() if row.status == "accepted"} == {"ada", "cyd", "dot"}
    assert (first["ben"].status, first["ben"].reason) == ("late", "no answer within the deadline of 2 s")
    assert {row.status for row in second.values()} == {"accepted"}
    assert run.rounds[1].phases["train"] >= DEADLINE


def test_an_evaluation_that_hangs_is_left_out(tmp_path: Path) -> None:
    options = ("federation.rounds=1", f"federation.deadline_s={DEADLINE}")
    hanging = Hanging("ben", MessageType.EVALUATE)
    steps: list[Progress] = []
    with listening(steps.append, hanging.release):
        run = drive(tiny(tmp_path, *options), tmp_path, hanging)
    judged = {m.client for m in run.measured if m.name == "held_out_loss" and m.round == 1}
    assert judged == {"", "ada", "cyd", "dot"}
    assert "ben did not evaluate: no answer within the deadline of 2 s" in [step.text for step in steps]


JUDGEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "ada": ({"num_examples": math.inf}, "it claims inf examples"),
    "ben": ({"metrics": {"loss": math.nan}}, "its loss is missing"),
    "cyd": ({"metrics": {"accuracy": 1.0}}, "its loss is missing"),
    "dot": ({"client": "ada"}, "it answers another order"),
    "eve": ({"num_examples": 1e300}, "it claims 1e+300 examples"),
    "fay": ({"metrics": {"loss": 1.0, "accuracy": math.inf}}, "a metric is not a finite number"),
    "gus": ({"round": 5}, "it answers another order"),
}


def test_no_evaluation_can_spoil_the_others(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.EVALUATE:
            answer, _ = read_message(reply.content, EvaluateAnswer)
            if answer.client in JUDGEMENTS:
                return Message(write_message(answer.model_copy(update=JUDGEMENTS[answer.client][0])), reply_to=message)
        return reply

    ranks = dict.fromkeys([*JUDGEMENTS, *HONEST], 2)
    steps: list[Progress] = []
    with listening(steps.append):
        run = drive(tiny(tmp_path, "federation.rounds=1", ranks=ranks), tmp_path, client)
    numbers = {m.client: m.value for m in run.measured if m.name == "held_out_loss" and m.round == 1}
    assert set(numbers) == {"", *HONEST}
    assert min(numbers[name] for name in HONEST) <= numbers[""] <= max(numbers[name] for name in HONEST)
    notices = {step.client: step.text for step in steps if step.kind == "notice" and step.round == 1}
    for name, (_, words) in JUDGEMENTS.items():
        assert words in notices[name]


def test_an_evaluation_nobody_answers_is_no_failure(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.EVALUATE:
            raise ValueError("no")
        return client_app(message, context)

    run = drive(tiny(tmp_path, "federation.rounds=1"), tmp_path, client)
    assert run.run.status == "completed"
    assert "held_out_loss" not in run.metrics


def test_clients_of_other_code_refuse_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.orders.code_fingerprint", lambda: "feed")
    with pytest.raises(RunError, match="nothing was trained"):
        drive(tiny(tmp_path), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        reasons = {row.reason for row in store.client_rounds(store.get_run("last").id, 1)}
    (reason,) = reasons
    assert reason is not None
    assert reason.startswith("the server runs code feed, this node ")
    assert reason.endswith("; install the same LoRAFleet version")


def test_clients_of_other_code_do_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.nodes.code_fingerprint", lambda: "feed")
    with pytest.raises(
        RunError, match=r"0 clients joined, at least 1 are needed; 4 could not: the server runs code feed"
    ):
        drive(tiny(tmp_path), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.get_run("last").status == "failed"


def test_a_federation_starts_without_the_nodes_that_refuse(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.QUERY and int(context.node_config["partition-id"]) == 1:
            raise ValueError("no GPU")
        return client_app(message, context)

    steps: list[Progress] = []
    with listening(steps.append):
        run = drive(tiny(tmp_path, "federation.rounds=1"), tmp_path, client)
    assert run.rounds[1].cohort == ("ada", "cyd", "dot")
    assert [step.text for step in steps if step.kind == "notice"] == ["node 1001 cannot take part: ValueError: no GPU"]
    with RunStore.open(tmp_path, read_only=True) as store:
        fates = {row.client: (row.status, row.reason) for row in store.client_rounds(run.run.id, 1)}
    assert fates["ben"] == ("offline", "its node is not connected")


def on_a_new_machine(message: Message, context: Context, home: Path) -> Message:
    """Answer from a thread without a model and a disk without files."""
    replies: list[Message] = []
    new = Context(context.run_id, context.node_id, context.node_config, RecordDict(), dict(context.run_config))
    new.run_config["home"] = str(home)
    thread = threading.Thread(target=lambda: replies.append(client_app(message, new)))
    thread.start()
    thread.join()
    return replies[0]


def test_a_client_that_lost_the_global_adapter_is_sent_it_again(tmp_path: Path) -> None:
    sent: dict[tuple[str, str, int], bool] = {}

    def client(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind != MessageType.QUERY:
            header: type[TrainOrder] | type[EvaluateOrder] = TrainOrder if kind == MessageType.TRAIN else EvaluateOrder
            order, parcels = read_message(message.content, header)
            sent[kind, order.client, order.round] = "global" in parcels
            if (kind, order.client, order.round) == (MessageType.TRAIN, "ben", 1):
                return on_a_new_machine(message, context, tmp_path / "elsewhere")
        return client_app(message, context)

    # Under fedavg the global adapter never changes, so it travels once.
    run = drive(tiny(tmp_path, "strategy.name=fedavg", ranks=dict.fromkeys(("ada", "ben", "cyd"), 2)), tmp_path, client)
    with RunStore.open(tmp_path, read_only=True) as store:
        (row,) = [row for row in store.client_rounds(run.run.id) if row.status != "accepted"]
    assert (row.client, row.round, row.status) == ("ben", 1, "failed")
    assert row.reason == "this node no longer holds the global adapter; it must be sent again"
    first = {(MessageType.EVALUATE, name, 0) for name in ("ada", "ben", "cyd")}
    assert {order for order, whole in sent.items() if whole} == first | {(MessageType.EVALUATE, "ben", 1)}


def parcels(count: int) -> list[Parcel]:
    return [seal(Adapter.pack({"x": LowRank(torch.full((2, 1), float(n)), torch.ones(1, 2))})) for n in range(count)]


def test_a_version_is_held_once_and_the_last_two_stay(tmp_path: Path) -> None:
    made = parcels(4)
    for parcel in (*made, made[-1], replace(made[-1], sha256="")):
        hold(tmp_path, parcel, made.index(parcel) if parcel.sha256 else 3)
    kept = {f"global-{number:08d}-{made[number].sha256[:32]}.safetensors" for number in (2, 3)}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert held(tmp_path, made[2].sha256).sha256() == unseal(made[2]).sha256()
    with pytest.raises(ClientError, match="must be sent again"):
        held(tmp_path, made[0].sha256)
    with pytest.raises(ClientError, match="must be sent again"):
        held(None, made[2].sha256)


def test_all_of_one_base_version_stay(tmp_path: Path) -> None:
    """Where downloads are bounded, clients of one machine hold different ones."""
    made = parcels(6)
    for number, parcel in enumerate(made):
        hold(tmp_path, parcel, number // 3)
    for parcel in made:
        assert held(tmp_path, parcel.sha256).sha256() == unseal(parcel).sha256()


def test_a_held_version_that_is_damaged_is_dropped(tmp_path: Path) -> None:
    (parcel,) = parcels(1)
    hold(tmp_path, parcel, 0)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ClientError, match="must be sent again"):
        held(tmp_path, parcel.sha256)
    assert not path.exists()


def test_an_update_the_strategy_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Screening is not the strategy's only say: ben is refused when his turn to be added has come."""
    add = FLoRA.add

    def choosy(strategy: FLoRA, accumulated: list[ClientUpdate], update: ClientUpdate) -> list[ClientUpdate]:
        if update.client == "ben":
            raise RejectedUpdate("ben does not fit")
        return add(strategy, accumulated, update)

    monkeypatch.setattr(FLoRA, "add", choosy)
    run = drive(tiny(tmp_path, "federation.rounds=1", "federation.keep_replies=true"), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        rows = {row.client: row for row in store.client_rounds(run.run.id, 1)}
        assert len(store.artefacts(run.run.id, "reply")) == 3
    assert (rows["ben"].status, rows["ben"].reason) == ("rejected", "ben does not fit")
    assert rows["ben"].bytes_up > 0
    assert {name for name, row in rows.items() if row.status == "accepted"} == {"ada", "cyd", "dot"}
    monkeypatch.undo()
    ranks = {"ada": 2, "cyd": 2, "dot": 8}
    alone = simulate(tiny(tmp_path, "federation.rounds=1", ranks=ranks), tmp_path)
    assert run.run.adapter_sha256 == alone.run.adapter_sha256
    assert run.round_metrics(1)["train_loss"] == alone.round_metrics(1)["train_loss"]


def test_a_disk_that_is_full_is_nobodys_fault_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops and says so, in place of leaving every client out."""

    def full(folder: Path, name: str, data: bytes) -> None:
        raise StoreError("no space left; free some space there, then resume the run")

    experiment = tiny(tmp_path, "federation.rounds=1")
    with monkeypatch.context() as patched:

        def fill(step: Progress) -> None:
            if step.kind == "dispatched":
                patched.setattr("server.journal.write_artefact", full)

        with pytest.raises(StoreError, match="no space left"), listening(fill):
            drive(experiment, tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        run = store.get_run("last")
        assert (run.status, run.reason) == ("failed", "no space left; free some space there, then resume the run")
    assert drive(experiment, tmp_path, run=run.id).run.status == "completed"
