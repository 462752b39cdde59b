"""What the verbs that move runs and keep databases say."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.store import RunLock, RunStore
from simulations.terminal.keeping import add, back_up_database, pack, upgrade_database
from simulations.terminal.listings import last_samples
from simulations.terminal.tables import Output
from tests.small_run import ADAPTER, REPLY, RUN, make_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    make_run(tmp_path / "home")
    return tmp_path / "home"


def words(home: Path) -> Output:
    """Give an output whose words are kept."""
    return Output(home, "", console=Console(file=StringIO(), width=500, highlight=False))


def said(output: Output) -> list[str]:
    assert isinstance(output.console.file, StringIO)
    return output.console.file.getvalue().splitlines()


def values(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_packing_says_what_else_goes_with_it_and_what_does_not(home: Path, tmp_path: Path) -> None:
    (home / "runs" / RUN / "clients" / "ada" / "memory").mkdir(parents=True)
    with RunStore.open(home) as store:
        store.set_status(RUN, "running")
    output = words(home)
    with RunLock(home / "runs" / RUN):
        assert pack("last", tmp_path / "[b]packed", True, output) == 0
    head, *notes = said(output)
    assert head.startswith(f"packed: {tmp_path}/[b]packed: r1 with 13 rows and 3 files, ")
    assert notes == [
        "note: it holds 1 file of clients' own replies, each what one client learned; --without-replies leaves them "
        "out",
        "note: what clients keep to themselves is not in it; a run that needs it goes on elsewhere as if they had just "
        "joined",
        "note: the run goes on: this is how it stood after round 1 of 2",
    ]


def test_without_replies_they_are_named_and_missed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(RUN, tmp_path / "packed", False, Output(home, as_json=True))
    told = values(capsys)
    assert (told["id"], told["files"], told["left_out"]) == (RUN, 2, [REPLY])
    assert told["notices"] == ["1 file of clients' replies left out"]
    with RunStore.open(home) as store:
        store.set_status(RUN, "running")
    pack(RUN, tmp_path / "killed", False, Output(home, as_json=True))
    assert values(capsys)["status"] == "interrupted"
    add(tmp_path / "packed", "mine", Output(tmp_path / "there", as_json=True))
    told = values(capsys)
    assert (told["id"], told["was"], told["status"], told["left_out"]) == ("mine", RUN, "completed", [REPLY])
    assert told["notices"] == ["clients' replies that its rows name and that were not packed: 1"]


def test_an_added_run_says_what_to_type_next(home: Path, tmp_path: Path) -> None:
    pack(RUN, tmp_path / "packed", True, words(home))
    output = words(tmp_path / "there")
    assert add(tmp_path / "packed", None, output) == 0
    assert said(output)[0] == "added: r1, completed, 3 files, 512 B"
    assert f"adapter: {tmp_path}/there/runs/r1/{ADAPTER}" in said(output)
    assert any(line.endswith(" runs show r1") for line in said(output))


def test_a_backup_says_what_is_not_in_it(home: Path, tmp_path: Path) -> None:
    output = words(home)
    assert back_up_database(tmp_path / "copy", None, output) == 0
    head, note = said(output)
    assert head.startswith(f"written: {tmp_path}/copy: the database {home}/lorafleet.db with 1 run, ")
    assert note == (f"note: artefacts are not in it: copy {home}/runs after it, not before, so that no file is lacking")


def test_an_upgrade_says_from_where_to_where(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upgrade_database(None, Output(home, as_json=True))
    place = f"the database {home}/lorafleet.db"
    same = {"database": place, "from": "0002", "to": "0002", "changed": False, "backup": None, "notices": []}
    assert values(capsys) == same
    with closing(sqlite3.connect(home / "lorafleet.db")) as connection, connection:
        connection.executescript("DROP TABLE clients; DROP TABLE statistics; ALTER TABLE runs DROP COLUMN alive_at;")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    output = words(home)
    assert upgrade_database(None, output) == 0
    assert said(output) == [
        f"upgraded: {place} from version 0001 to 0002",
        f"as it was: {home}/lorafleet.db.0001.backup; delete it when all is well",
    ]


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, {}]", '[{"prompt": 1, "text": "x"}]', "[" * 10**5, "\udc80", " " * 10**6 + "[]"]
)
def test_samples_that_anybody_may_have_written_do_no_harm(tmp_path: Path, content: str) -> None:
    path = tmp_path / "samples.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert last_samples({"artifacts": [{"kind": "samples", "path": str(path), "round": 1}]}) == []
