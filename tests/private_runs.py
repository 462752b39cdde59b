"""Private runs that die: one process imports everything once and forks a simulation per line of its input.

Takes a folder, reads a JSON list of numbers from 0 to 1 from stdin, and writes for each how the run ended that was
killed after such a share of the time a run takes, and was then resumed::

    {"killed": -9, "resumed": 0, "home": …}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import client.app
import client.privacy.balance
import server.app  # noqa: F401 - imported once, not in every run
import simulations.drivers.inprocess  # noqa: F401
from common.errors import RunError
from common.privacy.calibration import noise_multiplier
from common.store import RunStore
from simulations.run import resume, simulate
from tests.ledger_writer import ended, forked
from tests.tiny import synthetic

ROUNDS, STEPS, EPSILON, RATE = 4, 2, 4.0, 0.2


def begin(home: Path) -> None:
    private = ("privacy.mode=sample", f"privacy.epsilon={EPSILON}", f"privacy.sample_rate={RATE}")
    shape = (f"federation.rounds={ROUNDS}", f"training.steps={STEPS}", "simulation.persistent_ledger=true")
    simulate(synthetic(*private, *shape, ranks=(2, 4)), home)


def go_on(home: Path) -> None:
    """Resume a run, or begin it where nothing of it was stored yet."""
    try:
        with RunStore.open(home, read_only=True) as store:
            runs = store.runs()
    except Exception:
        runs = []
    if not runs:
        return begin(home)
    if runs[0].status != "completed":
        try:
            resume("last", home)
        except RunError:  # the rounds that were lost are missing at the end
            return


def killed_and_resumed(home: Path, after_s: float) -> dict[str, Any]:
    first = forked(lambda: begin(home))
    time.sleep(after_s)
    os.kill(first, signal.SIGKILL)
    return {"killed": ended(first), "resumed": ended(forked(lambda: go_on(home))), "home": str(home)}


def duration(home: Path) -> float:
    began = time.perf_counter()
    assert ended(forked(lambda: begin(home))) == 0
    return time.perf_counter() - began


def main() -> None:
    folder = Path(sys.argv[1])
    noise_multiplier(EPSILON, 1e-5, RATE, ROUNDS * STEPS)  # computed once for all
    client.privacy.balance.SECOND_STEPS = 0  # the second number is for people
    whole = min(duration(folder / name) for name in ("whole", "again"))
    found = [killed_and_resumed(folder / str(n), share * whole) for n, share in enumerate(json.load(sys.stdin))]
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
