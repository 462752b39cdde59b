"""What the terminal shows of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape

from common.wording import counted, size
from simulations.terminal.privacy_tables import private_plan_view
from simulations.terminal.tables import LISTED_CLIENTS, more_clients, numbers_table

if TYPE_CHECKING:
    from common.experiment import Experiment
    from server.plan import Plan


def plan_view(plan: Plan, experiment: Experiment, notices: bool = True) -> RenderableType:
    """Show the plan: clients, ranks, the bytes to expect, and what privacy takes."""
    from server.plan import rank_summary

    table = numbers_table("client", ">rank", "trains", "evaluates", ">steps", ">up per round", ">down, last round")
    for client in plan.clients[:LISTED_CLIENTS]:
        marks = ["yes" if mark else "no" for mark in (client.trains, client.evaluates)]
        sizes = [size(client.bytes_up), size(client.bytes_down)]
        costs = [str(client.steps), *sizes] if client.trains else ["–"] * 3
        table.add_row(escape(client.name), str(client.rank), *marks, *costs)
    training = sum(client.trains for client in plan.clients)
    return Group(
        f"[bold]{escape(experiment.name)}[/]: {escape(experiment.strategy.name)} on {escape(experiment.task.name)}",
        table,
        *more_clients(len(plan.clients)),
        f"{counted(plan.rounds, 'round')}, {plan.cohort_size} of {counted(training, 'client')} in each; "
        f"ranks {rank_summary(plan)}; {counted(plan.layers, 'layer')} adapted",
        f"about {size(plan.bytes_up)} up and {size(plan.bytes_down)} down in all, "
        f"at most {size(plan.largest_download)} in one download",
        *(private_plan_view(plan.privacy) if plan.privacy is not None else ()),
        *(f"[yellow]note:[/] {escape(notice)}" for notice in (plan.notices if notices else ())),
    )
