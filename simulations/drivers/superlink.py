"""A Flower SuperLink of our own for one run: its folder, its environment, and an end without remains."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from common.errors import ConfigurationError, RunError
from common.flower import set_environment_defaults
from simulations.drivers import supervisor

ROOT = Path(__file__).resolve().parents[2]

#: Name of the connection that ``flwr`` finds in its configuration.
CONNECTION = "lorafleet"

#: Seconds until the SuperLink must answer.
START_SECONDS = 60.0

#: Lines of a log that go with an error, as its note.
LAST_LINES = 20


@dataclass(frozen=True)
class Runtime:
    """The folder of one run on Flower's runtime, and the environment of all its processes."""

    folder: Path
    environment: dict[str, str]

    def program(self, name: str) -> str:
        """Return the path of one of Flower's programs."""
        path = shutil.which(name, path=self.environment["PATH"])
        if path is None:
            raise ConfigurationError(f"Flower's program {name} is not there; install flwr with pip again")
        return path

    def start(self, command: list[str], output: Path, stdin: int = subprocess.DEVNULL) -> Popen[bytes]:
        """Start a process out of reach of our terminal's Ctrl-C, with a new file for what it prints."""
        with output.open("wb") as log:
            return Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextmanager
def flower_runtime() -> Iterator[Runtime]:
    """Give a runtime whose SuperLink is up; afterwards neither its files nor any process is left."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-", ignore_cleanup_errors=True) as name:
        runtime = Runtime(Path(name), _environment(Path(name)))
        with _superlink(runtime):
            yield runtime


def _environment(folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    set_environment_defaults(environment)
    environment["FLWR_HOME"] = str(folder / "flwr")
    environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.1"
    environment["PYTHONUNBUFFERED"] = "1"
    # SuperLink and SuperExec start Flower's other programs by name.
    _prepend(environment, "PATH", sysconfig.get_path("scripts"))
    if str(ROOT) != sysconfig.get_path("purelib"):
        _prepend(environment, "PYTHONPATH", str(ROOT))
    # Clients work side by side in processes; each sets the threads it wants.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1"]))
    # A Ray of our own, not one that happens to run here. A socket's path may have 107 characters, and Ray
    # adds up to 68.
    if len(str(folder)) < 39:
        environment.setdefault("RAY_TMPDIR", str(folder))
    return environment


def _prepend(environment: dict[str, str], name: str, entry: str) -> None:
    environment[name] = os.pathsep.join(filter(None, [entry, environment.get(name)]))


@contextmanager
def _superlink(runtime: Runtime) -> Iterator[None]:
    """Run a SuperLink for this one run, and write down for ``flwr`` where it is.

    Told to stop, a SuperLink waits for its clients' connections and leaves a busy simulation running, so the
    supervisor kills all of it. Nothing is lost: what a run keeps, it keeps in the home.
    """
    port, log = _free_port(), runtime.folder / "superlink.log"
    command = [sys.executable, "-I", supervisor.__file__, runtime.program("flower-superlink")]
    command += ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    process = runtime.start(command, log, stdin=subprocess.PIPE)
    try:
        _await_start(process, port, log)
        config = Path(runtime.environment["FLWR_HOME"]) / "config.toml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
        )
        yield
    finally:
        process.communicate()  # closes its standard input


def _await_start(process: Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    *_, last = ["it printed nothing", *last_lines(log)]
    raise RunError(f"Flower's SuperLink did not start: {last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_lines(log: Path) -> list[str]:
    """Return the end of a log, without colours and empty lines."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
