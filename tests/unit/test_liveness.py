"""Whether somebody writes a run: the lock tells where its folder is, the sign of life where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.store import Run, RunLock, RunStore, last_sign, shown_status

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    with RunStore.open(tmp_path / "home", clock=lambda: NOW) as opened:
        yield opened


@pytest.fixture
def run(store: RunStore) -> Run:
    return store.create_run(
        "r1", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=1, fingerprint=""
    )


def test_the_lock_tells_whatever_the_signs_of_life_say(store: RunStore, run: Run) -> None:
    long_ago = replace(run, alive_at=NOW - timedelta(days=1))
    with RunLock(store.run_folder("r1")):
        assert shown_status(store, long_ago, NOW) == "running"
    assert shown_status(store, replace(run, alive_at=NOW), NOW) == "interrupted"


@pytest.mark.parametrize(("age", "status"), [(0, "running"), (60, "running"), (61, "interrupted"), (-5, "running")])
def test_on_another_machine_the_last_sign_of_life_tells(store: RunStore, run: Run, age: int, status: str) -> None:
    shutil.rmtree(store.run_folder("r1"))
    assert shown_status(store, replace(run, alive_at=NOW - timedelta(seconds=age)), NOW) == status


def test_without_any_sign_the_status_stands(store: RunStore, run: Run) -> None:
    shutil.rmtree(store.run_folder("r1"))
    assert run.alive_at is None
    assert shown_status(store, run, NOW) == "running"


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted"])
def test_a_run_that_ended_is_what_it_is(store: RunStore, run: Run, status: str) -> None:
    assert shown_status(store, replace(run, status=status), NOW) == status  # type: ignore[arg-type]


def test_a_beat_is_a_sign_but_no_change(store: RunStore, run: Run) -> None:
    assert last_sign(run) == run.updated_at == NOW
    later = NOW + timedelta(seconds=5)
    with RunStore.open(store.home, clock=lambda: later) as writer:
        writer.mark_alive("r1")
    beaten = store.get_run("r1")
    assert (beaten.alive_at, beaten.updated_at) == (later, NOW)
    assert last_sign(beaten) == later
    assert last_sign(replace(beaten, updated_at=later + timedelta(seconds=1))) == later + timedelta(seconds=1)
