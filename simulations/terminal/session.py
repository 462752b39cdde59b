"""Runs a federation for the command line: shows it while it goes on, then what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from common.errors import LoRAFleetError
from common.store import RunStore
from server.progress import Progress, listening
from simulations.terminal.following import following
from simulations.terminal.live import ProgressBars, ProgressLines
from simulations.terminal.planning import plan_view
from simulations.terminal.privacy_tables import privacy_lines
from simulations.terminal.summary import run_summary
from simulations.terminal.tables import (
    INTERRUPTED,
    Output,
    home_flag,
    outcome_view,
    print_error,
    print_interrupted,
    print_next,
)


@dataclass
class Watch:
    """Knows which run has begun, and shows its steps wherever they come from.

    Parameters
    ----------
    home : Path
        Where the run is.
    shown : callable
        Draws or writes the steps.
    """

    home: Path
    shown: ProgressBars | ProgressLines
    run: str = ""
    _followed: ExitStack = field(default_factory=ExitStack)

    def __call__(self, step: Progress) -> None:
        """Follow one step; a run of other processes is followed in the store."""
        if step.kind == "run_started":
            self.close()
            self.run = step.data["run"]
            if step.data["driver"] == "ray":
                self._followed.enter_context(following(self.home, self.run, self.shown))
        self.shown(step)

    def close(self) -> None:
        """Stop following."""
        self._followed.close()


@contextmanager
def watching(output: Output, whole_rounds: bool = True) -> Iterator[Watch]:
    """Show the progress of what runs in this block.

    Parameters
    ----------
    output : Output
        Where and how.
    whole_rounds : bool
        Show plan and rounds; without, only notices and what is under way.
    """
    shown = _display(output, whole_rounds)

    def show_plan(step: Progress) -> None:
        if step.kind == "planned" and whole_rounds and not (output.quiet or output.as_json):
            output.console.print(plan_view(step.data["plan"], step.data["experiment"], notices=False), "")

    with shown:
        watch = Watch(output.home, shown)
        try:
            with listening(show_plan, watch):
                yield watch
        finally:
            watch.close()


def run_session(begin: Callable[[], object], output: Output) -> int:
    """Run a federation, show it, and return the exit code.

    Parameters
    ----------
    begin : callable
        Simulates or resumes.
    output : Output
        Where and how it is shown.

    Raises
    ------
    LoRAFleetError
        If no run was begun.
    """
    trouble: LoRAFleetError | KeyboardInterrupt | None = None
    with watching(output) as watch:
        try:
            begin()
        except (KeyboardInterrupt, LoRAFleetError) as error:
            if not watch.run:
                raise
            trouble = error
    _show(output, watch.run)
    if isinstance(trouble, LoRAFleetError):
        print_error(trouble)
        return trouble.exit_code
    if trouble is not None:
        print_interrupted(f"go on with: lorafleet resume {watch.run}{home_flag(output.named_home)}")
        return INTERRUPTED
    return 0


def _display(output: Output, whole_rounds: bool) -> ProgressBars | ProgressLines:
    errors = Console(stderr=True, highlight=False, quiet=output.quiet)
    drawn = output.console if output.console.is_terminal else errors
    if output.as_json or output.quiet or not drawn.is_terminal or drawn.is_dumb_terminal:
        return ProgressLines(errors)
    return ProgressBars(drawn, whole_rounds)


def _show(output: Output, run: str) -> None:
    with RunStore.open(output.home, read_only=True) as store:
        summary = run_summary(store, run)
    private = privacy_lines(summary["privacy"]) if summary["privacy"] else []
    output.show(summary, outcome_view(summary), *private)
    if not output.as_json:
        print_next(output.console, summary, output.named_home)
