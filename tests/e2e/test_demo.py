"""The demo as the Makefile runs it, shortened, in a fresh home and without a network."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sysconfig
from pathlib import Path

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("federation.rounds=2", "training.steps=3", "task.options.eval_rows=4", "task.options.new_tokens=4")
SHORTEST = ("federation.rounds=1", "training.steps=1", "task.options.eval_rows=1", "evaluation.on=[]", "seed=1")
PATIENCE_S = 240
NOWHERE = "http://127.0.0.1:9"
"""A proxy that nobody serves: every way to the network ends there."""


def demo() -> list[str]:
    """Read the demo's command from the Makefile."""
    text = (ROOT / "Makefile").read_text()
    found = re.search(r"^demo: .*\n\t\$\(BIN\)/(\w+) (.+)$", text, re.MULTILINE)
    assert found, "the Makefile has no demo"
    return [str(Path(sysconfig.get_path("scripts")) / found[1]), *found[2].split()]


def call(command: list[str], folder: Path, *settings: str) -> str:
    """Run a command in an environment of its own, and return what it prints."""
    hidden = ("HF_", "LORAFLEET_", "TRANSFORMERS_", "NO_PROXY", "no_proxy")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    environment |= {key: NOWHERE for name in ("http_proxy", "https_proxy") for key in (name, name.upper())}
    environment |= {"HOME": str(folder), "LORAFLEET_HOME": str(folder / "home")}
    options = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh home after two runs, and what the first one printed."""
    place = tmp_path_factory.mktemp("demo")
    (place / "first.txt").write_text(call(demo(), place, *SHORT))
    call([*demo(), "--json"], place, *SHORTEST)
    return place


def listed(folder: Path) -> list[dict[str, object]]:
    runs: list[dict[str, object]] = json.loads(call([demo()[0], "runs", "list", "--json"], folder))["runs"]
    return runs


def test_both_runs_are_listed_newest_first(folder: Path) -> None:
    runs = listed(folder)
    assert [run["seed"] for run in runs] == [1, 0]
    assert {run["status"] for run in runs} == {"completed"}
    assert {run["name"] for run in runs} == {"quickstart"}


def test_the_loss_fell_and_the_database_says_so(folder: Path) -> None:
    run = listed(folder)[1]
    held_out = "SELECT round, value FROM metrics WHERE run = ? AND name = 'held_out_loss' AND client = ''"
    with sqlite3.connect(folder / "home" / "lorafleet.db") as database:
        rounds = database.execute("SELECT round, status FROM rounds WHERE run = ? ORDER BY round", [run["id"]])
        ended = rounds.fetchall()
        losses = dict(database.execute(held_out, [run["id"]]).fetchall())
    assert ended == [(0, "committed"), (1, "committed"), (2, "committed")]
    assert losses[0] - losses[2] > 0.05
    assert losses[0] > losses[1] > losses[2]


def test_the_adapter_is_a_file_with_what_was_trained(folder: Path) -> None:
    path = Path(str(listed(folder)[1]["adapter"]))
    assert path.is_relative_to(folder / "home")
    with safe_open(path, framework="numpy") as file:
        adapter = file.get_tensor("adapter")
    assert adapter.size > 0
    assert abs(adapter).max() > 0


def test_people_see_the_outcome(folder: Path) -> None:
    shown = (folder / "first.txt").read_text()
    assert str(listed(folder)[1]["id"]) in shown
    for owner in ("asyncio", "email", "idlelib", "unittest"):
        assert owner in shown


def test_nothing_else_is_written_beside_the_home(folder: Path) -> None:
    """No lorafleet-home in the working directory, no model fetched into a cache."""
    assert {path.name for path in folder.iterdir()} - {".cache", ".flwr", ".config"} == {"home", "first.txt"}
    assert not [path for path in folder.rglob("*") if "models--" in path.name]
