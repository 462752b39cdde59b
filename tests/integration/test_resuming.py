"""Runs that were interrupted, damaged, extended or taken back: what goes on, with which bits, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType

import client.work
from client.app import app as client_app
from common.errors import ConfigurationError, CorruptArtefact, RunError, StoreError, UnknownNameError, UserError
from common.messages import TrainOrder
from common.store import RunLock, RunStore
from common.wire import read_message
from server.progress import Progress, listening
from simulations import resume, simulate
from simulations.run import FinishedRun
from tests.tiny import drive, tiny

Listener = Callable[[Progress], None]


def stop_at(kind: str, number: int, times: int = 1, error: type[BaseException] = KeyboardInterrupt) -> Listener:
    """Interrupt the process when a step of a round is heard for the n-th time, as Ctrl-C would."""
    heard = []

    def listen(step: Progress) -> None:
        if (step.kind, step.round) == (kind, number):
            heard.append(step)
            if len(heard) == times:
                raise error

    return listen


def interrupted(tmp_path: Path, listener: Listener, *options: str) -> str:
    """Begin a run that is interrupted; return its id."""
    with pytest.raises(KeyboardInterrupt), listening(listener):
        simulate(tiny(tmp_path, *options), tmp_path)
    return last(tmp_path)


def last(home: Path) -> str:
    with RunStore.open(home, read_only=True) as store:
        return store.get_run("last").id


def state_file(home: Path, number: int) -> Path:
    return home / "runs" / last(home) / "rounds" / f"{number:04d}" / "state.safetensors"


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rounds_done(run: FinishedRun) -> tuple[str, int]:
    return run.run.status, run.run.rounds_done


def evaluation_bytes(run: FinishedRun) -> int:
    """Return what round 2 sent beside the orders to train, which the clients' rows count."""
    with RunStore.open(run.home, read_only=True) as store:
        return run.rounds[2].bytes_down - sum(row.bytes_down for row in store.client_rounds(run.run.id, 2))


@pytest.fixture
def undisturbed(tmp_path: Path) -> FinishedRun:
    return simulate(tiny(tmp_path), tmp_path / "undisturbed")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Note who trained in which round."""
    noted: list[tuple[int, str]] = []
    train = client.work.train

    def noting(place: object, rows: object, position: object, *more: object) -> object:
        noted.append((position.round, position.client))  # type: ignore[attr-defined]
        return train(place, rows, position, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(client.work, "train", noting)
    return noted


def test_an_interrupted_run_goes_on_and_keeps_what_it_had(
    tmp_path: Path, undisturbed: FinishedRun, trainings: list[tuple[int, str]]
) -> None:
    name = interrupted(tmp_path, stop_at("reply", 2, times=2))
    with RunStore.open(tmp_path, read_only=True) as store:
        run = store.get_run(name)
        received = {row.client for row in store.client_rounds(name, 2) if row.status == "received"}
        assert (run.status, run.rounds_done) == ("interrupted", 1)
        assert run.reason == f"interrupted; go on with: lorafleet resume {name}"
        assert len(received) == 2
    trainings.clear()
    resumed = resume("last", tmp_path)
    assert rounds_done(resumed) == ("completed", 2)
    assert resumed.run.adapter_sha256 == undisturbed.run.adapter_sha256
    assert {number for number, _ in trainings} <= {2}
    assert not received & {name for _, name in trainings}
    # What was measured is the same, bytes on the wire included; only the digits of seconds differ.
    for metrics in ("held_out_loss", "train_loss"):
        assert resumed.metrics[metrics] == undisturbed.metrics[metrics]
    assert resumed.rounds[2].bytes_up == pytest.approx(undisturbed.rounds[2].bytes_up, abs=200)
    assert evaluation_bytes(resumed) == evaluation_bytes(undisturbed)
    with RunStore.open(tmp_path, read_only=True) as store:
        kinds = [event.kind for event in store.events(name)]
    assert kinds.count("round_started") == 4
    assert "run_interrupted" in kinds


def test_orders_say_which_attempt_they_are(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("dispatched", 1))
    with pytest.raises(KeyboardInterrupt), listening(stop_at("aggregated", 1)):
        resume(name, tmp_path)
    seen: set[tuple[int, int]] = set()

    def noting(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            seen.add((order.round, order.attempt))
        return client_app(message, context)

    for path in (tmp_path / "runs" / name / "rounds").glob("*/replies/*"):
        path.unlink()
    drive(tiny(tmp_path), tmp_path, noting, run=name)
    assert seen == {(1, 3), (2, 1)}


def test_a_kept_reply_that_is_damaged_is_asked_for_again(
    tmp_path: Path, undisturbed: FinishedRun, trainings: list[tuple[int, str]]
) -> None:
    name = interrupted(tmp_path, stop_at("aggregated", 1))
    trainings.clear()
    replies = tmp_path / "runs" / name / "rounds" / "0001" / "replies"
    spoil(replies / "ada.safetensors")
    (replies / "ben.safetensors").unlink()
    resumed = resume(name, tmp_path)
    assert resumed.run.adapter_sha256 == undisturbed.run.adapter_sha256
    assert {name for number, name in trainings if number == 1} == set()  # they had stored their answers


def test_a_stored_answer_that_is_damaged_is_trained_again(
    tmp_path: Path, undisturbed: FinishedRun, trainings: list[tuple[int, str]]
) -> None:
    name = interrupted(tmp_path, stop_at("aggregated", 1))
    trainings.clear()
    folder = tmp_path / "runs" / name
    for client_name in ("ada", "ben", "cyd"):
        (folder / "rounds" / "0001" / "replies" / f"{client_name}.safetensors").unlink()
    spoil(folder / "clients" / "ada" / "answer.safetensors")
    (folder / "clients" / "ben" / "answer.safetensors").unlink()
    resumed = resume(name, tmp_path)
    assert resumed.run.adapter_sha256 == undisturbed.run.adapter_sha256
    assert {name for number, name in trainings if number == 1} == {"ada", "ben"}


def test_a_kept_reply_that_no_longer_fits_is_not_used(tmp_path: Path, undisturbed: FinishedRun) -> None:
    """A reply of another round under this round's name passes its hash, and is refused by the screening."""
    name = interrupted(tmp_path, stop_at("aggregated", 2), "federation.keep_replies=true")
    with RunStore.open(tmp_path) as store:
        old = next(row for row in store.client_rounds(name, 1) if row.client == "ada")
        new = next(row for row in store.client_rounds(name, 2) if row.client == "ada")
        assert old.artefact_path is not None
        assert new.artefact_path is not None
        store.artefact_file(name, new.artefact_path).write_bytes(
            store.artefact_file(name, old.artefact_path).read_bytes()
        )
        store.record_client(replace(new, artefact_sha256=old.artefact_sha256))
    steps: list[Progress] = []
    with listening(steps.append):
        resumed = resume(name, tmp_path)
    notices = [step.text for step in steps if step.kind == "notice"]
    assert notices == ["ada's kept reply is not used: the answer is for round 1, this is round 2"]
    assert resumed.run.adapter_sha256 == undisturbed.run.adapter_sha256


def test_a_client_that_has_left_is_offline_in_the_round_that_goes_on(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("dispatched", 1))

    def gone(message: Message, context: Context) -> Message:
        if int(context.node_config["partition-id"]) == 0:
            raise ConnectionError("gone")
        return client_app(message, context)

    for path in (tmp_path / "runs" / name / "rounds").glob("*/replies/*"):
        path.unlink()
    run = drive(tiny(tmp_path), tmp_path, gone, run=name)
    with RunStore.open(tmp_path, read_only=True) as store:
        rows = {(row.round, row.client): row for row in store.client_rounds(name)}
    assert run.rounds[1].cohort == ("ada", "ben", "cyd", "dot")
    assert run.rounds[2].cohort == ("ben", "cyd", "dot")
    assert (rows[1, "ada"].status, rows[1, "ada"].reason) == ("offline", "offline since the round began")
    assert rows[1, "ada"].bytes_down == 0
    assert (rows[2, "ada"].status, rows[2, "ada"].reason) == ("offline", "its node is not connected")


def test_an_error_of_ours_fails_the_run_with_its_name(tmp_path: Path, undisturbed: FinishedRun) -> None:
    with (
        pytest.raises(RunError, match="ZeroDivisionError"),
        listening(stop_at("aggregated", 1, error=ZeroDivisionError)),
    ):
        simulate(tiny(tmp_path), tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        run = store.get_run("last")
        assert run.status == "failed"
        assert run.reason is not None
        assert run.reason.startswith("ZeroDivisionError")
    assert resume("last", tmp_path).run.adapter_sha256 == undisturbed.run.adapter_sha256


def test_an_extended_run_equals_a_longer_one(tmp_path: Path, undisturbed: FinishedRun) -> None:
    first = simulate(tiny(tmp_path, "federation.rounds=1"), tmp_path)
    second = resume(first.run.id, tmp_path, rounds=2)
    assert rounds_done(second) == ("completed", 2)
    assert second.run.rounds_planned == 2
    assert second.run.adapter_sha256 == undisturbed.run.adapter_sha256
    assert second.metrics["held_out_loss"] == undisturbed.metrics["held_out_loss"]
    assert first.adapter is not None
    assert first.adapter.exists()


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, "federation.rounds=1"), tmp_path)
    for rounds in (None, 1, 0):
        with pytest.raises(UserError, match="has done its 1 rounds; extend it with --rounds N"):
            resume(run.run.id, tmp_path, rounds=rounds)


def test_an_interrupted_run_cannot_have_fewer_rounds_than_it_did(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("committed", 2), "federation.rounds=3")
    with pytest.raises(UserError, match="has done 2 rounds already; --rounds must be more"):
        resume(name, tmp_path, rounds=1)


def test_a_run_that_patience_ended_stays_ended(tmp_path: Path) -> None:
    options = ("federation.rounds=5", "federation.patience=1", "training.learning_rate=1e-30")
    name = interrupted(tmp_path, stop_at("notice", 1), *options)
    run = resume(name, tmp_path)
    assert rounds_done(run) == ("completed", 1)
    with pytest.raises(UserError, match="has done its 1 rounds"):
        resume(name, tmp_path)
    with pytest.raises(UserError, match=r"was ended by federation\.patience"):
        resume(name, tmp_path, rounds=9)


def test_patience_counts_on_after_an_interruption(tmp_path: Path) -> None:
    options = ("federation.rounds=9", "federation.patience=3", "training.learning_rate=1e-30")
    name = interrupted(tmp_path, stop_at("committed", 2), *options)
    assert rounds_done(resume(name, tmp_path)) == ("completed", 3)


def test_a_run_can_be_ended_early(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2), "federation.rounds=4")
    run = resume(name, tmp_path, rounds=1)
    assert rounds_done(run) == ("completed", 1)
    assert run.run.adapter_sha256 is not None


def test_another_experiment_is_refused_with_the_difference(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2))
    with pytest.raises(ConfigurationError) as caught:
        resume(name, tmp_path, experiment=tiny(tmp_path, "training.steps=3", "clients.ada.rank=3", "seed=4"))
    assert caught.value.problems[1:] == ["clients.ada.rank: 2 -> 3", "seed: 0 -> 4", "training.steps: 1 -> 3"]
    assert rounds_done(resume(name, tmp_path, experiment=tiny(tmp_path))) == ("completed", 2)


def test_another_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2))
    monkeypatch.setattr("simulations.run.run_fingerprint", lambda: "feed")
    with pytest.raises(UserError, match=r"begun by other code .* this is feed"):
        resume(name, tmp_path)


def test_a_run_somebody_else_writes_is_refused_and_left_alone(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2))
    with RunLock(tmp_path / "runs" / name):
        for begin in (lambda: resume(name, tmp_path), lambda: drive(tiny(tmp_path), tmp_path, run=name)):
            with pytest.raises(StoreError, match=rf"run {name} is being written by process \d+ on "):
                begin()
    with RunStore.open(tmp_path, read_only=True) as store:
        assert store.get_run(name).status == "interrupted"
    assert rounds_done(resume(name, tmp_path)) == ("completed", 2)


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    simulate(tiny(tmp_path, "federation.rounds=1"), tmp_path)
    with pytest.raises(UnknownNameError, match="no run named 'other'"):
        resume("other", tmp_path)


def test_a_damaged_state_is_found_and_an_earlier_round_offered(tmp_path: Path, undisturbed: FinishedRun) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2))
    spoil(state_file(tmp_path, 1))
    with pytest.raises(CorruptArtefact, match=rf"sha256 .*lorafleet resume {name} --from-round 0") as caught:
        resume(name, tmp_path)
    assert caught.value.exit_code == 2
    run = resume(name, tmp_path, from_round=0)
    assert rounds_done(run) == ("completed", 2)
    assert run.run.adapter_sha256 == undisturbed.run.adapter_sha256


def test_a_damaged_first_state_leaves_nothing_to_offer(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 1))
    state_file(tmp_path, 0).unlink()
    with pytest.raises(CorruptArtefact, match="is unreadable") as caught:
        resume(name, tmp_path)
    assert "--from-round" not in str(caught.value)


def test_a_state_that_is_no_state_is_found(tmp_path: Path) -> None:
    name = interrupted(tmp_path, stop_at("round_started", 2))
    content = b"no safetensors"
    state_file(tmp_path, 1).write_bytes(content)
    with RunStore.open(tmp_path) as store:
        store.rewind(name, 0)
        row = store.begin_round(name, 1, ["ada"])
        digest = hashlib.sha256(content).hexdigest()
        path = state_file(tmp_path, 1).relative_to(tmp_path).as_posix()
        store.commit_round(replace(row, status="committed", state_path=path, state_sha256=digest), rounds_done=1)
    with pytest.raises(CorruptArtefact, match=r"cannot be read.*--from-round 0"):
        resume(name, tmp_path)


def test_a_run_can_be_taken_back(tmp_path: Path, undisturbed: FinishedRun) -> None:
    run = simulate(tiny(tmp_path, "federation.rounds=3"), tmp_path)
    back = resume(run.run.id, tmp_path, from_round=1, rounds=2)
    assert rounds_done(back) == ("completed", 2)
    assert [row.round for row in back.rounds] == [0, 1, 2]
    assert back.run.adapter_sha256 == undisturbed.run.adapter_sha256
    again = resume(run.run.id, tmp_path, rounds=3)
    assert again.run.adapter_sha256 == run.run.adapter_sha256


def test_the_state_after_a_failed_round_is_the_one_before(tmp_path: Path) -> None:
    """A failed round has no state file of its own: one written twice could not be told from a damaged one."""

    def silent(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            order, _ = read_message(message.content, TrainOrder)
            if order.round == 2:
                raise ValueError("no power")
        return client_app(message, context)

    with pytest.raises(RunError, match="round 2 failed"):
        drive(tiny(tmp_path, 'federation.on_failure="stop"'), tmp_path, silent)
    assert not state_file(tmp_path, 2).exists()
    spoil(state_file(tmp_path, 1))
    with pytest.raises(CorruptArtefact, match="--from-round 0"):
        resume("last", tmp_path)
    assert rounds_done(resume("last", tmp_path, from_round=0)) == ("completed", 2)
