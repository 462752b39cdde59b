"""One store as all sessions see it: asked once per change, and a store that goes away leaves the last view."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, text

from common.errors import StoreError
from common.store import Round, RunStore
from common.store.models import RoundRow
from dashboard.source import Look, Source

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[RunStore]:
    with RunStore.open(home) as opened:
        for name in ("r1", "r2"):
            opened.create_run(
                name, name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=3, fingerprint=""
            )
        yield opened


@pytest.fixture
def source(home: Path) -> Iterator[Source]:
    made = Source(home, None)
    yield made
    made._forget()


ASKED: list[str] = []


def rounds(connection: Connection, run: str) -> list[int]:
    """Count how often the store is asked, and answer."""
    ASKED.append(run)
    return list(connection.execute(select(RoundRow.round).where(RoundRow.run == run)).scalars())


def at(look: Look) -> list[int]:
    return look.ask(rounds, look.run)


def commit(store: RunStore, run: str, number: int) -> None:
    store.commit_round(Round(run, number, START, "committed"), rounds_done=number)


@pytest.fixture(autouse=True)
def _forget() -> None:
    ASKED.clear()


def test_it_is_asked_once_until_the_run_changes(store: RunStore, source: Source) -> None:
    commit(store, "r1", 0)
    assert [at(source.look("r1")) for _ in range(3)] == [[0]] * 3
    assert ASKED == ["r1"]
    commit(store, "r2", 0)
    store.mark_alive("r1")
    assert at(source.look("r1")) == [0]
    assert ASKED == ["r1"], "another run's round and a sign of life are no change"
    commit(store, "r1", 1)
    assert at(source.look("r1")) == [0, 1]
    assert ASKED == ["r1", "r1"]


def test_every_change_is_seen(store: RunStore, source: Source) -> None:
    tokens = [source.look("r1").token, source.look().token]
    for change in (
        lambda: store.add_event("r1", "note", "something"),
        lambda: store.update_run("r1", name="other"),
        lambda: commit(store, "r1", 0),
        lambda: store.set_status("r1", "failed", "why"),
    ):
        change()
        now = [source.look("r1").token, source.look().token]
        assert now[0] != tokens[0]
        assert now[1] != tokens[1]
        tokens = now
    store.delete_run("r2")
    assert source.look().token != tokens[1]


def test_all_sessions_share_the_answers(store: RunStore, source: Source) -> None:
    commit(store, "r1", 0)
    with ThreadPoolExecutor(8) as sessions:
        found = list(sessions.map(lambda _: at(source.look("r1")), range(40)))
    assert found == [[0]] * 40
    assert ASKED == ["r1"]


def test_an_answer_cannot_be_spoilt_by_who_got_it(store: RunStore, source: Source) -> None:
    commit(store, "r1", 0)
    at(source.look("r1")).append(99)
    assert at(source.look("r1")) == [0]


def test_a_store_that_goes_away_leaves_the_last_view_and_comes_back(
    home: Path, store: RunStore, source: Source
) -> None:
    commit(store, "r1", 0)
    assert at(source.look("r1")) == [0]
    answered = source.answered_at
    assert answered is not None
    store.close()
    database = home / "lorafleet.db"
    away = database.rename(home / "away")
    for _ in range(2):
        assert at(source.look("r1")) == [0]
        assert source.trouble
        assert source.answered_at == answered
    with pytest.raises(StoreError):
        source.look("r2")
    away.rename(database)
    assert at(source.look("r1")) == [0]
    assert source.trouble == ""
    assert source.answered_at > answered
    with RunStore.open(home) as again:
        commit(again, "r1", 1)
    assert at(source.look("r1")) == [0, 1]


def test_a_store_that_fails_between_look_and_question_leaves_the_view_before(
    home: Path, store: RunStore, source: Source
) -> None:
    commit(store, "r1", 0)
    assert at(source.look("r1")) == [0]
    commit(store, "r1", 1)
    store.close()
    look = source.look("r1")
    away = (home / "lorafleet.db").rename(home / "away")
    assert at(look) == [0]
    assert source.trouble
    assert at(source.look("r1")) == [0], "later looks too"
    away.rename(home / "lorafleet.db")
    assert at(source.look("r1")) == [0, 1]
    assert not source.trouble


def test_another_store_in_its_place_is_seen(home: Path, store: RunStore, source: Source) -> None:
    commit(store, "r1", 0)
    assert at(source.look("r1")) == [0]
    store.close()
    for file in home.glob("lorafleet.db*"):
        file.unlink()
    with RunStore.open(home) as other:
        other.create_run(
            "r1", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=3, fingerprint=""
        )
        commit(other, "r1", 7)
    assert at(source.look("r1")) == [7]


def test_without_a_store_it_says_so(home: Path, source: Source) -> None:
    with pytest.raises(StoreError):
        source.look()
    assert source.trouble
    assert source.answered_at is None
    with RunStore.open(home):
        pass
    source.look()
    assert source.trouble == ""


def test_an_older_schema_names_the_command(home: Path, store: RunStore, source: Source) -> None:
    store.close()
    with sqlite3.connect(home / "lorafleet.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
    with pytest.raises(StoreError, match="run `lorafleet database upgrade`"):
        source.look()


def test_it_only_reads(store: RunStore, source: Source) -> None:
    def write(connection: Connection) -> None:
        connection.execute(text("DELETE FROM runs"))

    with pytest.raises(StoreError):
        source.look().ask(write)
    assert len(store.runs()) == 2


def test_a_look_is_good_for_a_moment(source: Source, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dashboard.source.FRESH_S", 0.05)
    monkeypatch.setattr("dashboard.source.monotonic", lambda: now[0])
    first = source.look("r1")
    store.add_event("r1", "note", "something new")
    assert source.look("r1") == first
    now[0] += 0.06
    assert source.look("r1").token != first.token
