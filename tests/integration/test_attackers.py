"""Liars in a federation: four of sixteen clients send what they learned times −10."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from client.faults import is_attacker
from client.node import Node
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.experiment_file import apply_override
from common.store import RunStore
from server.plan import make_plan
from server.progress import Progress, listening
from simulations.run import FinishedRun
from strategies.robust import ROBUST
from tests.tiny import drive

CLIENTS, ATTACKERS = 16, 4
RULES = [name for name in ROBUST.names() if name != "none"]
ON_PRODUCTS = [name for name in RULES if not ROBUST.plugin(name).needs_linear]


def experiment(*overrides: str) -> Experiment:
    table: dict[str, Any] = {
        "name": "attackers",
        "task": {"name": "low_rank_regression", "options": {"skew": 0.2, "size_ratio": 2.0}},
        "adapter": {"name": "lora", "options": {"target_modules": "all-linear", "rank": 4}},
        "strategy": {"name": "fedavg"},
        "training": {"steps": 8, "batch_size": 32, "learning_rate": 4e-2},
        "federation": {"rounds": 7},
        "simulation": {"clients": CLIENTS, "workers": 1},
        "evaluation": {"every": 100, "certificate": False},
    }
    for override in overrides:
        apply_override(table, override)
    return Experiment.parse(table)


def lies(*overrides: str) -> Experiment:
    return experiment(f"simulation.attackers={ATTACKERS}", *overrides)


def liars(settings: Experiment) -> set[str]:
    names = settings.simulated_clients()
    return {name for name in names if is_attacker(Node(name, settings, (), None, None))}


def loss(run: FinishedRun) -> float:
    assert run.run.status == "completed"
    return run.metrics["held_out_loss"][-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attackers")


@cache
def clean_loss(strategy: str, home: Path) -> float:
    return loss(drive(experiment(f"strategy.name={strategy}"), home))


QUICK = ("geometric_median", "trimmed_mean")
"""A rule on products and one on coordinates; the others' own tests are in tests/unit/test_robust.py."""


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("flora", marks=pytest.mark.long)])
def test_the_plain_mean_is_carried_off(strategy: str, home: Path) -> None:
    assert loss(drive(lies(f"strategy.name={strategy}"), home)) > clean_loss(strategy, home) + 0.1


@pytest.mark.parametrize(
    ("rule", "strategy"),
    [
        pytest.param(rule, strategy, marks=[] if rule in QUICK else pytest.mark.long)
        for rule, strategy in [
            *((rule, "flora" if rule in ON_PRODUCTS else "fedavg") for rule in RULES),
            ("norm_bounding", "fedavg"),
        ]
    ],
)
def test_every_rule_stays_close_to_the_clean_run(rule: str, strategy: str, home: Path) -> None:
    settings = lies(f"strategy.name={strategy}", f"robust.name={rule}")
    run = drive(settings, home)
    assert loss(run) < clean_loss(strategy, home) + 0.1
    with RunStore.open(home) as store:
        trust = store.metrics(run.run.id, "trust")
    assert len(trust) == CLIENTS * settings.federation.rounds
    false = [metric.value for metric in trust if metric.client in liars(settings)]
    honest = [metric.value for metric in trust if metric.client not in liars(settings)]
    assert max(false) < max(honest)
    assert sum(false) / len(false) < 0.5 * sum(honest) / len(honest)


def test_trust_is_in_the_record_and_the_error_is_that_of_what_was_left(home: Path) -> None:
    """The exact average that flora is held against holds no liar any more."""
    short = ("federation.rounds=1", "evaluation.certificate=true")
    run = drive(lies("strategy.name=flora", "robust.name=multi_krum", *short), home)
    assert run.rounds[-1].error is not None
    assert run.rounds[-1].error < 1e-5


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_cap_on_weights_bounds_who_owns_most_data(share: float, home: Path) -> None:
    """With a cap the run is another one, and as repeatable."""
    short = ("task.options.size_ratio=20.0", "federation.rounds=1")
    capped = [drive(experiment(*short, f"federation.max_weight_share={share}"), home).run for _ in range(2)]
    free = drive(experiment(*short), home).run
    assert capped[0].adapter_sha256 == capped[1].adapter_sha256
    assert (capped[0].adapter_sha256 == free.adapter_sha256) == (share == 0.5)


def test_a_round_with_too_few_replies_for_the_rule_has_failed(home: Path) -> None:
    """Thirteen are needed where five may lie; one client in five drops out."""
    settings = lies(
        "robust.name=krum", "robust.options.attackers=5", "simulation.dropout=0.2", "federation.rounds=4", "seed=2"
    )
    run = drive(settings, home)
    failed = [each for each in run.rounds if each.status == "failed"]
    assert failed
    assert all(each.reason is not None and each.reason.endswith("13 needed") for each in failed)


def test_an_interrupted_round_is_judged_with_the_replies_it_had(home: Path) -> None:
    settings = lies("robust.name=geometric_median", "federation.rounds=2")
    heard: list[str] = []

    def stop_once(step: Progress) -> None:
        if (step.kind, step.round) == ("reply", 2):
            heard.append(step.client)
            if len(heard) == 5:
                raise KeyboardInterrupt

    with listening(stop_once), pytest.raises(KeyboardInterrupt):
        drive(settings, home)
    with RunStore.open(home) as store:
        run = store.get_run("last").id
    assert drive(settings, home, run=run).run.adapter_sha256 == drive(settings, home).run.adapter_sha256


def test_what_cannot_work_is_refused_before_round_one() -> None:
    with pytest.raises(ConfigurationError, match="robust rule median works on the numbers themselves"):
        make_plan(lies("strategy.name=flora", "robust.name=median"))
    with pytest.raises(ConfigurationError, match="robust rule krum needs 17 updates a round, 16 clients train"):
        make_plan(lies("robust.name=krum", "robust.options.attackers=7"))
    with pytest.raises(ConfigurationError, match=r"robust rule krum: unknown key 'f'; known are: attackers"):
        make_plan(lies("robust.name=krum", "robust.options.f=7"))
