"""The verbs of the store, each in its smallest case."""

from __future__ import annotations

import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from common.errors import RejectedUpdate, StoreError, UnknownNameError
from common.store import (
    Artefact,
    ClientRound,
    Event,
    Metric,
    Round,
    Run,
    RunLock,
    RunStore,
    write_artefact,
)
from common.store import schema as store_schema
from common.store.models import Base

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    """Each look is one second later."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> datetime:
        self.looks += 1
        return START + timedelta(seconds=self.looks)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    with RunStore.open(home, clock=Clock()) as opened:
        yield opened


def create(store: RunStore, run_id: str = "r1", **changes: Any) -> Run:
    given: dict[str, Any] = {
        "name": "quickstart",
        "task": "text",
        "strategy": "flora",
        "seed": 7,
        "experiment": '{"rounds": 5}',
        "rounds_planned": 5,
        "fingerprint": "f00",
    }
    return store.create_run(run_id, **{**given, **changes})


# --- runs


def test_a_new_run_is_running_and_has_a_folder(store: RunStore, home: Path) -> None:
    run = create(store)
    now = START + timedelta(seconds=1)
    assert run == Run(
        id="r1",
        name="quickstart",
        status="running",
        task="text",
        strategy="flora",
        seed=7,
        experiment='{"rounds": 5}',
        fingerprint="f00",
        rounds_planned=5,
        created_at=now,
        updated_at=now,
    )
    assert store.get_run("r1") == run
    assert store.run_folder("r1") == home / "runs" / "r1"
    assert store.run_folder("r1").is_dir()


def test_a_taken_id_is_refused(store: RunStore) -> None:
    create(store)
    with pytest.raises(StoreError, match="already a run r1; give the new one another id"):
        create(store)


@pytest.mark.parametrize("run_id", ["", "last", "..", "a/b", "a b", ".hidden", "a\n", "a\0", "x" * 101])
def test_an_id_that_cannot_name_a_folder_is_refused(store: RunStore, run_id: str) -> None:
    with pytest.raises(StoreError, match="cannot be a run's id"):
        create(store, run_id)
    assert store.runs() == []


def test_runs_come_newest_first(store: RunStore) -> None:
    for run_id in ("b", "c", "a"):
        create(store, run_id)
    assert [run.id for run in store.runs()] == ["a", "c", "b"]
    assert [run.id for run in store.runs(limit=2)] == ["a", "c"]


def test_a_run_is_found_by_id_by_unique_start_and_as_the_last(store: RunStore) -> None:
    for run_id in ("20260101", "20260101-b", "20260102"):
        create(store, run_id)
    assert store.get_run("20260101").id == "20260101"
    assert store.get_run("20260101-").id == "20260101-b"
    assert store.get_run("last").id == "20260102"


@pytest.mark.parametrize("name", ["x", "", "R", "2026%", "_", "r\0"])
def test_an_unknown_run_lists_the_newest(store: RunStore, name: str) -> None:
    for number in range(7):
        create(store, f"r{number}")
    listed = re.escape("there is: r6, r5, r4, r3, r2; `lorafleet runs list` shows all")
    with pytest.raises(UnknownNameError, match=listed):
        store.get_run(name)


def test_an_ambiguous_start_lists_what_fits(store: RunStore) -> None:
    create(store, "r1")
    create(store, "r2")
    with pytest.raises(UnknownNameError, match=r"there is: r1, r2; several begin so"):
        store.get_run("r")


def test_without_runs_there_is_no_last(store: RunStore) -> None:
    with pytest.raises(UnknownNameError, match="no run named 'last'; there is: none"):
        store.get_run("last")


def test_a_status_ends_a_run_and_running_resumes_it(store: RunStore) -> None:
    create(store)
    failed = store.set_status("r1", "failed", "no valid reply")
    assert (failed.status, failed.reason) == ("failed", "no valid reply")
    assert failed.finished_at == failed.updated_at == START + timedelta(seconds=2)
    resumed = store.set_status("r1", "running")
    assert (resumed.reason, resumed.finished_at) == (None, None)


def test_a_status_that_is_none_is_refused(store: RunStore) -> None:
    create(store)
    with pytest.raises(StoreError, match="CHECK"):
        store.set_status("r1", "sleeping")  # type: ignore[arg-type]


def test_fields_of_a_run_change_and_no_others(store: RunStore) -> None:
    create(store)
    file = write_artefact(store.run_folder("r1"), "adapter.bin", b"abc")
    run = store.update_run("r1", best_round=3, best_metric=4.5, adapter_path=file.path, adapter_sha256=file.sha256)
    assert (run.best_round, run.best_metric, run.adapter_path) == (3, 4.5, "runs/r1/adapter.bin")
    assert run.updated_at > run.created_at
    with pytest.raises(TypeError, match=r"a run has no \['id'\] to change"):
        store.update_run("r1", id="r2")  # type: ignore[call-arg]
    with pytest.raises(StoreError, match="must name a file under runs/r1/"):
        store.update_run("r1", adapter_path="runs/r2/adapter.bin")


CHANGES: dict[str, Callable[[RunStore], Any]] = {
    "set_status": lambda store: store.set_status("no", "failed"),
    "update_run": lambda store: store.update_run("no", rounds_done=1),
    "begin_round": lambda store: store.begin_round("no", 1, []),
    "record_client": lambda store: store.record_client(ClientRound("no", 1, "c", "received")),
    "commit_round": lambda store: store.commit_round(Round("no", 1, START, "committed")),
    "add_event": lambda store: store.add_event("no", "note", "text"),
    "delete_run": lambda store: store.delete_run("no"),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_every_change_of_an_unknown_run_is_refused(store: RunStore, verb: str) -> None:
    create(store)
    with pytest.raises(UnknownNameError, match="no run named 'no'; there is: r1"):
        CHANGES[verb](store)
    assert not (store.home / "runs" / "no").exists()


def test_deleting_a_run_removes_all_of_it_and_nothing_else(store: RunStore) -> None:
    for run_id in ("r1", "r2"):
        create(store, run_id)
        commit_everything(store, run_id)
    kept = everything(store, "r2")
    store.delete_run("r1")
    assert everything(store, "r1") == [None, [], [], [], []]
    assert [run.id for run in store.runs()] == ["r2"]
    assert everything(store, "r2") == kept
    assert not store.run_folder("r1").exists()


def test_a_run_that_is_being_written_cannot_be_deleted(store: RunStore) -> None:
    create(store)
    with RunLock(store.run_folder("r1")), pytest.raises(StoreError, match="run r1 is being written by"):
        store.delete_run("r1")
    assert store.get_run("r1").id == "r1"


# --- rounds


def commit_everything(store: RunStore, run_id: str = "r1", round: int = 1) -> Round:
    begun = store.begin_round(run_id, round, ["alice", "bob"], base_version=2)
    file = write_artefact(store.run_folder(run_id), f"{round}.bin", b"abc")
    return store.commit_round(
        replace(begun, status="committed", state_path=file.path, state_sha256=file.sha256, error=math.nan),
        [ClientRound(run_id, round, "bob", "accepted", rank=4, metadata={"a": [1, None]})],
        [Metric(run_id, round, "loss", 1.5), Metric(run_id, round, "loss", math.inf, "bob", "layers.0")],
        [Artefact(run_id, round, "state", file.path, file.sha256, file.nbytes)],
        [Event(run_id, "round", "Round done.", START, round, data={"seconds": 1})],
        rounds_done=round,
    )


def everything(store: RunStore, run_id: str) -> list[object]:
    # repr, since NaN is not equal to itself.
    return [
        repr(store.round(run_id, 1)) if store.round(run_id, 1) else None,
        store.client_rounds(run_id),
        store.metrics(run_id),
        store.artefacts(run_id),
        store.events(run_id),
    ]


def test_a_begun_round_keeps_its_cohort(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, ["bob", "alice"], base_version=3)
    assert begun == Round("r1", 1, begun.started_at, cohort=("bob", "alice"), base_version=3)
    assert store.begin_round("r1", 1, ["carol"]) == begun
    assert store.round("r1", 1) == begun
    assert store.round("r1", 2) is None


def test_a_commit_stores_all_of_a_round_at_once(store: RunStore) -> None:
    create(store)
    committed = commit_everything(store)
    assert committed.status == "committed"
    assert committed.committed_at is not None
    assert committed.error is not None
    assert math.isnan(committed.error)
    assert (committed.cohort, committed.base_version) == (("alice", "bob"), 2)
    assert store.client_rounds("r1", 1)[0].metadata == {"a": [1, None]}
    assert [(m.name, m.value, m.client) for m in store.metrics("r1")] == [
        ("loss", 1.5, ""),
        ("loss", math.inf, "bob"),
    ]
    assert store.artefacts("r1", kind="state")[0].path == "runs/r1/1.bin"
    assert store.events("r1")[0].text == "Round done."
    assert store.get_run("r1").rounds_done == 1


def test_a_committed_round_is_not_committed_again(store: RunStore) -> None:
    create(store)
    commit_everything(store)
    before = everything(store, "r1")
    with pytest.raises(StoreError, match="round 1 of run r1 is committed; go on to the next"):
        commit_everything(store)
    assert everything(store, "r1") == before


def test_a_failed_round_may_be_committed_again(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, ["alice"])
    failed = store.commit_round(
        replace(begun, status="failed", reason="no valid reply"), metrics=[Metric("r1", 1, "old", 1.0)]
    )
    assert failed.committed_at is not None
    store.commit_round(replace(failed, status="committed", reason=None), metrics=[Metric("r1", 1, "new", 2.0)])
    assert [metric.name for metric in store.metrics("r1")] == ["new"]
    assert [(round.status, round.reason) for round in store.rounds("r1")] == [("committed", None)]


def test_a_running_round_is_no_commit(store: RunStore) -> None:
    create(store)
    with pytest.raises(ValueError, match="commit it as committed or failed"):
        store.commit_round(store.begin_round("r1", 1, []))


def test_a_commit_that_fails_at_its_end_leaves_nothing(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, ["alice"])
    stray = Event("no such run", "note", "text", START)
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        store.commit_round(
            replace(begun, status="committed"),
            [ClientRound("r1", 1, "alice", "accepted")],
            [Metric("r1", 1, "loss", 1.0)],
            events=[stray],
            rounds_done=1,
        )
    assert store.round("r1", 1) == begun
    assert everything(store, "r1")[1:] == [[], [], [], []]
    assert store.get_run("r1").rounds_done == 0


def test_an_artefact_that_is_not_on_disk_is_not_committed(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, [])
    for artefact in (
        Artefact("r1", 1, "state", "runs/r1/missing.bin", "00", 3),
        Artefact("r1", 1, "state", "runs/r1/../r2/state.bin", "00", 3),
    ):
        with pytest.raises(StoreError, match=r"is not on disk|must name a file under"):
            store.commit_round(replace(begun, status="committed"), artefacts=[artefact])
    assert store.round("r1", 1) == begun


def test_a_client_is_recorded_over_what_was_recorded(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, ["alice"])
    received = ClientRound("r1", 1, "alice", "received", num_examples=5, metadata={"step": 1})
    store.record_client(received)
    store.record_client(replace(received, client="bob"))
    assert store.client_rounds("r1", 1) == [received, replace(received, client="bob")]
    refused = replace(received, status="rejected", reason="not finite")
    store.commit_round(replace(begun, status="committed"), [refused])
    assert store.client_rounds("r1") == [refused, replace(received, client="bob")]


def test_a_client_of_a_round_that_has_not_begun_is_refused(store: RunStore) -> None:
    create(store)
    with pytest.raises(StoreError, match="round 4 of run r1 has not begun"):
        store.record_client(ClientRound("r1", 4, "alice", "received"))


def test_filters_leave_the_rest_out(store: RunStore) -> None:
    create(store)
    for round in (0, 1):
        begun = store.begin_round("r1", round, [])
        metrics = [Metric("r1", round, name, 1.0, client) for name in ("b", "a") for client in ("", "al")]
        store.commit_round(replace(begun, status="committed"), metrics=metrics)
    found = [(m.round, m.name, m.client) for m in store.metrics("r1", name="a", client="")]
    assert found == [(0, "a", ""), (1, "a", "")]
    assert [(m.name, m.client) for m in store.metrics("r1", round=1)] == [
        ("a", ""),
        ("a", "al"),
        ("b", ""),
        ("b", "al"),
    ]


def test_events_count_up_and_are_never_given_twice(store: RunStore) -> None:
    create(store)
    create(store, "r2")
    first = store.add_event("r1", "note", "one", round=3, client="alice", data={"a": 1})
    second = store.add_event("r2", "note", "two")
    third = store.add_event("r1", "note", "three")
    assert first < second < third
    assert store.events("r1", after=first) == [Event("r1", "note", "three", store.events("r1")[1].at, id=third)]
    assert [event.id for event in store.events("r1", limit=1)] == [first]
    store.delete_run("r1")
    create(store)
    assert store.add_event("r1", "note", "four") > third


# --- what clients may send


def test_hostile_text_is_escaped_and_bounded(store: RunStore) -> None:
    create(store)
    store.begin_round("r1", 1, [])
    store.record_client(ClientRound("r1", 1, "a\0\ud800" + "x" * 300, "rejected", "y" * 5_000_000, num_examples=10**30))
    [client] = store.client_rounds("r1")
    assert client.client.startswith("a\\x00\\ud800xxx")
    assert len(client.client) == 200
    assert client.reason is not None
    assert len(client.reason) == 4_000
    assert client.reason.endswith("y… (5,000,000 characters in all)")
    assert client.num_examples == 2**63 - 1


def test_long_names_that_differ_at_the_end_stay_apart(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, [])
    names = ["n" * 300 + "1", "n" * 300 + "2"]
    store.commit_round(replace(begun, status="committed"), metrics=[Metric("r1", 1, name, 1.0) for name in names])
    assert len(store.metrics("r1")) == 2
    assert len(store.metrics("r1", name=names[0])) == 1


def test_equal_metrics_of_one_commit_do_not_stop_it(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, [])
    twice = [Metric("r1", 1, "loss\0", 1.0), Metric("r1", 1, "loss\\x00", 2.0)]
    store.commit_round(replace(begun, status="committed"), metrics=twice)
    assert [metric.value for metric in store.metrics("r1")] == [2.0]


def test_a_kept_reply_with_megabytes_of_metadata_is_refused_and_a_rejected_one_recorded(
    store: RunStore,
) -> None:
    create(store)
    store.begin_round("r1", 1, [])
    reply = ClientRound("r1", 1, "alice", "received", metadata={"a": "x" * 2_000_000})
    with pytest.raises(RejectedUpdate, match="client 'alice' carries 2,000,008 bytes of metadata"):
        store.record_client(reply)
    store.record_client(replace(reply, status="rejected"))
    assert store.client_rounds("r1")[0].metadata == {"left_out": "2,000,008 characters, at most 1,000,000 are kept"}


def test_times_come_back_in_utc_and_need_a_zone(store: RunStore) -> None:
    create(store)
    begun = store.begin_round("r1", 1, [])
    local = datetime(2026, 3, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    committed = store.commit_round(replace(begun, status="failed", started_at=local))
    assert committed.started_at.isoformat() == "2026-02-28T23:00:00+00:00"
    with pytest.raises(Exception, match="has no zone"):
        store.commit_round(replace(begun, status="failed", started_at=datetime(2026, 3, 1)))


# --- opening


def test_a_store_is_found_again(store: RunStore, home: Path) -> None:
    run = create(store)
    with RunStore.open(str(home)) as again:
        assert again.get_run("r1") == run


def test_a_commit_is_on_the_disk_and_not_only_with_the_system(store: RunStore) -> None:
    with store._database.writing() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    # 2 is FULL in SQLite's documentation of the pragma.
    assert values == ["wal", 2, 1, 30_000]


def test_a_missing_store_is_not_made_by_reading(home: Path) -> None:
    with pytest.raises(StoreError, match=r"lorafleet\.db does not exist; simulate an experiment first"):
        RunStore.open(home, read_only=True)
    assert not home.exists()


def test_a_store_opened_for_reading_reads_and_does_not_write(store: RunStore, home: Path) -> None:
    run = create(store)
    with RunStore.open(home, read_only=True) as reader:
        assert reader.runs() == [run]
        later = create(store, "r2")
        assert reader.get_run("last") == later
        with pytest.raises(StoreError, match="was opened for reading only"):
            reader.set_status("r1", "failed")


def test_a_file_that_is_no_database_is_told_in_one_line(home: Path) -> None:
    home.mkdir()
    (home / "lorafleet.db").write_bytes(b"not a database at all" * 100)
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"\(file is not a database\); it is damaged") as caught:
            RunStore.open(home, read_only=read_only)
        assert "\n" not in str(caught.value)


def test_a_damaged_page_is_told_in_one_line(store: RunStore, home: Path) -> None:
    for number in range(50):
        create(store, f"r{number}", experiment="x" * 5_000)
    store.close()
    file = home / "lorafleet.db"
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"malformed\); it is damaged: restore a backup"):
        RunStore.open(home).runs()


def test_a_full_disk_leaves_the_round_uncommitted(store: RunStore, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(store)
    store.close()
    connect = sqlite3.connect

    def small(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + 2}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with RunStore.open(home) as tight:
        begun = tight.begin_round("r1", 1, [])
        events = [Event("r1", "note", "x" * 4_000, START) for _ in range(20)]
        with pytest.raises(StoreError, match=r"database or disk is full\); free some space, then try again"):
            tight.commit_round(replace(begun, status="committed"), events=events)
        assert tight.round("r1", 1) == begun
        assert tight.events("r1") == []


def test_a_home_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file/home/runs .*choose another with --home"):
        RunStore.open(tmp_path / "file" / "home")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense", "cannot be read; LORAFLEET_DATABASE_URL must be like postgresql://"),
        ("mysql://u:secret@h/d", r"mysql://u:\*\*\*@h/d is of no kind known here"),
        ("sqlite://", "is of no kind known here"),
        (
            "postgresql://u:secret@127.0.0.1:1/d",
            r"u:\*\*\*@127\.0\.0\.1:1/d failed .*check that the server runs",
        ),
    ],
)
def test_a_wrong_url_is_told_in_one_line_without_its_password(home: Path, url: str, told: str) -> None:
    with pytest.raises(StoreError, match=told) as caught:
        RunStore.open(home, url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_names_the_database(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = home.with_name("else #where%.db")
    monkeypatch.setenv("LORAFLEET_DATABASE_URL", f"sqlite:///{elsewhere}")
    with RunStore.open(home) as opened:
        create(opened)
    assert elsewhere.exists()
    assert not (home / "lorafleet.db").exists()


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be nobody for a while: rights do not bind root."""
    if os.getuid() != 0:
        yield
        return
    nobody = 65534
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def set_rights(home: Path, file: int, folder: int) -> None:
    for path in (home, home / "runs", home / "runs" / "r1"):
        path.chmod(folder)
    (home / "lorafleet.db").chmod(file)


@pytest.fixture
def locked_home() -> Iterator[Path]:
    """Give a home with one run that may only be read."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with RunStore.open(home) as store:
            create(store)
        set_rights(home, 0o444, 0o555)
        yield home
        set_rights(home, 0o644, 0o755)


def test_a_read_only_home_shows_what_its_owner_writes_meanwhile(locked_home: Path) -> None:
    with without_privileges():
        reader = RunStore.open(locked_home, read_only=True)
        assert reader.get_run("last").id == "r1"
    set_rights(locked_home, 0o644, 0o755)
    with RunStore.open(locked_home) as writer:
        create(writer, "r2")
        set_rights(locked_home, 0o444, 0o555)
        with without_privileges():
            assert reader.get_run("last").id == "r2"
        set_rights(locked_home, 0o644, 0o755)
    set_rights(locked_home, 0o444, 0o555)
    with without_privileges():
        assert [run.id for run in reader.runs()] == ["r2", "r1"]


def test_a_read_only_home_is_not_written(locked_home: Path) -> None:
    with without_privileges():
        with pytest.raises(StoreError, match=r"lorafleet\.db failed .*choose another --home") as caught:
            RunStore.open(locked_home).add_event("r1", "note", "text")
        with pytest.raises(StoreError, match=r"cannot write .*runs/r1/lock .*choose a folder that can be written"):
            RunLock(locked_home / "runs" / "r1").__enter__()
    assert "\n" not in str(caught.value)


def test_neither_torch_nor_an_up_to_date_stores_alembic_is_imported(store: RunStore, home: Path) -> None:
    create(store)
    program = (
        "import sys; from common.store import RunStore; RunStore.open(sys.argv[1]).runs();"
        "print([name for name in ('torch', 'alembic') if name in sys.modules])"
    )
    root = Path(store_schema.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(home)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- versions of the tables


def statements(database: Path) -> set[str]:
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
        ).fetchall()
    connection.close()
    return {row[0] for row in rows}


def unordered(found: set[str]) -> set[frozenset[str]]:
    """What each statement says, in any order: a column added later stands behind the constraints."""
    inner = re.compile(r"[(),](?![^()]*\))|[()]$")
    return {frozenset(" ".join(part.split()) for part in inner.split(statement)) for statement in found}


def test_migrations_make_the_tables_of_the_models(store: RunStore, home: Path, tmp_path: Path) -> None:
    migrated = create_engine(f"sqlite:///{home}/lorafleet.db")
    with migrated.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    migrated.dispose()
    direct = create_engine(f"sqlite:///{tmp_path}/direct.db")
    Base.metadata.create_all(direct)
    direct.dispose()
    assert unordered(statements(home / "lorafleet.db")) == unordered(statements(tmp_path / "direct.db"))


def test_the_newest_version_is_alembics_head() -> None:
    scripts = ScriptDirectory(str(store_schema.MIGRATIONS))
    assert scripts.get_current_head() == store_schema.known_versions()[-1]


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code know one more version, which rebuilds the table that all others refer to."""
    migrations = tmp_path / "migrations"
    shutil.copytree(store_schema.MIGRATIONS, migrations)
    (migrations / "versions" / "0003_note.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '0003', '0002'\n"
        "def upgrade():\n"
        "    with op.batch_alter_table('runs', recreate='always') as runs:\n"
        "        runs.add_column(sa.Column('note', sa.Text()))\n"
    )
    monkeypatch.setattr(store_schema, "MIGRATIONS", migrations)


def test_an_older_store_is_upgraded_for_writing_and_keeps_its_rows(
    store: RunStore, home: Path, request: pytest.FixtureRequest
) -> None:
    create(store)
    commit_everything(store)
    before = everything(store, "r1")
    store.close()
    request.getfixturevalue("next_version")
    with pytest.raises(StoreError, match="of the older version 0002; run `lorafleet database upgrade`"):
        RunStore.open(home, read_only=True)
    with RunStore.open(home) as upgraded:
        assert everything(upgraded, "r1") == before
        with pytest.raises(UnknownNameError):
            upgraded.add_event("no such run", "note", "text")
    RunStore.open(home, read_only=True).close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_store_is_refused(store: RunStore, home: Path, read_only: bool) -> None:
    store.close()
    connection = sqlite3.connect(home / "lorafleet.db")
    connection.execute("UPDATE alembic_version SET version_num = '0999'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="of the newer version 0999, this code knows 0002; update LoRAFleet"):
        RunStore.open(home, read_only=read_only)


def test_somebody_elses_database_is_left_alone(home: Path) -> None:
    home.mkdir()
    connection = sqlite3.connect(home / "lorafleet.db")
    connection.execute("CREATE TABLE birds (name TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="holds tables that are not LoRAFleet's"):
        RunStore.open(home)
    assert statements(home / "lorafleet.db") == {"CREATE TABLE birds (name TEXT)"}


def test_rewind_forgets_later_rounds(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        store.create_run("r", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=3)
        for number in range(3):
            store.begin_round("r", number, ["a"])
            row = Round("r", number, datetime.now(UTC), status="committed")
            store.commit_round(row, metrics=[Metric("r", number, "loss", float(number))], rounds_done=number)
        run = store.rewind("r", 1)
        assert run.rounds_done == 1
        assert [row.round for row in store.rounds("r")] == [0, 1]
        assert [metric.round for metric in store.metrics("r")] == [0, 1]
        with pytest.raises(StoreError, match="no round 5"):
            store.rewind("r", 5)
