"""What a client admits: as much as was planned and budgeted, charged before it is trained, never more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.node import Node
from client.privacy import balance
from client.privacy.account import Permit, admit, settle
from client.privacy.fingerprint import fingerprint_of
from client.privacy.ledger import Book, read_ledger
from common.errors import BudgetExhausted, LoRAFleetError, NotPrivate
from common.experiment import ClientSettings, Experiment
from common.messages import TrainOrder
from common.privacy.accounting import Mechanism, Spending
from common.privacy.settings import Budget
from common.tasks import Batch
from common.tasks.causal_lm import CausalLm
from tests.tiny import write_texts

STEPS = 8


class Numbers:
    """Rows that are their own number."""

    def __init__(self, count: int = 50, first: int = 0) -> None:
        self.values = torch.arange(first, first + count, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.values)

    def take(self, numbers: Tensor) -> Batch:
        return {"x": self.values[numbers], "odd": (self.values[numbers] % 2).bool()}


ROWS = Numbers()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the second number out where nobody looks at it: it takes longer than all the rest."""
    monkeypatch.setattr(balance, "SECOND_STEPS", 0)


def node(folder: Path, rounds: int = 10, clients: dict[str, Any] | None = None, **settings: Any) -> Node:
    """A client that is asked for eight steps a round at sample rate 0.1, budget 4.0 (spec §2, §11.9)."""
    table = {
        "task": {"name": "low_rank_regression"},
        "clients": clients or {"ada": {}},
        "training": {"steps": STEPS},
        "federation": {"rounds": rounds},
        "privacy": {"mode": "sample", "epsilon": 4.0, "sample_rate": 0.1} | settings,
    }
    experiment = Experiment.parse(table)
    return Node("ada", experiment, tuple(experiment.clients.items()), folder, None, folder / "privacy.db")


def order(number: int, run: str = "r", attempt: int = 1, rounds: int = 10) -> TrainOrder:
    return TrainOrder(
        run=run, round=number, attempt=attempt, rounds=rounds, fingerprint="", client="ada", base_version=0,
        global_hash="0" * 64, rank=2, seed=0, trains="ab",
    )  # fmt: skip


def trained(client: Node, run: str = "r", first: int = 1, last: int = 10) -> Iterator[Permit]:
    """Train rounds of a run until one is refused."""
    for number in range(first, last + 1):
        try:
            permit = admit(client, order(number, run), ROWS)
        except BudgetExhausted:
            return
        settle(client, permit)
        yield permit


def book_of(client: Node) -> Book:
    assert client.ledger is not None
    return read_ledger(client.ledger)


@pytest.mark.parametrize(("accountant", "noise"), [("rdp", 1.387), ("prv", 1.298)])
def test_a_budget_lasts_exactly_as_long_as_planned(tmp_path: Path, accountant: str, noise: float) -> None:
    client = node(tmp_path, accountant=accountant)
    permits = list(trained(client))
    assert [permit.report.rounds_left for permit in permits] == list(range(9, -1, -1))
    assert permits[0].mechanism == Mechanism(pytest.approx(noise, abs=1e-3), 0.1)
    assert 3.99 < permits[-1].report.epsilon <= 4.0
    with pytest.raises(
        BudgetExhausted, match=r"ε 4 of 4 \(of this experiment, δ = 1e-05\); a further round needs ε 4\.1"
    ):
        admit(client, order(10, attempt=2), ROWS)
    kinds = [entry.kind for entry in book_of(client).entries]
    assert kinds == ["plan", *["reserve", "done"] * 10]


def test_what_is_reported_is_what_was_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    permits = list(trained(node(tmp_path, noise_multiplier=1.4), last=2))
    for number, permit in enumerate(permits, 1):
        spent = Spending.of(Mechanism(1.4, 0.1), number * STEPS)
        assert permit.report.epsilon == spent.epsilon(1e-5)
        assert permit.report.second_epsilon == spent.epsilon(1e-5, "prv")
        assert (permit.steps, permit.clipping_norm, permit.report.delta) == (STEPS, 1.0, 1e-5)


def test_with_a_given_noise_training_goes_on_until_epsilon_is_spent(tmp_path: Path) -> None:
    client = node(tmp_path, noise_multiplier=1.3, epsilon=3.0)
    permits = list(trained(client))
    assert [permit.report.rounds_left for permit in permits] == [2, 1, 0]
    spent = Spending.of(Mechanism(1.3, 0.1), 4 * STEPS).epsilon(1e-5)
    told = rf"budget of ada is spent: .* needs ε {spent:.4g} in all; 7 of its 8 steps are left"
    with pytest.raises(BudgetExhausted, match=told):
        admit(client, order(4), ROWS)
    assert len(book_of(client).rounds_of("r")) == 3


def test_asked_again_after_a_crash_a_round_is_charged_again(tmp_path: Path) -> None:
    client = node(tmp_path)
    admit(client, order(1), ROWS)
    again = admit(client, order(1, attempt=2), ROWS)
    assert again.report.epsilon == Spending.of(again.mechanism, 2 * STEPS).epsilon(1e-5)
    assert again.report.rounds_left == 8
    settle(client, again)
    book = book_of(client)
    assert book.steps_of("r") == 2 * STEPS
    assert book.settled == {again.reserved.sequence}
    assert len(list(trained(client, first=2))) == 8


def test_the_owners_budget_counts_all_runs_on_the_data(tmp_path: Path) -> None:
    client = replace(node(tmp_path), budget=Budget(epsilon=5.0))
    assert len(list(trained(client, "first"))) == 10
    second = list(trained(client, "second"))
    assert len(second) == 10
    assert second[0].mechanism.noise_multiplier > 1.6  # the first run's, 1.387, would be too little for both
    both = Spending.of(second[0].mechanism, 80) + book_of(client).spent_by("first")
    assert 4.99 < both.epsilon(1e-5) <= 5.0
    with pytest.raises(
        BudgetExhausted, match=r"ada does not reach: .* ε = 5 cannot be kept over 80 steps at δ = 1e-05"
    ):
        admit(client, order(1, "third"), ROWS)
    other = Numbers(first=1000)
    with pytest.raises(BudgetExhausted, match="does not reach"):  # other rows under the old label
        admit(client, order(1, "third"), other)
    renamed = node(tmp_path, clients={"ada": {"data": "elsewhere"}})
    with pytest.raises(BudgetExhausted, match="does not reach"):  # the old rows under another label
        admit(replace(renamed, budget=client.budget), order(1, "third"), ROWS)
    assert admit(replace(renamed, budget=client.budget), order(1, "third"), other).report.rounds_left == 9


def test_a_budget_that_others_spend_meanwhile_ends_a_run_early(tmp_path: Path) -> None:
    client = replace(node(tmp_path, noise_multiplier=1.4), budget=Budget(epsilon=3.0, delta=1e-5))
    admit(client, order(1, "one"), ROWS)
    admit(client, order(1, "two"), ROWS)
    more = len(list(trained(client, "one", 2)))
    spent = [Spending.of(Mechanism(1.4, 0.1), rounds * STEPS).epsilon(1e-5) for rounds in (2 + more, 3 + more)]
    assert spent[0] <= 3.0 < spent[1]
    with pytest.raises(BudgetExhausted, match="the owner's, δ = 1e-05"):
        admit(client, order(2, "two"), ROWS)


def test_participations_are_counted_in_rounds(tmp_path: Path) -> None:
    for settings in ({}, {"noise_multiplier": 5.0}):
        client = node(tmp_path / str(len(settings)), participations=2, **settings)
        for number in (3, 7):
            permit = admit(client, order(number), ROWS)
        assert permit.report.rounds_left == 0
        with pytest.raises(BudgetExhausted):
            admit(client, order(8), ROWS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clipping_norm", 2.0), ("delta", 1e-6), ("epsilon", 9.0), ("sample_rate", 0.2), ("noise_multiplier", 0.7),
     ("accountant", "prv"), ("test_seed", 1)],
)  # fmt: skip
def test_settings_do_not_change_within_a_run(tmp_path: Path, name: str, value: Any) -> None:
    admit(node(tmp_path), order(2), ROWS)
    with pytest.raises(NotPrivate, match=f"privacy settings changed since round 2 of the run: {name} was .*; start"):
        admit(node(tmp_path, **{name: value}), order(3), ROWS)
    assert book_of(node(tmp_path)).steps_of("r") == STEPS


def test_an_order_beyond_the_experiment_is_refused(tmp_path: Path) -> None:
    for wrong in (order(11), order(1, rounds=11), order(1, rounds=9)):
        with pytest.raises(NotPrivate, match="but the experiment plans 10; no more rounds are trained"):
            admit(node(tmp_path), wrong, ROWS)
    assert not (tmp_path / "privacy.db").exists()


def test_a_client_without_a_folder_cannot_keep_the_promise(tmp_path: Path) -> None:
    with pytest.raises(NotPrivate, match="needs a ledger"):
        admit(replace(node(tmp_path), ledger=None), order(1), ROWS)


def test_a_budget_below_reach_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    client = node(tmp_path, epsilon=1e-4)
    with pytest.raises(BudgetExhausted, match=r"does not reach: .* the smallest ε within reach is"):
        admit(client, order(1), ROWS)
    assert book_of(client).entries == []


def test_a_clients_own_sample_rate_holds(tmp_path: Path) -> None:
    client = node(tmp_path, clients={"ada": {"sample_rate": 0.25, "data": "here"}})
    permit = admit(client, order(1), ROWS)
    assert permit.mechanism.sample_rate == permit.report.sample_rate == 0.25
    assert permit.reserved.label == "low_rank_regression:here"


def test_with_a_test_seed_everything_is_the_same_but_marked(tmp_path: Path) -> None:
    permit = admit(node(tmp_path, test_seed=7), order(1), ROWS)
    assert permit.report == admit(node(tmp_path / "other"), order(1), ROWS).report
    assert permit.reserved.test_seed == 7


def test_many_mechanisms_are_decided_on_by_orders(tmp_path: Path) -> None:
    client = replace(node(tmp_path), budget=Budget(epsilon=100.0))
    for number in range(balance.FEW + 1):
        noisy = node(tmp_path, accountant="prv", noise_multiplier=30.0 + number).experiment
        admit(replace(client, experiment=noisy), order(1, f"r{number}"), ROWS)
    spent = book_of(client).spent_on("low_rank_regression:ada", "")
    assert len(spent.steps) == balance.FEW + 1
    assert balance.deciding(balance.Limit(1.0, 1e-5, spent), "prv") == "rdp"


def test_a_fingerprint_is_of_what_is_in_the_rows() -> None:
    same = fingerprint_of(Numbers())
    assert fingerprint_of(Numbers()) == same == fingerprint_of(ROWS)
    others = [Numbers(49), Numbers(51), Numbers(first=1), Numbers(0)]
    assert len({same, *map(fingerprint_of, others)}) == 5
    changed = Numbers()
    changed.values[-1] += 1e-9
    assert fingerprint_of(changed) != same


def test_data_are_known_by_their_records_whatever_they_are_called(tmp_path: Path) -> None:
    """Another name, seed and length of rows: other rows, and another split, of the same texts."""
    texts = write_texts(tmp_path, ["ada", "ben"])
    copied = shutil.copytree(texts["ada"], tmp_path / "elsewhere" / "under another name")
    first, again, other = (
        CausalLm(sequence_length=length).client_data("x", (("x", ClientSettings(data=str(place))),), seed).train
        for place, length, seed in ((texts["ada"], 16, 0), (copied, 24, 7), (texts["ben"], 16, 0))
    )
    assert fingerprint_of(again) == fingerprint_of(first)
    assert not set(fingerprint_of(first).split()) & set(fingerprint_of(other).split())


def test_one_record_in_common_is_enough(tmp_path: Path) -> None:
    client = replace(node(tmp_path), budget=Budget(epsilon=3.0))
    permits = list(trained(client))
    renamed = replace(node(tmp_path, clients={"ada": {"data": "elsewhere"}}), budget=client.budget)
    assert len(permits) == 10
    assert any(row in fingerprint_of(ROWS).split() for row in fingerprint_of(Numbers(first=49)).split())
    with pytest.raises(BudgetExhausted, match="as good as nothing is left of it"):
        admit(renamed, order(1, "second"), Numbers(first=49))
    assert admit(renamed, order(1, "second"), Numbers(first=50)).report.rounds_left == 9


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    client = node(tmp_path, epsilon=1e-4)
    with pytest.raises(LoRAFleetError) as caught:
        admit(client, order(1), ROWS)
    assert "\n" not in str(caught.value)
