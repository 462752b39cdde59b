"""Runs on shared axes: which strategy is better, how sure that is, and what each took."""

from __future__ import annotations

from functools import partial

import streamlit as st

from common.errors import DataError
from common.store import Run
from dashboard.findings.compare_file import ComparisonFile, comparison_beside
from dashboard.findings.compare_groups import grouped
from dashboard.findings.compare_lines import Choice, Compared, lines_of_file, lines_of_groups
from dashboard.metric_words import metric_titles
from dashboard.pieces import explain, live
from dashboard.queries import comparing
from dashboard.session import all_runs, is_live, source
from dashboard.views.compare_body import body, configuration
from dashboard.views.compare_choice import RUNS, runs_by_hand
from dashboard.views.compare_files import offer
from dashboard.words import plain

BY_HAND, OF_FILE = "Runs I choose", "Results of lorafleet compare"
FIRST = ("held_out_loss", "worst_client_loss", "unseen_loss", "train_loss")
OVER = {"round": "rounds", "bytes": "bytes", "seconds": "time", "epsilon": "privacy"}


def page() -> None:
    """Show it."""
    st.title("Compare")
    known = {run.id: run for run in all_runs()}
    file, trouble = _file(known)
    if trouble:
        explain(trouble)
    compared = _of_file(file, known) if file and _source() == OF_FILE else _by_hand(known)
    if not compared.runs:
        explain("Choose two runs or more: differences between them become lines and rows here.")
        return
    choice = _choose(compared)
    if choice is None:
        explain("None of these runs has measured anything yet.")
        return
    running = any(map(is_live, compared.runs))

    live(partial(body, compared, choice), running)
    offer(compared, choice)
    configuration(compared)


def _file(known: dict[str, Run]) -> tuple[ComparisonFile | None, str]:
    """Return the comparison of this home if there is one, and what is wrong with it if something is."""
    try:
        found = comparison_beside(source().home)
    except DataError as error:
        return None, plain(error)
    return (found, "") if found and found.runs & known.keys() else (None, "")


def _source() -> str | None:
    picked: str | None = st.segmented_control(
        "What to compare",
        [OF_FILE, BY_HAND],
        default=BY_HAND if RUNS in st.query_params else OF_FILE,
        key="of",
        bind="query-params",
        required=True,
        help="The command lorafleet compare wrote comparison.json beside this home.",
    )
    return picked


def _of_file(file: ComparisonFile, known: dict[str, Run]) -> Compared:
    lines = lines_of_file(file, known)
    return Compared(lines, tuple(run for line in lines for run in line.runs), file=file)


def _by_hand(known: dict[str, Run]) -> Compared:
    groups = grouped(runs_by_hand(known))
    repeats = sum(len(group.repeats) for group in groups)
    return Compared(lines_of_groups(groups), tuple(run for group in groups for run in group.runs), repeats)


def _choose(compared: Compared) -> Choice | None:
    """Let the reader choose the axes; the address holds them."""
    ids = tuple(run.id for run in compared.runs)
    look = source().look()
    metrics = _metrics(look.ask(comparing.metric_names, ids))
    if not metrics:
        return None
    titles = metric_titles(metrics)
    costs = look.ask(comparing.costs, ids)
    over = [name for name in OVER if name != "epsilon" or costs["epsilon"].notna().any()]
    left, right = st.columns(2)
    metric = left.selectbox("Measured", metrics, format_func=lambda name: titles[name], key="y", bind="query-params")
    axis = right.segmented_control(
        "Against",
        over,
        format_func=lambda name: OVER[name],
        default="round",
        key="x",
        bind="query-params",
        required=True,
    )
    return Choice(metric, axis or "round")


def _metrics(by_run: dict[str, list[str]]) -> list[str]:
    """List what all runs have, losses first; or, where they have nothing in common, what any has."""
    known = [set(names) for names in by_run.values() if names]
    found = (set.intersection(*known) or set.union(*known)) if known else set()
    return [*(name for name in FIRST if name in found), *sorted(found - set(FIRST))]
