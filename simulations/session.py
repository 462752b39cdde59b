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
from simulations.following import following
from simulations.live import ProgressBars, ProgressLines
from simulations.summary import json_text, run_summary
from simulations.terminal import outcome_view, plan_view, print_error, what_next

INTERRUPTED = 130


@dataclass(frozen=True)
class Output:
    """How a verb shows what it does.

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
        self.shown(step)
        if step.kind == "run_started":
            self.close()
            self.run = step.data["run"]
            if step.data["driver"] == "ray":
                self._followed.enter_context(following(self.home, self.run, self.shown))

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
    code, trouble, run = 0, "", ""
    with watching(output) as watch:
        try:
            begin()
        except KeyboardInterrupt:
            if not watch.run:
                raise
            code, trouble = INTERRUPTED, "interrupted"
        except LoRAFleetError as error:
            if not watch.run:
                raise
            code, trouble = error.exit_code, str(error)
        run = watch.run
    _show(output, run)
    if trouble:
        flag = f" --home {output.named_home}" if output.named_home else ""
        hint = f"; go on with: lorafleet resume {run}{flag}" if code == INTERRUPTED else ""
        print_error(trouble + hint)
    return code


def _display(output: Output, whole_rounds: bool) -> ProgressBars | ProgressLines:
    errors = Console(stderr=True, highlight=False, quiet=output.quiet)
    drawn = output.console if output.console.is_terminal else errors
    if output.as_json or output.quiet or not drawn.is_terminal or drawn.is_dumb_terminal:
        return ProgressLines(errors)
    return ProgressBars(drawn, whole_rounds)


def _show(output: Output, run: str) -> None:
    with RunStore.open(output.home, read_only=True) as store:
        summary = run_summary(store, run)
    if output.as_json:
        print(json_text(summary))
        return
    output.console.print(outcome_view(summary), what_next(summary, output.named_home))
