"""Everything a comparison shows, found in one go: for the page, and for the files that readers take with them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from dashboard.charts import Axis, Spec, lines
from dashboard.findings.compare_even import Even, even
from dashboard.findings.compare_lines import Choice, Compared, clients_of, points, renewed
from dashboard.findings.compare_outcomes import Answers, common_level, counting, outcomes
from dashboard.findings.compare_verdict import judges
from dashboard.metric_words import KNOWN, metric_words
from dashboard.queries import comparing
from dashboard.queries.runs import runs as every_run
from dashboard.source import Look, Source

MOST_LINES = 12
"""Lines that a chart has colours for."""
MOST_DOTS = 80
"""Points of a line that are drawn as dots."""
BAND = "mean ± standard deviation"
OVER = {
    "round": ("rounds", "round", "d"),
    "bytes": ("bytes per client", "sent per client so far, up and down (MB)", ",.4~g"),
    "seconds": ("time", "time of the rounds so far", ",.4~g"),
    "epsilon": ("privacy", "largest privacy spending so far (ε)", ".3~g"),
}
"""What curves are drawn over: in a title, on the axis, and its numbers."""
TIMES = ((3 * 3600, 3600, "h"), (600, 60, "min"))
"""From how many seconds on which unit is taken."""


@dataclass(frozen=True)
class Findings:
    """What a comparison comes to.

    Parameters
    ----------
    compared : Compared
        Its lines with their runs as they are now.
    choice : Choice
        The axes.
    level : float or None
        The lowest that all runs got to.
    table : DataFrame
        Of :func:`dashboard.findings.compare_outcomes.outcomes`.
    curves : DataFrame
        Of :func:`dashboard.findings.compare_lines.points`.
    even : Even
        Where the lines stand after the same effort.
    labels : tuple of str
        Lines that are drawn.
    title : str
        Of the chart, in our own words.
    """

    compared: Compared
    choice: Choice
    level: float | None
    table: pd.DataFrame
    curves: pd.DataFrame
    even: Even
    labels: tuple[str, ...]
    title: str

    @property
    def banded(self) -> bool:
        """Tell whether there is a spread to draw."""
        return bool(self.curves["low"].notna().any())

    def drawing(self) -> tuple[pd.DataFrame, Spec]:
        """Return what is drawn and how; time in a unit that suits it."""
        _, title, form = OVER[self.choice.over]
        drawn = self.curves
        if self.choice.over == "seconds":
            longest = drawn["x"].max() if len(drawn) else 0.0
            share, unit = next(((share, unit) for least, share, unit in TIMES if longest >= least), (1, "s"))
            drawn, title = drawn.assign(x=drawn["x"] / share), f"{title} ({unit})"
        broken = tuple(line.label for line in self.compared.lines if line.reference and line.label in self.labels)
        y = Axis("y", metric_words(self.choice.metric).axis, ".4~f")
        told = (Axis("n", "runs in this mean", "d"),)
        more = told if self.choice.over == "round" else (*told, Axis("round", "round", "d"))
        band, dots = BAND if self.banded else "", len(drawn) <= MOST_DOTS * len(self.labels)
        return drawn, lines(Axis("x", title, form), y, self.labels, band, more, broken, dots)


def find(here: Source, compared: Compared, choice: Choice) -> Findings:
    """Ask the store for everything a comparison shows.

    Raises
    ------
    StoreError
        If it does not answer.
    """
    look = here.look()
    now = renewed(compared, look.ask(every_run))
    ids = tuple(run.id for run in now.runs)
    level, answers = _answers(look, now, choice, ids)
    table = outcomes(now.lines, answers, choice.metric)
    labels = _drawn(table)
    drawn = [line for line in now.lines if line.label in labels]
    measured = look.ask(comparing.curves, ids, choice.metric)
    curves = points(drawn, measured, choice.metric, choice.over, answers.shares)
    level_ground = even(now.lines, measured, choice.over, answers.shares)
    words = metric_words(choice.metric)
    said = words.title if choice.metric in KNOWN else words.axis
    title = f"{said[:1].upper()}{said[1:]} against {OVER[choice.over][0]}"
    return Findings(now, choice, level, table, curves, level_ground, labels, title)


def _answers(look: Look, compared: Compared, choice: Choice, ids: tuple[str, ...]) -> tuple[float | None, Answers]:
    ends = look.ask(comparing.ends, ids, choice.metric)
    counted = {run.id for line in compared.lines for run in counting(line)}
    level = common_level(ends[ends["run"].isin(counted)]) if judges(choice.metric) else None
    nowhere = pd.DataFrame(columns=["run", "round"])
    reached = nowhere if level is None else look.ask(comparing.reached, ids, choice.metric, level)
    met = look.ask(comparing.members, ids)
    shares = {run.id: clients_of(run, met) for run in compared.runs}
    return level, Answers(ends, look.ask(comparing.costs, ids), reached, look.ask(comparing.left_out, ids), shares)


def _drawn(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the lines that are drawn, in their own order: where there are too many, references and the best."""
    ranked = table.sort_values(["reference", "last"], ascending=[False, True], kind="stable")
    kept = set(ranked["label"][:MOST_LINES])
    return tuple(label for label in table["label"] if label in kept)
