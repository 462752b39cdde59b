"""The plan under privacy: noise and spending against Opacus, numbers by hand, refusals and notices.

Layers are as in ``test_plan``: eight of 192 × 192, so that one rank of all layers is 3,072 numbers, half of them in
``b``.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from opacus.accountants import RDPAccountant
from rich.console import Console

from common.errors import ConfigurationError
from common.privacy.accounting import ORDERS, Mechanism, Spending
from common.tasks import clients_key
from common.workspace import task_of
from server.plan import Plan, make_plan
from server.private_plan import PrivatePlan
from simulations.terminal.planning import plan_view
from simulations.terminal.summary import json_text
from tests.tiny import RANKS, tiny

RANK = 8 * 2 * 192
ROWS = ("privacy.mode=sample", "training.steps=3", "privacy.sample_rate=0.1", "task.options.public=builtin:unseen")
CLIENTS = ("privacy.mode=client", "strategy.name=ffa_lora", "task.options.public=builtin:unseen")
EQUAL = dict.fromkeys(RANKS, 4)


def planned(folder: Path, *overrides: str, ranks: dict[str, int] = RANKS) -> PrivatePlan:
    """Plan a tiny experiment under privacy."""
    found = make_plan(tiny(folder, *overrides, ranks=ranks)).privacy
    assert found is not None
    return found


def refused(folder: Path, *overrides: str, ranks: dict[str, int] = EQUAL) -> list[str]:
    """Return what is said against an experiment."""
    with pytest.raises(ConfigurationError) as caught:
        make_plan(tiny(folder, *overrides, ranks=ranks))
    return caught.value.problems


def shown(plan: Plan, folder: Path, *overrides: str) -> str:
    """Return what a terminal shows of a plan, on lines as long as they need."""
    console = Console(file=io.StringIO(), width=400, highlight=False)
    console.print(plan_view(plan, tiny(folder, *overrides)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_privacy_nothing_is_planned(tmp_path: Path) -> None:
    assert make_plan(tiny(tmp_path)).privacy is None


def test_spending_is_what_opacus_counts_and_reaches_the_budget(tmp_path: Path) -> None:
    for client in planned(tmp_path, *ROWS).clients:
        for number, spent in enumerate(client.epsilons, 1):
            accountant = RDPAccountant()
            accountant.history = [(client.noise_multiplier, 0.1, 3 * number)]
            assert spent == pytest.approx(accountant.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-9)
        assert len(client.epsilons) == 2
        assert 7.99 < client.epsilons[-1] <= 8
        assert 0.5 * client.epsilons[-1] < client.second_epsilon < client.epsilons[-1]


def test_a_client_by_hand(tmp_path: Path) -> None:
    """Rows are those of the task, which no longer packs; signal to noise is rows per step / (σ √P)."""
    experiment = tiny(tmp_path, *ROWS)
    plan, task = planned(tmp_path, *ROWS), task_of(experiment)
    data = task.client_data("ben", clients_key(experiment.simulated_clients()), experiment.seed)
    ben = plan.clients[1]
    assert (ben.name, ben.rows, ben.trained_numbers) == ("ben", len(data.train), 4 * RANK)
    assert ben.expected_rows == pytest.approx(0.1 * len(data.train))
    assert ben.signal_to_noise == pytest.approx(ben.expected_rows / (ben.noise_multiplier * math.sqrt(4 * RANK)))
    assert "one window of one document" in plan.unit
    assert (plan.steps, plan.rounds, plan.lasts, plan.private) == (3, 2, None, True)


@pytest.mark.parametrize(
    ("strategy", "per_rank"), [("flora", 1.0), ("ffa_lora", 0.5), ("rolora", 0.5), ("fedsa_lora", 1.0)]
)
def test_frozen_factors_are_not_noised(tmp_path: Path, strategy: str, per_rank: float) -> None:
    options = (f"strategy.name={strategy}", "evaluation.on=[]")
    plan = planned(tmp_path, *ROWS, *options, ranks=EQUAL)
    assert {client.trained_numbers for client in plan.clients} == {4 * RANK * per_rank}


def test_the_stricter_budget_decides_and_what_was_spent_counts(tmp_path: Path) -> None:
    budgets = ("clients.ada.budget={epsilon=2}", "clients.ben.budget={epsilon=50}", "clients.cyd.budget={epsilon=2}")
    experiment = tiny(tmp_path, *ROWS, *budgets)
    earlier = {"cyd": Spending.of(Mechanism(2.0, 0.1), 20)}
    plan = make_plan(experiment, earlier).privacy
    assert plan is not None
    ada, ben, cyd, dot = plan.clients
    assert 1.99 < ada.epsilons[-1] <= 2
    assert ben.noise_multiplier == dot.noise_multiplier < ada.noise_multiplier < cyd.noise_multiplier
    both = earlier["cyd"] + Spending.of(Mechanism(cyd.noise_multiplier, 0.1), 6)
    assert 1.99 < both.epsilon(1e-5) <= 2
    assert plan.noise_multiplier == cyd.noise_multiplier
    assert (ada.budget_epsilon, dot.budget_epsilon) == (2, None)


def test_a_budget_that_earlier_runs_have_spent_does_not_keep_the_others_from_training(tmp_path: Path) -> None:
    spent = {"ada": Spending.of(Mechanism(1.0, 0.1), 20)}
    experiment = tiny(tmp_path, *ROWS, "clients.ada.budget={epsilon=2}")
    plan = make_plan(experiment, spent)
    assert plan.privacy is not None
    assert [client.name for client in plan.privacy.clients] == ["ben", "cyd", "dot"]
    assert any(notice.startswith("ada will refuse, and the run goes on without it: ") for notice in plan.notices)
    stopping = tiny(tmp_path, *ROWS, "clients.ada.budget={epsilon=2}", "privacy.on_exhausted=stop")
    with pytest.raises(ConfigurationError, match=r"client ada: a budget of ε = 2 cannot be kept"):
        make_plan(stopping, spent)


def test_fewer_participations_need_less_noise(tmp_path: Path) -> None:
    often, once = planned(tmp_path, *ROWS), planned(tmp_path, *ROWS, "privacy.participations=1")
    assert once.noise_multiplier < often.noise_multiplier
    assert once.rounds == 1


def test_with_noise_given_it_is_told_how_long_the_budget_lasts(tmp_path: Path) -> None:
    options = (*ROWS, "federation.rounds=9", "privacy.noise_multiplier=0.7")
    experiment = tiny(tmp_path, *options)
    plan = make_plan(experiment)
    assert plan.privacy is not None
    lasts = plan.privacy.lasts
    assert lasts is not None
    assert len(plan.privacy.clients[0].epsilons) == lasts < 9
    next_round = Spending.of(Mechanism(0.7, 0.1), 3 * (lasts + 1))
    assert plan.privacy.clients[0].epsilons[-1] <= 8 < next_round.epsilon(1e-5)
    said = f"with privacy.noise_multiplier = 0.7 the budget of ada, ben, cyd, dot lasts {lasts} rounds of 9"
    assert said in plan.notices
    assert f"ε lasts {lasts} rounds" in shown(plan, tmp_path, *options)
    assert refused(tmp_path, *ROWS, "privacy.noise_multiplier=0.1") == [
        "client ada, ben, cyd, dot: privacy.noise_multiplier = 0.1 spends ε = 193.4 in one round, more than is "
        "allowed; raise it, or leave it out to have the noise worked out"
    ]


def test_budgets_that_no_noise_keeps_are_named(tmp_path: Path) -> None:
    tight = "budget={epsilon=0.001}"
    (said,) = refused(tmp_path, *ROWS, f"clients.ben.{tight}", f"clients.dot.{tight}")
    assert said.startswith("client ben, dot: a budget of ε = 0.001 cannot be kept over 6 steps at δ = 1e-05")
    assert "raise epsilon or plan fewer rounds" in said


def test_everything_that_stands_in_the_way_is_said_at_once(tmp_path: Path) -> None:
    options = ("strategy.name=slora", "task.options.packing=true", 'evaluation.on=["clients", "server"]')
    assert refused(tmp_path, *ROWS, *options) == [
        'privacy.mode = "sample" protects single rows: task.options.packing joins documents into one row; set it to '
        "false",
        "strategy slora trains single entries of the matrices at first, for which no gradient per row is found; under "
        'privacy.mode = "sample" use another one, such as ffa_lora',
        'what clients measure on their own data must not be told under privacy; set evaluation.on = ["server"]',
    ]


def test_where_neither_side_may_evaluate_nobody_is_offered(tmp_path: Path) -> None:
    options = ("strategy.name=fedsa_lora",)
    assert [said.rpartition("; ")[2] for said in refused(tmp_path, *ROWS, *options)] == ["set evaluation.on = []"]
    said = refused(tmp_path, *ROWS, *options, 'evaluation.on=["clients"]')
    assert [line.rpartition("; ")[2] for line in said] == ["set evaluation.on = []"]


def test_what_weakens_the_promise_is_noticed(tmp_path: Path) -> None:
    overrides = ("privacy.mode=sample", "privacy.test_seed=1", "privacy.delta=0.1", "privacy.sample_rate=0.0001")
    notices = make_plan(tiny(tmp_path, *overrides, "privacy.noise_multiplier=1.0")).notices
    starts = (
        "NOT PRIVATE",
        "nobody measures the model",
        "δ = 0.1 would be kept by",
        "a step of ada, ben, cyd, dot takes",
    )
    assert len(notices) == len(starts)
    assert all(said.startswith(start) for said, start in zip(notices, starts, strict=True))


def test_clients_as_a_whole(tmp_path: Path) -> None:
    """Every round counts in full, one release each; the widest adapter's ``b`` is noised."""
    options = (*CLIENTS, "federation.cohort_size=2")
    plan = make_plan(tiny(tmp_path, *options))
    private = plan.privacy
    assert private is not None
    assert {client.rows for client in private.clients} == {None}
    assert {client.trained_numbers for client in private.clients} == {8 * RANK // 2}
    client = private.clients[0]
    accountant = RDPAccountant()
    accountant.history = [(client.noise_multiplier, 1.0, 2)]
    assert client.epsilons[-1] == pytest.approx(accountant.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-9)
    assert 7.99 < client.epsilons[-1] <= 8
    assert client.signal_to_noise == pytest.approx(2 / (client.noise_multiplier * math.sqrt(8 * RANK // 2)))
    text = shown(plan, tmp_path, *options)
    assert "What is protected: all that one client contributes" in text
    assert "no amplification" in text


def test_what_people_and_scripts_see(tmp_path: Path) -> None:
    options = (*ROWS, "clients.ada.budget={epsilon=2}")
    plan = make_plan(tiny(tmp_path, *options))
    text = shown(plan, tmp_path, *options)
    assert plan.privacy is not None
    assert f"noise at most {plan.privacy.noise_multiplier:.3g} × clipping norm 1" in text
    assert "What is protected: one window of one document" in text
    assert "ε after rounds (ada): 1: " in text
    assert "ε after rounds (ben, cyd, dot): 1: " in text
    read = json.loads(json_text(asdict(plan)))["privacy"]
    assert read["clients"][0]["budget_epsilon"] == 2
    assert read["noise_multiplier"] == plan.privacy.noise_multiplier
    assert json.loads(json_text(asdict(make_plan(tiny(tmp_path)))))["privacy"] is None
