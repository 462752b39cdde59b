"""Progress while a run goes on: a bar per round with the clients inside it, or plain lines.

Both are listeners of ``server.progress``; where a run's steps come from is no concern of theirs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from common.wording import counted, duration
from server.progress import Progress

LISTED_CLIENTS = 10
BAR_WIDTH = 20
FRAMES_PER_S = 5

_STYLES = {"waiting": "dim", "training": "cyan", "done": "green", "left out": "yellow"}


@dataclass
class RoundState:
    """What is known of the round under way.

    Orders are worked on in the order they were sent, so the first unanswered ones, as many as there are workers, are
    in training.
    """

    workers: int = 1
    number: int = 0
    total: int = 0
    phase: str = ""
    started: float = 0.0
    waiting: list[str] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def cohort(self) -> int:
        """Count the clients of the round."""
        return len(self.waiting) + len(self.done) + len(self.left_out)

    def take(self, step: Progress) -> None:
        """Follow one step."""
        if step.kind == "run_started":
            self.workers = step.data.get("workers", 1)
        elif step.kind == "round_started":
            self.number, self.total = step.round, step.data.get("rounds", self.total)
            self.started = time.monotonic()
            self.waiting, self.done, self.left_out = list(step.data.get("clients", ())), {}, {}
            self.phase = "training" if step.round else "evaluating before training"
        elif step.kind == "reply":
            self._settle(step.client, self.done, _done(step.data))
        elif step.kind == "left_out":
            self._settle(step.client, self.left_out, step.text.partition(": ")[2] or step.text)
        elif step.kind in ("aggregated", "round_failed"):
            self.phase = "evaluating"

    def clients(self) -> list[tuple[str, str, str]]:
        """List name, state and words of the clients: those at work and left out first, as many as fit."""
        shown = [(name, "training", "") for name in self.waiting[: self.workers]]
        shown += [(name, "left out", reason) for name, reason in self.left_out.items()]
        shown += [(name, "done", words) for name, words in reversed(self.done.items())]
        shown += [(name, "waiting", "") for name in self.waiting[self.workers :]]
        return sorted(shown[:LISTED_CLIENTS])

    def sentence(self, data: Mapping[str, Any]) -> str:
        """Say how the round ended, from what its commit tells."""
        metrics, passed = data.get("metrics", {}), time.monotonic() - self.started
        loss = metrics.get("held_out_loss", metrics.get("unseen_loss"))
        parts = [f"{len(self.done)} of {self.cohort} trained"] if self.number else ["before training"]
        parts += [f"loss {loss:.4f}"] if loss is not None else []
        parts += _spent(data)
        return ", ".join([*parts, duration(data.get("seconds", passed))])

    def _settle(self, client: str, place: dict[str, str], words: str) -> None:
        if client in self.waiting:
            self.waiting.remove(client)
        self.done.pop(client, None)
        place[client] = words
        if not self.waiting:
            self.phase = "merging, evaluating"


class ProgressLines:
    """Writes a line per round: for logs, pipes and scripts."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.state = RoundState()

    def __call__(self, step: Progress) -> None:
        """Follow one step."""
        self.state.take(step)
        if step.kind in ("notice", "run_started"):
            self._write(step.text)
        elif step.kind == "left_out":
            self._write(f"round {step.round}: {step.text}")
        elif step.kind == "round_failed":
            self._write(step.text)
        elif step.kind == "committed":
            place = f"round {step.round} of {step.data.get('rounds', self.state.total)}"
            self._write(f"{place}: {self.state.sentence(step.data)}")

    def __enter__(self) -> Self:
        """Return the listener."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def _write(self, line: str) -> None:
        self.console.print(Text(" ".join(line.split())), soft_wrap=True)


class ProgressBars:
    """Shows the round under way at the bottom of a terminal, and leaves one line of each that ended.

    Parameters
    ----------
    console : Console
        A terminal.
    whole_rounds : bool
        Leave a line per round; without, only notices stay, for programs of many runs.
    """

    def __init__(self, console: Console, whole_rounds: bool = True) -> None:
        self.console = console
        self.state = RoundState()
        self.whole_rounds = whole_rounds
        self._opening = "reading model and data"
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=FRAMES_PER_S, transient=True)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wipe the round under way."""
        self._live.stop()

    def __call__(self, step: Progress) -> None:
        """Follow one step."""
        self.state.take(step)
        if step.kind == "run_started":
            self._opening = f"starting {step.text}"
        elif step.kind == "round_started":
            self._opening = ""
        elif step.kind == "notice":
            mark = "[yellow]note:[/] " if self.whole_rounds else ""
            self.console.print(mark + escape(step.text))
        elif step.kind == "left_out" and self.whole_rounds:
            self.console.print(f"[yellow]round {step.round}:[/] {escape(step.text)}")
        elif step.kind == "round_failed":
            self.console.print(f"[red]{escape(step.text)}[/]")
        elif step.kind == "committed":
            if self.whole_rounds:
                self.console.print(self._head(self.state.sentence(step.data), finished=True))
            self._opening = "finishing" if step.round == self.state.total else f"starting round {step.round + 1}"

    def _view(self) -> RenderableType:
        if self._opening:
            self._spinner.update(text=self._opening)
            return self._spinner
        state = self.state
        self._spinner.update(text=f"{state.phase} {duration(time.monotonic() - state.started)}")
        clients = Table.grid(padding=(0, 2, 0, 0))
        clients.add_column(no_wrap=True)
        clients.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        listed = state.clients()
        for name, kind, words in listed:
            clients.add_row(f"  {escape(name)}", Text(f"{kind} {words}".strip(), style=_STYLES[kind]))
        more = state.cohort - len(listed)
        return Group(self._head(self._spinner), clients, *([f"  … and {more} more"] if more else []))

    def _head(self, words: Any, finished: bool = False) -> Table:
        state = self.state
        settled = state.cohort - len(state.waiting)
        full = 1.0 if finished else settled / state.cohort if state.cohort else 0.0
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(width=BAR_WIDTH)
        row.add_column(ratio=1)
        row.add_row(f"round {state.number} of {state.total}", ProgressBar(1.0, full, width=BAR_WIDTH), words)
        return row


def _done(data: Mapping[str, Any]) -> str:
    loss, seconds, spent = data.get("train_loss"), data.get("seconds"), data.get("epsilon")
    words = [f"in {duration(seconds)}"] if seconds else []  # under privacy clients do not tell
    words += [f"train loss {loss:.4f}"] if loss is not None else []
    words += [f"ε {spent:.2f}"] if spent is not None else []
    return ", ".join(words)


def _spent(data: Mapping[str, Any]) -> list[str]:
    """Say what of a privacy budget is spent, and how long the rest lasts."""
    spent, left = data.get("epsilon"), data.get("rounds_left")
    words = [f"ε {spent:.2f} spent"] if spent is not None else []
    return words + ([f"{counted(left, 'round')} left"] if left is not None else [])
