"""The lines of a comparison: each a mean over runs, or a reference that is drawn broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from common.store import Run
from dashboard.findings.compare_file import ComparisonFile, Outcome
from dashboard.findings.compare_groups import Group, Settings, distinct, settings_of
from dashboard.queries.comparing import POINTS
from dashboard.queries.runs import thinned
from dashboard.settings import setting

SPENT = {"round": "round", "bytes": "nbytes", "seconds": "seconds", "epsilon": "epsilon"}
"""What a curve may be drawn over, and the column that holds it."""


@dataclass(frozen=True)
class Line:
    """What is drawn as one line and stands in one row.

    Parameters
    ----------
    label : str
        Its name, another one for each.
    runs : tuple of Run
        Of this store, one per seed.
    reference : tuple of Outcome
        One per seed, for what is there to compare with; then there are no runs.
    """

    label: str
    runs: tuple[Run, ...] = ()
    reference: tuple[Outcome, ...] = ()

    @property
    def settings(self) -> Settings:
        """What its runs share, by path; empty for a reference."""
        return settings_of(self.runs[0]) if self.runs else {}


@dataclass(frozen=True)
class Choice:
    """What the axes are: a metric, and a key of ``SPENT``."""

    metric: str
    over: str


@dataclass(frozen=True)
class Compared:
    """What is compared: lines, all their runs, how many were left out, and the file they come from, if they do."""

    lines: list[Line]
    runs: tuple[Run, ...]
    repeats: int = 0
    file: ComparisonFile | None = None


def renewed(compared: Compared, runs: Sequence[Run]) -> Compared:
    """Return what is compared with its runs as they are now."""
    newest = {run.id: run for run in runs}

    def now(known: Sequence[Run]) -> tuple[Run, ...]:
        return tuple(newest.get(run.id, run) for run in known)

    lines = [replace(line, runs=now(line.runs)) for line in compared.lines]
    return replace(compared, lines=lines, runs=now(compared.runs))


def lines_of_groups(groups: Sequence[Group]) -> list[Line]:
    """Make a line of every group."""
    return [Line(group.label, group.runs) for group in groups]


def lines_of_file(file: ComparisonFile, known: Mapping[str, Run]) -> list[Line]:
    """Make a line of every row of a file: runs as this store has them, references as the file has them."""
    found = []
    for row, label in zip(file.rows, distinct(row.label for row in file.rows), strict=True):
        if row.reference:
            found.append(Line(label, reference=tuple(row.outcomes)))
        else:
            named_runs = dict.fromkeys(run for outcome in row.outcomes for run in outcome.runs)
            found.append(Line(label, tuple(known[run] for run in named_runs if run in known)))
    return [line for line in found if line.runs or line.reference]


def clients_of(run: Run, met: Mapping[str, int]) -> int | None:
    """Count the clients among whom a run's bytes are shared: those of its configuration, or else those it met."""
    virtual, named = setting(run, "simulation.clients"), setting(run, "clients")
    if isinstance(virtual, int) and 0 < virtual < 2**31:
        return virtual
    return len(named) if isinstance(named, dict) and named else met.get(run.id)


def points(
    lines: Sequence[Line], curves: pd.DataFrame, metric: str, over: str, shares: Mapping[str, int | None]
) -> pd.DataFrame:
    """Average each line's runs round by round, over those that have the round.

    Parameters
    ----------
    lines : sequence of Line
        What is drawn.
    curves : DataFrame
        Of :func:`dashboard.queries.comparing.curves`.
    metric : str
        Name of what it holds.
    over : str
        A key of ``SPENT``.
    shares : mapping of str to int
        Clients of each run, among whom bytes are shared.

    Returns
    -------
    DataFrame
        Columns series, round, x, y, low, high (mean ± sd, missing for a single run) and n. Numbers that are not
        finite, and rounds where a spread is unknown, are left out.
    """
    column = SPENT[over]
    series = {run.id: line.label for line in lines for run in line.runs}
    run = curves.assign(series=curves["run"].map(series), x=curves[column].astype(float))
    if over == "bytes":
        # In megabytes per client; a run whose clients are unknown has none.
        run["x"] /= run["run"].map({name: 1e6 * count if count else float("nan") for name, count in shares.items()})
    parts = [run[["series", "round", "x", "value"]], *_references(lines, metric, over, run["x"])]
    every = pd.concat([part for part in parts if len(part)] or parts[:1])
    finite = every[every[["x", "value"]].abs().lt(float("inf")).all(axis=1)]
    grouped = finite.groupby(["series", "round"], sort=False)
    found = grouped.agg(x=("x", "mean"), y=("value", "mean"), sd=("value", "std"), n=("value", "size")).reset_index()
    return found.assign(low=found["y"] - found["sd"], high=found["y"] + found["sd"]).drop(columns="sd")


def _references(lines: Sequence[Line], metric: str, over: str, x: pd.Series) -> list[pd.DataFrame]:
    """Place references: over rounds as they went; they send and spend nothing, so elsewhere as a level."""
    furthest = float(x.max()) if x.notna().any() else 0.0
    found = []
    for line in lines:
        for outcome in line.reference:
            losses = thinned(outcome.losses(metric), POINTS)
            if losses and over != "round":
                losses = [(0, losses[-1][1]), (1, losses[-1][1])]
            rows = [
                (line.label, number, number * (1 if over == "round" else furthest), loss) for number, loss in losses
            ]
            found.append(pd.DataFrame(rows, columns=["series", "round", "x", "value"]))
    return found
