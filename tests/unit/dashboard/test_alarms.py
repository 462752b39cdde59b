"""Alarms: a run that is well has none, and each rule speaks exactly where its fact is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dashboard.findings.alarms import Facts, Missing, alarms

RESUME = ("resume", "run-1")
EXPORT = ("export", "run-1", "--best", "--format", "peft", "--out", "adapter")
LATE = Missing("ada", 3, "late", "no answer within the deadline of 60 s")


def facts(**changes: Any) -> Facts:
    """A live run after round 7 of 20 in which nothing is wrong; rounds take 10 seconds."""
    well: dict[str, Any] = {
        "run": "run-1",
        "status": "running",
        "written_status": "running",
        "done": 7,
        "planned": 20,
        "silence": 9.0,
        "since_sign": 2.0,
        "usual": 10.0,
        "last_ended": 7,
        "taken": 4,
        "asked": 4,
        "needed": 2,
        "watched": 5,
        "seconds": (("ada", 5.0), ("ben", 4.0), ("cyd", 4.0)),
        "slowest": ("ada", 5.0),
        "deadline": 60.0,
        "losses": ((4, 1.4), (5, 1.3), (6, 1.2), (7, 1.1)),
        "best": 1.1,
        "best_round": 7,
        "error": 0.1,
        "merged_round": 7,
    }
    return Facts(**well | changes)


def test_a_run_that_is_well_has_no_alarm() -> None:
    assert alarms(facts()) == []
    assert alarms(facts(status="completed", written_status="completed", silence=1e6, since_sign=1e6)) == []


@pytest.mark.parametrize(
    ("changes", "severity", "words", "command"),
    [
        ({"status": "interrupted", "since_sign": 180.0}, "error", "is gone; its last sign of life was 3 min", RESUME),
        (
            {"status": "failed", "written_status": "failed", "reason": "disk full"},
            "error",
            "failed after round 7 of 20: disk full",
            RESUME,
        ),
        ({"status": "interrupted", "written_status": "interrupted"}, "warning", "interrupted after round 7", RESUME),
        ({"silence": 61.0}, "warning", "Nothing has happened for 1 min 01 s; a round usually takes 10.0 s", ()),
        (
            {"last_failed": 7, "failure": "1 valid reply of 4, 2 needed", "failed_rounds": 1},
            "warning",
            "Round 7 failed: 1 valid reply of 4, 2 needed.",
            (),
        ),
        (
            {"last_failed": 3, "failure": "why", "failed_rounds": 2},
            "note",
            "Round 3 failed: why. 2 rounds failed in all.",
            (),
        ),
        ({"taken": 2}, "warning", "had 2 of 4 replies and needed 2: with one less", ()),
        (
            {"missing": (LATE,)},
            "warning",
            "ada was left out of 3 of the last 5 rounds. No answer within the deadline",
            (),
        ),
        (
            {"seconds": (("ada", 9.0), ("ben", 4.0), ("cyd", 4.0))},
            "warning",
            "ada is slow: it needs 9.0 s a round, the others 4.0 s. Every round waits.",
            (),
        ),
        (
            {"seconds": (("ada", 9.0), ("ben", 8.5), ("cyd", 0.04), ("dot", 0.04))},
            "warning",
            "ada (9.0 s) and ben (8.5 s) are slow: the others need 40 ms a round.",
            (),
        ),
        ({"slowest": ("ben", 48.0)}, "warning", "ben took 48.0 s of the 1 min 00 s", ()),
        ({"losses": ((7, math.nan),)}, "error", "round 7 is not a finite number", EXPORT),
        (
            {"losses": ((4, 1.2), (5, 1.3), (6, 1.4), (7, 1.5))},
            "warning",
            "has risen for 3 evaluations, from 1.2 to 1.5",
            EXPORT,
        ),
        ({"error": 0.5}, "note", "round 7 is 50% away from the exact average", ()),
        ({"error": math.inf}, "note", "no finite distance", ()),
        ({"epsilon": 6.5, "budget": 8.0}, "warning", "nearly spent: ε is 6.5 of 8 (81%)", ()),
        ({"epsilon": 8.0, "budget": 8.0}, "warning", "budget is spent", ()),
    ],
)
def test_each_trouble_has_its_alarm(
    changes: dict[str, Any], severity: str, words: str, command: tuple[str, ...]
) -> None:
    (alarm,) = alarms(facts(**changes))
    assert (alarm.severity, alarm.command) == (severity, command)
    assert words in alarm.sentence
    assert alarm.action.strip()


@pytest.mark.parametrize(
    "changes",
    [
        {"silence": 59.0},
        {"silence": 240.0, "usual": 60.0},  # rounds are slow
        {"taken": 2, "asked": 2},  # all replied
        {"missing": (Missing("ada", 2, "late", ""),)},
        {"seconds": (("ada", 0.3), ("ben", 0.1), ("cyd", 0.1))},  # nobody waits for a fifth of a second
        {"slowest": ("ben", 47.9)},
        {"losses": ((4, 1.2), (5, 1.3), (6, 1.25), (7, 1.5))},
        {"losses": ((6, 1.2), (7, 1.3))},
        {"error": 0.5, "exact": True},
        {"epsilon": 6.3, "budget": 8.0},
        {"epsilon": 100.0},
    ],
)
def test_what_is_ordinary_rings_nothing(changes: dict[str, Any]) -> None:
    assert alarms(facts(**changes)) == []


def test_in_a_run_that_has_ended_bad_rounds_are_worth_knowing_and_no_more() -> None:
    found = alarms(facts(status="completed", written_status="completed", missing=(LATE,), taken=2))
    assert [alarm.severity for alarm in found] == ["note", "note"]


def test_the_gravest_comes_first_and_many_clients_are_put_together() -> None:
    missing = tuple(Missing(f"client-{i}", 5, "offline", "") for i in range(10))
    found = alarms(facts(missing=missing, error=0.9, losses=((7, math.inf),)))
    assert [alarm.severity for alarm in found] == ["error", *["warning"] * 4, "note"]
    assert found[4].sentence == "7 more clients were left out of at least 3 of the last 5 rounds."
