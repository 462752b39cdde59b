"""What the terminal shows of privacy: what a plan costs, and what a run has spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from common.wording import counted, named, number
from simulations.terminal.tables import LISTED_CLIENTS, more_clients, numbers_table

if TYPE_CHECKING:
    from server.private_plan import PrivateClient, PrivatePlan

LISTED_ROUNDS = 8
NOT_PRIVATE = "[bold red]NOT PRIVATE: privacy.test_seed draws the noise from a seed that anybody can repeat[/]"
COUNTS = {
    "this run": "simulated budget: counts this run only (--persistent-ledger adds up all runs of this home)",
    "the data": "persistent ledger: owners' budgets count every run of this home on the same data",
}
"""What a budget is counted over."""


def private_plan_view(plan: PrivatePlan) -> list[RenderableType]:
    """Show what privacy takes: noise, spending by round, and what is left of the signal."""
    whom = "rows" if plan.mode == "sample" else "clients"
    differ = len({client.noise_multiplier for client in plan.clients}) > 1
    head = (
        f"[bold]privacy of {whom}[/]: ε = {plan.epsilon:g} at δ = {plan.delta:g}, counted by {plan.accountant}; noise "
        f"{'at most ' if differ else ''}{plan.noise_multiplier:.3g} × clipping norm {plan.clipping_norm:g}"
    )
    lines: list[RenderableType] = ["", head, f"What is protected: {escape(plan.unit)}"]
    if plan.mode == "sample":
        lines += [_rows_table(plan), *more_clients(len(plan.clients))]
    return [*lines, *_by_round(plan), *_words(plan)]


def privacy_view(privacy: dict[str, Any]) -> list[RenderableType]:
    """Show what a run promised, and what each client has spent."""
    table = numbers_table("client", ">ε spent", f">by {_other(privacy)}", ">noise", ">rounds left", ">after round")
    for client in privacy["clients"][:LISTED_CLIENTS]:
        left = client["rounds_left"]
        table.add_row(
            escape(client["client"]),
            number(client["epsilon"], 3),
            number(client["second_epsilon"], 3),
            number(client["noise_multiplier"], 3),
            "–" if left is None else str(left),
            str(client["round"]),
        )
    lines: list[RenderableType] = [*privacy_lines(privacy)]
    return [*lines, table, *more_clients(len(privacy["clients"]))] if privacy["clients"] else lines


def privacy_lines(privacy: dict[str, Any]) -> list[str]:
    """Say in a few lines what is promised to whom, what is spent and what is left."""
    spent, left = privacy["epsilon"], privacy["rounds_left"]
    most = "no spending was reported yet" if spent is None else f"at most ε = {spent:.3g} spent"
    lasts = "" if left is None else f", {counted(left, 'round')} left"
    return [
        *([] if privacy["private"] else [NOT_PRIVATE]),
        f"privacy: {most} of {privacy['budget']:g} at δ = {privacy['delta']:g}, counted by "
        f"{escape(privacy['accountant'])}{lasts}",
        f"What is protected: {escape(privacy['unit'])}",
        *([COUNTS[privacy["counts"]]] if privacy["mode"] == "sample" else []),
    ]


def _rows_table(plan: PrivatePlan) -> Table:
    head = ("client", ">rows", ">rows per step", ">noise", ">ε in the end", f">by {plan.second_accountant}")
    own = any(client.budget_epsilon is not None for client in plan.clients)
    table = numbers_table(*head, *([">owner's ε"] if own else []), ">signal/noise")
    for client in plan.clients[:LISTED_CLIENTS]:
        table.add_row(
            escape(client.name),
            f"{client.rows:,}",
            f"{client.expected_rows:.1f}",
            number(client.noise_multiplier, 3),
            number(client.epsilons[-1], 3),
            number(client.second_epsilon, 3),
            *([number(client.budget_epsilon, 2)] if own else []),
            number(client.signal_to_noise, 3),
        )
    return table


def _by_round(plan: PrivatePlan) -> list[str]:
    """Say what is spent after each round, once for all clients that spend the same."""
    groups: dict[tuple[float, ...], list[PrivateClient]] = {}
    for client in plan.clients:
        groups.setdefault(client.epsilons, []).append(client)
    lines = []
    for spent, clients in list(groups.items())[:LISTED_CLIENTS]:
        who = f" ({escape(named([client.name for client in clients]))})" if len(groups) > 1 else ""
        lines.append(f"ε after rounds{who}: {_listed(spent)}")
    if plan.lasts is not None:
        lines.append(f"the noise is given; with it ε lasts {_rounds(plan.lasts)}")
    return lines


def _words(plan: PrivatePlan) -> list[str]:
    """Say what signal to noise means, and what is not counted."""
    best = max(client.signal_to_noise for client in plan.clients)
    raised = "a larger sample_rate, a lower rank, frozen a (ffa_lora) or a larger ε raises it"
    if plan.mode == "sample":
        return [
            "[dim]signal/noise: how long a step's summed gradients can be beside its noise, rows per step ÷ (noise × "
            f"√ trained numbers); {raised}[/]"
        ]
    return [
        "[dim]no amplification: who takes part is drawn from a seed that is no secret, so every round a client takes "
        f"part in counts in full; signal/noise of a round is at most {best:.2g}: clients per round ÷ (noise × "
        "√ numbers that travel)[/]"
    ]


def _listed(spent: Sequence[float]) -> str:
    step = max(1, -(-len(spent) // LISTED_ROUNDS))
    numbers = sorted({*range(0, len(spent), step), len(spent) - 1})
    return ", ".join(f"{index + 1}: {spent[index]:.3g}" for index in numbers)


def _rounds(lasts: int) -> str:
    from server.private_plan import FOREVER

    return f"more than {FOREVER:,} rounds" if lasts >= FOREVER else counted(lasts, "round")


def _other(privacy: dict[str, Any]) -> str:
    return "prv" if privacy["accountant"] == "rdp" else "rdp"
