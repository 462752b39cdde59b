"""Copies of a database while it is written, and upgrades that keep what there was."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, make_url

from common.errors import StoreError
from common.store import Metric, Round, RunLock, RunStore
from common.store import schema as store_schema
from common.store.backup import back_up
from common.store.engine import place_of
from common.store.upgrade import upgrade
from tests.small_run import RUN, START, everything, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAFLEET_DATABASE_URL", raising=False)
        make_run(folder := tmp_path_factory.mktemp("made"))
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one small run."""
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


# ---- backups


def test_a_backup_is_one_file_that_opens_as_a_store(home: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = back_up(home, tmp_path / "copy", steps=lambda *step: steps.append(step))
    assert (made.version, made.runs, made.nbytes) == ("0002", 1, (tmp_path / "copy").stat().st_size)
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    assert steps[-1][0] == steps[-1][1] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"home", "copy"}
    url = f"sqlite:///{tmp_path}/copy"
    assert everything(home, url=url) == everything(home)
    with RunStore.open(home, url) as store:
        store.set_status(RUN, "failed")
    assert "'failed'" not in everything(home)


@pytest.fixture
def writer(home: Path) -> Iterator[threading.Event]:
    """Commit rounds of two metrics each, until the test ends; the event is set when the first is there."""
    begun, ended = threading.Event(), threading.Event()

    def write() -> None:
        with RunStore.open(home) as store:
            for number in range(2, 10_000):
                pair = [Metric(RUN, number, name, number) for name in "ab"]
                store.commit_round(Round(RUN, number, START, "committed"), metrics=pair, rounds_done=number)
                begun.set()
                if ended.is_set():
                    return

    thread = threading.Thread(target=write)
    thread.start()
    yield begun
    ended.set()
    thread.join()


def test_a_backup_is_of_one_moment_while_a_run_goes_on(
    home: Path, tmp_path: Path, writer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.store.backup.PAGES", 1)
    assert writer.wait(30)
    counts: list[int] = []

    def look(done: int, total: int) -> None:
        with RunStore.open(home, read_only=True) as store:
            counts.append(store.get_run(RUN).rounds_done)

    back_up(home, tmp_path / "copy", steps=look)
    assert counts[0] < counts[-1]
    with RunStore.open(home, f"sqlite:///{tmp_path}/copy", read_only=True) as store:
        done = store.get_run(RUN).rounds_done
        assert done <= counts[0]
        assert [row.round for row in store.rounds(RUN)] == list(range(1, done + 1))
        assert [metric.round for metric in store.metrics(RUN, "b")] == list(range(2, done + 1))


def test_nothing_is_written_over_by_a_backup(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="exists already and is not overwritten"):
        back_up(home, home / "lorafleet.db")
    with pytest.raises(StoreError, match=r"nowhere/lorafleet\.db does not exist; name its --home or --database-url"):
        back_up(tmp_path / "nowhere", tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def damage(database: Path) -> None:
    """Write zeros over the last page."""
    with database.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)


def loosen(database: Path) -> None:
    """Remove the round that all other rows are of."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM rounds")


def empty(database: Path) -> None:
    """Leave no tables."""
    database.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (damage, "is damaged .*: nothing was copied; go back to an earlier backup|malformed.*restore a backup"),
        (loosen, "is damaged .rows of .* refer to others that are gone"),
        (empty, "holds no runs yet; there is nothing to keep"),
        (lambda path: path.write_bytes(b"no database" * 1_000), "not a database"),
    ],
    ids=["a page", "references", "empty", "no database"],
)
def test_a_damaged_database_is_not_taken_for_a_backup(home: Path, tmp_path: Path, spoil: object, told: str) -> None:
    assert callable(spoil)
    spoil(home / "lorafleet.db")
    with pytest.raises(StoreError, match=told) as caught:
        back_up(home, tmp_path / "copy")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@127.0.0.1:1/d",
        "postgresql://127.0.0.1:1/d?user=u&password=secret",
        "postgresql://u@127.0.0.1:1/d?sslpassword=secret",
        "mysql://127.0.0.1/d?password=secret",
    ],
)
def test_a_password_is_never_told(home: Path, tmp_path: Path, url: str) -> None:
    for verb in (lambda: back_up(home, tmp_path / "copy", url), lambda: upgrade(home, url)):
        with pytest.raises(StoreError) as caught:
            verb()
        assert "secret" not in str(caught.value)
    assert not (tmp_path / "copy").exists()


def test_the_socket_of_a_server_is_told() -> None:
    url = make_url("postgresql://u:secret@/d?host=/run/there&password=secret")
    assert place_of(url) == "the database postgresql://u:***@/d?host=%2Frun%2Fthere"


# ---- upgrades


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of version 0001, as its migration alone makes it, with one run and one round."""
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    home = tmp_path / "old"
    (home / "runs" / RUN).mkdir(parents=True)
    engine = create_engine(f"sqlite:///{home}/lorafleet.db")
    with engine.begin() as connection:
        command.upgrade(store_schema.alembic_config(connection), "0001")
        run = (RUN, "n", "completed", "t", "s", 1, "{}", "f00", 3, 1, "2026-01-01 00:00:00", "2026-01-01 00:00:00")
        columns = (
            "id, name, status, task, strategy, seed, experiment, fingerprint, rounds_planned, rounds_done, "
            "created_at, updated_at"
        )
        connection.exec_driver_sql(f"INSERT INTO runs ({columns}) VALUES ({','.join('?' * 12)})", run)  # noqa: S608
        connection.exec_driver_sql(
            "INSERT INTO rounds (run, round, started_at, status, cohort, base_version, bytes_up, bytes_down, seconds, "
            "phases, exact) VALUES ('r1', 1, '2026-01-01 00:00:00', 'committed', '[\"ada\"]', 0, 1, 2, 0.5, '{}', 1)"
        )
        connection.exec_driver_sql("INSERT INTO metrics VALUES ('r1', 1, 'loss', '', '', 'nan')")
    engine.dispose()
    return home


def test_an_old_database_is_upgraded_and_kept_as_it_was(old: Path) -> None:
    with pytest.raises(StoreError, match="of the older version 0001; run `lorafleet database upgrade`"):
        RunStore.open(old, read_only=True)
    done = upgrade(old)
    assert (done.before, done.after, done.backup) == ("0001", "0002", old / "lorafleet.db.0001.backup")
    told = everything(old)
    assert "created_at=datetime.datetime(2026, 1, 1, 0, 0, tzinfo=datetime.timezone.utc)" in told
    assert "cohort=('ada',)" in told
    assert "Metric(run='r1', round=1, name='loss', value=nan, client='', layer='')" in told
    with closing(sqlite3.connect(done.backup)) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        assert copy.execute("SELECT count(*) FROM metrics").fetchall() == [(1,)]
    again = upgrade(old)
    assert (again.before, again.after, again.backup) == ("0002", "0002", None)
    assert len(list(old.glob("*.backup*"))) == 1


def test_an_old_database_is_backed_up_as_it_is(old: Path, tmp_path: Path) -> None:
    assert back_up(old, tmp_path / "copy").version == "0001"
    (old / "lorafleet.db").unlink()
    shutil.copy(tmp_path / "copy", old / "lorafleet.db")
    assert upgrade(old).before == "0001"


def test_an_earlier_copy_is_not_written_over(old: Path) -> None:
    (old / "lorafleet.db.0001.backup").write_text("mine")
    assert upgrade(old).backup == old / "lorafleet.db.0001.backup-2"
    assert (old / "lorafleet.db.0001.backup").read_text() == "mine"


def test_a_database_in_use_is_not_upgraded(old: Path) -> None:
    with RunLock(old / "runs" / RUN), pytest.raises(StoreError, match="run r1 is being written; let it end"):
        upgrade(old)
    assert list(old.glob("*.backup*")) == []
    with pytest.raises(StoreError, match="of the older version 0001"):
        RunStore.open(old, read_only=True)


def test_without_room_for_the_copy_nothing_is_changed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("no room")

    monkeypatch.setattr("common.store.upgrade.back_up", full)
    with pytest.raises(StoreError, match="no room"):
        upgrade(old)
    with pytest.raises(StoreError, match="of the older version 0001"):
        RunStore.open(old, read_only=True)


def test_what_is_not_there_or_newer_is_not_upgraded(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        upgrade(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with closing(sqlite3.connect(home / "lorafleet.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(StoreError, match="of the newer version 0999, this code knows 0002; update LoRAFleet"):
        upgrade(home)
    empty(home / "lorafleet.db")
    with pytest.raises(StoreError, match="holds no runs yet; there is nothing to upgrade"):
        upgrade(home)
