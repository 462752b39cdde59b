"""What releases cost their clients, who may still be drawn, and the clipping norm that follows the updates."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

from client.secure.masking import within
from common.errors import ConfigurationError, StoreError
from common.experiment import Experiment
from common.experiment_file import load_experiment
from common.federation import ServerState
from common.privacy.clipping import clip_change
from common.secure.fixed_point import decode, encode
from common.store import ClientRound, Metric, Round, RunStore
from server.cohort import training_cohort
from server.journal import Released, StoreJournal
from server.plan import make_plan
from server.privacy.account import ClientAccount, planned_noise
from server.privacy.adaptive import NORM, bounded, clipping_norm, count_noise, next_norm, remembered, update_noise
from server.privacy.refusals import client_privacy_refusals
from server.record import RoundRecord
from strategies import aggregation_strategy

NAMES = ("client-1", "client-2", "client-3", "client-4")


def protected(*options: str) -> Experiment:
    chosen = ("strategy.name=ffa_lora", "privacy.mode=client", "federation.rounds=5")
    return load_experiment("synthetic", [*chosen, *options])


def account(*options: str, before: list[Released] | None = None) -> ClientAccount:
    return ClientAccount(protected(*options), set(NAMES), before or [])


# Spending


def test_a_client_pays_for_the_releases_it_had_a_part_in() -> None:
    book = account("privacy.noise_multiplier=3")
    for clients in (NAMES, NAMES[:2], NAMES[:1]):
        book.charge(clients)
    for count, client in ((3, "client-1"), (2, "client-2"), (1, "client-3"), (1, "client-4")):
        slow = RdpAccountant().compose(GaussianDpEvent(3.0), count).get_epsilon(1e-5)
        assert book.epsilon(client) == pytest.approx(slow, rel=2e-2)
        assert book.epsilon(client) >= slow * (1 - 1e-3)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(("options", "rounds"), [((), 5), (("privacy.participations=2",), 2)])
def test_calibrated_noise_lasts_exactly_for_the_rounds(accountant: str, options: tuple[str, ...], rounds: int) -> None:
    book = account(f"privacy.accountant={accountant}", *options)
    for done in range(rounds):
        assert book.rounds_left("client-1") == rounds - done
        assert not book.spent()
        book.charge(NAMES[:1])
    assert 7.9 < book.epsilon("client-1") <= 8
    assert book.spent() == {"client-1"}
    assert book.rounds_left("client-2") == rounds


def test_given_noise_lasts_until_the_budget_is_spent() -> None:
    book = account("privacy.noise_multiplier=3", "privacy.epsilon=4", "federation.rounds=50")
    lasts = book.rounds_left("client-1")
    assert 1 < lasts < 50
    for _ in range(lasts):
        assert not book.spent()
        book.charge(NAMES)
    assert book.spent() == set(NAMES)
    assert book.epsilon("client-1") <= 4
    book.charge(NAMES)
    assert book.epsilon("client-1") > 4


def test_a_resumed_run_goes_on_with_what_was_committed() -> None:
    """The noise of its first round stays, whatever would be calibrated now; what cost more counts as more."""
    alone = account("privacy.noise_multiplier=1.5")
    alone.charge(NAMES[:2])
    again = account("privacy.noise_multiplier=9", before=[Released(1.5, NAMES[:2])])
    assert again.noise == 1.5
    assert [again.epsilon(name) for name in NAMES] == [alone.epsilon(name) for name in NAMES]
    assert again.rounds_left("client-1") == alone.rounds_left("client-1")


def test_the_account_is_read_from_committed_rounds_alone(tmp_path: Path) -> None:
    """A failed round released nothing; one whose noise is lost cannot be counted, and the run does not go on."""
    began = datetime.now(UTC)
    with RunStore.open(tmp_path) as store:
        store.create_run("r", name="n", task="t", strategy="s", seed=1, experiment="{}", rounds_planned=9)
        for number, status, noise in ((1, "committed", 2.0), (2, "failed", None), (3, "committed", 2.5)):
            store.begin_round("r", number, ["ada", "ben"])
            fates = {"ada": "accepted", "ben": "late" if number == 1 else "accepted"}
            told = [] if noise is None else [Metric("r", number, "noise_multiplier", noise)]
            rows = [ClientRound("r", number, name, fate) for name, fate in fates.items()]  # type: ignore[arg-type]
            store.commit_round(Round("r", number, began, status), rows, told)  # type: ignore[arg-type]
        journal = StoreJournal(store, "r")
        assert journal.released() == [Released(2.0, ("ada",)), Released(2.5, ("ada", "ben"))]
        store.begin_round("r", 4, ["ada"])
        store.commit_round(Round("r", 4, began, "committed"), [ClientRound("r", 4, "ada", "accepted")])
        with pytest.raises(StoreError, match="does not know the noise of round 4, so what run r has spent cannot be"):
            journal.released()


def test_every_client_that_took_part_is_recorded() -> None:
    book = account("privacy.noise_multiplier=3")
    book.charge(["client-2", "client-9"])  # a node that the experiment does not list
    record = RoundRecord(1, NAMES, 0, datetime.now(UTC))
    book.write(record)
    told = {(name, client) for name, _, client, _ in record.metrics}
    per_client = {(name, client) for name in ("epsilon", "second_epsilon", "rounds_left") for client in told_of(told)}
    assert told == {("noise_multiplier", "")} | per_client
    assert told_of(told) == {"client-2", "client-9"}
    assert record.epsilon == book.epsilon("client-2")


def told_of(told: set[tuple[str, str]]) -> set[str]:
    return {client for _, client in told if client}


def test_the_plan_promises_the_noise_that_is_added() -> None:
    for options in ((), ("privacy.participations=3", "privacy.accountant=prv"), ("privacy.noise_multiplier=2.5",)):
        experiment = protected(*options)
        plan = make_plan(experiment)
        assert plan.privacy is not None
        assert plan.privacy.noise_multiplier == pytest.approx(planned_noise(experiment), rel=1e-9)


# Cohorts


def test_a_cohort_aims_at_the_planned_number_whoever_is_there() -> None:
    experiment = protected("federation.cohort_fraction=0.5")
    clients = experiment.simulated_clients()
    assert len(training_cohort(experiment, clients, 1, NAMES)) == 2
    assert len(training_cohort(experiment, clients, 1, NAMES[:2])) == 2
    assert len(training_cohort(experiment, clients, 1, [*NAMES, "client-9"])) == 2


# Clipping


def test_a_change_is_scaled_to_the_limit_and_a_smaller_one_keeps_its_bits() -> None:
    start, change = torch.ones(4), torch.tensor([3.0, 0.0, -4.0, 0.0])
    clipped = clip_change(start + change, start, 1.0)
    assert clipped.norm == 5
    torch.testing.assert_close(clipped.change, change.double() / 5)
    assert torch.equal(clip_change(start + change, start, 5.0).change, change.double())
    assert clip_change(start, start, 1.0).norm == 0


def test_a_client_clips_so_that_fixed_point_keeps_within_the_limit() -> None:
    generator = torch.Generator().manual_seed(1)
    start, change = torch.randn(5_000, generator=generator), torch.randn(5_000, generator=generator)
    for limit in (1e-4, 1.0, 30.0):
        sent, _ = decode(encode(within(start + change, start, limit).numpy(), 1.0, 10))
        norm = float(torch.linalg.vector_norm(torch.from_numpy(sent) - start.double()))
        assert limit * (1 - 1e-2) < norm <= limit
    unclipped = within(start + 1e-6 * change, start, 1.0) - start.double()
    assert torch.equal(unclipped, (start + 1e-6 * change).double() - start.double())


# Adaptive clipping


def settled(began: float, norms: list[float], noise: float = 0.0, rounds: int = 200, **privacy: float) -> float:
    """Return the clipping norm after some rounds with clients whose updates have these norms."""
    settings = protected(
        "privacy.adaptive_clipping=true", f"privacy.clipping_norm={began}",
        *(f"privacy.{name}={value}" for name, value in privacy.items()),
    ).privacy  # fmt: skip
    generator, norm = random.Random(3), began
    for _ in range(rounds):
        counted = sum(0.5 if each <= norm else -0.5 for each in norms) + generator.gauss(0.0, noise)
        norm = next_norm(norm, counted / len(norms) + 0.5, settings)
    return norm


SPREAD = [math.exp(position / 100) for position in range(-100, 101)]
"""Norms around a median of 1."""


@pytest.mark.parametrize("began", [0.9, 1.1, 1e-3, 1e3])
def test_the_clipping_norm_converges_to_the_median(began: float) -> None:
    assert settled(began, SPREAD) == pytest.approx(1.0, rel=0.02)
    assert settled(began, SPREAD, noise=count_noise(len(SPREAD), 1.0)) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("quantile", "expected"), [(0.25, math.exp(-0.5)), (0.9, math.exp(0.8))])
def test_it_converges_to_other_quantiles(quantile: float, expected: float) -> None:
    assert settled(1.0, SPREAD, target_quantile=quantile) == pytest.approx(expected, rel=0.05)


def test_equal_norms_do_not_make_it_diverge() -> None:
    assert 0.9 <= settled(0.9, [1.0] * 50) <= 1.1
    assert 0.9 <= settled(1.1, [1.0] * 50) <= 1.1


@pytest.mark.parametrize("norms", [[math.inf] * 9, [math.nan] * 9, [1e300] * 9, [0.0] * 9, [math.nan, *[1.0] * 9]])
def test_hostile_norms_move_it_no_further_than_its_reach(norms: list[float]) -> None:
    found = settled(1.0, norms, rounds=2_000)
    assert 1e-6 <= found <= 1e6
    assert found == pytest.approx({math.inf: 1e6, 1e300: 1e6, 0.0: 1e-6, 1.0: 1.0}.get(norms[-1], 1e6), rel=0.11)


def test_the_count_and_the_updates_together_cost_the_noise_that_is_accounted() -> None:
    """1 / z² adds up over Gaussian mechanisms; the count's sensitivity is one."""
    for clients, noise in ((4, 5.0), (1_000, 0.7), (100, 30.0)):
        of_count = count_noise(clients, noise)
        of_update = update_noise(noise, of_count)
        assert of_count**-2 + of_update**-2 == pytest.approx(noise**-2)
        assert noise < of_update < 1.16 * noise


def test_the_norm_is_kept_in_the_state() -> None:
    spec_less = ServerState(None, None, None)  # type: ignore[arg-type]
    adaptive = protected("privacy.adaptive_clipping=true", "privacy.clipping_norm=2").privacy
    later = ServerState(None, None, None, extras=remembered(0.7))  # type: ignore[arg-type]
    assert (clipping_norm(spec_less, adaptive), clipping_norm(later, adaptive)) == (2.0, 0.7)
    assert clipping_norm(later, protected().privacy) == 1.0
    assert (bounded(math.nan, 2.0), bounded(1e9, 2.0), bounded(0.0, 2.0)) == (2.0, 2e6, 2e-6)
    assert later.extras[NORM].dtype == torch.float64


# Refusals


def refused(strategy: str, *options: str) -> str:
    return "; ".join(client_privacy_refusals(protected(*options), aggregation_strategy(strategy)))


def test_a_strategy_that_is_not_linear_is_refused_with_those_that_are() -> None:
    told = refused("flora")
    assert 'strategy flora merges the clients\' updates one by one, but privacy.mode = "client" adds noise to' in told
    assert "use a strategy that needs no more: fed_sb, fedavg, fedsa_lora, ffa_lora, rolora, slora" in told
    assert not refused("fedavg")
    assert not client_privacy_refusals(load_experiment("synthetic"), aggregation_strategy("flora"))


def test_noise_that_spends_the_budget_at_once_is_refused() -> None:
    told = refused("fedavg", "privacy.noise_multiplier=0.1", "privacy.epsilon=2")
    assert told.startswith("privacy.noise_multiplier = 0.1 spends ε = ")
    assert "more than privacy.epsilon = 2; raise one of them" in told


def test_settings_that_look_at_one_update_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"federation\.max_update_norm tells whose update is large"):
        protected("federation.max_update_norm=3")
