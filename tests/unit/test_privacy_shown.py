"""What the terminal and scripts are told of a run's privacy, from its store and while it goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from common.experiment import Experiment
from common.store import ClientRound, Metric, Round, RunStore
from server.progress import Progress
from simulations.terminal.following import Follower
from simulations.terminal.listings import run_view
from simulations.terminal.live import ProgressLines
from simulations.terminal.privacy_tables import privacy_lines
from simulations.terminal.summary import json_text, run_summary
from simulations.terminal.tables import outcome_view, print_next

NOW = datetime(2030, 1, 2, tzinfo=UTC)
RUN = "20300102-private-ab"
SPENT = {"ann": (5.5, 4.5, 2.0), "bob": (6.5, 5.0, 1.0)}
"""By client: ε, that of the second accountant, rounds left."""


def drawn(*views: RenderableType) -> str:
    """Return what a wide terminal would show."""
    console = Console(file=io.StringIO(), width=300, highlight=False)
    console.print(*views, sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def begin(store: RunStore, **privacy: Any) -> None:
    """Begin a run under privacy that says what a row is."""
    clients: dict[str, Any] = {name: {} for name in SPENT}
    table = {"name": "private", "task": {"name": "causal_lm"}, "clients": clients, "privacy": privacy}
    text = Experiment.parse(table).model_dump_json()
    store.create_run(RUN, name="private", task="causal_lm", strategy="flora", seed=0, experiment=text, rounds_planned=3)
    store.add_event(RUN, "privacy", "", data={"unit": "one [bold] window"})


def train(store: RunStore, number: int, spent: dict[str, tuple[float, float, float]]) -> None:
    """Commit a round in which clients reported what they spent, and nothing else."""
    metrics = [Metric(RUN, number, "unseen_loss", 5.0 - number)]
    for client, values in spent.items():
        names = ("epsilon", "second_epsilon", "rounds_left")
        metrics += [Metric(RUN, number, name, value, client) for name, value in zip(names, values, strict=True)]
        metrics.append(Metric(RUN, number, "noise_multiplier", 0.75, client))
    clients = [ClientRound(RUN, number, client, "accepted", rank=4) for client in spent]
    most = max(values[0] for values in spent.values())
    row = Round(RUN, number, NOW, "committed", cohort=tuple(spent), seconds=1.5, epsilon=most)
    store.commit_round(row, clients, metrics, rounds_done=number)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.open(tmp_path / "home", clock=lambda: NOW) as opened:
        yield opened


def test_a_summary_tells_what_each_client_last_reported(store: RunStore) -> None:
    begin(store, mode="sample", epsilon=7.0)
    train(store, 1, {name: (1.0, 0.5, 3.0) for name in SPENT})
    train(store, 2, SPENT)
    train(store, 3, {"ann": (5.9, 4.9, 1.0)})
    told = json.loads(json_text(run_summary(store, RUN)))["privacy"]
    clients = told.pop("clients")
    assert told == {
        "mode": "sample",
        "unit": "one [bold] window",
        "budget": 7.0,
        "delta": 1e-5,
        "accountant": "rdp",
        "clipping_norm": 1.0,
        "private": True,
        "counts": "this run",
        "epsilon": 6.5,
        "rounds_left": 1,
    }
    keys = ("client", "epsilon", "second_epsilon", "noise_multiplier", "rounds_left", "round")
    assert [tuple(client[key] for key in keys) for client in clients] == [
        ("ann", 5.9, 4.9, 0.75, 1, 3),
        ("bob", 6.5, 5.0, 0.75, 1, 2),
    ]


def test_a_run_is_shown_with_budget_unit_and_clients(store: RunStore) -> None:
    begin(store, mode="sample", epsilon=7.0)
    train(store, 1, SPENT)
    summary = run_summary(store, RUN)
    text = drawn(run_view(summary))
    rows = {line.split()[0]: line.split() for line in text.split("privacy: ")[1].splitlines() if line.strip()}
    assert rows["bob"] == ["bob", "6.500", "5.000", "0.750", "1", "1"]
    assert "at most ε = 6.5 spent of 7 at δ = 1e-05, counted by rdp, 1 round left" in text
    assert "What is protected: one [bold] window" in text
    assert "simulated budget: counts this run only" in text
    assert "NOT PRIVATE" not in text
    first = next(line for line in text.splitlines() if line.startswith("ann"))
    assert first.split() == ["ann", "4", "1", "0", "–", "0", "B", "0", "B", "–"]


def test_what_is_simulated_with_a_seed_is_not_private(store: RunStore) -> None:
    begin(store, mode="sample", test_seed=1)
    lines = [drawn(line).strip() for line in privacy_lines(run_summary(store, RUN)["privacy"])]
    assert lines[0].startswith("NOT PRIVATE: privacy.test_seed")
    assert lines[1].startswith("privacy: no spending was reported yet of 8 at δ = 1e-05")


def test_a_persistent_ledger_is_named(store: RunStore) -> None:
    begin(store, mode="sample")
    run = store.get_run(RUN)
    settings = json.loads(run.experiment)
    settings["simulation"]["persistent_ledger"] = True
    store.update_run(RUN, experiment=json.dumps(settings))
    assert any("persistent ledger" in line for line in privacy_lines(run_summary(store, RUN)["privacy"]))


def test_settings_that_cannot_be_read_hide_nothing_else(store: RunStore) -> None:
    begin(store, mode="sample")
    train(store, 1, SPENT)
    store.update_run(RUN, experiment="{")
    summary = run_summary(store, RUN)
    assert summary["privacy"] is None
    assert summary["rounds"][0]["epsilon"] == 6.5
    assert "6.50" in drawn(run_view(summary))


def test_an_outcome_without_the_clients_losses(store: RunStore) -> None:
    """Columns nobody has a number in are left out, and a finished run is not offered more rounds."""
    begin(store, mode="sample")
    for number in (1, 2, 3):
        train(store, number, SPENT)
    store.set_status(RUN, "completed")
    summary = run_summary(store, RUN)
    text = drawn(outcome_view(summary))
    assert text.splitlines()[0].split() == ["round", "unseen", "epsilon", "up", "down", "seconds", "error"]
    assert "unseen loss 4.0000 → 2.0000" in text
    console = Console(file=io.StringIO(), width=300)
    print_next(console, summary)
    assert isinstance(console.file, io.StringIO)
    assert "--rounds" not in console.file.getvalue()


def test_progress_tells_what_is_spent_and_left(store: RunStore) -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = ProgressLines(console)
    lines(Progress("round_started", "", 1, data={"clients": ["ann"], "rounds": 3}))
    lines(Progress("reply", "", 1, "ann", {"seconds": 0.0, "train_loss": None, "epsilon": 5.5}))
    assert lines.state.done == {"ann": "ε 5.50"}
    data = {"metrics": {"unseen_loss": 4.0}, "epsilon": 5.5, "rounds_left": 2, "rounds": 3, "seconds": 2.0}
    lines(Progress("committed", "", 1, data=data))
    assert isinstance(console.file, io.StringIO)
    said = "round 1 of 3: 1 of 1 trained, loss 4.0000, ε 5.50 spent, 2 rounds left, 2.0 s"
    assert console.file.getvalue().strip() == said


def test_a_run_elsewhere_tells_the_same_from_its_store(store: RunStore) -> None:
    begin(store, mode="sample")
    heard: list[Progress] = []
    follower = Follower(store, RUN, heard.append)
    store.begin_round(RUN, 1, ["ann", "bob"])
    store.add_event(RUN, "round_started", "", round=1, data={"clients": ["ann", "bob"], "rounds": 3})
    train(store, 1, SPENT)
    store.add_event(RUN, "committed", "", round=1)
    follower.look()
    assert [step.text for step in heard if step.kind == "reply"] == ["ann trained", "bob trained"]
    assert (heard[-1].data["epsilon"], heard[-1].data["rounds_left"]) == (6.5, 1)
