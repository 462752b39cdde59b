"""What a run leaves for who watches it: when everybody did what, how updates compare, who takes part, that it lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType

from client.app import app as client_app
from common.experiment import Experiment
from common.messages import TrainAnswer
from common.store import Run, RunStore, last_sign
from common.wire import read_message, write_message
from server.progress import Progress, listening
from simulations.run import FinishedRun
from simulations.terminal.summary import run_summary
from tests.tiny import RANKS, Client, drive, name_of, tiny

WORK = ["download", "train", "evaluate"]
JUDGING = ["evaluate"]
EQUAL = dict.fromkeys(RANKS, 4)


def statistics(run: FinishedRun, number: int) -> dict[str, Any]:
    with RunStore.open(run.home, read_only=True) as store:
        return {each.kind: each.data for each in store.statistics(run.run.id, round=number)}


def phases(timeline: dict[str, Any], client: str) -> list[str]:
    """Name a client's phases, but for those that may be too short to be told."""
    return [phase for phase, *_ in timeline["clients"][client] if phase not in ("wait", "upload")]


def check_frames(timeline: dict[str, Any], seconds: float) -> None:
    """Check that no span goes back in time or beyond the round."""
    for spans in [*timeline["clients"].values(), timeline["server"]]:
        edges = [0.0, *(edge for _, start, end in spans for edge in (start, end)), seconds + 0.01]
        assert edges == sorted(edges)


def without_power(experiment: Experiment, client_name: str) -> Client:
    """Build clients of which one cannot train."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and name_of(experiment, context) == client_name:
            raise ValueError("no power")
        return client_app(message, context)

    return client


def test_a_run_leaves_what_is_watched(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "federation.rounds=1", "clients.dot.trains=false")
    run = drive(experiment, tmp_path, without_power(experiment, "ben"))
    before, after = statistics(run, 0), statistics(run, 1)
    assert set(before) == {"timeline"}
    assert set(after) == {"timeline", "similarity", "layers"}
    first, second = before["timeline"], after["timeline"]
    assert {name: phases(first, name) for name in RANKS} == dict.fromkeys(RANKS, JUDGING)
    assert {name: phases(second, name) for name in RANKS} == {
        "ada": WORK,
        "ben": ["lost", "evaluate"],
        "cyd": WORK,
        "dot": JUDGING,
    }
    assert [phase for phase, *_ in second["server"]] == ["train", "aggregate", "evaluate"]
    for number, timeline in enumerate((first, second)):
        check_frames(timeline, run.rounds[number].seconds)

    cosine = after["similarity"]["cosine"]
    assert after["similarity"]["clients"] == ["ada", "cyd"]
    assert cosine[0][0] == cosine[1][1] == 1
    assert cosine[0][1] == cosine[1][0]
    layers = after["layers"]
    assert layers["clients"] == ["ada", "cyd"]
    assert layers["rank"] == [[2] * len(layers["layers"])] * 2
    assert all(1 <= rank <= 2 for row in layers["effective_rank"] for rank in row)

    with RunStore.open(tmp_path, read_only=True) as store:
        members = {member.client: member for member in store.members(run.run.id)}
        assert {name: (member.rank, member.rank_reason) for name, member in members.items()} == {
            "ada": (2, "set in the experiment"),
            "ben": (4, "set in the experiment"),
            "cyd": (2, "set in the experiment"),
            "dot": (None, "it only evaluates"),
        }
        assert all(member.device.startswith("CPU (") and member.memory_bytes > 0 for member in members.values())
        ended = store.get_run(run.run.id)
        assert ended.alive_at is not None
        assert run.run.created_at <= ended.alive_at <= last_sign(ended)
        told = run_summary(store, run.run.id)["members"]
        assert [member["rank_reason"] for member in told] == [members[name].rank_reason for name in sorted(RANKS)]


def skewed(by: float) -> Client:
    """Build clients whose clocks are wrong."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            answer, parcels = read_message(reply.content, TrainAnswer)
            wrong = answer.model_copy(update={"began": max(answer.began + by, 0), "seconds": 1e9, "ready": 5e8})
            return Message(write_message(wrong, parcels), reply_to=message)
        return reply

    return client


@pytest.mark.parametrize("by", [-3600, 5e9])
def test_a_lying_clock_stays_within_what_the_server_saw(tmp_path: Path, by: float) -> None:
    run = drive(tiny(tmp_path, "federation.rounds=1", "evaluation.on=[]"), tmp_path, skewed(by))
    timeline = statistics(run, 1)["timeline"]
    check_frames(timeline, run.rounds[1].seconds)
    for name in RANKS:
        (loading, start, middle), (training, _, end) = timeline["clients"][name]
        assert (loading, training) == ("download", "train")
        assert middle == pytest.approx((start + end) / 2, abs=2e-4)


def test_replies_that_were_kept_have_no_spans_and_members_stay_as_old_as_they_are(tmp_path: Path) -> None:
    heard: list[str] = []

    def stop(step: Progress) -> None:
        if step.kind == "reply":
            heard.append(step.client)
        if len(heard) == 2:
            raise KeyboardInterrupt

    experiment = tiny(tmp_path, "federation.rounds=1")
    with pytest.raises(KeyboardInterrupt), listening(stop):
        drive(experiment, tmp_path)
    name, joined = _last(tmp_path)
    run = drive(experiment, tmp_path, run=name)
    timeline = statistics(run, 1)["timeline"]
    asked = {client for client in RANKS if phases(timeline, client) == WORK}
    assert asked == set(RANKS) - set(heard)
    assert {client: phases(timeline, client) for client in heard} == dict.fromkeys(heard, JUDGING)
    assert _last(tmp_path) == (name, joined)
    similarity = statistics(run, 1)["similarity"]
    assert similarity["clients"] == sorted(RANKS)


def _last(home: Path) -> tuple[str, dict[str, Any]]:
    with RunStore.open(home, read_only=True) as store:
        run: Run = store.get_run("last")
        return run.id, {member.client: member.joined_at for member in store.members(run.id)}


def test_a_secure_sum_tells_when_and_nothing_of_what(tmp_path: Path) -> None:
    options = ("secure_aggregation.enabled=true", "strategy.name=ffa_lora", "federation.rounds=1")
    experiment = tiny(tmp_path, *options, ranks=EQUAL)
    run = drive(experiment, tmp_path, without_power(experiment, "cyd"))
    found = statistics(run, 1)
    assert set(found) == {"timeline"}
    told = {name: phases(found["timeline"], name) for name in RANKS}
    assert told == dict.fromkeys(RANKS, WORK) | {"cyd": ["lost", "evaluate"]}
    check_frames(found["timeline"], run.rounds[1].seconds)


def test_without_a_certificate_only_times_are_told(tmp_path: Path) -> None:
    run = drive(tiny(tmp_path, "federation.rounds=1", "evaluation.certificate=false"), tmp_path)
    assert set(statistics(run, 1)) == {"timeline"}
