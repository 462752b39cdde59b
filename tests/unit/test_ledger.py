"""The ledger's files: what is appended stays, in order, whoever else looks on and whatever the clock says."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.privacy.ledger import Book, Entry, open_ledger, read_ledger
from client.privacy.ledger import file as ledger_file
from client.privacy.ledger.entry import FIRST, curve_bytes, stored_curve
from client.privacy.ledger.lock import alone
from client.privacy.ledger.mark import Mark, mark_of, read_mark, write_mark
from common.errors import LedgerError
from common.privacy.accounting import Mechanism, Spending, curve

ONE = Mechanism(1.0, 0.1)


def draft(**changes: Any) -> Entry:
    entry = Entry(
        kind="reserve", client="ada", run="r", round=1, attempt=1, label="t:ada", fingerprint="f", noise_multiplier=1.0,
        sample_rate=0.1, clipping_norm=1.0, steps=8, rounds=10, delta=1e-5, epsilon=4.0, accountant="rdp",
        budget_epsilon=None, budget_delta=None, spent=1.0, test_seed=None, curve=b"",
    )  # fmt: skip
    entry = replace(entry, **changes)
    return replace(entry, curve=curve_bytes(curve(entry.mechanism)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "ledger.db"


def filled(path: Path, count: int = 3) -> list[Entry]:
    with open_ledger(path) as ledger:
        return [ledger.append(draft(round=number))[0] for number in range(1, count + 1)]


def forget() -> None:
    """Do as a new process does: know nothing of what was verified before."""
    ledger_file._verified.clear()


def test_entries_are_read_back_in_order_each_bound_to_the_one_before(path: Path) -> None:
    made = filled(path)
    found = read_ledger(path).entries
    assert found == [replace(entry, curve=b"") for entry in made]
    assert [entry.sequence for entry in found] == [1, 2, 3]
    assert [entry.previous for entry in found] == [FIRST, found[0].digest, found[1].digest]
    assert read_mark(path) == Mark(entries=3, digest=found[2].digest)


def test_a_ledger_is_its_owners_alone(path: Path) -> None:
    filled(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert mark_of(path).stat().st_mode & 0o777 == 0o600


def test_times_never_go_back_and_do_not_decide(path: Path) -> None:
    for number, now in enumerate((2_000.0, 1_000.0, 3_000.0), 1):
        with open_ledger(path, clock=lambda now=now: now) as ledger:  # type: ignore[misc]
            ledger.append(draft(round=number))
    forget()
    with open_ledger(path) as ledger:
        assert [entry.moment for entry in ledger.book.entries] == [2_000_000_000, 2_000_000_000, 3_000_000_000]
        assert ledger.book.steps_of("r") == 24


def test_sums_are_those_of_a_new_reading(path: Path) -> None:
    with open_ledger(path) as ledger:
        ledger.append(draft(kind="plan"), draft())
        ledger.append(draft(run="s", label="t:ben", noise_multiplier=2.0))
        kept = ledger.book
    read = read_ledger(path)
    for book in (kept, read):
        spent = book.spent_on("t:ada", "f")
        assert spent.steps == {ONE: 8, Mechanism(2.0, 0.1): 8}
        expected = (Spending.of(ONE, 8) + Spending.of(Mechanism(2.0, 0.1), 8)).rdp
        np.testing.assert_array_equal(spent.rdp, expected)
        assert book.spent_on("t:ada", "f", but="s").steps == {ONE: 8}
        assert book.plans["r"].sequence == 1


def test_a_data_set_is_known_by_its_label_or_its_rows() -> None:
    entries = [
        draft(fingerprint="one"),
        draft(run="s", fingerprint="two"),
        draft(run="u", label="t:renamed", fingerprint="two"),
    ]
    book = Book.of(replace(entry, sequence=number) for number, entry in enumerate(entries, 1))
    assert book.spent_on("t:ada", "never seen").steps == {ONE: 24}
    assert book.spent_on("t:renamed", "never seen").steps == {ONE: 24}
    assert book.spent_on("t:new", "one").steps == {ONE: 24}
    assert book.spent_on("t:other", "three").steps == {}
    assert len(book.data_sets()) == 1


def test_two_data_sets_that_turn_out_to_be_one_are_added_up() -> None:
    entries = [draft(label="a", fingerprint="1"), draft(label="b", fingerprint="2"), draft(label="a", fingerprint="2")]
    book = Book.of(replace(entry, sequence=number) for number, entry in enumerate(entries, 1))
    assert book.spent_on("b", "2").steps == {ONE: 24}
    assert [entry.sequence for entry in book.data_sets()[0].entries] == [1, 2, 3]


def test_a_curve_for_other_orders_is_computed_anew() -> None:
    written = curve_bytes(curve(ONE))
    np.testing.assert_array_equal(stored_curve(ONE, written), Spending.of(ONE, 1).rdp)
    np.testing.assert_array_equal(stored_curve(ONE, bytes(8) + bytes(len(written) - 8)), Spending.of(ONE, 1).rdp)


def test_a_ledger_that_was_never_begun_is_empty(path: Path) -> None:
    assert read_ledger(path).entries == []
    path.parent.mkdir()
    write_mark(path, Mark())  # killed before the database was made
    assert read_ledger(path).entries == []
    assert len(filled(path)) == 3


def test_what_a_killed_writer_left_undone_is_undone_by_who_reads(path: Path, tmp_path: Path) -> None:
    filled(path)
    killed = tmp_path / "killed" / "ledger.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in (
            "PRAGMA journal_mode = DELETE",
            "PRAGMA cache_size = 1",
            "BEGIN IMMEDIATE",
            "CREATE TABLE t (x)",
        ):
            connection.execute(statement)
        connection.executemany("INSERT INTO t VALUES (randomblob(5000))", [()] * 50)
        shutil.copytree(path.parent, killed.parent)  # as a kill leaves it, in the middle of a transaction
    assert killed.with_name("ledger.db-journal").stat().st_size
    with (
        pytest.raises(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{killed}?mode=ro", uri=True)) as reader,
    ):
        reader.execute("SELECT * FROM entries")
    assert len(read_ledger(killed).entries) == 3
    assert len(filled(killed, 1)) == 1


def test_a_mark_behind_is_brought_up(path: Path) -> None:
    made = filled(path)
    for behind in (Mark(), Mark(entries=2, digest=made[1].digest)):
        write_mark(path, behind)
        assert len(read_ledger(path).entries) == 3
        with open_ledger(path):
            assert read_mark(path) == Mark(entries=3, digest=made[2].digest)


def test_the_database_refuses_to_change_or_remove_entries(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        for statement in ("UPDATE entries SET steps = 1", "DELETE FROM entries"):
            with pytest.raises(sqlite3.IntegrityError, match="stay as they are"):
                connection.execute(statement)


def test_what_was_verified_is_not_trusted_once_the_files_change(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET steps = 1 WHERE sequence = 2")
        connection.commit()
    with pytest.raises(LedgerError, match="entry 2 of 3 was changed"), open_ledger(path):
        pass


def test_a_failed_append_leaves_no_trace_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_file, "write_mark", full)
    with pytest.raises(LedgerError, match="No space left on device"), open_ledger(path) as ledger:
        ledger.append(draft(round=4))
    monkeypatch.undo()
    with open_ledger(path) as ledger:  # it was committed, so it counts
        assert ledger.book.steps_of("r") == 32


def test_a_number_that_no_database_holds_is_told_in_one_line(path: Path) -> None:
    with pytest.raises(LedgerError, match="too large"), open_ledger(path) as ledger:
        ledger.append(draft(attempt=2**64))
    assert read_ledger(path).entries == []


def test_another_process_is_refused_in_one_line(path: Path) -> None:
    filled(path)
    other = os.open(path.with_suffix(".lock"), os.O_RDWR)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match=r"in use by process .*; wait for it or stop it first"), alone(path, 0.02):
            pass
    finally:
        os.close(other)
    with alone(path, 0.02):
        pass


def test_threads_take_turns(path: Path) -> None:
    def add(number: int) -> None:
        for round in range(3):
            with open_ledger(path) as ledger:
                ledger.append(draft(run=str(number), round=round))

    run_all([lambda number=number: add(number) for number in range(4)])  # type: ignore[misc]
    assert len(read_ledger(path).entries) == 12


def run_all(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(LedgerError, match=r"cannot be used \(File exists\)"),
        open_ledger(tmp_path / "file" / "l.db"),
    ):
        pass
