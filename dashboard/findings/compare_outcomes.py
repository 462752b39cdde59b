"""What came of each line of a comparison: means and spreads over its runs, a row each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from common.store import Run
from dashboard.findings.compare_lines import Line

MEASURES = ("last", "best", "reached", "up", "down", "seconds", "epsilon", "error", "left_out")
"""Columns of the table; each is a mean over runs and has its standard deviation beside it as ``…_sd``."""


@dataclass(frozen=True)
class Answers:
    """What the store says of the runs that are compared; see :mod:`dashboard.queries.comparing`.

    Parameters
    ----------
    ends, costs : DataFrame
        A row per run.
    reached : DataFrame
        When each run got to a level.
    left_out : mapping of str to int
        Replies by run.
    shares : mapping of str to int
        Clients among whom a run's bytes are shared.
    """

    ends: pd.DataFrame
    costs: pd.DataFrame
    reached: pd.DataFrame
    left_out: Mapping[str, int]
    shares: Mapping[str, int | None]


def counting(line: Line) -> tuple[Run, ...]:
    """Return the runs that count in a line's means: those that were completed, or all while none is."""
    return tuple(run for run in line.runs if run.status == "completed") or line.runs


def common_level(ends: pd.DataFrame) -> float | None:
    """Return the lowest level that every run got to; None where one of them never fell."""
    if ends.empty or ends["best"].isna().any():
        return None
    level = float(ends["best"].max())
    return level if level < float(ends["first"].min()) else None


def outcomes(lines: Sequence[Line], answers: Answers, metric: str) -> pd.DataFrame:
    """Return a row per line.

    Returns
    -------
    DataFrame
        Columns label, reference, runs (that count), unfinished (of all), settled (those that count are completed),
        exact (in all rounds by construction), and of every measure the mean over the runs that have it and the sample
        standard deviation, which takes two.
    """
    by_run = _by_run(answers)
    rows = [_of_reference(line, metric) if line.reference else _of_runs(line, by_run) for line in lines]
    names = [f"{name}{part}" for name in MEASURES for part in ("", "_sd")]
    table = pd.DataFrame(rows, columns=["label", "reference", "runs", "unfinished", "settled", "exact", *names])
    table[names] = table[names].astype(float)
    return table


def _by_run(answers: Answers) -> pd.DataFrame:
    costs = answers.costs.set_index("run")
    clients = pd.Series(dict(answers.shares), dtype=float)
    found = pd.DataFrame(
        {
            "last": answers.ends.set_index("run")["last"],
            "best": answers.ends.set_index("run")["best"],
            "reached": answers.reached.set_index("run")["round"],
            "up": costs["bytes_up"] / clients,
            "down": costs["bytes_down"] / clients,
            "seconds": costs["seconds"],
            "epsilon": costs["epsilon"],
            "error": costs["error"],
            "left_out": pd.Series(dict(answers.left_out), dtype=float).reindex(costs.index, fill_value=0.0),
            "exact": (costs["rounds"] > 0) & (costs["rounds"] == costs["exact"]),
        }
    )
    return found


def _of_runs(line: Line, by_run: pd.DataFrame) -> dict[str, object]:
    counted = counting(line)
    found = by_run.reindex([run.id for run in counted])
    numbers: dict[str, object] = {}
    for name in MEASURES:
        values = found[name].astype(float).dropna()
        numbers |= _estimate(name, values.tolist())
    unfinished = sum(run.status != "completed" for run in line.runs)
    exact = bool(found["exact"].eq(True).all())
    return {
        "label": line.label,
        "reference": False,
        "runs": len(counted),
        "unfinished": unfinished,
        "settled": unfinished < len(line.runs),
        "exact": exact,
        **numbers,
    }


def _of_reference(line: Line, metric: str) -> dict[str, object]:
    curves = [losses for outcome in line.reference if (losses := outcome.losses(metric))]
    seconds = [value for outcome in line.reference if (value := outcome.measures.get("seconds")) is not None]
    return {
        "label": line.label,
        "reference": True,
        "runs": len(line.reference),
        "unfinished": 0,
        "settled": True,
        "exact": False,
        **_estimate("last", [losses[-1][1] for losses in curves]),
        **_estimate("best", [min(loss for _, loss in losses) for losses in curves]),
        **_estimate("seconds", seconds),
    }


def _estimate(name: str, values: Sequence[float]) -> dict[str, object]:
    """Estimate mean and spread; a value that is not finite makes both unknown."""
    if not values or not all(map(math.isfinite, values)):
        return {name: math.nan, f"{name}_sd": math.nan}
    series = pd.Series(values, dtype=float)
    return {name: series.mean(), f"{name}_sd": series.std()}
