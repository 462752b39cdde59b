"""Secure aggregation in whole runs: the plain result, dropouts, kills, replays, and what the server gets to see."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from safetensors.torch import load_file
from torch import Tensor

import client.secure.masking
import client.work
from client.app import app as client_app
from common.adapter import Adapter, tensor_bytes
from common.errors import RunError
from common.federation import Dispatch
from common.messages import SharesAnswer, TrainAnswer, TrainOrder, UnmaskAnswer
from common.secure.fixed_point import encode
from common.secure.shamir import PRIME
from common.store import ClientRound, RunStore
from common.travel import take
from common.wire import BODY, HEADER, read_message, write_message
from server.progress import listening
from server.secure.desk import Desk
from simulations.run import FinishedRun
from strategies import AGGREGATION
from tests.tiny import Client, drive, tiny

LINEAR = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.linear_uplink]
SECURE = ("secure_aggregation.enabled=true", "strategy.name=ffa_lora")
ONE_ROUND = ("federation.rounds=1", "evaluation.on=[]")
EQUAL = dict.fromkeys(("ada", "ben", "cyd", "dot"), 4)
STEPS = ("keys", "shares", "uploads", "unmask")


def merged(run: FinishedRun) -> Tensor:
    """Return all numbers of a run's adapter."""
    (path,) = (run.home / "runs" / run.run.id).glob("adapter-*.safetensors")
    return load_file(path)["adapter"].float()


def rows(run: FinishedRun, number: int = 1) -> dict[str, ClientRound]:
    with RunStore.open(run.home, read_only=True) as store:
        return {row.client: row for row in store.client_rounds(run.run.id, number)}


def order_client(message: Message) -> str:
    """Return who a message is for, from its header."""
    return str(json.loads(str(message.content.config_records[HEADER][BODY])).get("client", ""))


def gone(kind: str, *names: str) -> Client:
    """Clients of which some are not there for one kind of message."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == kind and order_client(message) in names:
            raise ConnectionError("gone")
        return client_app(message, context)

    return client


def noting(kinds: list[str], client: Client) -> Client:
    """Note what kinds of message clients get."""

    def noted(message: Message, context: Context) -> Message:
        kinds.append(message.metadata.message_type)
        return client(message, context)

    return noted


def tampering(kind: str, name: str, change: Callable[[Message], RecordDict]) -> Client:
    """Clients of which one answers one kind of message with something else."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == kind and order_client(message) == name:
            return Message(change(reply), reply_to=message)
        return reply

    return client


# The result


@pytest.mark.parametrize(("strategy", "weighting"), [*((name, "examples") for name in LINEAR), ("ffa_lora", "equal")])
def test_the_result_is_the_plain_one(tmp_path: Path, strategy: str, weighting: str) -> None:
    ranks = {"ada": 2, "ben": 4, "cyd": 2, "dot": 8} if AGGREGATION.plugin(strategy).capabilities.mixed_ranks else EQUAL
    options = (*ONE_ROUND, f"strategy.name={strategy}", f"federation.weighting={weighting}")
    plain = drive(tiny(tmp_path, *options, ranks=ranks), tmp_path / "plain")
    secure = drive(tiny(tmp_path, *options, SECURE[0], ranks=ranks), tmp_path / "secure")
    # One rounding to fp32 here, one per client and one more in the plain sum; the fixed point's is far below.
    torch.testing.assert_close(merged(secure), merged(plain), rtol=1e-6, atol=1e-8)
    assert secure.rounds[1].exact == plain.rounds[1].exact
    assert secure.rounds[1].error is None


@pytest.mark.parametrize("strategy", ["fedsa_lora", "rolora", "slora"])
def test_later_rounds_go_on_from_the_sum(tmp_path: Path, strategy: str) -> None:
    options = (f"strategy.name={strategy}", "federation.rounds=3")
    plain = drive(tiny(tmp_path, *options, ranks=EQUAL), tmp_path / "plain")
    secure = drive(tiny(tmp_path, *options, SECURE[0], ranks=EQUAL), tmp_path / "secure")
    assert [each.status for each in secure.rounds] == ["committed"] * 4
    assert secure.metrics["held_out_loss"] == pytest.approx(plain.metrics["held_out_loss"], rel=1e-5)
    assert "train_loss" not in secure.metrics


def test_a_server_optimizer_steps_from_the_sum(tmp_path: Path) -> None:
    options = (*ONE_ROUND, "strategy.name=ffa_lora", "server_optimizer.name=fedavgm")
    plain = drive(tiny(tmp_path, *options), tmp_path / "plain")
    secure = drive(tiny(tmp_path, *options, SECURE[0]), tmp_path / "secure")
    torch.testing.assert_close(merged(secure), merged(plain), rtol=1e-5, atol=1e-7)


def test_nothing_is_left_on_the_servers_disk(tmp_path: Path) -> None:
    run = drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path)
    assert not list((tmp_path / "runs" / run.run.id / "rounds").glob("*/secure"))
    assert not list((tmp_path / "runs" / run.run.id / "rounds").glob("*/replies/*"))


# Dropouts


@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "train"])
@pytest.mark.parametrize("name", ["ada", "dot"])
def test_who_drops_out_before_the_upload_is_not_in_the_sum(tmp_path: Path, kind: str, name: str) -> None:
    plain = drive(tiny(tmp_path, *ONE_ROUND, SECURE[1]), tmp_path / "plain", gone("train", name))
    secure = drive(tiny(tmp_path, *ONE_ROUND, *SECURE), tmp_path / "secure", gone(kind, name))
    torch.testing.assert_close(merged(secure), merged(plain), rtol=1e-6, atol=1e-8)
    found = rows(secure)
    assert {client for client, row in found.items() if row.status == "accepted"} == set(EQUAL) - {name}
    assert (found[name].status, found[name].reason) == ("failed", "ConnectionError: gone")


def test_who_drops_out_after_the_upload_is_in_the_sum(tmp_path: Path) -> None:
    plain = drive(tiny(tmp_path, *ONE_ROUND, SECURE[1]), tmp_path / "plain")
    secure = drive(tiny(tmp_path, *ONE_ROUND, *SECURE), tmp_path / "secure", gone("query.unmask", "ben"))
    torch.testing.assert_close(merged(secure), merged(plain), rtol=1e-6, atol=1e-8)
    assert {row.status for row in rows(secure).values()} == {"accepted"}


def test_clients_may_drop_out_in_every_step_at_once(tmp_path: Path) -> None:
    ranks = {f"client-{number}": 2 for number in range(8)}
    leavers = dict(zip(("query.keys", "query.shares", "train", "query.unmask"), ranks, strict=False))

    def client(message: Message, context: Context) -> Message:
        if leavers.get(message.metadata.message_type) == order_client(message):
            raise ConnectionError("gone")
        return client_app(message, context)

    options = (*ONE_ROUND, *SECURE, "secure_aggregation.threshold=0.51")
    run = drive(tiny(tmp_path, *options, ranks=ranks), tmp_path / "secure", client)
    plain = drive(
        tiny(tmp_path, *ONE_ROUND, SECURE[1], ranks=ranks), tmp_path / "plain", gone("train", *list(ranks)[:3])
    )
    torch.testing.assert_close(merged(run), merged(plain), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "train"])
def test_with_too_few_survivors_the_round_fails_and_nothing_is_revealed(tmp_path: Path, kind: str) -> None:
    kinds: list[str] = []
    with pytest.raises(RunError, match="no round brought a valid reply"):
        drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path, noting(kinds, gone(kind, "ada", "cyd")))
    with RunStore.open(tmp_path, read_only=True) as store:
        run = store.get_run("last")
        failed = store.round(run.id, 1)
        found = {row.client: row for row in store.client_rounds(run.id, 1)}
    assert failed is not None
    assert failed.status == "failed"
    assert "2 clients" in str(failed.reason)
    assert "3 are needed for a secure sum; nothing was revealed" in str(failed.reason)
    assert "query.unmask" not in kinds
    assert {found[name].status for name in ("ada", "cyd")} == {"failed"}
    assert {found[name].reason for name in ("ada", "cyd")} == {"ConnectionError: gone"}
    assert found["ben"].reason == failed.reason
    assert not list((tmp_path / "runs" / run.id / "rounds").glob("*/secure"))


def test_a_quorum_that_is_missed_reveals_nothing_either(tmp_path: Path) -> None:
    kinds: list[str] = []
    with pytest.raises(RunError, match="no round brought a valid reply"):
        drive(
            tiny(tmp_path, *SECURE, *ONE_ROUND, "federation.min_completion=1"),
            tmp_path,
            noting(kinds, gone("train", "ada")),
        )
    assert "train" in kinds
    assert "query.unmask" not in kinds


def test_the_round_after_a_failed_one_sums_again(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            if order.round == 1 and order.client in ("ada", "ben"):
                raise ConnectionError("gone")
        return client_app(message, context)

    run = drive(tiny(tmp_path, *SECURE, "federation.rounds=2"), tmp_path, client)
    assert [each.status for each in run.rounds] == ["committed", "failed", "committed"]


# What the server sees


class Recorder:
    """Clients whose every word to the server is noted, and what they would have said without masks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.received: list[bytes] = []
        self.uploads: dict[str, np.ndarray[Any, np.dtype[np.uint64]]] = {}
        self.answers: list[TrainAnswer] = []
        self.plain: dict[str, tuple[float, Tensor]] = {}
        self.secrets: set[str] = set()
        hide = client.secure.masking.Mask.hide

        def noting(mask: Any, answer: TrainAnswer, start: Adapter, trained: Adapter, dispatch: Dispatch) -> Any:
            self.plain[answer.client] = answer.num_examples, take(trained, dispatch.sends, dispatch).clone()
            self.secrets |= {mask.vault.cipher, mask.vault.mask, mask.vault.seed}
            return hide(mask, answer, start, trained, dispatch)

        monkeypatch.setattr(client.secure.masking.Mask, "hide", noting)

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        for record in reply.content.config_records.values():
            self.received += [str(value).encode() for value in record.values()]
        for arrays in reply.content.array_records.values():
            self.received += [array.data for array in arrays.values()]
        if message.metadata.message_type == MessageType.TRAIN:
            answer, parcels = read_message(reply.content, TrainAnswer)
            self.answers.append(answer)
            self.uploads[answer.client] = np.frombuffer(parcels["update"].data, np.uint64)
        return reply


def looks_uniform(data: bytes) -> bool:
    counts, expected = np.bincount(np.frombuffer(data, np.uint8), minlength=256), len(data) / 256
    return abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 7 * math.sqrt(2 * 255)


def test_the_server_receives_no_update_no_count_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = drive(tiny(tmp_path, *SECURE, *ONE_ROUND, ranks=EQUAL), tmp_path, recorder)
    everything = b"\n".join(recorder.received)
    assert len(recorder.plain) == 4
    for name, (count, numbers) in recorder.plain.items():
        for weighted in (numbers, numbers * count, numbers * count / sum(each for each, _ in recorder.plain.values())):
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                moved = weighted[weighted != 0].to(dtype)
                assert tensor_bytes(moved[:4]) not in everything
        words = encode(numbers.numpy(), count, 4)
        assert words[:4].tobytes() not in everything
        assert words[-1:].tobytes() not in recorder.uploads[name].tobytes()
        assert not np.intersect1d(words[words != 0], recorder.uploads[name]).size
        assert looks_uniform(recorder.uploads[name].tobytes())
        assert len({*recorder.uploads[name].tolist()}) == len(words)
        assert f'"num_examples":{count}'.encode() not in everything
    assert {answer.num_examples for answer in recorder.answers} == {1.0}
    assert {len(answer.metrics) for answer in recorder.answers} == {0}
    assert len(recorder.secrets) == 12
    for secret in recorder.secrets:
        assert secret.encode() not in everything
        assert bytes.fromhex(secret) not in everything
    assert {row.num_examples for row in rows(run).values()} == {0}


def test_no_partial_sum_of_uploads_is_a_plain_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even added up, all uploads stay masked until the clients lift their own masks."""
    recorder = Recorder(monkeypatch)
    drive(tiny(tmp_path, *SECURE, *ONE_ROUND, ranks=EQUAL), tmp_path, recorder)
    names = sorted(recorder.uploads)
    for chosen in (names, names[:3], names[1:], names[:2]):
        total = sum((recorder.uploads[name] for name in chosen), np.zeros_like(recorder.uploads["ada"]))
        assert looks_uniform(total.tobytes())


def test_two_rounds_have_no_mask_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, seen = Recorder(monkeypatch), []

    def client(message: Message, context: Context) -> Message:
        reply = recorder(message, context)
        if message.metadata.message_type == MessageType.TRAIN and order_client(message) == "ada":
            seen.append(recorder.uploads["ada"].copy())
        return reply

    drive(tiny(tmp_path, *SECURE, "federation.rounds=2", "evaluation.on=[]", ranks=EQUAL), tmp_path, client)
    assert len(seen) == 2
    assert looks_uniform((seen[0] - seen[1]).tobytes())


# Bad answers


def of_another_session(reply: Message) -> RecordDict:
    answer, parcels = read_message(reply.content, TrainAnswer)
    return write_message(answer.model_copy(update={"session": "0" * 64}), parcels)


def unmasked(reply: Message) -> RecordDict:
    answer, parcels = read_message(reply.content, TrainAnswer)
    return write_message(answer.model_copy(update={"session": ""}), parcels)


def shorter(reply: Message) -> RecordDict:
    answer, parcels = read_message(reply.content, TrainAnswer)
    return write_message(answer, {"update": parcels["update"], "more": parcels["update"]})


def for_few(reply: Message) -> RecordDict:
    answer, _ = read_message(reply.content, SharesAnswer)
    return write_message(answer.model_copy(update={"shares": dict(list(answer.shares.items())[1:])}))


def malformed(reply: Message) -> RecordDict:
    answer, _ = read_message(reply.content, SharesAnswer)
    return write_message(answer.model_copy(update={"shares": dict.fromkeys(answer.shares, "00")}))


def signed_by_ada(reply: Message) -> RecordDict:
    answer, _ = read_message(reply.content, SharesAnswer)
    return write_message(answer.model_copy(update={"client": "ada"}))


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("train", of_another_session, "of another client, round or secure session"),
        ("train", unmasked, "of another client, round or secure session"),
        ("train", shorter, "expected one masked upload named update, got: more, update"),
        ("query.shares", for_few, "it sent shares for cyd, dot, expected ada, cyd, dot"),
        ("query.shares", malformed, "not of the right form"),
        ("query.shares", signed_by_ada, "signed 'ada', expected 'ben'"),
        ("query.shares", lambda reply: RecordDict(), "lacks its header"),
    ],
)
def test_bad_answers_are_left_out(
    tmp_path: Path, kind: str, change: Callable[[Message], RecordDict], reason: str
) -> None:
    run = drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path / "bad", tampering(kind, "ben", change))
    plain = drive(tiny(tmp_path, *ONE_ROUND, SECURE[1]), tmp_path / "plain", gone("train", "ben"))
    row = rows(run)["ben"]
    assert row.status == "rejected"
    assert reason in str(row.reason)
    torch.testing.assert_close(merged(run), merged(plain), rtol=1e-6, atol=1e-8)


def test_a_replayed_upload_is_left_out(tmp_path: Path) -> None:
    first: list[RecordDict] = []

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN and order_client(message) == "ben":
            first.append(reply.content)
            return Message(first[0], reply_to=message)
        return reply

    run = drive(tiny(tmp_path, *SECURE, "evaluation.on=[]"), tmp_path, client)
    assert len(first) == 2
    assert rows(run, 1)["ben"].status == "accepted"
    assert rows(run, 2)["ben"].status == "rejected"
    assert "of another client, round or secure session" in str(rows(run, 2)["ben"].reason)


def wrong_shares(reply: Message) -> RecordDict:
    answer, _ = read_message(reply.content, UnmaskAnswer)
    return write_message(answer.model_copy(update={"seeds": dict.fromkeys(answer.seeds, f"{PRIME - 1:x}")}))


def test_wrong_shares_fail_the_round_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no round brought"):
        drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path, tampering("query.unmask", "ada", wrong_shares))
    with RunStore.open(tmp_path, read_only=True) as store:
        failed = store.round(store.get_run("last").id, 1)
    assert failed is not None
    assert "the masks of ada cannot be lifted" in str(failed.reason)


def test_shares_of_somebody_else_are_left_out(tmp_path: Path) -> None:
    def change(reply: Message) -> RecordDict:
        answer, _ = read_message(reply.content, UnmaskAnswer)
        return write_message(answer.model_copy(update={"mask_keys": answer.seeds}))

    notices: list[str] = []
    with listening(lambda step: notices.append(step.text) if step.kind == "notice" else None):
        run = drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path, tampering("query.unmask", "ben", change))
    assert run.rounds[1].status == "committed"
    assert notices == [
        "ben did not help to lift the masks: it sent shares of other clients' secrets than those asked for"
    ]


# Kills


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    train = client.work.train

    def noting(place: Any, rows: Any, position: Any, *more: Any, **named: Any) -> Any:
        noted.append(position.client)
        return train(place, rows, position, *more, **named)

    monkeypatch.setattr(client.work, "train", noting)
    return noted


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, method: str, step: str, count: int) -> Iterator[None]:
    """Interrupt the server right after the n-th time something of a step was written to disk."""
    original = getattr(Desk, method)
    seen: list[str] = []

    def writing(desk: Desk, first: str, *rest: Any) -> None:
        original(desk, first, *rest)
        seen.append("uploads" if method == "keep_upload" else first)
        if seen.count(step) == count:
            seen.append(step)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Desk, method, writing)
        yield


KILLS = [
    *(("keep", step, count) for step in ("keys", "shares", "unmask") for count in (1, 3)),
    ("keep_upload", "uploads", 1),
    ("keep_upload", "uploads", 3),
    *(("close", step, 1) for step in STEPS),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run in which cyd drops out before its upload."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return drive(tiny(folder, *SECURE, *ONE_ROUND), folder, gone("train", "cyd"))


@pytest.mark.parametrize(("method", "step", "count"), KILLS)
def test_a_killed_run_goes_on_with_the_same_session(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: FinishedRun,
    trainings: list[str],
    method: str,
    step: str,
    count: int,
) -> None:
    experiment, leaving = tiny(tmp_path, *SECURE, *ONE_ROUND), gone("train", "cyd")
    with killed_after(monkeypatch, method, step, count), pytest.raises(KeyboardInterrupt):
        drive(experiment, tmp_path, leaving)
    (folder,) = (tmp_path / "runs").iterdir()
    uploaded = [path.stem for path in (folder / "rounds" / "0001" / "secure" / "uploads").glob("*")]
    run = drive(experiment, tmp_path, leaving, run=folder.name)
    assert run.run.status == "completed"
    assert run.run.adapter_sha256 == undisturbed.run.adapter_sha256
    assert [trainings.count(name) for name in uploaded] == [1] * len(uploaded)
    assert {client: row.status for client, row in rows(run).items()} == {
        client: row.status for client, row in rows(undisturbed).items()
    }
    assert {client: row.reason for client, row in rows(run).items()} == {
        client: row.reason for client, row in rows(undisturbed).items()
    }
    assert run.rounds[1].bytes_up == pytest.approx(undisturbed.rounds[1].bytes_up, abs=300)


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *kill: Any) -> str:
    with killed_after(monkeypatch, *kill), pytest.raises(KeyboardInterrupt):
        drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path)
    return next((tmp_path / "runs").iterdir()).name


@pytest.mark.parametrize("lost", ["shares/ada.json", "uploads/ben.safetensors", "keys.json"])
def test_a_session_whose_files_are_damaged_fails_its_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    name = interrupted(tmp_path, monkeypatch, "close", "uploads", 1)
    path = tmp_path / "runs" / name / "rounds" / "0001" / "secure" / lost
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match="no round brought"):
        drive(tiny(tmp_path, *SECURE, *ONE_ROUND), tmp_path, run=name)
    with RunStore.open(tmp_path, read_only=True) as store:
        failed = store.round(name, 1)
    assert failed is not None
    assert "lost on the server's disk" in str(failed.reason)


def test_a_round_that_failed_is_repeated_in_a_new_session(tmp_path: Path) -> None:
    options = (*SECURE, *ONE_ROUND, "federation.on_failure=stop")
    with pytest.raises(RunError, match="round 1 failed"):
        drive(tiny(tmp_path, *options), tmp_path, gone("train", "ada", "ben"))
    name = next((tmp_path / "runs").iterdir()).name
    run = drive(tiny(tmp_path, *options), tmp_path, run=name)
    assert (run.run.status, run.rounds[1].status) == ("completed", "committed")
    assert {row.status for row in rows(run).values()} == {"accepted"}


def test_masks_once_lifted_are_not_lifted_for_another_sum(tmp_path: Path) -> None:
    """The server that lost a sum it could have had gets no second one of the same updates."""
    options = (*SECURE, *ONE_ROUND, "federation.on_failure=stop")
    with pytest.raises(RunError, match="round 1 failed"):
        drive(tiny(tmp_path, *options), tmp_path, tampering("query.unmask", "ada", wrong_shares))
    name = next((tmp_path / "runs").iterdir()).name
    with pytest.raises(RunError, match="round 1 failed: 0 clients sent keys"):
        drive(tiny(tmp_path, *options), tmp_path, run=name)
    with RunStore.open(tmp_path, read_only=True) as store:
        reasons = {row.reason for row in store.client_rounds(name, 1)}
    assert reasons == {"the masks of round 1 were already lifted once; its updates cannot be summed again"}
