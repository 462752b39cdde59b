"""A comparison as people and programs read it: a table in the terminal, in Markdown and CSV, and all of it as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simulations.comparison.rows import MEASURES, TASK_MEASURES, Estimate, Row, has_losses

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """How one measure is shown: its head, what its number is divided by, and its format."""

    title: str
    form: str
    unit: float = 1.0

    def show(self, found: Estimate | None, spread: bool = True) -> str:
        """Write mean ± standard deviation, where it has one that shows."""
        if found is None or math.isnan(found.mean):
            return MISSING
        mean = format(found.mean / self.unit, self.form)
        sd = format((found.sd or 0.0) / self.unit, self.form.lstrip("+"))
        return f"{mean} ± {sd}" if spread and float(sd) else mean


COLUMNS = {
    "held_out_loss": Column("held-out loss", ".4f"),
    "best_loss": Column("best", ".4f"),
    "perplexity": Column("perplexity", ".2f"),
    "excess_loss": Column("excess loss", ".4f"),
    "worst_client_loss": Column("worst client", ".4f"),
    "unseen_loss": Column("unseen loss", ".4f"),
    "change": Column("change", "+.4f"),
    "bytes_up_per_client": Column("MB up per client", ".2f", 1e6),
    "bytes_down_per_client": Column("MB down per client", ".2f", 1e6),
    "bytes_up": Column("MB up", ".2f", 1e6),
    "bytes_down": Column("MB down", ".2f", 1e6),
    "seconds": Column("seconds", ".1f"),
    "error": Column("merge error", ".2g"),
    "epsilon": Column("ε", ".3g"),
    "left_out": Column("left out", "g"),
}
SPREAD_IN_TERMINAL = ("held_out_loss",)
TERMINAL = {
    "held_out_loss": "held-out\nloss",
    "perplexity": "perplex-\nity",
    "excess_loss": "excess\nloss",
    "worst_client_loss": "worst\nclient",
    "unseen_loss": "unseen\nloss",
    "bytes_up_per_client": "MB up/\nclient",
    "bytes_down_per_client": "MB down/\nclient",
    "seconds": "s",
    "error": "merge\nerror",
}

NOTES = (
    "Losses are those of the last evaluated round, *best* is the lowest of all, *change* counts from before training; "
    "held-out loss and perplexity are means over the clients weighted by examples. Megabytes are all adapter traffic, "
    "that of evaluation included. *Excess loss* is what is left to the known optimum of a synthetic task. "
    "*Merge error* is the distance to the exact average of the updates, as a mean over rounds. "
    "*ε* is the privacy spent by the client that spent most, at the experiment's δ. "
    "*Left out* counts replies that were refused or did not come. "
    "*centralised* is one client that trains on the data of all, as many steps as all do together; *local* is each "
    "owner alone, judged by its own held-out part. Both are made for the experiment before anything is varied, and "
    "send no adapters."
)


@dataclass(frozen=True)
class Machine:
    """Where a comparison ran."""

    cpu: str
    cores: int
    gpu: str | None
    torch: str


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Parameters
    ----------
    command : str
        What repeats it.
    seeds : tuple of int
        Averaged over.
    fingerprint : str
        Of the code.
    machine : Machine
        Where it ran.
    home : Path
        Store of its runs.
    rows : tuple of Row
        References last.
    """

    command: str
    seeds: tuple[int, ...]
    fingerprint: str
    machine: Machine
    home: Path
    rows: tuple[Row, ...]

    @property
    def hours(self) -> float:
        """Sum of the time its runs took, those done before included."""
        return sum(outcome.measures["seconds"] for row in self.rows for outcome in row.outcomes) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return everything in the types of JSON; numbers that are not finite become null."""
        rows = [
            {
                "label": row.label,
                "settings": dict(row.settings),
                "reference": row.reference,
                "status": row.status,
                "measures": {name: asdict(found) for name, found in row.measures.items()},
                "outcomes": [asdict(outcome) for outcome in row.outcomes],
                "troubles": [asdict(trouble) for trouble in row.troubles],
            }
            for row in self.rows
        ]
        about = {"command": self.command, "seeds": list(self.seeds), "fingerprint": self.fingerprint}
        place = {"machine": asdict(self.machine), "hours": self.hours, "home": str(self.home)}
        plain: dict[str, Any] = _finite({**about, **place, "rows": rows})
        return plain

    def table(self) -> RenderableType:
        """Draw the table for a terminal, with the sentences of refused rows below."""
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        table.add_column("", overflow="fold", min_width=11)
        shown = [name for name in measured(self.rows) if name in TERMINAL]
        for name in shown:
            table.add_column(TERMINAL[name], justify="right", vertical="bottom", no_wrap=True)
        for row in self.rows:
            found = row.measures
            cells = [COLUMNS[name].show(found.get(name), name in SPREAD_IN_TERMINAL) for name in shown]
            cells[0] = cells[0] if row.outcomes else row.status
            table.add_row(row.label, *cells, style="dim" if row.reference else None)
        sentences = [Text(f"{row.label}: {sentence}") for row in self.rows for sentence in row.sentences]
        return Group(table, *[Padding(sentence, (1, 0, 0, 0)) for sentence in sentences])


def measured(rows: Sequence[Row]) -> list[str]:
    """List the measures worth a column: all, less those that belong to other tasks."""
    return [name for name in COLUMNS if name not in TASK_MEASURES or any(name in row.measures for row in rows)]


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json``, ``comparison.csv`` and ``comparison.md``."""
    text = json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    (folder / "comparison.csv").write_text(_csv(comparison.rows), encoding="utf-8", newline="")
    (folder / "comparison.md").write_text(_markdown(comparison), encoding="utf-8")


def this_machine() -> Machine:
    """Describe the machine this process runs on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(_cpu(), len(os.sched_getaffinity(0)), gpu, version("torch"))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _markdown(comparison: Comparison) -> str:
    machine = comparison.machine
    gpu = f", {machine.gpu}" if machine.gpu else ""
    picture = ["", "![Loss against rounds and against megabytes per client](comparison.svg)"]
    return "\n".join(
        [
            "# Comparison",
            "",
            f"    {comparison.command}",
            "",
            *_markdown_table(comparison),
            "",
            NOTES,
            "",
            f"- seeds: {', '.join(map(str, comparison.seeds))} (mean ± sample standard deviation)",
            f"- code: {comparison.fingerprint}",
            f"- machine: {machine.cpu}, {machine.cores} cores{gpu}, torch {machine.torch}",
            f"- hours of runs: {comparison.hours:.2g}",
            *(picture if has_losses(comparison.rows) else []),
            "",
        ]
    )


def _markdown_table(comparison: Comparison) -> Iterator[str]:
    shown = measured(comparison.rows)
    titles = [COLUMNS[name].title for name in shown]
    noted = any(row.sentences for row in comparison.rows)
    yield _line(["", *titles, *(["note"] if noted else [])])
    yield _line(["---", *["---:"] * len(titles), *(["---"] if noted else [])])
    for row in comparison.rows:
        found = row.measures
        numbers = [COLUMNS[name].show(found.get(name)) for name in shown]
        yield _line([row.label, *numbers, *([_note(row, len(comparison.seeds))] if noted else [])])


def _note(row: Row, seeds: int) -> str:
    if not row.sentences:
        return ""
    done = f" ({len(row.outcomes)} of {seeds} seeds done)" if row.outcomes else ""
    return f"{row.status}{done}: {'; '.join(row.sentences)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(rows: Sequence[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    heads = [f"{name}_{part}" for name in MEASURES for part in ("mean", "sd")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["row", *keys, "reference", "status", "seeds", *heads, "sentence"])
    for row in rows:
        found = row.measures
        numbers = [value for name in MEASURES for value in _pair(found.get(name))]
        settings = [row.settings.get(key, "") for key in keys]
        about = [str(row.reference).lower(), row.status, len(row.outcomes)]
        writer.writerow([row.label, *settings, *about, *numbers, " ".join(row.sentences)])
    return text.getvalue()


def _pair(found: Estimate | None) -> tuple[float | str, float | str]:
    if found is None or math.isnan(found.mean):
        return "", ""
    return found.mean, "" if found.sd is None else found.sd


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
