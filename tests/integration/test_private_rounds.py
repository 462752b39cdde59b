"""Whole federations whose clients train with DP-SGD: what they tell, what they spend, and how a run ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from torch import Tensor

from client.app import app as client_app
from client.privacy.training import prepare
from common.errors import ConfigurationError, NotPrivate, RunError, UserError
from common.experiment import Experiment
from common.messages import EvaluateOrder, PrivacyReport, TrainAnswer, TrainOrder
from common.privacy.accounting import Mechanism, Spending
from common.store import ClientRound, RunStore
from common.tasks import Batch
from common.wire import read_message, write_message
from common.workspace import workspace
from server.plan import make_plan
from simulations import simulate
from simulations.run import FinishedRun, resume
from strategies import AGGREGATION
from tests.tiny import Client, drive, name_of, synthetic, tiny

PRIVATE = ("privacy.mode=sample", "privacy.sample_rate=0.2", "federation.rounds=3")
NAMES = ("client-1", "client-2", "client-3", "client-4")
TYPICAL = {"fedavg", "ffa_lora", "flora", "lora_lego", "fed_sb", "fedsa_lora"}
"""Means, frozen factors, stacks, clusters, a core, and factors that stay at home."""

SPARSE = {"slora"}
"""Strategies with a part that has no per-row rule."""


def private(*overrides: str, **more: Any) -> Experiment:
    return synthetic(*PRIVATE, *overrides, **more)


def spent(run: FinishedRun, name: str = "epsilon") -> dict[str, list[float]]:
    """Return a number of each client, round by round."""
    found: dict[str, list[float]] = {}
    for metric in run.measured:
        if metric.name == name and metric.client:
            found.setdefault(metric.client, []).append(metric.value)
    return found


def fates(run: FinishedRun) -> list[dict[str, str]]:
    with RunStore.open(run.home) as store:
        return [
            {row.client: row.status for row in store.client_rounds(run.run.id, number.round)}
            for number in run.rounds
            if number.round
        ]


def client_rows(run: FinishedRun, number: int) -> list[ClientRound]:
    with RunStore.open(run.home) as store:
        return store.client_rounds(run.run.id, number)


def events(run: FinishedRun) -> str:
    with RunStore.open(run.home) as store:
        return "\n".join(event.text for event in store.events(run.run.id))


def test_a_run_spends_its_budget_and_no_more(tmp_path: Path) -> None:
    experiment = private("privacy.epsilon=4")
    run = simulate(experiment, tmp_path)
    noises = spent(run, "noise_multiplier")
    for client in NAMES:
        assert len(set(noises[client])) == 1
        mechanism = Mechanism(noises[client][0], 0.2)
        expected = [Spending.of(mechanism, 2 * done).epsilon(1e-5) for done in (1, 2, 3)]
        assert spent(run)[client] == pytest.approx(expected, rel=1e-12)
        assert 3.99 < spent(run)[client][-1] <= 4
    assert [row.epsilon for row in run.rounds] == [None, *(max(spent(run)[n][i] for n in NAMES) for i in range(3))]
    assert run.metrics["noise_multiplier"] == [min(noises[name][0] for name in NAMES)] * 3
    assert spent(run, "rounds_left") == {name: [2.0, 1.0, 0.0] for name in NAMES}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TYPICAL else pytest.mark.long)
        for name in AGGREGATION.names()
        if name not in SPARSE
    ],
)
def test_every_strategy_trains_under_privacy(tmp_path: Path, name: str) -> None:
    mixed = AGGREGATION.plugin(name).capabilities.mixed_ranks
    ranks = (2, 4, 4, 8) if mixed else (4, 4, 4, 4)
    options = (f"strategy.name={name}", "federation.rounds=2", "privacy.noise_multiplier=1", "evaluation.on=[]")
    run = simulate(private(*options, ranks=ranks), tmp_path)
    assert fates(run) == [dict.fromkeys(NAMES, "accepted")] * 2
    assert all(len(values) == 2 for values in spent(run).values())


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_a_part_without_a_per_row_rule_is_refused_before_round_1(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        simulate(private(f"strategy.name={name}", ranks=(4, 4, 4, 4)), tmp_path)


def watching(seen: list[TrainAnswer]) -> Client:
    """Keep what clients answer to training orders."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type.startswith(MessageType.TRAIN) and not reply.has_error():
            seen.append(read_message(reply.content, TrainAnswer)[0])
        return reply

    return client


def test_an_answer_tells_declared_public_numbers_and_nothing_else(tmp_path: Path) -> None:
    answers: list[TrainAnswer] = []
    run = drive(private("federation.rounds=1"), tmp_path, watching(answers))
    assert len(answers) == 4
    for answer in answers:
        told = json.loads(answer.model_dump_json())
        report = told.pop("privacy")
        assert set(report) == set(PrivacyReport.model_fields)
        public = {"client", "round", "base_version", "holds", "frozen_hash", "session"}
        rest = {key: value for key, value in told.items() if key not in public}
        assert rest == {"num_examples": 1.0, "seconds": 0.0, "began": 0.0, "ready": 0.0, "metrics": {}}
        assert answer.model_dump(include={"privacy"})["privacy"]["steps"] == 2
    assert {row.num_examples for row in client_rows(run, 1)} == {0}
    assert "train_loss" not in run.metrics


def test_row_counts_may_be_declared_public(tmp_path: Path) -> None:
    answers: list[TrainAnswer] = []
    drive(private("federation.rounds=1", "privacy.row_counts=public"), tmp_path, watching(answers))
    assert sorted(answer.num_examples for answer in answers) == [136.0, 196.0, 283.0, 408.0]
    assert all(answer.metrics == {} for answer in answers)


def test_the_end_of_every_budget_ends_the_run(tmp_path: Path) -> None:
    """Noise of 2 at a rate of 0.2 spends ε = 1.6 within a few rounds of the thirty that are planned."""
    mechanism = Mechanism(2.0, 0.2)
    lasts = max(n for n in range(31) if Spending.of(mechanism, 2 * n).epsilon(1e-5) <= 1.6)
    assert 2 < lasts < 6
    options = ("privacy.noise_multiplier=2", "privacy.epsilon=1.6", "federation.rounds=30", "evaluation.on=[]")
    run = simulate(private(*options), tmp_path)
    assert [len(values) for values in spent(run).values()] == [lasts] * 4
    assert len(run.rounds) == lasts + 1
    assert all(row.status == "committed" for row in run.rounds)
    assert "stopped: the privacy budget of every client is spent" in events(run)
    assert run.run.status == "completed"
    assert max(row.epsilon or 0 for row in run.rounds) <= 1.6


def test_an_owner_may_be_stricter_than_the_experiment(tmp_path: Path) -> None:
    options = ("privacy.noise_multiplier=2", "clients.client-2.budget.epsilon=1.4")
    run = simulate(private(*options, "federation.rounds=4"), tmp_path)
    last = len(spent(run)["client-2"])
    assert 0 < last < 4
    assert spent(run)["client-2"][-1] <= 1.4
    assert [row.get("client-2") for row in fates(run)] == ["accepted"] * last + [None] * (4 - last)
    assert len(spent(run)["client-1"]) == 4


def test_an_experiment_may_end_with_the_first_spent_budget(tmp_path: Path) -> None:
    options = ("privacy.noise_multiplier=2", "clients.client-2.budget.epsilon=1.4", "privacy.on_exhausted=stop")
    run = simulate(private(*options, "federation.rounds=30"), tmp_path)
    assert "stopped: the privacy budget of client-2 is spent (privacy.on_exhausted)" in events(run)
    assert len(run.rounds) == len(spent(run)["client-2"]) + 1
    assert run.rounds[-1].status == "committed"


@pytest.mark.long
def test_a_calibrated_budget_includes_the_owners(tmp_path: Path) -> None:
    run = simulate(private("clients.client-2.budget.epsilon=1.5"), tmp_path)
    assert fates(run) == [dict.fromkeys(NAMES, "accepted")] * 3
    assert 1.49 < spent(run)["client-2"][-1] <= 1.5
    assert 7.99 < spent(run)["client-1"][-1] <= 8


def test_a_client_takes_part_as_often_as_it_may(tmp_path: Path) -> None:
    run = simulate(private("privacy.participations=2", "evaluation.on=[]"), tmp_path)
    assert [len(values) for values in spent(run).values()] == [2] * 4
    assert [row.status for row in run.rounds] == ["committed"] * 3


def test_only_a_test_seed_repeats_a_private_run(tmp_path: Path) -> None:
    def sha256(name: str, *options: str) -> str | None:
        fixed = ("federation.rounds=1", "privacy.noise_multiplier=1", "evaluation.on=[]")
        return simulate(private(*fixed, *options), tmp_path / name).run.adapter_sha256

    assert sha256("a", "privacy.test_seed=1") == sha256("b", "privacy.test_seed=1")
    assert sha256("d") != sha256("e")


def test_a_spent_run_is_neither_extended_nor_set_back(tmp_path: Path) -> None:
    run = simulate(private("federation.rounds=1"), tmp_path)
    with pytest.raises(UserError, match=r"its noise was chosen for 1 rounds.*start_from = run:"):
        resume(run.run.id, tmp_path, rounds=2)
    with pytest.raises(UserError, match="cannot be trained again"):
        resume(run.run.id, tmp_path, from_round=0)


def interrupting(at: int) -> Client:
    """Be interrupted, as by Ctrl-C at the server, once clients have trained in a round."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type.startswith(MessageType.TRAIN):
            order, _ = read_message(message.content, TrainOrder)
            if order.round == at:
                return Message(RecordDict(), reply_to=message)
        return reply

    return client


def test_an_answer_that_was_lost_is_given_again_and_costs_nothing(tmp_path: Path) -> None:
    experiment = private("federation.rounds=2", "federation.on_failure=stop", "privacy.epsilon=4")
    with pytest.raises(RunError, match="round 2 failed"):
        drive(experiment, tmp_path, interrupting(2))
    with RunStore.open(tmp_path) as store:
        name = store.get_run("last").id
    run = drive(experiment, tmp_path, run=name)
    assert run.run.status == "completed"
    assert fates(run)[1] == dict.fromkeys(NAMES, "accepted")
    assert all(3.9 < values[-1] <= 4 for values in spent(run).values())


def test_a_coordinator_cannot_ask_for_more_than_was_planned(tmp_path: Path) -> None:
    """Whatever rounds a server makes up, a client trains those of the experiment, and no more."""
    experiment = private("federation.rounds=2", "privacy.epsilon=4")
    replies: list[Message] = []

    def greedy(message: Message, context: Context) -> Message:
        if not message.metadata.message_type.startswith(MessageType.TRAIN) or name_of(experiment, context) != NAMES[0]:
            return client_app(message, context)
        order, parcels = read_message(message.content, TrainOrder)
        for attempt in range(5):
            more = {"round": 10, "rounds": 99, "attempt": 7 + attempt}
            content = write_message(order.model_copy(update=more), parcels)
            asked = Message(content, message.metadata.dst_node_id or 1, message.metadata.message_type)
            replies.append(client_app(asked, context))
        return client_app(message, context)

    drive(experiment, tmp_path, greedy)
    assert len(replies) == 10
    assert all(reply.has_error() for reply in replies)
    assert {reply.error.reason for reply in replies} == {
        "the order is for round 10 of 99, but the experiment plans 2; no more rounds are trained"
    }


def test_a_client_does_not_measure_on_its_own_data_for_others(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "privacy.mode=sample", 'evaluation.on=["clients"]', "task.options.packing=false")
    with pytest.raises(ConfigurationError, match="evaluation"):
        make_plan(experiment)
    refused: list[str] = []

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type.startswith(MessageType.EVALUATE):
            read_message(message.content, EvaluateOrder)
            refused.append(reply.error.reason if reply.has_error() else "")
        return reply

    run = drive(experiment, tmp_path, client)
    assert len(refused) == 12
    assert all("not told under privacy" in reason for reason in refused)
    assert "held_out_loss" not in run.metrics


def test_language_models_train_with_one_row_per_window(tmp_path: Path) -> None:
    place = tmp_path / "texts" / "ada"
    options = ("privacy.mode=sample", "privacy.sample_rate=0.3", f"task.options.public='{place}'")
    run = simulate(tiny(tmp_path, *options), tmp_path)
    assert all(math.isfinite(value) for value in run.metrics["unseen_loss"])
    assert len(run.metrics["unseen_loss"]) == 3
    assert "held_out_loss" not in run.metrics
    with pytest.raises(ConfigurationError, match=r"task\.options\.packing"):
        make_plan(tiny(tmp_path, *options, "task.options.packing=true"))


def test_whether_the_self_check_fails_does_not_depend_on_rows() -> None:
    """It is made before anything is charged, and the server sees how it ends."""

    class Unread:
        def __len__(self) -> int:
            return 5

        def take(self, numbers: Tensor) -> Batch:
            raise AssertionError("rows were read before a budget was charged")

    place = workspace(private("task.options.shapes=[[3, 4]]", "task.options.rank=1"))
    prepare(place, Unread(), "ada", "ab")
    place = workspace(private("task.options.shapes=[[3, 5]]", "task.options.rank=1"))
    for factor in place.adapted.train_only("ab"):
        factor.data.fill_(1e9)
    with pytest.raises(NotPrivate, match="not finite"):
        prepare(place, Unread(), "ada", "ab")
