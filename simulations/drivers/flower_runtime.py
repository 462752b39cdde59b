"""The ``ray`` driver: the same two apps on Flower's own simulation runtime.

Flower runs bundles. Ours is thin: its components name modules of the installed platform, and the experiment
travels as one text value of the run configuration. A SuperLink of our own serves one run, from a neutral
folder, so that neither the user's working directory nor an older SuperLink decides which code runs.
"""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen

from common.errors import ConfigurationError, RunError
from simulations.drivers.superlink import CONNECTION, Runtime, flower_runtime, last_lines

#: Seconds until Flower must say how a run has ended.
ANSWER_SECONDS = 60.0

#: What Flower's log says when not a single client can be placed; its status does not.
NO_ROOM = "ActorPool is empty"

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
        Ray is not installed, `cpus_per_client` is no whole number, or this machine has less than one client
        needs.
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
    with flower_runtime() as runtime:
        bundle = _write_bundle(runtime.folder, components)
        overrides = runtime.folder / "run.toml"
        overrides.write_text("".join(f"{name} = {_toml(text)}\n" for name, text in values.items()), encoding="utf-8")
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
    try:
        code = _finish(runtime.start(command, log), timeout)
    except subprocess.TimeoutExpired:
        raise _failure(f"the run was given up after {timeout:g} s", log) from None
    if code != 0:
        raise _failure("Flower did not run the experiment to its end", log)


def _finish(process: Popen[bytes], timeout: float | None) -> int:
    try:
        return process.wait(timeout)
    finally:
        process.kill()
        process.wait()


def _check_outcome(runtime: Runtime, log: Path) -> None:
    command = [runtime.program("flwr"), "ls", CONNECTION, "--format", "json"]
    listed = runtime.folder / "runs.json"
    try:
        _finish(runtime.start(command, listed), ANSWER_SECONDS)
        (run,) = json.loads(listed.read_text())["runs"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        raise _failure(f"Flower did not say how the run ended ({error})", log) from None
    if run["status"] == "finished:completed":
        return
    if NO_ROOM in log.read_text(encoding="utf-8", errors="replace"):
        raise ConfigurationError(
            "no client fits on this machine; lower simulation.client_cpus or simulation.client_gpus"
        )
    reason = run["status-details"].removeprefix("Simulation failed with exception: ")
    raise _failure(f"the run on Flower's runtime is {run['status']}: {reason}", log)


def _failure(what: str, log: Path) -> RunError:
    error = RunError(f"{what}; see {log}")
    error.add_note("\n".join(last_lines(log)))
    return error
