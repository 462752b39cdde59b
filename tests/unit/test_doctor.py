"""The doctor finds what is wrong with a machine, and changes nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from common.store import RunStore
from common.store.engine import URL_VARIABLE
from common.store.schema import known_versions
from common.text import stdlib
from simulations.terminal import doctor, verbs
from simulations.terminal.doctor import (
    Check,
    check_base_model,
    check_corpus,
    check_database,
    check_home,
    check_packages,
    check_python,
    examine,
)
from simulations.terminal.tables import Output

Usage = namedtuple("Usage", "total used free")
BASE = Path(__file__).parents[2] / "simulations" / "demo" / "base"


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_good_machine_has_nothing_that_fails_and_stays_as_it_is(tmp_path: Path) -> None:
    checks = examine(tmp_path / "home")
    assert [check.name for check in checks] == [
        "python", "packages", "torch", "flower", "ray", "home", "database", "base model", "corpus",
    ]  # fmt: skip
    assert [check for check in checks if check.status == "fail"] == []
    assert "will be made" in found(checks)["home"].text
    assert list(tmp_path.iterdir()) == []


def test_python_must_be_new_enough() -> None:
    assert check_python((3, 11, 0)).status == "ok"
    old = check_python((3, 10, 9))
    assert (old.status, old.advice) == ("fail", "LoRAFleet needs Python 3.11 or newer")


def test_packages_must_be_there_and_in_range() -> None:
    check = check_packages(
        ["numpy>=99", "nowhere-to-be-found>=1", 'also-nowhere; extra == "ray"', 'pytest>=99; extra == "dev"', "rich>=1"]
    )
    assert check.status == "fail"
    assert "nowhere-to-be-found is missing" in check.text
    assert "wanted is >=99" in check.text
    assert "also-nowhere" not in check.text
    assert "pytest" not in check.text
    assert check_packages(["rich>=1", 'numpy>=1; extra == "models"']).text.startswith("2 packages")


def test_a_home_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = check_home(tmp_path / "file" / "home")
    assert (check.status, check.advice) == ("fail", "choose another folder with --home")


@pytest.mark.parametrize(("free", "status"), [(1e8, "fail"), (1e9, "warn"), (1e11, "ok")])
def test_the_disk_must_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free))
    assert check_home(tmp_path).status == status


def test_a_database_is_opened_and_its_runs_are_counted(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        store.create_run(
            "one", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=1, fingerprint=""
        )
    check = check_database(tmp_path)
    assert check.status == "ok"
    assert check.text.endswith(f"version {known_versions()[-1]}, 1 runs")


def test_a_damaged_database_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "lorafleet.db").write_bytes(b"no database at all" * 100)
    check = found(examine(tmp_path))["database"]
    assert check.status == "fail"
    assert "restore a backup or choose another --home" in check.text
    assert "\n" not in check.text


def test_an_address_of_no_database_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, "mysql://host/name")
    check = found(examine(tmp_path))["database"]
    assert check.status == "fail"
    assert URL_VARIABLE in check.text


def test_the_base_model_is_the_one_that_was_committed(tmp_path: Path) -> None:
    assert check_base_model().status == "ok", "the weights were changed: mend BASE_SHA256 in doctor.py"
    content = bytearray((BASE / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert check_base_model(tmp_path).status == "fail"


def test_a_missing_base_model_fails_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("common.tasks.causal_lm.BUILTIN_BASE", tmp_path)
    check = found(examine(tmp_path))["base model"]
    assert check.status == "fail"
    assert "No such file" in check.text


def test_packages_that_stand_in_for_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = stdlib.installed
    monkeypatch.setattr(stdlib, "installed", lambda names: [name for name in here(names) if name != "idlelib"])
    check = check_corpus()
    assert check.status == "warn"
    assert "idlelib is not installed here" in check.text


def test_a_missing_library_is_advised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> Check:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(doctor, "check_torch", absent)
    check = found(examine(tmp_path))["torch"]
    assert (check.status, check.text) == ("fail", "torch cannot be imported")
    assert "pip install" in check.advice


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 2)])
def test_the_verb_ends_with_2_where_something_needed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    check = Check("disk", status, "it [is] full", "free some space")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda home: [check])
    assert verbs.doctor(Output(Path())) == code
    assert "it [is] full" in (text := capsys.readouterr().out)
    assert "free some space" in text
    assert verbs.doctor(Output(Path(), as_json=True)) == code
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "ok": code == 0,
        "checks": [{"name": "disk", "status": status, "text": "it [is] full", "advice": "free some space"}],
    }
