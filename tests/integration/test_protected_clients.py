"""Whole runs in which the server protects clients: what is released, recorded, charged, and when a run ends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType
from safetensors.torch import load_file
from torch import Tensor

import server.privacy.release as module
from client.app import app as client_app
from common.experiment import Experiment
from common.messages import PrivacyReport, TrainAnswer
from common.privacy.accounting import Mechanism, Spending
from common.store import RunStore
from common.wire import read_message, write_message
from server.progress import Progress, listening
from simulations import resume, simulate
from simulations.run import FinishedRun
from tests.tiny import Client, drive, name_of, synthetic

NAMES = ("client-1", "client-2", "client-3", "client-4")
FEW_ROUNDS = ("federation.rounds=2", "evaluation.on=[]")


def protected(*options: str, **more: Any) -> Experiment:
    return synthetic("privacy.mode=client", "strategy.name=ffa_lora", *options, **more)


def numbers(run: FinishedRun, name: str) -> list[dict[str, float]]:
    """Return a number of each client ("" is the federation), round by round."""
    return [
        {metric.client: metric.value for metric in run.measured if (metric.name, metric.round) == (name, row.round)}
        for row in run.rounds
        if row.round
    ]


def accepted(run: FinishedRun) -> list[set[str]]:
    with RunStore.open(run.home, read_only=True) as store:
        rows = store.client_rounds(run.run.id)
    return [
        {row.client for row in rows if (row.round, row.status) == (each.round, "accepted")}
        for each in run.rounds
        if each.round
    ]


def notices(run: FinishedRun) -> str:
    with RunStore.open(run.home, read_only=True) as store:
        return "\n".join(event.text for event in store.events(run.run.id) if event.kind == "notice")


def weights(run: FinishedRun) -> Tensor:
    (path,) = (run.home / "runs" / run.run.id).glob("adapter-*.safetensors")
    return load_file(path)["adapter"]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the noise off."""
    monkeypatch.setattr(module, "gaussian", lambda like, std, generator: torch.zeros(like.shape))


def away(experiment: Experiment, *names: str) -> Client:
    """Clients of which some do not train."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and name_of(experiment, context) in names:
            raise ConnectionError("gone")
        return client_app(message, context)

    return client


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora"])
def test_a_run_spends_its_budget_and_tells_nothing_of_an_update(tmp_path: Path, strategy: str) -> None:
    run = simulate(protected(f"strategy.name={strategy}", "federation.rounds=3", ranks=(4,) * 4), tmp_path)
    noise = numbers(run, "noise_multiplier")[0][""]
    expected = [Spending.of(Mechanism(noise, 1.0), done).epsilon(1e-5) for done in (1, 2, 3)]
    assert numbers(run, "epsilon") == [dict.fromkeys(NAMES, pytest.approx(value)) for value in expected]
    assert [row.epsilon for row in run.rounds] == [None, *map(pytest.approx, expected)]
    assert 7.9 < expected[-1] <= 8
    assert numbers(run, "rounds_left") == [dict.fromkeys(NAMES, left) for left in (2.0, 1.0, 0.0)]
    assert numbers(run, "clipping_norm") == [{"": 1.0}] * 3
    assert run.run.status == "completed"
    assert not notices(run)
    # Nothing else is measured: this task has no public data.
    with RunStore.open(tmp_path, read_only=True) as store:
        kept = {each.name for each in store.metrics(run.run.id)}
        told = {row.num_examples for row in store.client_rounds(run.run.id)}
        statistics = {each.kind for each in store.statistics(run.run.id)}
    assert kept == {"epsilon", "second_epsilon", "rounds_left", "noise_multiplier", "clipping_norm"}
    assert (told, statistics) == ({0}, {"timeline"})
    assert {(row.error, row.exact) for row in run.rounds} == {(None, False)}
    assert not list((tmp_path / "runs" / run.run.id / "rounds").glob("*/replies/*"))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("gone", [(), ("client-4",)])
def test_a_secure_sum_releases_what_the_plain_one_does(tmp_path: Path, gone: tuple[str, ...]) -> None:
    """Clipped by the clients, before their masks; the widest client may be missing."""
    plain, secure = (
        protected("privacy.clipping_norm=0.05", f"secure_aggregation.enabled={masked}", *FEW_ROUNDS)
        for masked in ("false", "true")
    )
    open_run = drive(plain, tmp_path / "plain", away(plain, *gone))
    masked_run = drive(secure, tmp_path / "secure", away(secure, *gone))
    torch.testing.assert_close(weights(masked_run), weights(open_run), rtol=1e-5, atol=1e-7)
    assert accepted(masked_run) == accepted(open_run) == [set(NAMES) - set(gone)] * 2
    assert numbers(masked_run, "epsilon") == numbers(open_run, "epsilon")
    unclipped = drive(protected("privacy.clipping_norm=1e3", *FEW_ROUNDS), tmp_path / "free")
    assert float(torch.dist(weights(unclipped), weights(open_run))) > 0.05


def test_a_secure_sum_is_released_with_noise(tmp_path: Path) -> None:
    options = ("secure_aggregation.enabled=true", "federation.rounds=1", "evaluation.on=[]", "privacy.clipping_norm=50")
    run = simulate(protected(*options, ranks=(4,) * 4), tmp_path)
    layout, rank = {"b": 24 + 16}, 4
    learned = weights(run)[: layout["b"] * rank]
    noise = numbers(run, "noise_multiplier")[0][""]
    assert 0.7 < float(learned.std()) / (noise * 50 / 4) < 1.4  # updates are far below the clipping norm


def test_a_run_killed_before_its_commit_releases_once_and_pays_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], module.gaussian

    def noting(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
        drawn.append(draw(like, std, generator))
        return drawn[-1]

    def interrupt(step: Progress) -> None:
        if (step.kind, step.round) == ("aggregated", 2) and len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "gaussian", noting)
    with pytest.raises(KeyboardInterrupt), listening(interrupt):
        simulate(protected("federation.rounds=3", "evaluation.on=[]"), tmp_path)
    run = resume("last", tmp_path)
    assert len(drawn) == 4
    assert float(torch.corrcoef(torch.stack(drawn[1:3]))[0, 1].abs()) < 0.5  # fresh noise for what was not released
    assert numbers(run, "noise_multiplier")[0] == numbers(run, "noise_multiplier")[2]
    noise = numbers(run, "noise_multiplier")[0][""]
    paid = [Spending.of(Mechanism(noise, 1.0), done).epsilon(1e-5) for done in (1, 2, 3)]
    assert numbers(run, "epsilon") == [dict.fromkeys(NAMES, pytest.approx(value)) for value in paid]


def test_a_client_takes_part_as_often_as_it_may_and_the_run_ends_with_the_last(tmp_path: Path) -> None:
    """Two of four are drawn, each twice at most: four rounds, also where the run is resumed in between."""
    options = ("federation.cohort_size=2", "privacy.participations=2", "federation.rounds=9", "evaluation.on=[]")

    def interrupt(step: Progress) -> None:
        if (step.kind, step.round) == ("committed", 2):
            raise KeyboardInterrupt

    whole = simulate(protected(*options), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), listening(interrupt):
        simulate(protected(*options), tmp_path / "parts")
    parts = resume("last", tmp_path / "parts")
    assert accepted(parts) == accepted(whole)
    taken = Counter(name for names in accepted(whole) for name in names)
    assert taken == dict.fromkeys(NAMES, 2)
    assert 7.9 < (whole.rounds[-1].epsilon or 0) <= 8
    assert (whole.run.status, whole.run.rounds_done) == ("completed", len(accepted(whole)))
    assert whole.run.rounds_done < 9
    assert "will not be drawn any more: the privacy budget is spent" in notices(whole)
    assert "stopped: the privacy budget of every client is spent" in notices(whole)


def test_a_run_may_stop_with_the_first_spent_budget(tmp_path: Path) -> None:
    options = ("federation.cohort_size=1", "privacy.participations=1", "privacy.on_exhausted=stop", "evaluation.on=[]")
    run = simulate(protected(*options), tmp_path)
    assert run.run.rounds_done == 1
    assert "is spent (privacy.on_exhausted)" in notices(run)


def test_who_sent_nothing_pays_nothing(tmp_path: Path) -> None:
    experiment = protected(*FEW_ROUNDS)
    run = drive(experiment, tmp_path, away(experiment, "client-2"))
    assert accepted(run) == [set(NAMES) - {"client-2"}] * 2
    assert all(set(told) == set(NAMES) - {"client-2"} for told in numbers(run, "epsilon"))


def test_a_clipping_norm_that_follows_goes_on_after_a_resume(tmp_path: Path) -> None:
    options = ("privacy.adaptive_clipping=true", "privacy.clipping_norm=1e3", "privacy.test_seed=1", "evaluation.on=[]")

    def interrupt(step: Progress) -> None:
        if (step.kind, step.round) == ("committed", 2):
            raise KeyboardInterrupt

    whole = simulate(protected(*options), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), listening(interrupt):
        simulate(protected(*options), tmp_path / "parts")
    parts = resume("last", tmp_path / "parts")
    norms = numbers(whole, "clipping_norm")
    assert numbers(parts, "clipping_norm") == norms
    assert len({told[""] for told in norms}) == 4
    assert parts.run.adapter_sha256 == whole.run.adapter_sha256


def test_a_client_cannot_write_into_the_account(tmp_path: Path) -> None:
    """A report of its own, as under DP-SGD, would stand beside what the server counts."""
    report = PrivacyReport(
        noise_multiplier=9, clipping_norm=1, sample_rate=1, steps=1, delta=1e-5, epsilon=1e3, rounds_left=99
    )

    def client(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN and name_of(experiment, context) == "client-3":
            answer, parcels = read_message(reply.content, TrainAnswer)
            return Message(write_message(answer.model_copy(update={"privacy": report}), parcels), reply_to=message)
        return reply

    experiment = protected("federation.rounds=1", "evaluation.on=[]")
    run = drive(experiment, tmp_path, client)
    assert accepted(run) == [set(NAMES) - {"client-3"}]
    assert set(numbers(run, "epsilon")[0]) == set(NAMES) - {"client-3"}
