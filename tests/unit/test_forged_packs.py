"""Packed runs that nobody packed: each is refused in one line, and leaves no trace."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import pytest

from common.errors import StoreError
from common.store import RunStore, packed_file
from common.store.engine import DATABASE_FILE
from common.store.packed_rows import DEEPEST, decode
from common.store.packing import pack_run
from common.store.rows import TABLES
from common.store.unpacking import add_run
from tests.small_run import ADAPTER, RUN, STATE, files, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's home, its pack, and a home that is empty."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAFLEET_DATABASE_URL", raising=False)
        make_run(folder / "home")
        pack_run(folder / "home", RUN, folder / "packed")
        RunStore.open(folder / "empty").close()
    return folder


@pytest.fixture
def packed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LORAFLEET_DATABASE_URL", raising=False)
    shutil.copy(made / "packed", tmp_path)
    return tmp_path / "packed"


@pytest.fixture
def elsewhere(made: Path, tmp_path: Path) -> Path:
    """An empty home to add to."""
    shutil.copytree(made / "empty", tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


Entries = dict[str, bytes]


def entries_of(packed: Path) -> Entries:
    with ZipFile(packed) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(packed: Path, entries: Entries) -> None:
    with ZipFile(packed, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, ZIP_STORED if name.startswith("files/") else ZIP_DEFLATED)


def declare(entries: Entries, **changes: Any) -> None:
    """Make the manifest agree with the entries, but for the changes."""
    manifest = json.loads(entries["run.json"])
    for name, content in entries.items():
        kind, _, path = name.partition("/")
        said = {"sha256": hashlib.sha256(content).hexdigest(), "nbytes": len(content)}
        if kind == "rows":
            manifest["tables"][path.removesuffix(".jsonl")] = said | {"rows": content.count(b"\n")}
        elif kind == "files":
            manifest["files"][path] = said
    entries["run.json"] = json.dumps(manifest | changes).encode()


def forge(packed: Path, change: Callable[[Entries], object]) -> None:
    """Change entries of a pack and make its manifest agree with them."""
    entries = entries_of(packed)
    change(entries)
    declare(entries)
    write(packed, entries)


def edit(table: str, number: int, **changes: Any) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        lines = entries[f"rows/{table}.jsonl"].splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | changes).encode()
        entries[f"rows/{table}.jsonl"] = b"".join(line + b"\n" for line in lines)

    return change


def twice(table: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[f"rows/{table}.jsonl"] *= 2

    return change


def plant(path: str) -> Callable[[Entries], None]:
    return lambda entries: entries.update({f"files/{path}": b"planted"})


def put(table: str, content: bytes) -> Callable[[Entries], None]:
    return lambda entries: entries.update({f"rows/{table}.jsonl": content})


def manifest(**changes: Any) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries["run.json"] = json.dumps(json.loads(entries["run.json"]) | changes).encode()

    return change


def refused(packed: Path, elsewhere: Path, told: str) -> None:
    """Check that a pack is refused in one line, and that nothing of it is left."""
    with pytest.raises(StoreError, match=told) as caught:
        add_run(elsewhere, packed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert sorted(path.name for path in packed.parent.iterdir()) == ["elsewhere", "packed"]
    assert {path.name.removesuffix("-wal").removesuffix("-shm") for path in elsewhere.iterdir()} == {
        "runs",
        DATABASE_FILE,
    }
    assert list((elsewhere / "runs").iterdir()) == []
    with RunStore.open(elsewhere, read_only=True) as store:
        assert store.runs() == []


FORGED: dict[str, tuple[Callable[[Entries], object], str]] = {
    "out of the folder": (plant("../../evil"), "is no place for an artefact"),
    "from the root": (plant("/etc/evil"), "is no place for an artefact"),
    "up and down": (plant("rounds/../evil"), "is no place for an artefact"),
    "not the plain form": (plant("rounds//evil"), "is no place for an artefact"),
    "hidden": (plant(".hidden"), "is no place for an artefact"),
    "the lock": (plant("lock"), "is no place for an artefact"),
    "a client's own": (plant("clients/ada/memory/own.bin"), "is no place for an artefact"),
    "a long path": (plant("x" * 1_000), "is no place for an artefact"),
    "a file of no row": (plant("traceback.txt"), "no row names its file 'traceback.txt'"),
    "an id that leads away": (manifest(run="../evil"), "is no place for an artefact"),
    "an id that means another": (manifest(run="last"), "'last' cannot be a run's id"),
    "another id": (manifest(run="r2"), "a row of runs is of another run"),
    "another format": (manifest(format="zip"), "is of the format 'zip', expected 'lorafleet-run'"),
    "a newer form": (manifest(version=2, news=1), "of the newer form 2, this code knows 1; update LoRAFleet"),
    "newer tables": (manifest(tables_version="0999"), "of the newer version '0999', not 0002; update LoRAFleet"),
    "more in the manifest": (manifest(extra=1), "run.json is wrong at 'extra'"),
    "a wrong manifest": (manifest(tables_version=2), "run.json is wrong at 'tables_version'"),
    "a run of another id": (edit("runs", 0, id="r2"), "a row of runs is of another run"),
    "a row of another run": (edit("metrics", 1, run="r2"), "a row of metrics is of another run"),
    "an unknown status": (edit("runs", 0, status="asleep"), "its rows contradict one another"),
    "a file of another run": (edit("runs", 0, adapter_path="runs/r2/x"), "name files outside of the run's folder"),
    "a file elsewhere": (edit("runs", 0, adapter_path="runs/r1/../../x"), "name files outside of the run's folder"),
    "no such file": (edit("runs", 0, adapter_path="runs/r1/x"), "its rows name 'x', which is not in it"),
    "another hash": (edit("runs", 0, adapter_sha256="0" * 64), f"its rows name '{ADAPTER}', which is not in it as"),
    "another size": (edit("artefacts", 0, nbytes=1), "an artefact's row and its file differ in size"),
    "no such round": (edit("metrics", 0, round=7), "its rows contradict one another"),
    "metrics twice": (twice("metrics"), "its rows contradict one another"),
    "a run twice": (twice("runs"), "its rows contradict one another"),
    "no run": (put("runs", b""), "its rows contradict one another"),
    "another table": (put("birds", b""), "rows of an unknown table 'birds'"),
    "half a line": (put("events", b"{}"), "the last line of events has no end"),
    "brackets": (put("events", b"[" * 10**5 + b"\n"), "a line of events is not JSON"),
    "a number without end": (put("events", b"1" * 10**5 + b"\n"), "a line of events is not JSON"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_pack_is_refused(packed: Path, elsewhere: Path, forged: str) -> None:
    change, told = FORGED[forged]
    forge(packed, change)
    refused(packed, elsewhere, told)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("files/" + STATE, b"STATE" * 100, "does not have the sha256 it was packed with"),
        ("files/" + STATE, b"state" * 101, "has 505 bytes, run.json says 500"),
        ("files/other.bin", b"", "do not agree on 'files/other.bin'"),
        ("../evil", b"", r"do not agree on '\.\./evil'"),
        ("/evil", b"", "do not agree on '/evil'"),
        ("run.json", b"[]", "its run.json is none of a packed run"),
        ("run.json", b"[" * 10**6, "its run.json is none of a packed run"),
    ],
)
def test_entries_that_are_not_as_declared_are_refused(
    packed: Path, elsewhere: Path, name: str, content: bytes, told: str
) -> None:
    entries = entries_of(packed) | {name: content}
    write(packed, entries)
    refused(packed, elsewhere, told)


def test_rows_that_are_not_as_declared_are_refused(packed: Path, elsewhere: Path) -> None:
    entries = entries_of(packed)
    entries["rows/metrics.jsonl"] = entries["rows/metrics.jsonl"].replace(b"NaN", b"0.1")
    write(packed, entries)
    refused(packed, elsewhere, "its rows of metrics are not those that were packed")


@pytest.mark.parametrize("missing", ["run.json", "rows/runs.jsonl", f"files/{STATE}"])
def test_a_pack_that_lacks_something_is_refused(packed: Path, elsewhere: Path, missing: str) -> None:
    entries = entries_of(packed)
    del entries[missing]
    write(packed, entries)
    refused(packed, elsewhere, re.escape(missing))


def special(entries: Entries, packed: Path, **attributes: Any) -> None:
    """Write a pack whose state is an entry of a special kind."""
    with ZipFile(packed, "w") as archive:
        for name, content in entries.items():
            info = ZipInfo(name)
            for key, value in attributes.items() if name == f"files/{STATE}" else ():
                setattr(info, key, value)
            archive.writestr(info, content)


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "is not an ordinary file"),
        ({"external_attr": (stat.S_IFIFO | 0o600) << 16}, "is not an ordinary file"),
        ({"compress_type": ZIP_DEFLATED}, "is compressed, which artefacts are not"),
        ({"compress_type": 12}, "is not an ordinary file"),
    ],
)
def test_special_entries_are_refused(packed: Path, elsewhere: Path, attributes: dict[str, Any], told: str) -> None:
    special(entries_of(packed), packed, **attributes)
    refused(packed, elsewhere, told)


def test_an_entry_that_is_there_twice_is_refused(packed: Path, elsewhere: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), ZipFile(packed, "a") as archive:
        archive.writestr(f"files/{STATE}", b"other")
    refused(packed, elsewhere, "holds 'files/rounds/0001/state.bin' more than once")


def test_an_encrypted_entry_is_refused(packed: Path, elsewhere: Path) -> None:
    write(packed, entries_of(packed))
    content = bytearray(packed.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    packed.write_bytes(content)
    refused(packed, elsewhere, "is not an ordinary file")


def test_rows_that_would_fill_the_disk_are_refused(
    packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "SMALL", 100_000)
    forge(packed, lambda entries: entries.update({"rows/events.jsonl": b"{}" + b" " * 10**6 + b"\n"}))
    refused(packed, elsewhere, "that is more than rows may be")


def test_what_could_not_be_added_is_not_packed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "ROWS_BYTES", 10)
    with pytest.raises(StoreError, match="run r1 cannot be packed: its rows would be"):
        pack_run(made / "home", RUN, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_line_without_end_is_refused(packed: Path, elsewhere: Path) -> None:
    forge(packed, lambda entries: entries.update({"rows/events.jsonl": b" " * (18 << 20) + b"\n"}))
    refused(packed, elsewhere, "a line of events is longer than")


def test_a_list_of_entries_of_any_length_is_not_read(packed: Path, elsewhere: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[-10:-6] = struct.pack("<L", 2**32 - 1)
    packed.write_bytes(content)
    refused(packed, elsewhere, "its list of entries is longer than")


def test_entries_over_one_another_are_refused(packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(packed)
    for number in range(20):
        entries[f"files/{number}.bin"] = b"x" * 1_000
    declare(entries)
    write(packed, entries)
    content = packed.read_bytes()
    start, last = content.index(b"PK\3\4"), content.index(b"files/19.bin") - 30
    overlaid = content[:start] + content[last:]  # the data of all but the last file are gone, their entries are not
    packed.write_bytes(overlaid)
    refused(packed, elsewhere, "lie over one another")


def test_more_than_the_disk_has_room_for_is_refused(
    packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(packed.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(packed, elsewhere, r"take 512 bytes, .* has room for 100; free some space")


@pytest.mark.parametrize("length", [0, 10, 500, -1])
def test_a_pack_that_was_cut_off_is_refused(packed: Path, elsewhere: Path, length: int) -> None:
    packed.write_bytes(packed.read_bytes()[:length])
    refused(packed, elsewhere, "is no zip file|may have been cut off")


def test_a_flipped_byte_is_found_or_changes_nothing(made: Path, packed: Path, elsewhere: Path) -> None:
    content = packed.read_bytes()
    found = 0
    for place in range(0, len(content), len(content) // 40):
        packed.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            add_run(elsewhere, packed, new_id=f"flip-{place}")
        except StoreError:
            found += 1
            assert not (elsewhere / "runs" / f"flip-{place}").exists()
        else:
            assert files(elsewhere, f"flip-{place}") == files(made / "home")
    assert found > 30


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(StoreError, match="does not exist; expected what `lorafleet runs pack` has written"):
        add_run(elsewhere, tmp_path / "none")
    with pytest.raises(StoreError, match=r"cannot be read as a packed run \(Is a directory\)"):
        add_run(elsewhere, tmp_path)
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("runs", {"status": 3}),
        ("runs", {"status": "x" * 21}),
        ("runs", {"name": None}),
        ("runs", {"seed": 1.5}),
        ("runs", {"seed": True}),
        ("runs", {"seed": 2**63}),
        ("runs", {"experiment": ["text"]}),
        ("runs", {"best_metric": "0.1"}),
        ("runs", {"best_metric": 10**400}),
        ("runs", {"created_at": 5}),
        ("runs", {"created_at": "yesterday"}),
        ("runs", {"created_at": "2026-01-01T00:00:00"}),
        ("runs", {"created_at": "0001-01-01T00:00:00+14:00"}),
        ("runs", {"adapter_sha256": "é"}),
        ("runs", {"more": 1}),
        ("rounds", {"cohort": [1]}),
        ("rounds", {"cohort": "ada"}),
        ("rounds", {"exact": 1}),
        ("rounds", {"phases": [1]}),
        ("rounds", {"phases": None}),
        ("client_rounds", {"metadata": "text"}),
        ("events", {"data": 3}),
        ("events", {"id": 1}),
    ],
)
def test_a_row_of_wrong_values_is_refused(made: Path, table: str, changes: dict[str, Any]) -> None:
    (row, *_) = entries_of(made / "packed")[f"rows/{table}.jsonl"].splitlines()
    columns = next(one for one in TABLES if one.name == table)
    decode(columns, row)
    with pytest.raises(packed_file.Unfit, match=r"a row of|is not a row of it"):
        decode(columns, json.dumps(json.loads(row) | changes).encode())


def test_a_value_too_deep_for_its_readers_is_left_out(packed: Path, elsewhere: Path) -> None:
    deep: Any = 1
    for _ in range(DEEPEST):
        deep = [deep]
    forge(packed, edit("statistics", 0, data=deep))
    add_run(elsewhere, packed)
    with RunStore.open(elsewhere) as store:
        assert store.statistics(RUN)[0].data == {"left_out": "nested more than 100 deep"}
