"""The wheel alone, away from the clone, runs the quickstart and the dashboard: all that they read is inside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ClientState_pb2 import ClientState
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets import Subprotocol
from websockets.sync.client import connect

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("client", "common", "dashboard", "server", "simulations", "strategies")
PATIENCE_S = 240

LIST_FILES = """
import atexit, json, os, sys
def write():
    files = sorted({str(f) for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))})
    open(os.environ["LISTED"], "w").write(json.dumps(files))
atexit.register(write)
"""
"""A sitecustomize that writes down where every module of a process came from."""


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that the clone stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".[!s]*", "__pycache__", "*.egg-info", "build", "dist", "docs", "results", "tests"
    )
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    run([*pip, "-q", "-w", str(folder), str(folder / "source")], folder)
    (built,) = folder.glob("lorafleet-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Install it into a folder of its own."""
    target = wheel.parent / "target"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    run([*pip, "-q", "--target", str(target), str(wheel)], wheel.parent)
    return target


def test_it_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {*PACKAGES, "lorafleet.py"}
    sources = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(names)
    data = {f"simulations/presets/{path.name}" for path in (ROOT / "simulations" / "presets").iterdir()}
    data |= {f"simulations/demo/base/{path.name}" for path in (ROOT / "simulations" / "demo" / "base").iterdir()}
    data |= {f"{package}/py.typed" for package in PACKAGES} | {"common/store/migrations/script.py.mako"}
    data |= {f"dashboard/static/{path.name}" for path in (ROOT / "dashboard" / "static").iterdir()}
    data |= {"dashboard/.streamlit/config.toml"}
    assert data <= set(names)


def test_it_runs_the_quickstart_without_the_clone(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(LIST_FILES)
    (tmp_path / "neutral").mkdir()
    options = ["training.steps=1", "federation.rounds=1", "task.options.eval_rows=2", "task.options.new_tokens=2"]
    settings = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "-m", "lorafleet", "simulate", "quickstart", *settings, "--json"]
    out = run(
        command,
        tmp_path / "neutral",
        PYTHONPATH=os.pathsep.join([str(tmp_path / "hook"), str(installed)]),
        LISTED=str(tmp_path / "files.json"),
        LORAFLEET_HOME=str(tmp_path / "home"),
        HOME=str(tmp_path),
    )
    made = json.loads(out)
    assert made["status"] == "completed"
    assert Path(made["adapter"]).is_relative_to(tmp_path / "home")
    assert [row["round"] for row in made["rounds"]] == [0, 1]
    assert list((tmp_path / "neutral").iterdir()) == []
    files = [Path(name) for name in json.loads((tmp_path / "files.json").read_text())]
    ours = [path for path in files if path.is_relative_to(installed)]
    assert {path.relative_to(installed).parts[0] for path in ours} >= {*PACKAGES, "lorafleet.py"} - {"dashboard"}
    own = (*PACKAGES, "lorafleet.py", "tests")
    assert [path for path in files if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in own] == []


def test_its_dashboard_has_its_theme_and_stays_on_this_machine(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "neutral").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LORAFLEET_", "STREAMLIT_"))}
    command = [sys.executable, "-m", "lorafleet", "dashboard", "--home", str(tmp_path / "home"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--no-browser"],
        cwd=tmp_path / "neutral",
        env=kept | {"PYTHONPATH": str(installed), "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"http://(localhost:\d+)", said)
            assert found, said
            assert answer(f"http://{found[1]}/_stcore/health") == "ok"
            begun = first_message(f"ws://{found[1]}/_stcore/stream").new_session
        finally:
            process.terminate()
    assert Path(begun.main_script_path).is_relative_to(installed)
    stated = tomllib.loads((ROOT / "dashboard" / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert begun.custom_theme.light.primary_color == stated["theme"]["light"]["primaryColor"]
    assert begun.custom_theme.dark.background_color == stated["theme"]["dark"]["backgroundColor"]
    assert not begun.config.gather_usage_stats


def answer(url: str) -> str:
    """Ask until it is there."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as found:  # noqa: S310
                assert found.headers["x-frame-options"] == "DENY"
                return str(found.read().decode())
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)


def first_message(url: str) -> ForwardMsg:
    """Open a session as a browser does, and return how the server begins it."""
    with connect(url, subprotocols=[Subprotocol("streamlit")], open_timeout=PATIENCE_S, proxy=None) as socket:
        socket.send(BackMsg(rerun_script=ClientState()).SerializeToString())
        while True:
            got = socket.recv(timeout=PATIENCE_S)
            assert isinstance(got, bytes)
            message = ForwardMsg.FromString(got)
            if message.WhichOneof("type") == "new_session":
                return message
