"""The store on PostgreSQL: the same answers as on SQLite.

The server is the one of ``LORAFLEET_TEST_POSTGRESQL_URL``, else one of the test's own.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Table, create_engine, make_url, text

from common.errors import StoreError, UnknownNameError
from common.store import Artefact, ClientRound, Event, Metric, RunStore, backup, write_artefact
from common.store.models import Base
from common.store.packing import pack_run
from common.store.unpacking import add_run
from common.store.upgrade import upgrade
from tests.postgresql import Cluster
from tests.small_run import RUN, everything, files, make_run

URL_VARIABLE = "LORAFLEET_TEST_POSTGRESQL_URL"
START = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMAS = count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Give the URL of a server: the environment's, or one that is started and stopped here."""
    if given := os.environ.get(URL_VARIABLE):
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        cluster.start()
        try:
            yield cluster.url
        finally:
            cluster.stop()


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """Give the URL of an empty schema."""
    schema = f"lorafleet_test_{os.getpid()}_{next(SCHEMAS)}"
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    inside = make_url(server).update_query_dict({"options": f"-csearch_path={schema}"})
    yield inside.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


class Clock:
    """Each look is one second later."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> datetime:
        self.looks += 1
        return START + timedelta(seconds=self.looks)


def create(store: RunStore, run_id: str) -> None:
    store.create_run(run_id, name="n\0", task="t", strategy="s", seed=2**63 - 1, experiment="{}", rounds_planned=3)


def commit(store: RunStore, run_id: str, round: int) -> None:
    begun = store.begin_round(run_id, round, ["alice", "B\ud800b"], base_version=round)
    store.record_client(ClientRound(run_id, round, "alice", "received", metadata={"a\0": math.inf}))
    state = write_artefact(store.run_folder(run_id), f"{round}.bin", b"abc")
    values = [1.5, -0.5, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308]
    store.commit_round(
        replace(
            begun,
            status="committed",
            error=math.nan,
            phases={"train": 0.1},
            state_path=state.path,
            exact=True,
        ),
        [ClientRound(run_id, round, name, "rejected", "x\0\ud800" * 9_999, num_examples=10**30) for name in "aB"],
        [Metric(run_id, round, f"m{k}\0", value, name) for k, value in enumerate(values) for name in ("", "a", "B")],
        [Artefact(run_id, round, "state", state.path, state.sha256, state.nbytes)],
        [Event(run_id, "round", "Done\0.", START, round, "é\ud800", {"\0": math.nan})],
        rounds_done=round,
        best_metric=math.nan,
    )


def story(store: RunStore) -> str:
    """Use every verb and tell all it answers; as repr, since NaN is not equal to itself."""
    for run_id in ("r1", "r2", "gone"):
        create(store, run_id)
        commit(store, run_id, 0)
    commit(store, "r1", 1)
    store.begin_round("r1", 2, ["alice"])
    store.delete_run("gone")
    store.add_event("r2", "note", "text", data={"a": [None, True]})
    store.set_status("r2", "failed", "no\0 reply")
    with pytest.raises(UnknownNameError) as unknown:
        store.get_run("R\0")
    told: list[object] = [str(unknown.value), store.runs(), store.get_run("r1"), store.get_run("last")]
    for run_id in ("r1", "r2", "gone"):
        told += [store.rounds(run_id), store.client_rounds(run_id), store.artefacts(run_id)]
        told += [store.metrics(run_id), store.metrics(run_id, "m2\0", 0, "a"), store.events(run_id, limit=9)]
    return "\n".join(map(repr, told))


def test_the_answers_are_those_of_sqlite(tmp_path: Path, url: str) -> None:
    with RunStore.open(tmp_path / "one", url, clock=Clock()) as store:
        postgresql = story(store)
    with RunStore.open(tmp_path / "two", f"sqlite:///{tmp_path}/x.db", clock=Clock()) as store:
        assert postgresql == story(store)
    assert not (tmp_path / "one" / "lorafleet.db").exists()
    with RunStore.open(tmp_path / "one", url, read_only=True) as store:
        assert store.get_run("r1").rounds_done == 1


def test_migrations_make_the_tables_of_the_models(tmp_path: Path, url: str) -> None:
    RunStore.open(tmp_path, url).close()
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    with engine.begin() as connection:
        migrated = details(connection)
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
        assert details(connection) == migrated
    engine.dispose()


def details(connection: Connection) -> list[tuple[object, ...]]:
    """Tell what the comparison above does not look at: collations, and what constraints say."""
    columns = """
        SELECT table_name, column_name, data_type, character_maximum_length, collation_name, is_nullable
        FROM information_schema.columns WHERE table_schema = current_schema()
        AND table_name <> 'alembic_version' ORDER BY table_name, ordinal_position
    """
    constraints = """
        SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = current_schema()::regnamespace AND conname NOT LIKE 'alembic%' ORDER BY conname
    """
    return [tuple(row) for query in (columns, constraints) for row in connection.execute(text(query))]


def test_a_commit_that_fails_at_its_end_leaves_nothing(tmp_path: Path, url: str) -> None:
    with RunStore.open(tmp_path, url) as store:
        create(store, "r1")
        begun = store.begin_round("r1", 1, ["alice"])
        with pytest.raises(StoreError, match="violates foreign key") as caught:
            store.commit_round(
                replace(begun, status="committed"),
                metrics=[Metric("r1", 1, "loss", 1.0)],
                events=[Event("no such run", "note", "text", START)],
            )
        assert "\n" not in str(caught.value)
        assert store.round("r1", 1) == begun
        assert store.metrics("r1") == []


def test_several_may_open_a_fresh_database_at_once(tmp_path: Path, url: str) -> None:
    def use(number: int) -> str:
        with RunStore.open(tmp_path, url) as store:
            create(store, f"r{number}")
            return store.get_run(f"r{number}").id

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(4))) == ["r0", "r1", "r2", "r3"]


def test_a_lost_connection_is_made_again(tmp_path: Path, url: str) -> None:
    named = make_url(url).update_query_dict({"application_name": "to be lost"})
    with RunStore.open(tmp_path, named.render_as_string(hide_password=False)) as store:
        create(store, "r1")
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        with engine.connect() as connection:
            lost = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'to be lost'"
            assert connection.execute(text(lost)).scalars().all() == [True]
        engine.dispose()
        assert store.get_run("r1").id == "r1"


def test_reading_needs_a_database_that_is_up_to_date(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="holds no runs yet"):
        RunStore.open(tmp_path, url, read_only=True)
    RunStore.open(tmp_path, url).close()
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    engine.dispose()
    for read_only in (True, False):
        with pytest.raises(StoreError, match="of the newer version 0999"):
            RunStore.open(tmp_path, url, read_only=read_only)


def test_a_database_that_is_not_there_is_told_in_one_line(tmp_path: Path, server: str) -> None:
    missing = make_url(server).set(database="no_such_database").render_as_string(hide_password=False)
    with pytest.raises(StoreError, match=r"does not exist.*; create it, or check LORAFLEET") as caught:
        RunStore.open(tmp_path, missing)
    assert "\n" not in str(caught.value)


def test_a_run_moves_between_postgresql_and_sqlite(tmp_path: Path, url: str) -> None:
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    make_run(here, url)
    packed = pack_run(here, RUN, tmp_path / "packed", url)
    assert packed.rows["metrics"] == 4
    add_run(there, tmp_path / "packed")
    assert everything(there) == everything(here, url=url)
    assert files(there) == files(here)
    pack_run(there, RUN, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "packed").read_bytes()
    add_run(back, tmp_path / "again", url, new_id="mine")
    with RunStore.open(back, url) as store:
        assert [run.id for run in store.runs()] == ["r1", "mine"]
        store.delete_run("mine")
    with pytest.raises(StoreError, match="already a run r1"):
        add_run(back, tmp_path / "again", url)


@pytest.mark.parametrize("broken", ["no such round", "no such status"])
def test_rows_that_contradict_one_another_are_not_added(tmp_path: Path, url: str, broken: str) -> None:
    make_run(tmp_path / "here", f"sqlite:///{tmp_path}/x.db")
    engine = create_engine(f"sqlite:///{tmp_path}/x.db")  # without foreign keys
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints=ON")
        connection.execute(text(BROKEN[broken]))
    engine.dispose()
    pack_run(tmp_path / "here", RUN, tmp_path / "packed", f"sqlite:///{tmp_path}/x.db")
    with pytest.raises(StoreError, match="its rows contradict one another"):
        add_run(tmp_path / "there", tmp_path / "packed", url)
    assert not (tmp_path / "there" / "runs" / RUN).exists()


BROKEN = {
    "no such round": "UPDATE metrics SET round = 7",
    "no such status": "UPDATE runs SET status = 'asleep'",
}


def test_a_backup_of_postgresql_is_a_sqlite_file_of_one_moment(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, copy, read = tmp_path / "home", f"sqlite:///{tmp_path}/copy", backup.read_rows
    make_run(home, url)
    before = everything(home, url=url)

    def reading(connection: Connection, table: Table) -> Iterable[dict[str, Any]]:
        if table.name == "metrics":
            with RunStore.open(home, url) as store:
                store.delete_run(RUN)
        return read(connection, table)

    monkeypatch.setattr(backup, "read_rows", reading)
    made = backup.back_up(home, tmp_path / "copy", url)
    assert (made.runs, made.version) == (1, "0002")
    assert everything(home, url=copy) == before
    with RunStore.open(home, url) as store:
        assert store.runs() == []
    done = upgrade(home, url)
    assert (done.before, done.after, done.backup) == ("0002", "0002", None)
