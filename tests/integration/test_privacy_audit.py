"""The audit with canaries: correct code passes, and what is broken in the code that trains is seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import opacus.optimizers.optimizer_fast_gradient_clipping as ghost_clipping
import pytest
import torch
from click.testing import Result
from opacus.optimizers import optimizer as flat_clipping
from torch import Tensor
from typer.testing import CliRunner

import lorafleet
from client.privacy import audit as auditing
from client.privacy import own_engine, steps
from client.privacy.audit import FALSE_ALARM, audit, decisive
from client.privacy.audit_settings import Setting, default_settings, settings_of, sharp
from client.privacy.gradients.record import Record
from client.privacy.steps import StepPlan
from common.errors import UserError
from common.privacy.accounting import Mechanism
from common.privacy.calibration import noise_multiplier
from common.privacy.noise import secret_generator
from tests.tiny import synthetic

Break = Callable[[pytest.MonkeyPatch], None]

PRIVATE = 'privacy.mode="sample"'


def noise_times(factor: float) -> Break:
    """Scale the noise of all engines."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        gaussian = own_engine.gaussian
        patch.setattr(own_engine, "gaussian", lambda *given: gaussian(*given) * factor)
        generate = flat_clipping._generate_noise
        for module in (flat_clipping, ghost_clipping):
            patch.setattr(module, "_generate_noise", lambda *given, **more: generate(*given, **more) * factor)

    return broken


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    sums = Record.clipped_sums
    patch.setattr(Record, "clipped_sums", lambda record, norm: sums(record, 1e9))


def samples(drawn: Callable[[int], Tensor]) -> Break:
    """Draw the same rows in every step."""

    def every_step(rows: int, plan: StepPlan, *purpose: str | int) -> Iterator[Tensor]:
        yield from (drawn(rows) for _ in range(plan.steps))

    return lambda patch: patch.setattr(auditing, "poisson_samples", every_step)


def frozen_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim.SGD, "step", lambda optimizer: None)


def test_correct_code_passes_and_the_bounds_are_below_the_claims() -> None:
    sharpest, sampled = audit(default_settings(), test_seed=1)
    assert (sharpest.trouble, sampled.trouble) == ("", "")
    assert sharpest.claimed == pytest.approx(4.387, abs=1e-3)
    assert sampled.claimed == pytest.approx(2.806, abs=1e-3)
    assert 3 < sharpest.gaussian < sharpest.claimed
    assert 1 < sampled.gaussian < sampled.claimed
    assert 0 < sharpest.guesses < sharpest.gaussian
    assert sharpest.memory == pytest.approx(1, abs=0.15)
    assert sharpest.sees_half
    assert sampled.sees_half


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (noise_times(0.0), "noise, clipping or sampling is wrong"),
        (noise_times(0.5), "noise, clipping or sampling is wrong"),
        (noise_times(2**-0.5), "noise, clipping or sampling is wrong"),
        (no_clipping, "noise, clipping or sampling is wrong"),
        (samples(torch.arange), "noise, clipping or sampling is wrong"),
        (samples(lambda rows: torch.arange(0)), "no memory of canaries"),
        (frozen_weights, "no memory of canaries"),
    ],
    ids=["no noise", "half the noise", "noise over √2", "no clipping", "no sampling", "no rows", "frozen weights"],
)
def test_what_is_broken_in_the_engine_fails_the_audit(
    monkeypatch: pytest.MonkeyPatch, broken: Break, words: str
) -> None:
    broken(monkeypatch)
    findings = audit(default_settings(), test_seed=1)
    assert any(words in finding.trouble for finding in findings), findings


@pytest.mark.parametrize("gradients", ["hooks", "functorch", "ghost"])
def test_opacus_engines_pass_and_their_missing_noise_is_seen(monkeypatch: pytest.MonkeyPatch, gradients: Any) -> None:
    setting = Setting("each", Mechanism(1.0, 0.5), 4, gradients=gradients, canaries=1000, clipping_norm=0.01)
    assert audit([setting], test_seed=2)[0].passed
    noise_times(0.5)(monkeypatch)
    assert not audit([setting], test_seed=2)[0].passed


def test_a_seed_repeats_an_audit_and_without_one_it_differs() -> None:
    setting = Setting("one", Mechanism(1.0, 0.5), 2, canaries=200)
    first, again, other = (audit([setting], test_seed=seed)[0].memory for seed in (1, 1, 2))
    assert first == pytest.approx(again, rel=1e-6)
    assert first != pytest.approx(other, rel=1e-6)
    assert audit([setting])[0].memory != audit([setting])[0].memory


def test_an_audit_that_cannot_see_halved_noise_says_so() -> None:
    few = Setting("few", Mechanism(30.0, 0.1), 1, canaries=200)
    found = audit([few], test_seed=1)[0]
    assert found.passed
    assert not found.sees_half


def test_the_finding_nearest_to_its_claim_decides() -> None:
    findings = audit(default_settings(canaries=200), test_seed=3)
    assert decisive(findings).empirical / decisive(findings).claimed == max(f.empirical / f.claimed for f in findings)


def test_an_experiments_settings_are_its_own() -> None:
    experiment = synthetic(
        PRIVATE, "privacy.sample_rate=0.1", "training.steps=8", "federation.rounds=10", "privacy.epsilon=4",
        "privacy.clipping_norm=0.5", 'privacy.gradients="hooks"', "privacy.delta=1e-6",
    )  # fmt: skip
    planned, sharpest = settings_of(experiment, 500)
    noise = noise_multiplier(4, 1e-6, 0.1, 80)
    assert planned.mechanism == (noise, 0.1)
    assert (planned.steps, planned.clipping_norm, planned.gradients, planned.canaries) == (80, 0.5, "hooks", 500)
    assert sharpest.mechanism == (noise, 1.0)
    assert sharpest.steps == round(noise**2)
    assert (sharpest.clipping_norm, sharpest.gradients, sharpest.delta) == (0.5, "hooks", 1e-6)


def test_of_clients_with_sample_rates_of_their_own_the_least_noise_is_audited() -> None:
    names = list(synthetic().clients)
    rates = [f"clients.{names[0]}.sample_rate=0.01", f"clients.{names[1]}.sample_rate=0.5"]
    planned, _ = settings_of(synthetic(PRIVATE, *rates))
    assert planned.mechanism.sample_rate == 0.01
    given, _ = settings_of(synthetic(PRIVATE, "privacy.noise_multiplier=3", "privacy.participations=1"))
    assert given.mechanism.noise_multiplier == 3
    assert given.steps == synthetic().training.steps


def test_only_experiments_that_protect_rows_have_noise_to_audit() -> None:
    with pytest.raises(UserError, match=r'privacy\.mode is "none"'):
        settings_of(synthetic())


def test_the_sharp_setting_lets_canaries_stand_out_of_any_noise() -> None:
    for noise, expected in ((0.1, 1), (1.0, 1), (5.0, 25), (500.0, 100)):
        assert sharp(Setting("any", Mechanism(noise, 0.1))).steps == expected


# ---- the command line


def call(*arguments: str) -> Result:
    return CliRunner().invoke(lorafleet.app, ["privacy", "audit", *arguments], standalone_mode=False)


def seeded(device: torch.device | str, seed: int | None = None, *purpose: str | int) -> torch.Generator:
    return secret_generator(device, 7 if seed is None else seed, *purpose)


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed what the command draws: one audit in a thousand may fail by chance."""
    for module in (auditing, steps):
        monkeypatch.setattr(module, "secret_generator", seeded)


@pytest.mark.usefixtures("repeatable")
def test_the_command_prints_one_object_and_its_code_tells_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = call("--json")
    told = json.loads(ended.stdout)
    assert (ended.return_value, told["passed"]) == (0, True)
    assert told["empirical_epsilon"] <= told["claimed_epsilon"] == pytest.approx(4.387, abs=1e-3)
    assert [each["name"] for each in told["settings"]] == ["sharp", "sampled"]
    noise_times(0.5)(monkeypatch)
    ended = call("--json")
    told = json.loads(ended.stdout)
    assert (ended.return_value, told["passed"], told["delta"]) == (3, False, 1e-5)
    assert told["empirical_epsilon"] > told["claimed_epsilon"]


@pytest.mark.usefixtures("repeatable")
def test_people_see_a_table_and_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = call("--noise-multiplier", "1.5", "--steps", "2", "--sample-rate", "1")
    assert ended.return_value == 0
    assert "as asked" in ended.stdout
    assert "Passed: " in ended.stdout
    no_clipping(monkeypatch)
    ended = call()
    assert ended.return_value == 3
    assert "noise, clipping or sampling is wrong" in " ".join(ended.stdout.split())


def test_an_experiment_is_audited_with_its_own_engine() -> None:
    ended = call(
        "synthetic", "--json", "--canaries", "500", "--set", PRIVATE, "--set", "privacy.gradients=functorch",
        "--set", "privacy.sample_rate=0.2", "--steps", "3",
    )  # fmt: skip
    (told,) = json.loads(ended.stdout)["settings"]
    assert (told["gradients"], told["canaries"], told["sample_rate"], told["steps"]) == ("functorch", 500, 0.2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--noise-multiplier", "0"), "--noise-multiplier 0 is no noise"),
        (("--noise-multiplier", "nan"), "--noise-multiplier nan is no noise"),
        (("--noise-multiplier", "inf"), "--noise-multiplier inf is no noise"),
        (("--sample-rate", "1.5"), "--sample-rate 1.5 is no chance"),
        (("--sample-rate", "0"), "--sample-rate 0 is no chance"),
        (("--set", PRIVATE), "--set belongs to SOURCE"),
        (("synthetic", "--set", 'privacy.mode="client"'), 'privacy.mode is "client"'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    ended = call(*arguments)
    assert isinstance(ended.exception, UserError)
    assert words in str(ended.exception)


@pytest.mark.long
def test_correct_code_almost_never_fails_and_broken_code_almost_always(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps.poisson_samples is auditing.poisson_samples
    failed = sum(not all(finding.passed for finding in audit(default_settings())) for _ in range(200))
    assert failed <= 2  # 3 or more in 1 of 1,000 times at the promised rate
    assert FALSE_ALARM * 200 < 1
    for broken in (noise_times(0.0), noise_times(0.5), no_clipping):
        with monkeypatch.context() as patch:
            broken(patch)
            assert all(not all(finding.passed for finding in audit(default_settings())) for _ in range(50))
