"""What all benchmark programs share: timing, memory, and one results file each under ``docs/results/``."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def seconds(
    work: Callable[[], object], repeats: int = 5, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median time of ``work`` by a clock, wall time unless said, in seconds."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        taken.append(clock() - start)
    return statistics.median(taken)


def in_fresh_process(arguments: Sequence[str]) -> str:
    """Run this program again with arguments, in a process of its own, and return what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def peak_above(work: Callable[[], T]) -> tuple[T, int]:
    """Return what ``work`` gives, and by how many bytes resident memory grew meanwhile, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to hide what is needed now
    before = resident_memory()
    Path("/proc/self/clear_refs").write_text("5")
    given = work()
    return given, max(peak_memory() - before, 0)


def resident_memory() -> int:
    """Return this process's resident memory in bytes, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def report(name: str, title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table and write it to ``docs/results/<name>.md`` with command, date and machine."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows]]
    table = "\n".join(lines)
    command = " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    page = f"# {title}\n\n{text}\n\n{table}\n\n`{command}`, {_machine()}\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    sys.stdout.write(f"\n{title}\n{table}\n")


def _machine() -> str:
    from importlib.metadata import version

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "peft"))
    return f"{datetime.now(UTC):%Y-%m-%d}, {model} ({cores} cores), Python {platform.python_version()}, {versions}"
