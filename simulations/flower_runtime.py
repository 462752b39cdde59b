"""The ``ray`` driver: the same two apps on Flower's own simulation runtime.

Flower runs bundles. Ours is thin: its components name modules of the installed platform, and the experiment
travels as one text value of the run configuration. A SuperLink of our own serves one run, from a neutral
folder, so that neither the user's working directory nor an older SuperLink decides which code runs.
"""

from __future__ import annotations

import json
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
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen

from common.errors import ConfigurationError, RunError
from common.flower import set_environment_defaults
from simulations import supervisor

ROOT = Path(__file__).resolve().parents[1]

CONNECTION = "lorafleet"

#: Seconds until the SuperLink must answer.
START_SECONDS = 60.0

#: Lines of a log that go with an error, as its note.
LAST_LINES = 20

_BUNDLE = """\
[project]
name = "lorafleet"
version = "0.1.0"
description = "Runs the installed LoRAFleet"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lorafleet"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = {serverapp}
clientapp = {clientapp}

[tool.flwr.app.config]
experiment = ""
run-id = ""
home = ""
"""


@dataclass(frozen=True)
class Runtime:
    """The folder of one run on Flower's runtime, and the environment of all its processes."""

    folder: Path
    environment: dict[str, str]

    def program(self, name: str) -> str:
        """Return the path of one of Flower's programs."""
        return shutil.which(name, path=self.environment["PATH"]) or name

    def start(self, command: list[str], output: Path, stdin: int = subprocess.DEVNULL) -> Popen[bytes]:
        """Start a process out of reach of our terminal's Ctrl-C."""
        with output.open("ab") as log:
            return Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def run_on_flower(
    experiment: str,
    *,
    run_id: str,
    home: Path,
    num_clients: int,
    cpus_per_client: float = 1,
    gpus_per_client: float = 0.0,
    timeout: float | None = None,
    components: tuple[str, str] = ("server.app:app", "client.app:app"),
) -> None:
    """Run an experiment on Flower's simulation runtime and wait for its end.

    Both apps find `experiment`, `run_id` and `home` in ``context.run_config`` as ``experiment``, ``run-id``
    and ``home``. They run in another working directory: paths inside the experiment must be absolute.
    What they print is kept in ``runs/<run_id>/flower.log`` under `home`.

    Parameters
    ----------
    experiment : str
        The whole experiment as text, of any length.
    run_id : str
        Our id of the run.
    home : Path
        Where the platform keeps its runs.
    num_clients : int
        Simulated clients; they work in as many processes as their CPUs and GPUs allow.
    cpus_per_client : whole number of CPUs, at least 1
        What one client at work occupies.
    gpus_per_client : float, at least 0
        Likewise; 0.5 lets two clients share a GPU, 0 hides GPUs from the clients.
    timeout : float, seconds, optional
        Give the run up after this time.
    components : (server, client)
        The two apps as ``module:attribute``.

    Raises
    ------
    ConfigurationError
        Ray is not installed, or `cpus_per_client` is no whole number.
    RunError
        The run failed or could not be started. The last lines of the log are in its notes.
    """
    _check(cpus_per_client)
    log = home.resolve() / "runs" / run_id / "flower.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    values = {"experiment": experiment, "run-id": run_id, "home": str(home.resolve())}
    resources = {
        "num-supernodes": num_clients,
        "client-resources-num-cpus": int(cpus_per_client),
        "client-resources-num-gpus": gpus_per_client,
    }
    with _runtime() as runtime, _superlink(runtime):
        bundle = _write_bundle(runtime.folder, components)
        overrides = runtime.folder / "run.toml"
        overrides.write_text("".join(f"{name} = {_toml(text)}\n" for name, text in values.items()))
        command = [runtime.program("flwr"), "run", str(bundle), CONNECTION, "--stream"]
        command += ["--run-config", str(overrides)]
        command += ["--federation-config", " ".join(f"{name}={value}" for name, value in resources.items())]
        _run(runtime, command, log, timeout)
        _check_outcome(runtime, log)


def _check(cpus_per_client: float) -> None:
    if find_spec("ray") is None:
        raise ConfigurationError(
            "the ray driver needs Ray, which is not installed: pip install 'lorafleet[ray]', "
            "or set simulation.driver to 'inprocess'"
        )
    if cpus_per_client < 1 or cpus_per_client != int(cpus_per_client):
        raise ConfigurationError(
            f"simulation.client_cpus is {cpus_per_client:g}; on Ray a client needs whole CPUs, 1 or more"
        )


@contextmanager
def _runtime() -> Iterator[Runtime]:
    with tempfile.TemporaryDirectory(prefix="lorafleet-", ignore_cleanup_errors=True) as name:
        yield Runtime(Path(name), _environment(Path(name)))


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
        config.write_text(f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
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
    lines = _last_lines(log)
    raise _with_lines(RunError(f"Flower's SuperLink did not start: {lines[-1] if lines else 'no output'}"), lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_bundle(folder: Path, components: tuple[str, str]) -> Path:
    bundle = folder / "bundle"
    bundle.mkdir()
    serverapp, clientapp = map(_toml, components)
    (bundle / "pyproject.toml").write_text(_BUNDLE.format(serverapp=serverapp, clientapp=clientapp))
    (bundle / "README.md").write_text("The code is the installed platform.\n")
    return bundle


def _toml(text: str) -> str:
    """Write a TOML string: JSON's escapes are among TOML's, which also wants DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _run(runtime: Runtime, command: list[str], log: Path, timeout: float | None) -> None:
    process = runtime.start(command, log)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise _failure(f"the run was given up after {timeout:g} s", log) from None
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise _failure("Flower did not run the experiment to its end", log)


def _check_outcome(runtime: Runtime, log: Path) -> None:
    command = [runtime.program("flwr"), "ls", CONNECTION, "--format", "json"]
    listed = runtime.folder / "runs.json"
    runtime.start(command, listed).wait(START_SECONDS)
    try:
        (run,) = json.loads(listed.read_text())["runs"]
    except (ValueError, KeyError) as error:
        raise _failure(f"Flower did not say how the run ended ({error})", log) from None
    if run["status"] != "finished:completed":
        raise _failure(f"the run on Flower's runtime is {run['status']}: {run['status-details']}", log)


def _failure(what: str, log: Path) -> RunError:
    return _with_lines(RunError(f"{what}; see {log}"), _last_lines(log))


def _last_lines(log: Path) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _with_lines(error: RunError, lines: list[str]) -> RunError:
    error.add_note("\n".join(lines))
    return error
