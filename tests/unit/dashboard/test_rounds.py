"""What a run's page asks the store: exact numbers of a run so small that they can be counted by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from common.store import ClientRound, Event, Metric, Round, RunStore
from dashboard.queries import costs, happenings, rounds
from dashboard.queries.standing import standing, watched_clients

RUN = "run-1"
START = datetime(2026, 11, 1, tzinfo=UTC)
CLIENTS = ("ada", "ben", "cyd", "dot")


def create(store: RunStore, run: str = RUN) -> None:
    store.create_run(run, name="n", task="t", strategy="flora", seed=0, experiment="{}", rounds_planned=9)


def commit(store: RunStore, number: int, metrics: list[Metric], status: str = "committed", run: str = RUN) -> None:
    """Commit a round of ``10 + number`` seconds; ben is late in even rounds, ada takes 6 s, the others 2 s."""
    clients = [
        ClientRound(run, number, name, "late", "no answer", seconds=0.0)
        if name == "ben" and number % 2 == 0
        else ClientRound(run, number, name, "accepted", seconds=6.0 if name == "ada" else 2.0)
        for name in CLIENTS
    ]
    taken = sum(client.status == "accepted" for client in clients)
    row = Round(
        run,
        number,
        START + timedelta(minutes=number),
        status,  # type: ignore[arg-type]
        "too few" if status == "failed" else None,
        CLIENTS if number else (),
        bytes_up=100 * number,
        bytes_down=1_000,
        seconds=10.0 + number,
        phases={"train": 5.0, "evaluate": 1.0 * number},
        error=0.1 * number,
    )
    told = [
        Event(run, "round_started", "it begins", START, number),
        Event(run, "aggregated", "merged", START, number, data={"k": taken, "n": 4, "needed": 2}),
        Event(run, status, f"round {number}", START, number),
    ]
    store.commit_round(row, clients if number else [], metrics, events=told, rounds_done=number)


def losses(number: int, *values: float, run: str = RUN) -> list[Metric]:
    """Return held-out losses of clients, and as the federation's the round's number."""
    named = zip(CLIENTS, values, strict=False)
    return [
        Metric(run, number, "held_out_loss", float(number)),
        *(Metric(run, number, "held_out_loss", value, name) for name, value in named),
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    """Round 0, three that were committed, the third of them evaluated by no client, one that failed, one under way."""
    with RunStore.open(tmp_path, clock=lambda: START) as store:
        create(store)
        commit(store, 0, losses(0, 4.0, 2.0, 3.0, 1.0))
        commit(store, 1, [*losses(1, 4.0, math.nan, 3.0, math.inf), *layers(1, 2.0, 4.0)])
        commit(store, 2, [*layers(2, math.nan, 3.0), Metric(RUN, 2, "discarded_energy", 0.25)])
        commit(store, 3, [], "failed")
        store.begin_round(RUN, 4, CLIENTS)
        store.add_event(RUN, "dispatched", "4 clients train", round=4)
        store.record_client(ClientRound(RUN, 4, "ada", "received", seconds=6.0))
        yield store


def layers(number: int, *ranks: float) -> list[Metric]:
    return [Metric(RUN, number, "effective_rank", rank, "", f"layer-{i}") for i, rank in enumerate(ranks)]


@pytest.fixture
def connection(store: RunStore) -> Iterator[Connection]:
    with store.reading() as connection:
        yield connection


def test_rounds_that_ended_are_offered_newest_first(connection: Connection) -> None:
    assert rounds.ended_rounds(connection, RUN) == [3, 2, 1, 0]
    assert rounds.one_round(connection, RUN, 9) is None


def test_what_is_measured_is_known_with_whether_clients_were(connection: Connection) -> None:
    assert rounds.measured(connection, RUN) == {"discarded_energy": False, "held_out_loss": True}
    assert rounds.measured(connection, "no run") == {}


def test_quantiles_are_values_of_clients_and_leave_out_what_is_no_number(connection: Connection) -> None:
    found = rounds.client_spread(connection, RUN, "held_out_loss")
    assert found.to_dict("list") == {
        "round": [0, 1],
        "least": [1.0, 3.0],
        "low": [1.0, 3.0],
        "median": [2.0, 3.0],
        "high": [4.0, 4.0],
        "most": [4.0, 4.0],
        "clients": [4, 2],
    }


def test_a_metric_of_some_clients(connection: Connection) -> None:
    found = rounds.client_metric(connection, RUN, "held_out_loss", ("dot", "ada"))
    assert list(found.itertuples(index=False, name=None)) == [
        (0, "ada", 4.0), (0, "dot", 1.0), (1, "ada", 4.0), (1, "dot", math.inf)
    ]  # fmt: skip
    assert rounds.federation_metric(connection, RUN, "held_out_loss").to_dict("list") == {
        "round": [0, 1],
        "value": [0.0, 1.0],
    }
    assert rounds.client_metric(connection, RUN, "held_out_loss", ()).empty


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 100])
def test_a_long_line_is_thinned_over_the_rounds_that_were_evaluated_and_keeps_the_last(
    tmp_path: Path, most: int
) -> None:
    with RunStore.open(tmp_path) as store:
        create(store)
        for number in range(1, 22):
            commit(store, number, losses(number, 1.0) if number % 3 == 0 else [])
        with store.reading() as connection:
            line = rounds.federation_metric(connection, RUN, "held_out_loss", most)
            band = rounds.client_spread(connection, RUN, "held_out_loss", most=most)
    evaluated = [3, 6, 9, 12, 15, 18, 21]
    assert line["round"].tolist() == band["round"].tolist()
    assert set(line["round"]) <= set(evaluated)
    assert line["round"].iloc[-1] == 21
    assert min(most, 7) / 2 <= len(line) <= most


def test_costs_are_means_over_a_bar(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "BARS", 2)
    assert costs.traffic(connection, RUN).to_dict("list") == {
        "first": [0, 2],
        "last": [1, 3],
        "bytes_up": [50.0, 250.0],
        "bytes_down": [1_000.0, 1_000.0],
    }
    found = costs.phases(connection, RUN)
    assert found[found["first"] == 2].to_dict("list") == {
        "first": [2, 2, 2],
        "last": [3, 3, 3],
        "phase": ["train", "aggregate", "evaluate"],
        "seconds": [5.0, 0.0, 2.5],
    }


def test_sizes_that_lie_do_not_break_the_sums(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        create(store)
        phases = {"train": math.inf, "aggregate": "long", "evaluate": -1.0}
        for number in range(3):
            row = Round(RUN, number, START, "committed", bytes_up=10**30, bytes_down=-(10**30), phases=phases)  # type: ignore[arg-type]
            store.commit_round(row)
        with store.reading() as connection:
            assert costs.traffic(connection, RUN)["bytes_up"].tolist() == pytest.approx([2.0**63] * 3)
            assert costs.phases(connection, RUN)["seconds"].tolist() == [0.0] * 9
            assert standing(connection, RUN).bytes_up == pytest.approx(3 * 2.0**63)


def test_merges(connection: Connection) -> None:
    assert costs.merges(connection, RUN)["error"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    found = costs.effective_ranks(connection, RUN).to_dict("list")
    assert found == {"round": [1, 2], "value": [3.0, 3.0], "low": [2.0, 3.0], "high": [4.0, 3.0]}
    assert costs.discarded(connection, RUN).to_dict("list") == {
        "round": [2],
        "name": ["discarded_energy"],
        "value": [0.25],
    }


@pytest.mark.parametrize(
    ("what", "kinds", "total"),
    [
        ("what matters", ["failed", "committed"], 4),
        ("rounds", ["failed", "committed"], 4),
        ("everything", ["dispatched", "failed"], 13),
        ("left out", [], 0),
    ],
)
def test_events_by_the_page(connection: Connection, what: str, kinds: list[str], total: int) -> None:
    page, count = happenings.happenings(connection, RUN, what, 0, 2)
    assert (page["kind"].tolist(), count) == (kinds, total)
    after, _ = happenings.happenings(connection, RUN, what, max(0, total - 1), 2)
    assert len(after) == min(1, total)


def test_how_a_run_stands(connection: Connection) -> None:
    found = standing(connection, RUN)
    assert found.begun is not None
    assert (found.begun.round, found.begun.status, found.step, found.replied) == (4, "running", "dispatched", 1)
    assert (found.taken, found.asked, found.needed) == (4, 4, 2)
    assert found.recent == (11.0, 12.0, 13.0)
    assert (found.failed, found.last_failed and found.last_failed.reason) == (1, "too few")
    assert (found.bytes_up, found.bytes_down, found.seconds, found.epsilon) == (600.0, 4_000.0, 46.0, None)
    assert (found.loss_name, found.first_loss, found.losses) == ("held_out_loss", 0.0, ((0, 0.0), (1, 1.0)))
    assert found.merged is not None
    assert found.merged.round == 2


def test_a_run_without_rounds_stands_nowhere(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        create(store)
        with store.reading() as connection:
            found, clients = standing(connection, RUN), watched_clients(connection, RUN)
    assert (found.begun, found.merged, found.last_failed, found.losses) == (None, None, None, ())
    assert (clients.rounds, clients.missing, clients.seconds, clients.slowest) == (0, (), (), None)


def test_clients_are_watched_in_training_rounds_that_ended(connection: Connection) -> None:
    found = watched_clients(connection, RUN)
    assert found.rounds == 3
    assert found.missing == (("ben", 1, "late", "no answer"),)
    assert found.seconds == (("ada", 6.0), ("ben", 2.0), ("cyd", 2.0), ("dot", 2.0))
    assert found.slowest == ("ada", 6.0)
