"""Files of a run: whole or absent, inside their folder, and what stops them told in one line."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from common.errors import CorruptArtefact, StoreError
from common.store import RunLock, is_locked, verify, write_artefact
from common.store.artefacts import checked_path, file_of, remove_leftovers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "r1"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_bytes_are_written_with_hash_size_and_a_path_relative_to_the_home(folder: Path) -> None:
    written = write_artefact(folder, "rounds/3/state.bin", b"abc")
    # SHA-256 of "abc" is the example of FIPS 180-4.
    assert written.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (written.path, written.nbytes) == ("runs/r1/rounds/3/state.bin", 3)
    assert files_in(folder) == ["rounds/3/state.bin"]


def test_a_function_writes_to_the_path_it_is_given(folder: Path) -> None:
    written = write_artefact(folder, "a.bin", lambda path: path.write_bytes(b"abc"))
    assert written == write_artefact(folder, "a.bin", b"abc")
    assert (folder / "a.bin").read_bytes() == b"abc"


def test_a_function_may_put_another_file_in_place(folder: Path) -> None:
    def rename(path: Path) -> None:
        other = path.with_suffix(".other")
        other.write_bytes(b"abc")
        other.replace(path)

    assert write_artefact(folder, "a.bin", rename).sha256 == hashlib.sha256(b"abc").hexdigest()


def test_file_and_folder_are_flushed_before_and_after_the_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    calls: list[str] = []
    flush, rename = os.fsync, os.replace

    def watched_flush(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def watched_rename(old: Path, new: Path) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(os, "replace", watched_rename)
    write_artefact(folder, "a.bin", b"abc")
    assert calls == [".a.bin.tmp", "rename", "r1"]


def test_a_failing_function_leaves_the_old_file_and_nothing_else(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no more")

    write_artefact(folder, "a.bin", b"old")
    with pytest.raises(ValueError, match="no more"):
        write_artefact(folder, "a.bin", fail)
    assert files_in(folder) == ["a.bin"]
    assert (folder / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize(
    "name",
    ["../r2/a.bin", "a/../../a.bin", "/etc/passwd", "", ".", ".hidden", "a/.b/c", "lock", "a\0b", "\ud800"],
)
def test_names_that_are_not_plain_files_of_the_run_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(StoreError, match="must name a file under runs/r1/") as caught:
        checked_path("r1", f"runs/r1/{name}") if name != "/etc/passwd" else checked_path("r1", name)
    assert "\n" not in str(caught.value)


def test_an_absolute_name_lands_inside_the_folder(folder: Path) -> None:
    assert write_artefact(folder, "/etc/x", b"").path == "runs/r1/etc/x"
    assert files_in(folder) == ["etc/x"]


def test_another_runs_folder_is_not_a_place_for_a_path() -> None:
    with pytest.raises(StoreError, match="must name a file under runs/r1/"):
        checked_path("r1", "runs/r2/a.bin")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.mkdir(parents=True)
    (folder / "way").symlink_to(outside)
    with pytest.raises(StoreError, match="leads out of the run's folder"):
        write_artefact(folder, "way/a.bin", b"abc")
    assert not list(outside.iterdir())


def full_device(path: Path) -> None:
    Path("/dev/full").write_bytes(b"abc")


def full_device_told_by_rust(path: Path) -> None:
    raise RuntimeError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")


@pytest.mark.parametrize("writer", [full_device, full_device_told_by_rust])
def test_a_full_disk_is_told_in_one_line(folder: Path, writer: object) -> None:
    with pytest.raises(StoreError) as caught:
        write_artefact(folder, "a.bin", writer)  # type: ignore[arg-type]
    told = "(No space left on device); free some space there, then resume the run"
    assert str(caught.value) == f"cannot write {folder / 'a.bin'} {told}"
    assert files_in(folder) == []


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot write .*runs/r1 .*--home"):
        write_artefact(tmp_path / "runs" / "r1", "a.bin", b"abc")


def test_verify_accepts_what_was_written_and_names_what_was_changed(folder: Path) -> None:
    written = write_artefact(folder, "a.bin", b"abc")
    verify(folder / "a.bin", written.sha256)
    (folder / "a.bin").write_bytes(b"abd")
    found = hashlib.sha256(b"abd").hexdigest()
    with pytest.raises(CorruptArtefact, match=rf"a\.bin has sha256 {found}, expected {written.sha256}"):
        verify(folder / "a.bin", written.sha256)


def test_verify_names_a_missing_file(folder: Path) -> None:
    with pytest.raises(CorruptArtefact, match=r"a\.bin is unreadable .*No such file.* expected sha256 00"):
        verify(folder / "a.bin", "00")


def test_leftovers_are_the_hidden_files(folder: Path) -> None:
    write_artefact(folder, "rounds/3/state.bin", b"abc")
    (folder / "rounds" / "3" / ".other.bin.tmp").write_bytes(b"half")
    (folder / ".tmpQx1").write_bytes(b"half")
    remove_leftovers(folder)
    assert files_in(folder) == ["rounds/3/state.bin"]


def test_a_lock_lets_one_writer_in_and_names_it(folder: Path) -> None:
    assert not is_locked(folder)
    with RunLock(folder):
        assert is_locked(folder)
        with pytest.raises(StoreError, match=rf"run r1 is being written by process {os.getpid()} on \S+;"):
            RunLock(folder).__enter__()
        assert is_locked(folder)
    assert not is_locked(folder)


def test_entering_a_lock_removes_what_a_killed_writer_left(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / ".a.bin.tmp").write_bytes(b"half")
    with RunLock(folder):
        assert files_in(folder) == ["lock"]


def test_a_link_out_of_the_run_is_not_followed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    (tmp_path / "secret").write_text("not the run's")
    (run / "adapter.safetensors").symlink_to(tmp_path / "secret")
    (run / "rounds").symlink_to(tmp_path)
    for path in ("runs/r1/adapter.safetensors", "runs/r1/rounds/secret"):
        with pytest.raises(StoreError, match="leads out of the run's folder"):
            file_of(tmp_path, "r1", path)
    assert file_of(tmp_path, "r1", "runs/r1/other") == run / "other"
