"""Runs in one file: what goes in comes out, and a kill on the way does no harm."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from common.errors import CorruptArtefact, StoreError, UnknownNameError
from common.store import ClientRound, RunLock, RunStatus, RunStore, packing, verify, write_artefact
from common.store.database import Database
from common.store.models import Base
from common.store.packing import pack_run
from common.store.rows import TABLES
from common.store.unpacking import add_run
from tests.hostile_store import hostile_store
from tests.small_run import REPLY, RUN, START, STATE, commit, everything, files, make_run


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


@pytest.fixture
def packed(home: Path, tmp_path: Path) -> Path:
    pack_run(home, RUN, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere"


# ---- the way there and back


def test_a_run_is_the_same_in_another_home(home: Path, packed: Path, elsewhere: Path) -> None:
    added = add_run(elsewhere, packed)
    assert everything(elsewhere) == everything(home)
    assert files(elsewhere) == files(home)
    assert (added.run.id, added.was, added.files, added.left_out) == (RUN, RUN, 3, ())


def test_it_says_what_it_packed(home: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = pack_run(home, "last", tmp_path / "packed", steps=lambda *step: steps.append(step))
    assert (made.run.id, made.files, made.replies, made.left_out, made.private) == (RUN, 3, 1, (), False)
    assert dict(made.rows) == {
        "runs": 1, "rounds": 1, "clients": 1, "client_rounds": 2, "metrics": 4, "statistics": 1, "artefacts": 2,
        "events": 1,
    }  # fmt: skip
    assert made.nbytes == (tmp_path / "packed").stat().st_size
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1] == sum(map(len, files(home).values()))


def test_a_pack_is_its_owners_alone_and_equal_runs_make_equal_files(home: Path, packed: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(packed.stat().st_mode) == 0o600
    pack_run(home, RUN, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()


def test_all_tables_are_packed_in_an_order_that_references_allow() -> None:
    assert {table.name for table in TABLES} == set(Base.metadata.tables)
    for place, table in enumerate(TABLES):
        assert {key.column.table for key in table.foreign_keys} <= set(TABLES[:place])


def test_a_store_that_means_harm_comes_through_as_it_is(tmp_path: Path, elsewhere: Path) -> None:
    home = tmp_path / "home"
    for run in hostile_store(home):
        with RunStore.open(home) as store:
            store.set_status(run, "failed", "\x1b[31m\0")
        pack_run(home, run, tmp_path / f"{run}.zip")
        add_run(elsewhere, tmp_path / f"{run}.zip")
        assert everything(elsewhere, run) == everything(home, run)


def test_under_another_id_all_paths_follow(home: Path, packed: Path, elsewhere: Path) -> None:
    assert add_run(elsewhere, packed, new_id="mine").was == RUN
    assert files(elsewhere, "mine") == files(home)
    with RunStore.open(elsewhere) as store:
        assert [run.id for run in store.runs()] == ["mine"]
        for artefact in store.artefacts("mine"):
            verify(store.artefact_file("mine", artefact.path), artefact.sha256)
        assert store.get_run("mine").adapter_path == "runs/mine/adapter-0001.bin"
        assert store.rounds("mine")[0].state_path == f"runs/mine/{STATE}"
        assert store.client_rounds("mine")[0].artefact_path == f"runs/mine/{REPLY}"
        assert store.events("mine")[-1].text == "added from a packed file; it was r1 there"
        store.delete_run("mine")
    add_run(elsewhere, packed)
    assert everything(elsewhere) == everything(home)


def test_what_was_running_arrives_as_interrupted(home: Path, tmp_path: Path, elsewhere: Path) -> None:
    with RunStore.open(home, clock=lambda: START) as store:
        store.set_status(RUN, "running")
        store.begin_round(RUN, 2, ["ada"])
        reply = write_artefact(store.run_folder(RUN), "rounds/0002/replies/ada.bin", b"early")
        early = ClientRound(RUN, 2, "ada", "received", artefact_path=reply.path, artefact_sha256=reply.sha256)
        store.record_client(early)
    made = pack_run(home, RUN, tmp_path / "packed")
    assert (made.run.status, made.replies) == ("running", 2)
    run = add_run(elsewhere, tmp_path / "packed").run
    assert (run.status, run.finished_at) == ("interrupted", START)
    assert run.reason is not None
    assert run.reason.endswith("go on with: lorafleet resume r1")
    with RunStore.open(elsewhere) as store:
        assert store.client_rounds(RUN, 2) == [early]
        assert store.rounds(RUN)[-1].status == "running"
        assert store.events(RUN)[-1].kind == "run_added"


def test_rows_of_other_runs_stay_where_they_are(home: Path, packed: Path) -> None:
    before = everything(home)
    add_run(home, packed, new_id="twin")
    assert everything(home) == before
    assert everything(home, "twin").count("'r1'") == 0


def test_a_run_that_is_written_meanwhile_is_packed_as_it_was(
    home: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = everything(home), packing.read_rows

    def reading(connection: Any, table: Any, run: str | None = None) -> Iterable[dict[str, Any]]:
        if table.name == "metrics":
            with RunStore.open(home, clock=lambda: START) as store:
                commit(store, 2)
        return read(connection, table, run)

    monkeypatch.setattr(packing, "read_rows", reading)
    pack_run(home, RUN, tmp_path / "packed")
    assert everything(home) != before
    add_run(elsewhere, tmp_path / "packed")
    assert everything(elsewhere) == before


# ---- what is not packed


def test_replies_stay_at_home_when_asked(home: Path, tmp_path: Path, elsewhere: Path) -> None:
    made = pack_run(home, RUN, tmp_path / "packed", replies=False)
    assert (made.files, made.replies, made.left_out) == (2, 0, (REPLY,))
    added = add_run(elsewhere, tmp_path / "packed")
    assert added.left_out == (REPLY,)
    assert set(files(elsewhere)) == {"adapter-0001.bin", STATE}
    with RunStore.open(elsewhere) as store:
        assert [artefact.kind for artefact in store.artefacts(RUN)] == ["state"]
        ada = store.client_rounds(RUN)[0]
        assert (ada.status, ada.artefact_path, ada.artefact_sha256) == ("accepted", None, None)


def test_what_clients_keep_is_never_packed(home: Path, tmp_path: Path) -> None:
    memory = home / "runs" / RUN / "clients" / "ada" / "memory"
    memory.mkdir(parents=True)
    (memory / "own.bin").write_bytes(b"ada's")
    assert pack_run(home, RUN, tmp_path / "packed").private
    with ZipFile(tmp_path / "packed") as archive:
        assert not [name for name in archive.namelist() if "clients/" in name]


@pytest.mark.parametrize("path", ["adapter-0001.bin", STATE, REPLY])
@pytest.mark.parametrize("there", [False, True])
def test_an_artefact_that_is_not_whole_is_not_packed(home: Path, tmp_path: Path, path: str, there: bool) -> None:
    place = home / "runs" / RUN / path
    place.unlink()
    if there:
        place.write_bytes(b"another")
    with pytest.raises(CorruptArtefact, match=re.escape(path)) as caught:
        pack_run(home, RUN, tmp_path / "packed")
    assert ("--without-replies" in str(caught.value)) == (path == REPLY)
    assert [place.name for place in tmp_path.iterdir()] == ["home"]


def test_a_reply_of_the_round_under_way_may_be_gone(home: Path, tmp_path: Path, elsewhere: Path) -> None:
    with RunStore.open(home) as store:
        store.begin_round(RUN, 2, ["ada"])
        gone = f"runs/{RUN}/rounds/0002/replies/ada.bin"
        store.record_client(ClientRound(RUN, 2, "ada", "received", artefact_path=gone, artefact_sha256="0" * 64))
    assert pack_run(home, RUN, tmp_path / "packed").left_out == ("rounds/0002/replies/ada.bin",)
    add_run(elsewhere, tmp_path / "packed")
    with RunStore.open(elsewhere) as store:
        assert store.client_rounds(RUN, 2) == [ClientRound(RUN, 2, "ada", "received")]


def test_nothing_is_written_over(home: Path, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    with pytest.raises(StoreError, match="exists already and is not overwritten"):
        pack_run(home, RUN, packed)
    assert packed.read_bytes() == before
    with pytest.raises(StoreError, match=r"cannot write .*nowhere/x .*No such file"):
        pack_run(home, RUN, tmp_path / "nowhere" / "x")
    with pytest.raises(UnknownNameError):
        pack_run(home, "r7", tmp_path / "x")


# ---- what is not added


def test_a_taken_id_is_refused(home: Path, packed: Path, elsewhere: Path) -> None:
    before = everything(home), files(home)
    with pytest.raises(StoreError, match="already a run r1; give this one another id with --as"):
        add_run(home, packed)
    assert (everything(home), files(home)) == before
    with pytest.raises(StoreError, match="cannot be a run's id"):
        add_run(elsewhere, packed, new_id="../r2")
    assert not elsewhere.exists()


# ---- a kill, and what it leaves


def test_a_folder_that_a_kill_left_without_a_row_is_completed(home: Path, packed: Path, elsewhere: Path) -> None:
    RunStore.open(elsewhere).close()
    shutil.copytree(home / "runs" / RUN / "rounds", elsewhere / "runs" / RUN / "rounds")
    (elsewhere / "runs" / RUN / ".adapter-0001.bin.tmp").write_bytes(b"half")
    before = os.stat(elsewhere / "runs" / RUN / STATE)
    add_run(elsewhere, packed)
    assert everything(elsewhere) == everything(home)
    assert files(elsewhere) == files(home)
    assert os.stat(elsewhere / "runs" / RUN / STATE).st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("path", [STATE, "clients/ada/memory/own.bin", "notes.txt"])
def test_a_folder_of_somebody_else_is_left_alone(packed: Path, elsewhere: Path, path: str) -> None:
    RunStore.open(elsewhere).close()
    place = elsewhere / "runs" / RUN / path
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"has no run in the database but holds .* of another one"):
        add_run(elsewhere, packed)
    assert files(elsewhere) == {path: b"mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_before_the_rows_leaves_nothing(
    packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(self: Database) -> Any:
        assert set(files(elsewhere)) == {"adapter-0001.bin", STATE, REPLY}
        raise error

    monkeypatch.setattr(Database, "writing", fail)
    with pytest.raises(error):
        add_run(elsewhere, packed)
    assert not (elsewhere / "runs" / RUN).exists()


def test_only_one_adds_a_run_at_a_time(packed: Path, elsewhere: Path) -> None:
    with RunLock(elsewhere / "runs" / RUN), pytest.raises(StoreError, match="run r1 is being written by process"):
        add_run(elsewhere, packed)


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted"])
def test_a_run_that_has_ended_stays_as_it_is(home: Path, tmp_path: Path, elsewhere: Path, status: RunStatus) -> None:
    with RunStore.open(home) as store:
        store.set_status(RUN, status, "because")
    pack_run(home, RUN, tmp_path / "packed")
    add_run(elsewhere, tmp_path / "packed")
    assert everything(elsewhere) == everything(home)
