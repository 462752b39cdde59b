"""Whatever happens to a ledger's files, it is noticed, and the entry is named."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.ledger import Entry, open_ledger, read_ledger
from client.privacy.ledger import file as ledger_file
from client.privacy.ledger.entry import digest_of
from client.privacy.ledger.mark import mark_of
from common.errors import LedgerError
from common.privacy.accounting import ORDERS

COUNT = 6
COLUMNS = [field.name for field in fields(Entry)]
VALUES = st.one_of(
    st.none(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of six entries, and its copies after every one of them."""
    folder = tmp_path_factory.mktemp("ledger")
    first = Entry(
        kind="plan", client="ada", run="r", round=1, attempt=1, label="t:ada", fingerprint="f" * 64,
        noise_multiplier=1.0, sample_rate=0.1, clipping_norm=1.0, steps=8, rounds=10, delta=1e-5, epsilon=4.0,
        accountant="rdp", budget_epsilon=None, budget_delta=None, spent=0.5, test_seed=None,
        curve=bytes(8 + 8 * len(ORDERS)),
    )  # fmt: skip
    for number in range(1, COUNT + 1):
        kind: Any = ("plan", "reserve", "done", "reserve", "done", "reserve")[number - 1]
        with open_ledger(folder / "ledger.db") as ledger:
            ledger.append(replace(first, kind=kind, round=number, settles=number - 1 if kind == "done" else None))
        shutil.copytree(folder, folder.with_name(f"{folder.name}-{number}"))
    return folder


@pytest.fixture(scope="module")
def place(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Gives a fresh copy."""
    folder = tmp_path_factory.mktemp("copies")
    numbers = iter(range(1_000_000))

    def copy() -> Path:
        target = folder / str(next(numbers))
        shutil.copytree(whole, target)
        return target / "ledger.db"

    return copy


def execute(path: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    """Change a ledger as who edits a file can; the guards of the database bind nobody."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for guard in ("no_update", "no_delete"):
            connection.execute(f"DROP TRIGGER IF EXISTS {guard}")
        for statement in statements:
            connection.execute(statement, values if "?" in statement else ())
        connection.commit()


def column(statement: str, name: str) -> str:
    return statement.replace("COLUMN", name)


def rows(path: Path, names: str = ", ".join(COLUMNS), where: str = "true") -> list[tuple[Any, ...]]:
    statement = "SELECT COLUMNS FROM entries WHERE CONDITION ORDER BY rowid"
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement.replace("COLUMNS", names).replace("CONDITION", where)).fetchall()


def refused(path: Path, match: str) -> None:
    """Check that neither reading nor writing goes on, and that trying leaves the ledger as it is."""
    for attempt in (read_ledger, open_for_writing, read_ledger):
        noticed(attempt, path, match)


def noticed(attempt: Callable[[Path], object], path: Path, match: str) -> None:
    with pytest.raises(LedgerError, match=match) as caught:
        attempt(path)
    assert "\n" not in str(caught.value)


def open_for_writing(path: Path) -> None:
    ledger_file._verified.clear()
    with open_ledger(path):
        pass


@pytest.fixture(scope="module")
def loose(place: Callable[[], Path]) -> Path:
    """A ledger whose table has lost its types and constraints."""
    path = place()
    make = ("CREATE TABLE loose AS SELECT * FROM entries", "DROP TABLE entries", "ALTER TABLE loose RENAME TO entries")
    execute(path, *make)
    assert len(read_ledger(path).entries) == COUNT
    return path


@given(st.integers(1, COUNT), st.sampled_from(COLUMNS), VALUES)
def test_any_change_of_any_field_is_noticed(loose: Path, number: int, name: str, value: Any) -> None:
    before = rows(loose, name, f"rowid = {number}")[0][0]
    change = column("UPDATE entries SET COLUMN = ? WHERE rowid = ?", name)
    execute(loose, change, values=(value, number))
    if (type(value), value) != (type(before), before):
        noticed(read_ledger, loose, r"is damaged: entry \d( of 6)? (was changed|is missing|cannot be read)")
    execute(loose, change, values=(before, number))
    assert len(read_ledger(loose).entries) == COUNT


@pytest.mark.parametrize("number", range(1, COUNT + 1))
def test_a_changed_entry_is_named_whatever_of_it_was_changed(loose: Path, number: int) -> None:
    for name in COLUMNS:
        before = rows(loose, name, f"rowid = {number}")[0][0]
        change = column("UPDATE entries SET COLUMN = ? WHERE rowid = ?", name)
        execute(loose, change, values=("x", number))
        told = f"entry {number} is missing" if name == "sequence" else f"entry {number} of {COUNT} was changed"
        noticed(read_ledger, loose, told)
        execute(loose, change, values=(before, number))


@pytest.mark.parametrize("number", range(1, COUNT))
def test_a_removed_entry_is_named(place: Callable[[], Path], number: int) -> None:
    path = place()
    execute(path, "DELETE FROM entries WHERE sequence = ?", values=(number,))
    refused(path, f"entry {number} is missing")


@pytest.mark.parametrize("kept", range(COUNT))
def test_a_cut_end_is_noticed(place: Callable[[], Path], kept: int) -> None:
    path, missing = place(), COUNT - kept
    execute(path, "DELETE FROM entries WHERE sequence > ?", values=(kept,))
    told = "1 entry is" if missing == 1 else f"{missing} entries are"
    refused(path, f"{told} missing at the end")


@pytest.mark.parametrize("number", range(1, COUNT))
def test_an_old_copy_put_back_is_noticed(whole: Path, place: Callable[[], Path], number: int) -> None:
    path = place()
    shutil.copy(whole.with_name(f"{whole.name}-{number}") / "ledger.db", path)
    told = "1 entry is" if number == COUNT - 1 else f"{COUNT - number} entries are"
    refused(path, f"{told} missing at the end")


def test_two_entries_that_changed_places_are_noticed(place: Callable[[], Path]) -> None:
    path = place()
    for old, new in ((2, 90), (3, 2), (90, 3)):
        execute(path, "UPDATE entries SET sequence = ? WHERE sequence = ?", values=(new, old))
    refused(path, "entry 2 of 6 was changed")


def test_an_entry_forged_with_a_right_hash_breaks_the_chain(place: Callable[[], Path]) -> None:
    path = place()
    forged = replace(Entry(**dict(zip(COLUMNS, rows(path)[3], strict=True))), steps=1)
    execute(path, "UPDATE entries SET steps = 1, digest = ? WHERE sequence = 4", values=(digest_of(forged),))
    refused(path, "entry 5 of 6 does not follow the one before")
    execute(path, "DELETE FROM entries WHERE sequence > 4")
    refused(path, "2 entries are missing at the end")


def test_a_ledger_of_somebody_else_does_not_fit_the_mark(whole: Path, place: Callable[[], Path]) -> None:
    path, other = place(), place()
    execute(other, "UPDATE entries SET client = 'ben'")
    made = path.with_name("other.db")
    with open_ledger(made) as ledger:
        ledger.append(*(Entry(**dict(zip(COLUMNS, row, strict=True))) for row in rows(other)))
    shutil.copy(made, path)
    refused(path, "entry 6 is not the one its mark was made for")


def test_a_missing_mark_is_noticed(place: Callable[[], Path]) -> None:
    path = place()
    mark_of(path).unlink()
    refused(path, "its mark is missing")


@pytest.mark.parametrize(
    "text", ["", "{}x", '{"entries": -1}', '{"entries": "6"}', '{"entries": 6, "digest": "x"}', "[" * 99999]
)
def test_a_mark_that_is_none_is_noticed(place: Callable[[], Path], text: str) -> None:
    path = place()
    mark_of(path).write_text(text)
    refused(path, "the mark .* cannot be read")


def test_a_deleted_ledger_whose_mark_is_left_is_noticed(place: Callable[[], Path]) -> None:
    path = place()
    path.unlink()
    refused(path, "the file is gone, 6 entries must be there")
    path.touch()
    refused(path, "its entries are gone, 6 must be there")


@pytest.mark.parametrize("content", [b"half", b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_database_is_told_in_one_line(place: Callable[[], Path], content: bytes) -> None:
    path = place()
    path.write_bytes(content)
    refused(path, "cannot be used")


@given(st.integers(0, 2**31), st.integers(0, 255))
def test_no_changed_byte_of_the_file_makes_it_forget(place: Callable[[], Path], where: int, value: int) -> None:
    path = place()
    content = bytearray(path.read_bytes())
    content[where % len(content)] = value
    path.write_bytes(content)
    try:
        book = read_ledger(path)
    except LedgerError:
        return
    assert book.steps_of("r") == 24
    assert len(book.entries) == COUNT
