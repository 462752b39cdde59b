"""Small promises: the help text, one commit of 10 MB, base models loaded per process, a thousand clients' memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime

from reporting import ROOT, report, resident_memory, seconds


def help_seconds() -> float:
    """Time ``lorafleet --help`` as a process."""
    command = [sys.executable, "-m", "lorafleet", "--help"]
    return seconds(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))


def commit_seconds() -> float:
    """Time the commit of a round whose state is 10 MB."""
    import torch

    from common.adapter import Adapter
    from common.federation import ModelSpec, ServerState
    from common.lowrank import LowRank
    from common.store import RunStore
    from server.journal import StoreJournal
    from server.record import RoundRecord

    layers = {f"layer.{i:02d}": LowRank(torch.randn(2560, 16), torch.randn(16, 2560)) for i in range(32)}
    state = ServerState(ModelSpec({}, 0), Adapter.pack(layers), Adapter.empty())
    taken = []
    with tempfile.TemporaryDirectory(dir=ROOT) as home, RunStore.open(home) as store:
        store.create_run("bench", name="b", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=9)
        journal = StoreJournal(store, "bench")
        for number in range(8):
            journal.begin(number, ["a"], 0)
            record = RoundRecord(number, ("a",), 0, datetime.now(UTC))
            start = time.perf_counter()
            journal.commit(record, state, best=False)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def thousand(rounds: int) -> tuple[int, list[int]]:
    """Run the preset and return base models loaded and resident memory after each round."""
    from common import base_model
    from common.experiment_file import load_experiment
    from server.progress import Progress, listening
    from simulations import simulate

    loads, memory = [], []
    original = base_model.BaseModel.__init__

    def counted(self, load):  # type: ignore[no-untyped-def]
        loads.append(load)
        original(self, load)

    def watch(step: Progress) -> None:
        if step.kind == "committed":
            memory.append(resident_memory())

    base_model.BaseModel.__init__ = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as home, listening(watch):
        simulate(load_experiment("thousand", [f"federation.rounds={rounds}"]), home)
    return len(loads), memory


def main() -> None:
    """Measure and report."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    loads, memory = thousand(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    quarter = memory[len(memory) // 4]
    rows = [
        ["`lorafleet --help`", f"{help_seconds():.2f} s", "0.5 s"],
        ["commit of a round, 10 MB state", f"{commit_seconds() * 1000:.0f} ms", "50 ms"],
        ["base models loaded in one process, 1,000 clients", loads, "1"],
        [
            f"`thousand`: resident memory after {len(memory) // 4} and {len(memory) - 1} rounds",
            f"{quarter / 1e6:.0f} and {memory[-1] / 1e6:.0f} MB",
            "flat",
        ],
    ]
    report("platform", "Platform figures", "Medians of several runs.", ["figure", "measured", "goal"], rows)


if __name__ == "__main__":
    main()
