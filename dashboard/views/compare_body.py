"""What a comparison says: the verdict, the curves, the table; and in what its lines differ."""

from __future__ import annotations

import streamlit as st

from common.wording import counted
from dashboard.findings.compare_file import ComparisonFile
from dashboard.findings.compare_groups import differing, untold
from dashboard.findings.compare_lines import Choice, Compared
from dashboard.findings.compare_verdict import judges, verdict
from dashboard.pieces import command, draw, explain
from dashboard.session import source
from dashboard.views.cells import written
from dashboard.views.compare_findings import MOST_LINES, Findings, find
from dashboard.views.compare_tables import WRITERS, difference_table, outcome_columns, outcome_table
from dashboard.words import code, listed, plain, visible

HEIGHT = 360
MORE_SEEDS = f"More seeds would tell: {code('lorafleet compare … --vary seed=0,1,2')}"


def body(compared: Compared, choice: Choice) -> None:
    """Show a comparison as its runs are now."""
    found = find(source(), compared, choice)
    _say(found)
    draw(found.title, *found.drawing(), "No run has both of these numbers.", key="curves", height=HEIGHT)
    explain(_notes(found))
    st.dataframe(
        written(outcome_table(found.table, choice.metric, found.even.best), WRITERS),
        hide_index=True,
        width="stretch",
        height="content",
        key="outcomes",
        column_config=outcome_columns(found.level, choice.metric),
        alt="What came of each line",
        placeholder="–",
    )


def configuration(compared: Compared) -> None:
    """Show in what the lines differ, and how a file was made."""
    of_runs = [line for line in compared.lines if line.runs][:MOST_LINES]
    paths = differing([line.settings for line in of_runs])
    with st.expander(f"Configuration: {counted(len(paths), 'difference')}"):
        if paths:
            rows, titles = difference_table(of_runs, paths)
            st.dataframe(rows, hide_index=True, width="stretch", key="differences", column_config=titles)
        else:
            explain("They differ by nothing but their seeds.")
        if compared.file:
            st.markdown("This comparison was made by")
            command(visible(compared.file.command, 2_000))
            for sentence in _troubles(compared.file):
                explain(plain(sentence, 600))


def _say(found: Findings) -> None:
    """Say which line is better, and what else differs."""
    with st.container(border=True):
        if judges(found.choice.metric):
            tasks = {run.task for run in found.compared.runs}
            st.markdown(verdict(found.table, found.even, found.choice.metric, len(tasks), MORE_SEEDS))
        else:
            st.markdown("Neither more nor less of this number is better by itself: look at a loss to judge.")
        of_runs = [line for line in found.compared.lines if line.runs]
        if also := untold([line.label for line in of_runs], [line.settings for line in of_runs]):
            explain(f"Beside what their names say they differ in {plain(listed(also, 5), 500)}.")


def _notes(found: Findings) -> str:
    """Say how the chart is to be read and what is not in it."""
    said = []
    if found.banded:
        said.append("Lines are means over seeds, bands one standard deviation to each side.")
    if found.table["reference"].any():
        said.append("Broken lines are references: all data in one place, and each owner alone; they send nothing.")
    if len(found.labels) < len(found.table):
        said.append(f"The {len(found.labels)} best of {len(found.table)} are drawn.")
    drawn = set(found.curves["series"])
    if missing := [label for label in found.labels if label not in drawn]:
        said.append(f"Not drawn, for want of this number: {plain(listed(missing), 500)}.")
    if found.compared.repeats:
        said.append(f"One run per seed is counted: {counted(found.compared.repeats, 'repeat')} left out.")
    return " ".join(said) or "One run each: bands appear where there are several seeds."


def _troubles(file: ComparisonFile) -> list[str]:
    told = [f"{row.label}, {trouble.status}: {trouble.sentence}" for row in file.rows for trouble in row.troubles]
    return list(dict.fromkeys(told))[:MOST_LINES]
