"""What the terminal shows of a one-shot merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape

from simulations.terminal.tables import numbers_table

if TYPE_CHECKING:
    from server.merge import Merge


NOTES = (
    "[dim]error: distance from the weighted sum of the updates, relative to it[/]",
    "[dim]effective rank: singular values that hold 95 % of the squared norm[/]",
)


def merge_view(made: Merge, places: Sequence[Path], out: Path) -> RenderableType:
    """Show what was merged with which weights, and how near each layer is to the exact sum."""
    inputs = [f"{weight:g} × {escape(str(place))}" for weight, place in zip(made.weights, places, strict=True)]
    table = numbers_table("layer", ">rank", ">norm", ">error", ">effective rank")
    table.columns[0].overflow = "fold"
    for row in made.layers:
        table.add_row(escape(row.layer), str(row.rank), f"{row.norm:.4g}", f"{row.error:.1e}", str(row.effective_rank))
    largest = max(row.rank for row in made.layers)
    widest = max(row.effective_rank for row in made.layers)
    table.add_row("all layers", str(largest), f"{made.norm:.4g}", f"{made.error:.1e}", str(widest), style="bold")
    written = f"written: {escape(str(out))}"
    return Group(f"{escape(made.strategy)} of {' + '.join(inputs)}", "", table, "", *NOTES, "", written)
