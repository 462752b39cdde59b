"""What the terminal shows when asked: runs, one run, plug-ins, and the doctor's findings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.experiment_file import toml_value
from common.wording import number, size
from simulations.terminal.privacy_tables import privacy_view
from simulations.terminal.tables import (
    LISTED_CLIENTS,
    Summary,
    more_clients,
    numbers_table,
    rounds_table,
    status_text,
    troubles,
)

if TYPE_CHECKING:
    from simulations.terminal.doctor import Check
    from simulations.terminal.plugin_list import ListedPlugin
    from strategies.matrix import MatrixRow

SAMPLES_BYTES = 1_000_000
"""A longer file of samples is not shown."""


def runs_view(runs: Sequence[Summary], now: datetime | None = None) -> RenderableType:
    """Show a list of runs, newest first."""
    if not runs:
        return "no runs here yet; begin with: lorafleet simulate quickstart"
    table = numbers_table("run", "status", "strategy", ">rounds", ">best", ">age")
    table.columns[0].overflow = "fold"
    for run in runs:
        age = (now or datetime.now(UTC)) - datetime.fromisoformat(run["created_at"])
        table.add_row(
            run["id"],
            status_text(run["status"]),
            escape(run["strategy"]),
            f"{run['rounds_done']}/{run['rounds_planned']}",
            number(run["best_metric"]),
            _age(age.total_seconds()),
        )
    return table


def run_view(summary: Summary) -> RenderableType:
    """Show everything the store knows of a run."""
    reason = f": {escape(summary['reason'])}" if summary["reason"] else ""
    facts = {
        "run": f"[bold]{summary['id']}[/]",
        "status": f"{status_text(summary['status'])}{reason}",
        "experiment": escape(f"{summary['name']}: {summary['strategy']} on {summary['task']}, seed {summary['seed']}"),
        "rounds": f"{summary['rounds_done']} of {summary['rounds_planned']}",
    }
    head = Table.grid(padding=(0, 2))
    head.add_column()
    head.add_column(overflow="fold")
    for key, value in facts.items():
        head.add_row(f"[dim]{key}[/]", value)
    parts: list[RenderableType] = [head, "", rounds_table(summary)]
    if certified := [row for row in summary["rounds"] if "cosine_to_mean" in row["certificate"]]:
        parts += ["", _certificates_table(certified)]
    if summary["clients"]:
        parts += ["", _clients_table(summary)]
    if summary["privacy"]:
        parts += ["", *privacy_view(summary["privacy"])]
    if made := last_samples(summary):
        parts += ["", *made]
    if lines := troubles(summary):
        parts += ["", *lines]
    return Group(*parts)


def last_samples(summary: Summary) -> list[RenderableType]:
    """Show what the model made of the task's prompts in the last round that has samples."""
    files = [item for item in summary["artifacts"] if item["kind"] == "samples"]
    samples = _samples(Path(files[-1]["path"])) if files else []
    shown: list[RenderableType] = [f"[dim]samples of round {files[-1]['round']}[/]"] if samples else []
    return shown + [
        Text.assemble(f"  {prompt.strip()} → ", (" ".join(text.split()), "italic")) for prompt, text in samples
    ]


def _samples(path: Path) -> list[tuple[str, str]]:
    """Read prompts and texts; of a run that was added, anybody may have written the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= SAMPLES_BYTES else []
    except (OSError, ValueError, RecursionError):
        return []
    items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
    pairs = [(item.get("prompt"), item.get("text")) for item in items]
    return [(prompt, text) for prompt, text in pairs if isinstance(prompt, str) and isinstance(text, str)]


def plugins_view(title: str, plugins: Sequence[ListedPlugin]) -> RenderableType:
    """Show one family of plug-ins with their options."""
    parts: list[RenderableType] = [f"[bold]{title}[/]"]
    for plugin in plugins:
        source = "" if plugin.source == "built-in" else f" [dim]{escape(plugin.source)}[/]"
        style, words = ("red", plugin.error) if plugin.error else ("cyan", plugin.summary)
        able = _capabilities(plugin.capabilities or {})
        lines = [f"[{style}]{escape(plugin.name)}[/]{source}", escape(words), *([f"[dim]{able}[/]"] if able else [])]
        parts += [Padding(line, (0, 0, 0, 2 if number == 0 else 4)) for number, line in enumerate(lines)]
        parts += [Padding(_options_table(plugin), (0, 0, 0, 4))] if plugin.options else []
    return Group(*parts, "")


def matrix_view(rows: Sequence[MatrixRow]) -> RenderableType:
    """Show which strategy goes with what."""
    table = numbers_table(
        "strategy", "exact", "mixed ranks", "numbers up per layer", "secure sum", "feedback", "memory", "robust rules"
    )
    for row in rows:
        marks = ["yes" if value else "–" for value in (row.exact, row.mixed_ranks)]
        more = ["yes" if v else "–" for v in (row.secure_aggregation, row.error_feedback, row.client_memory)]
        table.add_row(row.name, *marks, row.uploads, *more, row.rules)
    words = (
        "[dim]secure sum: may be merged under secure aggregation; feedback: int8 and int4 uploads may carry over what "
        "they lost; memory: clients keep factors of their own; robust rules: those that fit at equal ranks[/]"
    )
    return Group("[bold]what goes with what[/]", table, words, "")


def checks_view(checks: Sequence[Check]) -> RenderableType:
    """Show the doctor's findings."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for check in checks:
        advice = f"\n[dim]{escape(check.advice)}[/]" if check.advice else ""
        table.add_row(status_text(check.status), check.name, escape(check.text) + advice)
    return table


def _certificates_table(rounds: Sequence[Summary]) -> RenderableType:
    """Show what each merge was: how far from the exact average, of which rank, and who pulled another way."""
    table = numbers_table(
        ">round", ">error", ">effective rank", ">lost energy", ">cosine to mean", "least like the mean"
    )
    for row in rounds:
        known = row["certificate"]
        cosines, ranks = known["cosine_to_mean"], list(known.get("effective_rank", {}).values())
        least = min(cosines, key=lambda client: (cosines[client], client))
        table.add_row(
            str(row["round"]),
            "exact" if row["exact"] else number(row["error"]),
            number(sum(ranks) / len(ranks), 1) if ranks else "–",
            number(known["discarded_energy"]),
            number(sum(cosines.values()) / len(cosines), 2),
            f"{escape(least)} ({number(cosines[least], 2)})",
        )
    return table


def _clients_table(summary: Summary) -> RenderableType:
    table = numbers_table("client", ">rank", ">trained", ">left out", ">examples", ">up", ">down", ">s per round")
    names = sorted({row["client"] for row in summary["clients"]})
    for name in names[:LISTED_CLIENTS]:
        rows = [row for row in summary["clients"] if row["client"] == name]
        trained = [row for row in rows if row["status"] in ("accepted", "received")]
        missed = len(rows) - len(trained)
        table.add_row(
            escape(name),
            ", ".join(str(rank) for rank in sorted({row["rank"] for row in rows if row["rank"]})) or "–",
            str(len(trained)),
            f"[yellow]{missed}[/]" if missed else "0",
            f"{max(row['num_examples'] for row in rows):,}"
            if not summary["privacy"] or any(r["num_examples"] for r in rows)
            else "–",
            size(sum(row["bytes_up"] for row in rows)),
            size(sum(row["bytes_down"] for row in rows)),
            f"{sum(row['seconds'] for row in trained) / len(trained):.1f}"
            if any(r["seconds"] for r in trained)
            else "–",
        )
    return Group(table, *more_clients(len(names)))


def _options_table(plugin: ListedPlugin) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=20)
    table.add_column(ratio=1)
    for option in plugin.options:
        default = "–" if option.default is None else toml_value(option.default)
        words = "required" if option.required else escape(default)
        table.add_row(option.name, words, f"[dim]{escape(option.sentence)}[/]")
    return table


def _capabilities(capabilities: Mapping[str, Any]) -> str:
    able = [key.replace("_", " ") for key, value in capabilities.items() if value is True]
    named = [f"{key}: {value}" for key, value in capabilities.items() if not isinstance(value, bool)]
    return ", ".join([*able, *named])


def _age(seconds: float) -> str:
    for limit, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.0f} {unit}"
    return f"{seconds:.0f} s"
