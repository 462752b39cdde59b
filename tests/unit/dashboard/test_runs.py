"""The list of runs: what the store tells of each, which rows a filter takes, how ticks follow their runs."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st

from common.store import Artefact, Metric, Round, Run, RunStatus, RunStore, write_artefact
from dashboard import session
from dashboard.queries import runs as queries
from dashboard.source import Source
from dashboard.views import ticks
from dashboard.views.cells import written
from dashboard.views.runs_table import BRIEF, COLUMNS, WRITERS, Found, Wanted, brief_rows, columns, options, run_rows
from tests.pages import Opener

START = datetime(2026, 11, 1, tzinfo=UTC)
HUGE = 2**62


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """One run of two rounds, a failed one judged on public data, one that has not begun."""
    clock = iter(range(1_000))
    with RunStore.open(tmp_path, clock=lambda: START + timedelta(seconds=next(clock))) as store:
        _create(store, "one", "flora")
        file = write_artefact(store.run_folder("one"), "state.bin", b"12345")
        for number, loss in enumerate((3.0, math.nan, 1.0)):
            metrics = [Metric("one", number, "held_out_loss", loss), Metric("one", number, "unseen_loss", 9.0)]
            metrics += [Metric("one", number, "held_out_loss", 7.0, client="ada")]
            files = [Artefact("one", 2, "state", file.path, file.sha256, file.nbytes)] if number == 2 else []
            store.commit_round(_round("one", number), (), metrics, files, rounds_done=number)
        store.update_run("one", best_metric=1.0, best_round=2)
        store.set_status("one", "completed")
        _create(store, "two", "fedavg", task="other")
        row = _round("two", 0, bytes_up=HUGE, bytes_down=HUGE, seconds=math.inf, epsilon=math.nan)
        store.commit_round(row, (), [Metric("two", 0, "unseen_loss", 4.0)], rounds_done=0)
        store.commit_round(_round("two", 1, bytes_up=HUGE, epsilon=0.5), rounds_done=1)
        store.set_status("two", "failed", "the disk is full")
        _create(store, "new", "flora")
    return tmp_path


def _create(store: RunStore, run: str, strategy: str, task: str = "words") -> None:
    text = json.dumps({"strategy": {"name": strategy}})
    store.create_run(
        run,
        name=f"name of {run}",
        task=task,
        strategy=strategy,
        seed=3,
        experiment=text,
        rounds_planned=4,
        fingerprint="f",
    )


def _round(run: str, number: int, **values: float) -> Round:
    given = {"bytes_up": 10, "bytes_down": 20, "seconds": 1.5, **values}
    return Round(run, number, START, "committed", **given)  # type: ignore[arg-type]


# Queries


def test_totals_are_sums_of_what_is_finite(home: Path) -> None:
    with RunStore.open(home, read_only=True) as store, store.reading() as connection:
        found = queries.totals(connection).set_index("run")
    assert found.loc["one"].tolist()[:3] == [30.0, 60.0, 4.5]
    assert found.loc["two"].tolist() == [2.0 * HUGE, HUGE + 20.0, 1.5, 0.5]
    assert set(found.index) == {"one", "two"}


def test_disk_use_is_of_the_files(home: Path) -> None:
    with RunStore.open(home, read_only=True) as store, store.reading() as connection:
        assert queries.disk_use(connection).to_numpy().tolist() == [["one", 5.0]]


def test_sparks_are_of_the_loss_a_run_is_judged_by(home: Path) -> None:
    with RunStore.open(home, read_only=True) as store, store.reading() as connection:
        found = queries.sparks(connection)
    assert found == {"one": ("held_out_loss", [3.0, 1.0]), "two": ("unseen_loss", [4.0])}


def test_sparks_of_a_long_run_keep_its_end(tmp_path: Path) -> None:
    rounds = 3 * queries.LOOKED_AT
    with RunStore.open(tmp_path) as store:
        _create(store, "long", "flora")
        for number in (0, 1, 2, 4, 8, rounds - 1, rounds):
            store.commit_round(
                _round("long", number), (), [Metric("long", number, "held_out_loss", float(number))], rounds_done=number
            )
        with store.reading() as connection:
            # Every fourth of them is looked at, and the last.
            assert queries.sparks(connection) == {"long": ("held_out_loss", [0.0, 4.0, 8.0, float(rounds)])}


def test_thinned_keeps_both_ends() -> None:
    values = [float(i) for i in range(101)]
    assert queries.thinned(values, 5) == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert queries.thinned(values[:5], 5) == values[:5]


# The table


def _run(run: str = "r", **values: object) -> Run:
    given: dict[str, object] = {
        "id": run,
        "name": "n",
        "status": "completed",
        "task": "words",
        "strategy": "flora",
        "seed": 1,
        "experiment": "{}",
        "fingerprint": "f",
        "rounds_planned": 4,
        "rounds_done": 1,
        "created_at": START,
        "updated_at": START,
    }
    return Run(**given | values)  # type: ignore[arg-type]


NOTHING = Found(pd.DataFrame(columns=["run"]), pd.DataFrame(columns=["run", "nbytes"]))


def test_a_row_tells_what_is_known_and_leaves_the_rest_empty() -> None:
    costs = {"run": "r", "bytes_up": 100.0, "bytes_down": 50.0, "seconds": 3661.4, "epsilon": 2.0}
    found = Found(
        pd.DataFrame([costs]), pd.DataFrame([{"run": "r", "nbytes": 7.0}]), {"r": ("unseen_loss", [2.0, 1.0])}
    )
    table = run_rows(
        [_run(best_metric=0.5), _run("s", best_metric=math.inf, rounds_planned=0)],
        {"r": "completed", "s": "failed"},
        found,
    )
    assert list(table.columns) == list(COLUMNS) == ["open", *columns(None)]
    known, bare = table.iloc[0], table.iloc[1]
    assert (known["state"], known["rounds"], known["done"], known["loss"]) == ("✓ completed", "1 of 4", 0.25, 0.5)
    assert (known["traffic"], known["disk"], known["epsilon"], known["losses"]) == (150.0, 7.0, 2.0, [2.0, 1.0])
    assert (known["judged"], known["seconds"]) == ("unseen loss", 3661.0)
    assert bare[["done", "loss", "traffic", "disk", "epsilon", "seconds"]].isna().all()


def test_costs_are_written_with_their_units_and_stay_numbers() -> None:
    costs = {"run": "r", "bytes_up": 45_700_000.0, "bytes_down": 0.0, "seconds": 3661.4, "epsilon": None}
    shown = written(run_rows([_run()], {"r": "completed"}, Found(pd.DataFrame([costs]), NOTHING.disk)), WRITERS)
    assert shown.data["traffic"][0] == 45_700_000.0
    _, cells = shown.hide(axis="index").to_string(delimiter="|").splitlines()
    said = dict(zip(COLUMNS, cells.split("|"), strict=True))
    assert [said[name] for name in ("traffic", "seconds", "disk")] == ["45.7 MB", "1 h 01 min", "–"]


def test_a_run_is_done_only_at_its_end_whatever_it_says() -> None:
    done = [
        run_rows([_run(rounds_done=n, rounds_planned=m)], {"r": "running"}, NOTHING)["done"][0]
        for n, m in ((999, 1000), (2**62, 4), (1, -3))
    ]
    assert done[:2] == [0.99, 1.0]
    assert math.isnan(done[2])


def test_hostile_numbers_and_texts_fit_into_the_table() -> None:
    costs = {"run": "r", "bytes_up": 1e300, "bytes_down": 0.0, "seconds": 1e300, "epsilon": math.nan}
    run = _run(name="<b>\u202ex\n" + "y" * 500, created_at=datetime.max.replace(tzinfo=UTC), seed=2**63 - 1)
    table = run_rows([run], {"r": "running"}, Found(pd.DataFrame([costs]), NOTHING.disk))
    assert table["name"][0].startswith("<b>\N{REPLACEMENT CHARACTER}x y")
    assert len(table["name"][0]) == 60
    assert table["seed"][0] == str(2**63 - 1)
    assert pd.isna(table["seconds"][0])


def test_a_short_row_has_fewer_columns() -> None:
    assert tuple(brief_rows([_run()], {"r": "completed"}).columns) == BRIEF


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (Wanted(), True),
        (Wanted("FLORA seed 1"), True),
        (Wanted("disk full"), True),
        (Wanted("flora seed 2"), False),
        (Wanted(state="✕ failed"), True),
        (Wanted(state="✓ completed"), False),
        (Wanted(strategy="flora", task="words"), True),
        (Wanted(strategy="flora", task="other"), False),
    ],
)
def test_a_filter_takes_what_all_its_parts_take(wanted: Wanted, taken: bool) -> None:
    assert wanted.takes(_run(status="failed", reason="the disk is full"), "failed") is taken


def test_options_are_told_apart_by_what_is_shown() -> None:
    assert options(["flora", "fedavg", "flora\u200b", "flora"]) == ["fedavg", "flora", "flora\N{REPLACEMENT CHARACTER}"]


# Ticks


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A session's memory."""
    memory: dict[str, object] = {}
    monkeypatch.setattr(st, "session_state", memory)
    return memory


def _tick(state: dict[str, object], *rows: int) -> None:
    state["t"] = {"selection": {"rows": list(rows), "columns": [], "cells": []}}
    ticks.taken("t")()


def test_ticks_follow_their_runs(state: dict[str, object]) -> None:
    ticks.follow("t", ["c", "b", "a"], ticks.chosen())
    _tick(state, 2, 0)
    assert ticks.chosen() == ["a", "c"]
    ticks.follow("t", ["d", "c", "b", "a"], ticks.chosen())  # a run began
    assert state["t"]["selection"]["rows"] == [1, 3]  # type: ignore[index]
    ticks.follow("t", ["c"], ticks.chosen())  # a filter hides the other
    _tick(state)
    assert ticks.chosen() == ["a"]


def test_ticks_beyond_the_table_are_nobody(state: dict[str, object]) -> None:
    ticks.follow("t", ["a"], [])
    _tick(state, 0, 7)
    assert ticks.chosen() == ["a"]
    ticks.choose([])
    assert ticks.chosen() == []


# Who lives


def test_a_run_that_nobody_writes_is_not_looked_at_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "source", lambda: Source(home, None))
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("new")
    assert run.status == "running"
    assert not session.is_live(run)


# The page


def test_the_page_lists_runs_newest_first(home: Path, open_page: Opener) -> None:
    page = open_page(home, "runs")
    assert not page.exception
    assert [(metric.label, metric.value) for metric in page.metric][:3] == [
        ("Runs", "3"),
        ("Running now", "0"),
        ("Failed or interrupted", "2"),  # nobody writes the run that has not begun
    ]
    table = page.dataframe[0].value
    assert table["id"].tolist() == ["new", "two", "one"]
    assert table["state"].tolist() == ["◌ interrupted", "✕ failed", "✓ completed"]
    assert [list(losses) for losses in table["losses"]] == [[], [4.0], [3.0, 1.0]]


def test_the_address_holds_the_filter(home: Path, open_page: Opener) -> None:
    page = open_page(home, "runs", q="name", strategy="flora", state="✓ completed")
    assert page.dataframe[0].value["id"].tolist() == ["one"]
    page.text_input(key="q").set_value("nothing is called so").run()
    assert not page.dataframe
    assert any("None of the 3 runs" in caption.value for caption in page.caption)


def test_ticked_runs_are_counted_and_compared(home: Path, open_page: Opener) -> None:
    page = open_page(home, "runs")
    page.session_state[ticks.CHOSEN] = ["one", "two", "gone"]
    page.run()
    assert not page.exception
    assert "**2 of 3 runs chosen**" in [text.value for text in page.markdown]
    assert page.session_state["runs_table"]["selection"]["rows"] == [1, 2]
    page.selectbox(key="strategy").set_value("flora").run()
    assert "**2 of 3 runs chosen**, 1 of them not in the filter" in [text.value for text in page.markdown]
    page.button(key="runs_clear").click().run()
    assert any("Tick some to compare them" in text.value for text in page.markdown)


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_every_state_has_words(status: RunStatus) -> None:
    assert run_rows([_run()], {"r": status}, NOTHING)["state"][0].endswith(status)
