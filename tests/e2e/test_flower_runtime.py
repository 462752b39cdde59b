"""The ray driver: a thin bundle on Flower's own runtime, with stand-ins for the platform's two apps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError, RunError
from simulations.drivers import flower_runtime, superlink
from simulations.drivers.flower_runtime import run_on_flower
from simulations.drivers.superlink import Runtime

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.e2e

SERVER = """
import json, os, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
from common.flower import wait_for_replies

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    if config["experiment"] == "fail":
        raise ValueError("no such data")
    end = time.monotonic() + 60
    while len(nodes := list(grid.get_node_ids())) < 3 and time.monotonic() < end:
        time.sleep(0.1)  # Flower registers the nodes after it has started the server
    missing = list(grid.push_messages([Message(RecordDict(), node, "query") for node in nodes]))
    clients = []
    while missing:
        for reply in wait_for_replies(grid, missing, 60):
            missing.remove(reply.metadata.reply_to_message_id)
            clients.append(dict(reply.content["about"]))
    said = {"config": dict(config), "clients": clients, "folder": os.getcwd(), "pid": os.getpid()}
    Path(config["home"], "said.json").write_text(json.dumps(said))
    print("the stand-in is done")
"""

CLIENT = """
import os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    names = ["FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_USAGE_STATS_ENABLED", "OMP_NUM_THREADS"]
    about = {name: os.environ.get(name, "") for name in names}
    about |= {"partition": context.node_config["partition-id"], "pid": os.getpid(), "folder": os.getcwd()}
    return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)
"""

COMPONENTS = ("standin_server.app:app", "standin_client.app:app")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the stand-ins importable as an installed package is, and give a home."""
    for name, code in (("standin_server", SERVER), ("standin_client", CLIENT)):
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "app.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "home"


def processes_in(folder: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(folder):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def run(home: Path, experiment: str, **options: Any) -> None:
    run_on_flower(experiment, run_id="run-1", home=home, num_clients=3, components=COMPONENTS, **options)


def test_the_two_apps_run_on_flower_and_nothing_is_left(installed: Path) -> None:
    experiment = json.dumps({"task": "äöü \U0001f33c", "line": 'a "b" \\ c', "odd": "\t\n\x7f"}) + " \x7f" * 20_000
    run(installed, experiment)
    said = json.loads((installed / "said.json").read_text())
    assert said["config"] == {"experiment": experiment, "run-id": "run-1", "home": str(installed)}
    assert sorted(client["partition"] for client in said["clients"]) == [0, 1, 2]
    for client in said["clients"]:
        assert client["FLWR_TELEMETRY_ENABLED"] == client["RAY_USAGE_STATS_ENABLED"] == "0"
        assert client["FLWR_DISABLE_UPDATE_CHECK"] == client["OMP_NUM_THREADS"] == "1"
        assert client["folder"] == said["folder"] != os.getcwd()
    assert "the stand-in is done" in (installed / "runs" / "run-1" / "flower.log").read_text()
    assert not Path(said["folder"]).exists()
    assert processes_in(said["folder"]) == []
    assert not [pid for pid in {c["pid"] for c in said["clients"]} | {said["pid"]} if Path(f"/proc/{pid}").exists()]


@pytest.mark.long
def test_a_failure_of_the_server_is_the_reason_of_the_error(installed: Path) -> None:
    with pytest.raises(RunError, match=r"finished:failed: no such data; see .*flower\.log") as failure:
        run(installed, "fail")
    assert "ValueError: no such data" in failure.value.__notes__[0]


def test_an_app_that_is_not_there_is_named(installed: Path) -> None:
    with pytest.raises(RunError, match=r"not run the experiment .*flower\.log") as failure:
        run_on_flower(
            "",
            run_id="run-1",
            home=installed,
            num_clients=1,
            components=("standin_server.app:app", "standin_client.app:nothing"),
        )
    assert "Unable to find attribute nothing" in failure.value.__notes__[0]


def test_a_run_that_takes_too_long_is_ended(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    inner = superlink._environment

    def noting(folder: Path) -> dict[str, str]:
        folders.append(folder)
        return inner(folder)

    monkeypatch.setattr(superlink, "_environment", noting)
    with pytest.raises(RunError, match=r"given up after 3 s"):
        run(installed, "", timeout=3)
    assert not folders[0].exists()
    assert processes_in(str(folders[0])) == []


def test_a_superlink_that_does_not_start_is_reported(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "_free_port", lambda: 99_999)
    with pytest.raises(RunError, match=r"SuperLink did not start: .*65535"):
        run(installed, "")


@pytest.mark.parametrize("cpus", [0, 0.5, 1.5])
def test_clients_need_whole_cpus(tmp_path: Path, cpus: float) -> None:
    with pytest.raises(ConfigurationError, match="whole CPUs"):
        run(tmp_path, "", cpus_per_client=cpus)


def test_without_ray_the_driver_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_runtime, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lorafleet\[ray\]'"):
        run(tmp_path, "")


OUTCOMES = [
    ("finished:failed", "no disk", "", RunError, "finished:failed: no disk; see .*flower.log"),
    ("finished:stopped", "N/A", "", RunError, "finished:stopped: N/A; see .*flower.log"),
    ("finished:failed", "Ending.", "ERROR ActorPool is empty. Stopping", ConfigurationError, "no client fits"),
]


def outcome_of(folder: Path, printed: str, log: str) -> None:
    program = folder / "flwr"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{printed}'\n")
    program.chmod(0o755)
    (folder / "flower.log").write_text(log)
    environment = {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    flower_runtime._check_outcome(Runtime(folder, environment), folder / "flower.log")


@pytest.mark.parametrize(("status", "details", "log", "kind", "words"), OUTCOMES)
def test_an_unhappy_end_is_told(
    tmp_path: Path, status: str, details: str, log: str, kind: type[Exception], words: str
) -> None:
    printed = json.dumps({"runs": [{"status": status, "status-details": details}]})
    with pytest.raises(kind, match=words):
        outcome_of(tmp_path, printed, log)


@pytest.mark.parametrize("printed", ["", "{}", '{"runs": []}'])
def test_an_unreadable_end_is_told(tmp_path: Path, printed: str) -> None:
    with pytest.raises(RunError, match="did not say how the run ended"):
        outcome_of(tmp_path, printed, "")
