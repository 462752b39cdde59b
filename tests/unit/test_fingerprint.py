"""The fingerprints of the code, and where runs are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import fingerprint
from common.fingerprint import NODE_PACKAGES, RUN_PACKAGES, code_fingerprint, run_fingerprint
from common.home import HOME_VARIABLE, default_home
from common.plugins import PLUGINS_VARIABLE


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the packages that are hashed, which a test may change."""
    for package in RUN_PACKAGES:
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(fingerprint.ROOT / package, tmp_path / "copy" / package, ignore=left_out)
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    here = prints()
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path / "copy")
    assert prints() == here, "the place of the code must not count"
    yield tmp_path / "copy"
    forget()


def forget() -> None:
    code_fingerprint.cache_clear()
    fingerprint._run_fingerprint.cache_clear()


def prints() -> tuple[str, str]:
    forget()
    return code_fingerprint(), run_fingerprint()


def test_they_are_short_and_differ() -> None:
    node, run = prints()
    assert len(node) == len(run) == 16
    assert int(node, 16) >= 0
    assert node != run
    assert set(NODE_PACKAGES) < set(RUN_PACKAGES)


@pytest.mark.parametrize(
    ("path", "node", "run"),
    [
        ("common/lowrank.py", True, True),
        ("client/app.py", True, True),
        ("common/methods/lora.py", True, True),
        ("server/rounds.py", False, True),
        ("strategies/aggregation/flora.py", False, True),
        ("common/py.typed", False, False),
    ],
)
def test_a_changed_file_counts_where_it_runs(copy: Path, path: str, node: bool, run: bool) -> None:
    before = prints()
    with (copy / path).open("a") as file:
        file.write("#\n")
    after = prints()
    assert (after[0] != before[0], after[1] != before[1]) == (node, run)


def test_a_new_and_a_renamed_file_count(copy: Path) -> None:
    before = prints()
    (copy / "common" / "zz.py").write_text("")
    added = prints()
    (copy / "common" / "zz.py").rename(copy / "common" / "zy.py")
    assert len({before, added, prints()}) == 3


def test_the_users_plugins_count_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = prints()
    (tmp_path / "aggregation").mkdir()
    (tmp_path / "aggregation" / "own.py").write_text("x = 1\n")
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path))
    own = prints()
    assert own[0] == bare[0]
    assert own[1] != bare[1]
    (tmp_path / "aggregation" / "own.py").write_text("x = 2\n")
    assert prints()[1] != own[1]


def test_the_home_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert default_home() == tmp_path / "lorafleet-home"
    monkeypatch.setenv(HOME_VARIABLE, "")
    assert default_home() == tmp_path / "lorafleet-home"
    monkeypatch.setenv(HOME_VARIABLE, "mine")
    assert default_home() == tmp_path / "mine"
