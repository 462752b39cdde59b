"""What a client keeps to itself: the newest entry of an earlier round, whatever was killed or damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from client.memory import recall, remember


def keep(folder: Path, number: int, kind: str = "own") -> None:
    remember(folder, kind, number, {"b": torch.full((3,), float(number)), "head.weight": torch.ones(2, 2)})


def first(folder: Path | None, before: int, kind: str = "own") -> float | None:
    found = recall(folder, kind, before)
    return None if found is None else float(found["b"][0])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "memory").iterdir())


def test_what_was_kept_comes_back_bit_by_bit(tmp_path: Path) -> None:
    kept = {"b": torch.randn(7), "transposed": torch.randn(3, 2).T, "empty": torch.empty(0)}
    remember(tmp_path, "own", 1, kept)
    got = recall(tmp_path, "own", 2)
    assert got is not None
    assert set(got) == set(kept)
    assert all(torch.equal(got[name], kept[name]) for name in kept)


def test_only_earlier_rounds_count(tmp_path: Path) -> None:
    keep(tmp_path, 3)
    keep(tmp_path, 4)
    assert [first(tmp_path, before) for before in (3, 4, 5, 9)] == [None, 3.0, 4.0, 4.0]


def test_a_round_trained_again_starts_from_the_same_memory_and_replaces_its_own(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    before = first(tmp_path, 2)
    keep(tmp_path, 2)
    assert first(tmp_path, 2) == before == 1.0
    keep(tmp_path, 2)
    assert len(files(tmp_path)) == 2


def test_two_rounds_of_every_kind_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3, 12):
        keep(tmp_path, number)
        keep(tmp_path, number, "feedback")
    assert len(files(tmp_path)) == 4
    assert [first(tmp_path, before) for before in (3, 4, 13)] == [None, 3.0, 12.0]
    assert first(tmp_path, 13, "feedback") == 12.0


def test_rounds_that_were_taken_back_are_forgotten(tmp_path: Path) -> None:
    """A run whose last states are damaged goes on from an earlier one: what came after never happened."""
    for number in (4, 5):
        keep(tmp_path, number)
    keep(tmp_path, 3)
    assert files(tmp_path) == ["own-00000003.safetensors"]
    keep(tmp_path, 4)
    assert [first(tmp_path, before) for before in (4, 5, 9)] == [3.0, 4.0, 4.0]


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    assert recall(tmp_path, "feedback", 9) is None


def test_who_has_no_folder_or_no_memory_remembers_nothing(tmp_path: Path) -> None:
    assert recall(None, "own", 9) is None
    assert recall(tmp_path, "own", 9) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    keep(tmp_path, 1)
    keep(tmp_path, 2)
    path = tmp_path / "memory" / files(tmp_path)[1]
    path.write_bytes({"cut": path.read_bytes()[:-5], "empty": b"", "other": b"text " * 100}[damage])
    with caplog.at_level(logging.WARNING):
        assert first(tmp_path, 3) == 1.0
    assert "is not used" in caplog.text


def test_what_a_kill_left_half_written_is_not_found(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    (tmp_path / "memory" / ".own-00000002.safetensors.99.tmp").write_bytes(b"half")
    assert first(tmp_path, 9) == 1.0
