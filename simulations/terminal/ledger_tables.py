"""What the terminal shows of privacy ledgers."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from common.errors import LedgerError, UserError
from common.wording import number
from simulations.terminal.ledgers import ledger_values
from simulations.terminal.tables import Output, numbers_table, print_error

DIGITS = 12
"""Of a fingerprint, enough to tell data sets apart."""

NONE = (
    "no privacy ledgers here: nothing was trained under differential privacy of rows; begin with: "
    "lorafleet simulate FILE --set privacy.mode=sample"
)


def show_ledgers(run: str | None, client: str | None, output: Output) -> int:
    """List what clients' data were used for; a damaged ledger is an error, but hides no other."""
    ledgers = ledger_values(output.home, run, client)
    output.show({"ledgers": ledgers}, ledgers_view(ledgers))
    errors = [one["error"] for one in ledgers if one["error"]]
    for error in errors:
        print_error(LedgerError(error))
    return UserError.exit_code if errors else 0


def ledgers_view(ledgers: list[dict[str, Any]]) -> RenderableType:
    """Show data sets with what they have cost in all, then every round."""
    if not ledgers:
        return NONE
    parts: list[RenderableType] = []
    for note in dict.fromkeys(one["note"] for one in ledgers if one["data"]):
        chosen = [one for one in ledgers if one["note"] == note]
        parts += [f"[bold]{note}[/]", _data_table(chosen), ""]
        for run, rows in _by_run(chosen).items():
            parts += [f"[dim]run[/] {escape(run)}", _rounds_table(rows), ""]
    if any(not data["private"] for one in ledgers for data in one["data"]):
        parts.append(
            "[bold red]NOT PRIVATE: noise was drawn from a seed that anybody can repeat (privacy.test_seed)[/]"
        )
    return Group(*parts, "[dim]what is reserved counts in full, whether or not its training was finished[/]")


def _data_table(ledgers: list[dict[str, Any]]) -> Table:
    table = numbers_table("client", "data", "fingerprint", ">ε in all", ">δ", ">owner's ε", ">rounds")
    table.columns[1].overflow = "fold"
    for one in ledgers:
        for data in one["data"]:
            table.add_row(
                escape(one["client"]),
                escape(data["label"]),
                data["fingerprint"][:DIGITS],
                number(data["epsilon"], 3) if data["private"] else "[red]not private[/]",
                f"{data['delta']:g}",
                "–" if data["budget"] is None else f"{data['budget']:g}",
                str(len(data["rounds"])),
            )
    return table


def _by_run(ledgers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in ledgers:
        for row in (row for data in one["data"] for row in data["rounds"]):
            found.setdefault(row["run"], []).append(row | {"client": one["client"]})
    return found


def _rounds_table(rows: list[dict[str, Any]]) -> Table:
    table = numbers_table("client", ">round", ">steps", ">noise", ">rate", "state", ">ε of run", ">ε of data")
    for row in rows:
        table.add_row(
            escape(row["client"]),
            str(row["round"]),
            str(row["steps"]),
            number(row["noise_multiplier"], 3),
            f"{row['sample_rate']:g}",
            "[green]done[/]" if row["state"] == "done" else "[yellow]reserved[/]",
            number(row["run_epsilon"], 3),
            number(row["data_epsilon"], 3),
        )
    return table
