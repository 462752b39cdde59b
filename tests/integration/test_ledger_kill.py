"""Real clients, killed with SIGKILL where it hurts: what they drew from their data is charged, and never too little."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.ledger_writer

ROOT = Path(tests.ledger_writer.__file__).parents[1]
ALLOWED = tests.ledger_writer.ROUNDS
"""Rounds that the budget pays for, whatever happens."""

CHARGED_BEFORE = {
    "before the reserve transaction": 2,
    "inside the reserve transaction": 2,
    "before COMMIT of the reserve": 2,
    "before the mark of the reserve": 3,
    "half a mark of the reserve": 3,
    "before training": 3,
    "while training": 3,
    "before done": 3,
    "before the done transaction": 3,
    "before COMMIT of the done": 3,
    "before the mark of the done": 3,
    "after done": 3,
}
"""Rounds that are charged when a client dies there in round 3."""

ANSWERED = ("before done", "before the done", "before COMMIT of the done", "before the mark of the done", "after done")


def live(folder: Path, scenarios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.ledger_writer", str(folder / "warm")]
    ended = subprocess.run(command, cwd=ROOT, input=json.dumps(scenarios), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout)
    return found


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of a client that died at each hook in round 3, and of a race."""
    folder = tmp_path_factory.mktemp("ledgers")
    scenarios = [{"folder": str(folder / hook), "hook": hook, "at": 3} for hook in CHARGED_BEFORE]
    scenarios += [{"folder": str(folder / "first"), "hook": "before the mark of the reserve", "at": 1}]
    scenarios += [{"folder": str(folder / "race"), "racing": 6}]
    return dict(zip([*CHARGED_BEFORE, "first", "race"], live(folder, scenarios), strict=True))


@pytest.mark.parametrize("hook", CHARGED_BEFORE)
def test_a_killed_client_is_charged_for_what_it_drew(lives: dict[str, dict[str, Any]], hook: str) -> None:
    life, charged = lives[hook], CHARGED_BEFORE[hook]
    assert life["killed"] == -signal.SIGKILL
    assert life["then"]["reserved"] == charged
    assert life["then"]["drawn"] <= charged
    assert life["resumed"] == 0
    check_end(life["end"])
    lost = charged == 3 and not hook.startswith(ANSWERED)
    assert life["end"]["answered"] == ALLOWED - lost


def test_a_client_killed_while_it_makes_its_ledger_makes_it_again(lives: dict[str, dict[str, Any]]) -> None:
    assert lives["first"]["killed"] == -signal.SIGKILL
    assert lives["first"]["then"]["reserved"] == 0
    check_end(lives["first"]["end"])


def test_of_racing_clients_only_as_many_win_as_the_budget_pays_for(lives: dict[str, dict[str, Any]]) -> None:
    race = lives["race"]
    assert sorted(race["ended"]) == [0, 0, 0, 3, 3, 3]
    assert race["end"]["reserved"] == ALLOWED


@pytest.mark.long
def test_a_hundred_random_kills(tmp_path: Path) -> None:
    moments = random.Random(5)
    scenarios = [{"folder": str(tmp_path / str(n)), "after_s": moments.uniform(0.001, 0.3)} for n in range(100)]
    lives = live(tmp_path, scenarios)
    assert sum(life["killed"] == -signal.SIGKILL for life in lives) > 50
    assert len({life["then"]["reserved"] for life in lives}) > 3
    for life in lives:
        assert life["then"]["drawn"] <= life["then"]["reserved"]
        check_end(life["end"])


def check_end(end: dict[str, Any]) -> None:
    """Check that all of the budget was used, no more, and that nothing was drawn without being charged."""
    assert end["reserved"] == ALLOWED
    assert end["answered"] <= end["drawn"] <= end["reserved"]
