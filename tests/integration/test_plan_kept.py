"""A run under privacy spends what its plan says, round by round, and says so everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.store import RunStore
from server.plan import make_plan
from simulations.terminal.summary import run_summary
from tests.tiny import drive, synthetic

MODES = {
    "sample": ("strategy.name=flora", "clients.client-2.budget={epsilon=2}"),
    "client": ("strategy.name=ffa_lora", "privacy.participations=2"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_costs_what_its_plan_says(tmp_path: Path, mode: str) -> None:
    experiment = synthetic(f"privacy.mode={mode}", "federation.rounds=3", *MODES[mode], ranks=(2, 4))
    plan = make_plan(experiment).privacy
    assert plan is not None
    finished = drive(experiment, tmp_path)
    assert finished.run.status == "completed"
    told = {
        (m.name, m.client, m.round): m.value
        for m in finished.measured
        if m.name in ("epsilon", "second_epsilon", "rounds_left", "noise_multiplier")
    }
    for client in plan.clients:
        for number, spent in enumerate(client.epsilons, 1):
            assert told["epsilon", client.name, number] == pytest.approx(spent, rel=1e-6)
            assert told["rounds_left", client.name, number] == len(client.epsilons) - number
        last = told["second_epsilon", client.name, len(client.epsilons)]
        assert last == pytest.approx(client.second_epsilon, rel=1e-6)
        if mode == "sample":
            assert told["noise_multiplier", client.name, 1] == pytest.approx(client.noise_multiplier, rel=1e-6)
    noises = [client.noise_multiplier for client in plan.clients]
    assert told["noise_multiplier", "", 1] == pytest.approx(min(noises), rel=1e-6)
    with RunStore.open(tmp_path, read_only=True) as store:
        summary = run_summary(store, finished.run.id)
    assert summary["privacy"]["unit"] == plan.unit
    assert summary["privacy"]["epsilon"] == max(client.epsilons[-1] for client in plan.clients)
    assert summary["rounds"][-1]["epsilon"] == summary["privacy"]["epsilon"]
    if mode == "sample":
        hidden = {(row["num_examples"], row["seconds"]) for row in summary["clients"]}
        assert hidden == {(0, 0.0)}
