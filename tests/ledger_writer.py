"""Clients that die: one process imports everything once and forks a client per scenario, each with a real ledger.

Takes a folder of its own, reads scenarios as a JSON list from stdin, and writes what became of them to stdout::

    {"folder": …, "hook": "before the mark", "at": 3}    dies in round 3, then another client goes on
    {"folder": …, "after_s": 0.03}                       killed from outside after so many seconds, likewise
    {"folder": …, "racing": 6}                           six clients ask at the same moment
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.engine import Engine
from torch import Tensor

import client.privacy.balance
import client.privacy.ledger.file
import client.privacy.ledger.mark
from client.node import Node
from client.privacy.account import admit, settle
from client.privacy.ledger import read_ledger
from common.errors import BudgetExhausted
from common.experiment import Experiment
from common.messages import TrainOrder
from common.tasks import Batch

STEPS, ROUNDS = 8, 5


@dataclass(frozen=True)
class Numbers:
    """Rows that are their own number."""

    count: int = 50

    def __len__(self) -> int:
        return self.count

    def take(self, numbers: Tensor) -> Batch:
        return {"x": numbers.double()}


def client_node(folder: Path) -> Node:
    """A client whose budget of 4 lasts five rounds of eight steps at sample rate 0.1."""
    privacy = {"mode": "sample", "epsilon": 4.0, "sample_rate": 0.1}
    table = {
        "task": {"name": "low_rank_regression"},
        "clients": {"ada": {}},
        "training": {"steps": STEPS},
        "federation": {"rounds": ROUNDS},
        "privacy": privacy,
    }
    experiment = Experiment.parse(table)
    return Node("ada", experiment, tuple(experiment.clients.items()), folder, None, folder / "privacy.db")


def order(number: int, run: str = "r", attempt: int = 1) -> TrainOrder:
    return TrainOrder(
        run=run, round=number, attempt=attempt, rounds=ROUNDS, fingerprint="", client="ada", base_version=0,
        global_hash="0" * 64, rank=2, seed=0, trains="ab",
    )  # fmt: skip


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def before(owner: Any, name: str, wanted: Callable[[], bool]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **more: die() if wanted() else original(*given, **more))


class Client:
    """Trains round after round; where it stands outlives it in two files: what was drawn, and what was answered."""

    def __init__(self, folder: Path, hook: str = "", at: int = 0) -> None:
        self.folder, self.hook, self.at = folder, hook, at
        self.now, self.phase = 0, ""
        store = client.privacy.ledger.file
        for phase in ("reserve", "done"):
            here = self._here(f"before the {phase} transaction", phase)
            event.listen(Engine, "begin", lambda connection, here=here: die() if here() else None)
            here = self._here(f"inside the {phase} transaction", phase)
            event.listen(
                Engine,
                "before_cursor_execute",
                lambda c, cursor, sql, *_, here=here: die() if "INTO entries" in sql and here() else None,
            )
            here = self._here(f"before COMMIT of the {phase}", phase)
            event.listen(Engine, "commit", lambda connection, here=here: die() if here() else None)
            before(store, "write_mark", self._here(f"before the mark of the {phase}", phase))
            before(client.privacy.ledger.mark.os, "replace", self._here(f"half a mark of the {phase}", phase))

    def _here(self, hook: str, phase: str) -> Callable[[], bool]:
        return lambda: self.hook == hook and self.now == self.at and self.phase == phase

    def reach(self, hook: str) -> None:
        if self.hook == hook and self.now == self.at:
            die()

    def note(self, name: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(f"{self.now}\n")
            file.flush()
            os.fsync(file.fileno())

    def work(self) -> None:
        node, rows = client_node(self.folder), Numbers()
        answered = self.folder / "answered"
        done = len(answered.read_text().split()) if answered.exists() else 0
        for self.now in range(done + 1, ROUNDS + 5):
            self.phase = "reserve"
            try:
                permit = admit(node, order(min(self.now, ROUNDS), attempt=self.now), rows)
            except BudgetExhausted:
                return
            self.phase = ""
            self.reach("before training")
            self.note("drawn")
            self.reach("while training")
            self.note("answered")
            self.reach("before done")
            self.phase = "done"
            settle(node, permit)
            self.phase = ""
            self.reach("after done")


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = 0 if work() is not False else 3
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(folder: Path, hook: str = "", at: int = 0, after_s: float = 0.0) -> dict[str, Any]:
    """Let a client die, look at its ledger, and let another one go on until the budget is spent."""
    first = forked(lambda: Client(folder, hook, at).work())
    if after_s:
        time.sleep(after_s)
        os.kill(first, signal.SIGKILL)
    code = ended(first)
    return {
        "killed": code,
        "then": counted(folder),
        "resumed": ended(forked(lambda: Client(folder).work())),
        "end": counted(folder),
    }


def counted(folder: Path) -> dict[str, Any]:
    lines = {name: _lines(folder / name) for name in ("drawn", "answered")}
    book = read_ledger(folder / "privacy.db")
    kinds = [entry.kind for entry in book.entries]
    return lines | {"reserved": kinds.count("reserve"), "done": kinds.count("done")}


def _lines(path: Path) -> int:
    return len(path.read_text().split()) if path.exists() else 0


def race(folder: Path, racing: int) -> dict[str, Any]:
    """Let clients ask at the same moment for what is left after two rounds."""
    node, rows = client_node(folder), Numbers()
    warm = [admit(node, order(number), rows) for number in (1, 2)]
    reader, writer = os.pipe()

    def ask(number: int) -> bool:
        os.read(reader, 1)
        try:
            admit(node, order(3, attempt=number), rows)
        except BudgetExhausted:
            return False
        return True

    children = [forked(lambda number=number: ask(number + 1)) for number in range(racing)]  # type: ignore[misc]
    os.write(writer, b"x" * racing)
    return {"before": len(warm), "ended": [ended(child) for child in children], "end": counted(folder)}


def warm_up(folder: Path) -> None:
    """Live one life here, so that no client has to compute again what noise costs."""
    client.privacy.balance.SECOND_STEPS = 0  # the second number is for people
    folder.mkdir(parents=True)
    Client(folder).work()


def main() -> None:
    found = []
    warm_up(Path(sys.argv[1]))
    for scenario in json.load(sys.stdin):
        folder = Path(scenario.pop("folder"))
        folder.mkdir(parents=True)
        found.append(race(folder, **scenario) if "racing" in scenario else killed_and_resumed(folder, **scenario))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
