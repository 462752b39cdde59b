"""What the terminal shows around a run: the rounds, the outcome, and what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from common.errors import ConfigurationError, LoRAFleetError
from common.plugins import PLUGINS_VARIABLE
from common.wording import counted, duration, named, number, size
from simulations.terminal.summary import json_text

INTERRUPTED = 130
LISTED_CLIENTS = 20
LISTED_TROUBLES = 20

STATUS_STYLES = {
    "completed": "green",
    "ok": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "warn": "yellow",
    "failed": "red",
    "fail": "red",
}

Summary = dict[str, Any]
"""What ``simulations.terminal.summary.run_summary`` returns."""


@dataclass(frozen=True)
class Output:
    """How a verb shows what it did.

    Parameters
    ----------
    home : Path
        Where the runs are.
    named_home : str
        The ``--home`` the user gave; empty for the default.
    as_json : bool
        One object on stdout, in place of tables.
    quiet : bool
        No plan and no progress.
    """

    home: Path
    named_home: str = ""
    as_json: bool = False
    quiet: bool = False
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def show(self, values: Mapping[str, Any], *views: RenderableType) -> None:
        """Show a result: its values to a script, its views to people."""
        if self.as_json:
            sys.stdout.write(json_text(values) + "\n")
        else:
            self.console.print(*views, sep="\n")


def print_error(error: LoRAFleetError) -> None:
    """Write what went wrong on stderr, one line per problem."""
    for problem in error.problems if isinstance(error, ConfigurationError) else [str(error)]:
        _print_aside(Text.assemble(("error:", "bold red"), " ", " ".join(problem.split())))


def print_interrupted(advice: str) -> None:
    """Say on stderr how to go on after Ctrl-C."""
    _print_aside(Text.assemble(("interrupted:", "bold yellow"), " ", advice))


def _print_aside(line: Text) -> None:
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


HELD_OUT = "held_out_"
"""What the names of the clients' mean metrics begin with."""


def rounds_table(summary: Summary) -> Table:
    """Show what each round came to; the best one stands out."""
    rounds = summary["rounds"]
    unseen = any("unseen_loss" in row["metrics"] for row in rounds)
    judged = not unseen or any("held_out_loss" in row["metrics"] for row in rounds)
    private = any(row["epsilon"] is not None for row in rounds)
    told = {name for row in rounds for name in row["metrics"] if name.startswith(HELD_OUT)} - {f"{HELD_OUT}loss"}
    extra = sorted(told)
    optional = [*([">unseen"] if unseen else []), *([">epsilon"] if private else [])]
    named = [f">{name.removeprefix(HELD_OUT).replace('_', ' ')}" for name in extra]
    names = [">round", *([">held-out", *named, ">worst"] if judged else []), *optional]
    names += [">up", ">down", ">seconds", ">error"]
    table = numbers_table(*names)
    for row in rounds:
        metrics = row["metrics"]
        own = (number(metrics.get(name), 1 if name.endswith("perplexity") else 4) for name in extra)
        losses = [number(metrics.get("held_out_loss")), *own, number(metrics.get("worst_client_loss"))]
        table.add_row(
            str(row["round"]) if row["status"] == "committed" else f"[red]{row['round']}[/]",
            *(losses if judged else []),
            *([number(metrics.get("unseen_loss"))] if unseen else []),
            *([number(row["epsilon"], 2)] if private else []),
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            f"{row['seconds']:.1f}",
            _error(row),
            style="bold" if row["round"] and row["round"] == summary["best_round"] else "",
        )
    return table


def troubles(summary: Summary) -> list[str]:
    """Say which rounds failed, and which clients were left out for which reason."""
    lines = []
    for row in summary["rounds"]:
        if row["status"] == "failed":
            lines.append(f"[red]round {row['round']} failed:[/] {escape(row['reason'] or 'no reason given')}")
        reasons: dict[str, list[str]] = {}
        for client in summary["clients"]:
            if client["round"] == row["round"] and client["status"] not in ("accepted", "received"):
                reasons.setdefault(f"{client['status']}: {client['reason'] or 'no reason given'}", []).append(
                    client["client"]
                )
        lines += [f"[yellow]round {row['round']}:[/] {escape(f'{named(who)} {why}')}" for why, who in reasons.items()]
    left = len(lines) - LISTED_TROUBLES
    return lines[:LISTED_TROUBLES] + ([f"… and {left} more of the kind"] if left > 0 else [])


def outcome_view(summary: Summary) -> RenderableType:
    """Show what a run came to: its rounds, who was left out, and the change in one line."""
    return Group(rounds_table(summary), "", *troubles(summary), _outcome(summary))


def print_next(console: Console, summary: Summary, home: str = "") -> None:
    """Say where the adapter is and what to type next, in lines that can be copied.

    ``home`` is the ``--home`` the user gave, if any.
    """
    if summary["adapter"]:
        console.print(f"\n[dim]adapter:[/] {escape(summary['adapter'])}", soft_wrap=True)
    run = summary["id"]
    trained = any(row["round"] and row["status"] == "committed" for row in summary["rounds"])
    export = f"export {run} {'--best ' if summary['best_round'] else ''}--format peft --out adapter"
    commands = ["dashboard", f"runs show {run}"]
    if summary["status"] == "completed":
        whole = summary["rounds_done"] == summary["rounds_planned"]
        more = whole and not summary["privacy"]  # what a budget was planned for is spent
        commands += [export, *([f"resume {run} --rounds {summary['rounds_planned'] * 2}"] if more else [])]
    else:
        commands = [f"resume {run}", *commands, *([export] if trained else [])]
    console.print("\n[dim]next:[/]")
    for command in commands:
        console.print(Text(f"  {program()} {command}{home_flag(home)}"), soft_wrap=True)


def program() -> str:
    """Return what to type for this program: its name if the shell finds it, else the path it was started by."""
    if shutil.which("lorafleet") or Path(sys.argv[0]).name != "lorafleet":
        return "lorafleet"
    return shlex.quote(os.path.relpath(sys.argv[0]))


def home_flag(home: str) -> str:
    """Repeat the ``--home`` and ``--plugins`` the user gave in a command to type."""
    plugins = os.environ.get(PLUGINS_VARIABLE)
    given = (("--home", home), ("--plugins", plugins))
    return "".join(f" {flag} {shlex.quote(value)}" for flag, value in given if value)


def numbers_table(*columns: str) -> Table:
    """Build an empty table; a heading that begins with > stands over numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column[0] == ">" else "left")
    return table


def status_text(status: str) -> str:
    """Colour a status."""
    return f"[{STATUS_STYLES.get(status, 'default')}]{status}[/]"


def more_clients(count: int) -> list[str]:
    """Say how many clients a table leaves out."""
    return [f"… and {count - LISTED_CLIENTS} more"] if count > LISTED_CLIENTS else []


def _error(row: Summary) -> str:
    if row["exact"]:
        return "exact"
    return "–" if row["error"] is None else f"{row['error']:.1e}"


def _outcome(summary: Summary) -> str:
    metrics = [row["metrics"] for row in summary["rounds"]]
    name = "held_out_loss" if any("held_out_loss" in told for told in metrics) else "unseen_loss"
    losses = [told[name] for told in metrics if name in told]
    words = name.replace("held_out", "held-out").replace("_", " ")
    change = f"\n{words} {losses[0]:.4f} → [bold]{losses[-1]:.4f}[/]" if len(losses) > 1 else ""
    done, planned = summary["rounds_done"], summary["rounds_planned"]
    rounds = counted(done, "round") if done == planned else f"{done} of {counted(planned, 'round')}"
    seconds = duration(sum(row["seconds"] for row in summary["rounds"]))
    return f"run {summary['id']} {status_text(summary['status'])}: {rounds} in {seconds}{change}"
