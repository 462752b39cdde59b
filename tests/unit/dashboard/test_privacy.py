"""The page of privacy: what is spent, how long the rest lasts, and what it means to have none."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common.store import ClientRound, Metric, Round, RunStore
from dashboard.findings.budget import Policy, answer, odds, pace, rounds_left, unit
from dashboard.findings.silence import silence
from dashboard.queries import privacy
from dashboard.settings import positive
from dashboard.views.privacy_without import how_to_ask, protections, risks
from tests.pages import Opener

START = datetime(2026, 11, 1, tzinfo=UTC)
RUN = "run-1"
PRIVATE = {"mode": "sample", "epsilon": 8.0, "delta": 1e-5, "clipping_norm": 0.5, "accountant": "prv"}


def _store(home: Path, rounds: int = 0, clients: int = 4, **sections: Any) -> RunStore:
    """Write a run in which client i has spent i / 4 of ε = 1 per round; ``rounds`` of 10 are done."""
    store = RunStore.open(home, clock=lambda: START)
    text = json.dumps(sections)
    store.create_run(
        RUN, name="n", task="t", strategy="flora", seed=0, experiment=text, rounds_planned=10, fingerprint="f"
    )
    for number in range(rounds):
        spent = {f"c-{i}": number * i / 4 for i in range(1, clients + 1)}
        metrics = [Metric(RUN, number, "epsilon", value, client) for client, value in spent.items()]
        metrics.append(Metric(RUN, number, "noise_multiplier", 1.1))
        largest = max(spent.values(), default=math.nan)
        store.commit_round(Round(RUN, number, START, "committed", epsilon=largest), (), metrics, rounds_done=number)
    return store


def test_spending_and_spread(tmp_path: Path) -> None:
    with _store(tmp_path, 4) as store, store.reading() as connection:
        assert privacy.spending(connection, RUN).to_numpy().tolist() == [[0, 0.0], [1, 1.0], [2, 2.0], [3, 3.0]]
        assert privacy.spending(connection, RUN, 2)["round"].tolist() == [1, 3]
        spread = privacy.spread(connection, RUN, "epsilon")
        assert spread.columns.tolist() == ["round", "low", "median", "high", "largest", "clients"]
        assert spread.iloc[-1].tolist() == [3, 0.75, 1.5, 3.0, 3.0, 4]
        assert privacy.spread(connection, RUN, "nothing").empty


def test_many_rounds_are_thinned_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "POINTS", 2)
    with _store(tmp_path, 5) as store, store.reading() as connection:
        assert privacy.spread(connection, RUN, "epsilon")["round"].tolist() == [1, 4]


def test_what_is_no_number_was_not_spent(tmp_path: Path) -> None:
    with _store(tmp_path, 2, clients=0) as store, store.reading() as connection:
        assert privacy.spending(connection, RUN).empty  # NaN is not NULL


@pytest.mark.parametrize(
    ("value", "found"),
    [(1, 1.0), (0.5, 0.5), (0, None), (-1, None), (math.nan, None), (math.inf, None), (True, None), ("8", None)],
)
def test_settings_are_read_without_trust(value: object, found: float | None) -> None:
    assert positive(value) == found
    assert positive(10**400) is None


def test_policies(tmp_path: Path) -> None:
    with _store(tmp_path, privacy=PRIVATE) as store:
        policy = Policy.of(store.get_run(RUN))
    assert policy == Policy("sample", 8.0, 1e-5, 0.5, None, "prv")
    assert policy.promises
    assert not Policy("none").promises
    assert not Policy().promises


@pytest.mark.parametrize("held", [None, [], "none", {"mode": ["sample"], "epsilon": {}, "accountant": 3}])
def test_broken_policies_promise_nothing(held: object, tmp_path: Path) -> None:
    with _store(tmp_path, privacy=held) as store:
        assert Policy.of(store.get_run(RUN)) == Policy()


def test_units_in_words() -> None:
    assert "one row of a client's data set" in unit(Policy("sample"))
    assert "all of one client's data" in unit(Policy("client"))
    assert "do not say" in unit(Policy("else"))


def test_the_pace_is_that_of_the_last_rounds() -> None:
    assert pace([0, 1, 2, 3], [0.0, 3.0, 4.0, 5.0], back=2) == (1.0, 2)
    assert pace([0, 10], [0.0, 5.0]) == (0.5, 10)
    assert pace([3], [1.0]) is None
    assert pace([3, 4], [1.0, 1.0]) is None
    assert rounds_left(8.0, 5.0, 1.0) == 3
    assert rounds_left(8.0, 9.0, 1.0) == 0
    assert rounds_left(8.0, 0.0, 1e-300) == 10**9


def test_answers() -> None:
    policy = Policy("sample", 8.0)
    rounds, spent = [0, 1, 2], [0.0, 2.0, 4.0]
    assert answer(policy, rounds, spent, 3, True) == (
        "**ε = 4 of 8 is spent (50%).** At the pace of the last 2 rounds the rest lasts about 2 rounds; "
        "the run plans 1 more. This extends a straight line; it is no account of rounds that are not run yet."
    )
    assert "but the run plans 8: it will not reach the end" in answer(policy, rounds, spent, 10, True)
    assert "the rest would last about 2 rounds. This" in answer(policy, rounds, spent, 2, False)
    assert answer(policy, [1], [8.5], 3, True).endswith("a further round would break the promise.")
    assert answer(policy, [1], [1.0], 3, True) == "**ε = 1 of 8 is spent (12%).**"
    assert "name no budget" in answer(Policy("sample"), rounds, spent, 3, True)


def test_the_clients_own_accounts_go_before_a_straight_line() -> None:
    policy, rounds, spent = Policy("sample", 8.0), [0, 1, 2], [0.0, 2.0, 4.0]
    assert answer(policy, rounds, spent, 5, True, 3) == (
        "**ε = 4 of 8 is spent (50%).** By the clients' own accounts the rest lasts 3 rounds; the run plans 3 more."
    )
    assert "but the run plans 8: it will not reach the end" in answer(policy, rounds, spent, 10, True, 3)
    assert answer(policy, rounds, spent, 2, False, 3).endswith("the rest would have lasted 3 rounds.")
    assert "Nothing is left" in answer(policy, rounds, [0.0, 4.0, 7.9999], 5, True, 0)


def test_odds() -> None:
    assert odds(1.0) == "2.72 times"
    assert odds(1e308) == "more than a hundred million times"


def test_what_protects_a_run_without_privacy(tmp_path: Path) -> None:
    secure: dict[str, Any] = {
        "secure_aggregation": {"enabled": True, "min_cohort": 3},
        "evaluation": {"on": ["server"]},
    }
    with _store(tmp_path / "a", **secure) as store:
        run = store.get_run(RUN)
    assert "the server learns the sum of at least 3 clients and no single update" in " ".join(protections(run))
    assert "held-out" not in " ".join(risks(run))
    open_: dict[str, Any] = {"federation": {"keep_replies": True}, "evaluation": {"on": ["clients", "server"]}}
    with _store(tmp_path / "b", **open_) as store:
        run = store.get_run(RUN)
    assert "Secure aggregation is off" in " ".join(protections(run))
    assert "stays on the server's disk" in " ".join(protections(run))
    assert "held-out" in " ".join(risks(run))


def test_asking_names_settings_that_there_are() -> None:
    from common.privacy.settings import PrivacySettings

    named = set(re.findall(r"privacy\.(\w+)", how_to_ask()))
    assert named == {"mode", "epsilon"}
    assert named <= set(PrivacySettings.model_fields)


def test_a_private_run(tmp_path: Path, open_page: Opener) -> None:
    _store(tmp_path, 5, privacy=PRIVATE).close()
    page = open_page(tmp_path, "privacy", run=RUN, lines="c-2")
    assert not page.exception
    assert page.markdown[0].value.startswith("**ε = 4 of 8 is spent (50%).** At the pace of the last 4 rounds")
    assert {metric.label: metric.value for metric in page.metric} == {
        "ε spent": "4",
        "Budget ε": "8",
        "Rounds left": "≈ 4",
        "δ": "1e-05",
        "Noise multiplier": "1.1",
        "Clipping norm": "0.5",
    }
    assert page.dataframe[0].value.to_numpy().tolist()[0] == ["c-4", 4.0, 50.0, 4]
    assert page.multiselect(key="lines").value == ["c-2"]


def test_what_a_run_says_of_itself_is_shown(tmp_path: Path, open_page: Opener) -> None:
    """Its own words on what a row is, what is left, the second accountant, and that it is not private."""
    with _store(tmp_path, 3, privacy=PRIVATE | {"test_seed": 7}) as store:
        store.add_event(RUN, "privacy", "", data={"unit": "one *window* of text"})
        told = [
            Metric(RUN, 3, name, value, client)
            for client, left in (("c-1", 9.0), ("c-4", 4.0))
            for name, value in (("epsilon", 4.0), ("second_epsilon", 3.5), ("rounds_left", left))
        ]
        store.commit_round(Round(RUN, 3, START, "committed", epsilon=4.0), (), told, rounds_done=3)
        with store.reading() as connection:
            assert privacy.protected(connection, RUN) == "one *window* of text"
            assert privacy.least_left(connection, RUN) == 4
    page = open_page(tmp_path, "privacy", run=RUN)
    assert not page.exception
    assert "not private" in page.error[0].value
    assert "By the clients' own accounts the rest would have lasted 4 rounds." in page.markdown[0].value
    assert "(here a row is one \\*window\\* of text)" in page.markdown[1].value
    assert next(metric.value for metric in page.metric if metric.label == "Rounds left") == "4"
    shown = page.dataframe[0].value
    assert shown["second"].dropna().tolist() == [3.5, 3.5]


@pytest.mark.parametrize("data", [{"unit": 3}, {}, [1]], ids=str)
def test_what_a_run_says_is_not_trusted(data: Any, tmp_path: Path) -> None:
    with _store(tmp_path) as store:
        store.add_event(RUN, "privacy", "", data=data)
        store.commit_round(Round(RUN, 0, START, "committed"), (), [Metric(RUN, 0, "rounds_left", math.nan, "c")])
        with store.reading() as connection:
            assert privacy.protected(connection, RUN) == ""
            assert privacy.least_left(connection, RUN) is None


def test_what_clients_do_not_tell(tmp_path: Path) -> None:
    def said(name: str, **settings: str) -> str:
        with _store(tmp_path / name, privacy=settings) as store:
            return silence(store.get_run(RUN))

    assert said("none", mode="none") == ""
    assert "no losses, numbers of rows and working times" in said("rows", mode="sample", row_counts="private")
    assert "no losses and working times" in said("public", mode="sample", row_counts="public")
    assert "no losses and numbers of rows" in said("whole", mode="client")


def test_a_budget_that_was_planned_is_no_alarm_and_noise_never_repeats() -> None:
    """Noise worked out for the plan lasts to its end; noise that was given may not."""
    assert [Policy("sample", 8.0, noise_multiplier=noise).may_end_early for noise in (None, 1.0)] == [False, True]
    assert Policy("", 8.0).may_end_early
    assert [Policy("sample", seeded=seeded).repeats for seeded in (False, True)] == [False, True]
    assert Policy("none").repeats


def test_pages_without_the_clients_numbers_say_why(tmp_path: Path, open_page: Opener) -> None:
    with _store(tmp_path, privacy={"mode": "sample"}) as store:
        clients = [ClientRound(RUN, 1, f"c-{i}", "accepted", rank=4) for i in range(2)]
        store.commit_round(Round(RUN, 1, START, "committed", cohort=("c-0", "c-1")), clients, (), rounds_done=1)
    for name in ("clients", "run"):
        page = open_page(tmp_path, name, run=RUN)
        assert not page.exception
        assert any("Clients tell no losses" in caption.value for caption in page.caption), name
    assert any("never repeats" in caption.value for caption in page.caption)
    assert not any("No client has finished" in line.value for line in page.markdown)


def test_a_promise_without_spending_yet(tmp_path: Path, open_page: Opener) -> None:
    _store(tmp_path, privacy=PRIVATE).close()
    page = open_page(tmp_path, "privacy", run=RUN)
    assert not page.exception
    assert page.markdown[0].value.startswith("No round has recorded a spending yet.")


def test_a_run_without_privacy(tmp_path: Path, open_page: Opener) -> None:
    _store(tmp_path).close()
    page = open_page(tmp_path, "privacy", run=RUN)
    assert not page.exception
    assert page.markdown[0].value.startswith("**This run has no differential privacy:**")
    assert not page.metric
