"""The ``replay`` verb: merges a past run's replies again and shows both merges side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import track

from common.errors import ConfigurationError, UserError
from common.experiment_file import apply_override
from common.wording import number
from simulations.terminal.tables import Output, numbers_table

if TYPE_CHECKING:
    from server.replay import ReplayedRound


def replay_run(run: str, strategy: str, overrides: Sequence[str], evaluate: bool, output: Output) -> int:
    """Merge a run's kept replies with another strategy; show or print what came of it."""
    from server.replay import own_choices, replay
    from strategies import AGGREGATION
    from strategies.robust import ROBUST

    if unknown := [override for override in overrides if not override.startswith(("strategy.options.", "robust."))]:
        raise ConfigurationError(
            f"--set {unknown[0]}: a replay takes strategy.options.KEY and robust.KEY; all else is as the run had it"
        )
    table = own_choices(run, output.home, strategy)
    for override in overrides:
        apply_override(table, override)
    merging = AGGREGATION.create(strategy, table["strategy"].get("options"))
    rule = ROBUST.create(table["robust"]["name"], table["robust"].get("options"))
    rounds = replay(run, output.home, merging, rule, evaluate)
    shown = Console(stderr=True)
    quiet = output.as_json or not shown.is_terminal
    found = list(track(rounds, "merging again", console=shown, transient=True, disable=quiet))
    if all(each.reason for each in found):
        raise UserError(f"{strategy} can merge no round of that run: {found[0].reason}")
    output.show(
        {"run": run, "strategy": strategy, "robust": rule.plugin_name, "rounds": [asdict(each) for each in found]},
        _view(strategy, found),
    )
    return 0


def _view(strategy: str, rounds: Sequence[ReplayedRound]) -> RenderableType:
    table = numbers_table(
        ">round", ">replies", ">error", ">it was", ">loss", ">it was", ">effective rank", ">lost energy"
    )
    for each in rounds:
        cells = [each.error, each.was_error, each.loss, each.was_loss, each.effective_rank, each.discarded_energy]
        table.add_row(str(each.number), str(each.replies), *(number(cell) for cell in cells))
    reasons = [f"[dim]round {each.number}: {escape(each.reason)}[/]" for each in rounds if each.reason]
    words = (
        f"[dim]merged by {escape(strategy)}, each round on top of the run's own model before it; the error is relative "
        "to the exact average[/]"
    )
    return Group(table, words, *reasons)
