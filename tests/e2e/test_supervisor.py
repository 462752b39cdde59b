"""The supervisor ends what its command started, however far that went away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulations.drivers import supervisor

pytestmark = pytest.mark.e2e

LONG = 20

# A grandchild in a session of its own whose parent has ended, and a child; both write down who they are.
COMMAND = """
setsid sh -c 'sh -c "echo \\$\\$; exec sleep 1000" &'
echo $$
exec sleep 1000
"""


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_everything_ends_when_standard_input_closes() -> None:
    process = start("sh", "-c", COMMAND)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.communicate(timeout=LONG)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_everything_ends_when_the_command_does() -> None:
    process = start("sh", "-c", "setsid sleep 1000 & echo $!")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.wait(timeout=LONG)
    assert not Path(f"/proc/{pid}").exists()
    process.communicate()
