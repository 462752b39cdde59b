"""Checks this machine: what LoRAFleet needs, what it may use, and what to do about the rest."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from common.errors import LoRAFleetError

Status = Literal["ok", "warn", "fail"]

LEAST_PYTHON = (3, 11)
ENOUGH_DISK = 5e9
LEAST_DISK = 2e8
BASE_SHA256 = "429e619e0279baacc16dc7df45ed9d2595e317b61f167274ef8803a97b8b7dc3"
"""Of the weights of the demo's base model, as they are committed."""

_INSTALL = "pip install -c constraints.txt -e '.[all]' in a clone, or pip install 'lorafleet[all]'"


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Parameters
    ----------
    name : str
        What was looked at.
    status : {"ok", "warn", "fail"}
        A failure is something that is needed.
    text : str
        What was found.
    advice : str
        What to do; empty if nothing.
    """

    name: str
    status: Status
    text: str
    advice: str = ""


def examine(home: Path) -> list[Check]:
    """Run all checks; none of them changes anything."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("flower", check_flower),
        ("ray", check_ray),
        ("home", lambda: check_home(home)),
        ("database", lambda: check_database(home)),
        ("base model", check_base_model),
        ("corpus", check_corpus),
    ]
    return [_careful(name, check) for name, check in checks]


def check_python(found: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Check the interpreter's version."""
    text = f"Python {'.'.join(map(str, found))} on {platform.system()} {platform.machine()}"
    if found < LEAST_PYTHON:
        return Check("python", "fail", text, "LoRAFleet needs Python 3.11 or newer")
    return Check("python", "ok", text)


def check_packages(wanted: list[str] | None = None) -> Check:
    """Check the installed versions against what LoRAFleet asks for; extras may be absent, but not out of range.

    Parameters
    ----------
    wanted : list of str, optional
        Requirements as package metadata have them; default LoRAFleet's own.
    """
    from packaging.requirements import Requirement

    if wanted is None:
        try:
            wanted = requires("lorafleet") or []
        except PackageNotFoundError:
            return Check("packages", "warn", "LoRAFleet itself is not installed, only found on the path", _INSTALL)
    problems, names = [], set()
    for item in map(Requirement, wanted):
        if item.name == "lorafleet" or 'extra == "dev"' in str(item.marker):
            continue
        try:
            found = version(item.name)
        except PackageNotFoundError:
            problems += [] if item.marker else [f"{item.name} is missing"]
            continue
        names.add(item.name)
        if not item.specifier.contains(found, prereleases=True):
            problems.append(f"{item.name} is {found}, wanted is {item.specifier}")
    if problems:
        return Check("packages", "fail", "; ".join(problems), _INSTALL)
    return Check("packages", "ok", f"{len(names)} packages, all in the range asked for")


def check_torch() -> Check:
    """Check that there is PyTorch, and tell what it computes on."""
    import torch

    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"PyTorch {torch.__version__}, {cores} CPU cores, {memory:.0f} GB of memory"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return Check("torch", "ok", f"{text}, no GPU")
    return Check(
        "torch", "ok", f"{text}; " + ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)
    )


def check_flower() -> Check:
    """Check that Flower's internals are where ``common/flower.py`` expects them."""
    importlib.import_module("common.flower")
    return Check("flower", "ok", f"Flower {version('flwr')}")


def check_ray() -> Check:
    """Check whether simulations can run on Ray; nothing else needs it."""
    try:
        return Check("ray", "ok", f"Ray {version('ray')}")
    except PackageNotFoundError:
        advice = "only needed for --driver ray: pip install 'lorafleet[ray]'"
        return Check("ray", "warn", "Ray is not installed", advice)


def check_home(home: Path) -> Check:
    """Check that the home can be written and has room, without making it."""
    place = next(path for path in (home, *home.parents) if path.exists())
    made = "" if place == home else ", will be made"
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        reason = error.strerror or str(error)
        return Check("home", "fail", f"{home} cannot be written ({reason})", "choose another folder with --home")
    text = f"{home}{made}; {free / 1e9:.1f} GB free"
    if free < LEAST_DISK:
        return Check("home", "fail", text, "free some space or choose another folder with --home")
    if free < ENOUGH_DISK:
        return Check("home", "warn", text, "large models need more: free some space")
    return Check("home", "ok", text)


def check_database(home: Path) -> Check:
    """Check that the database can be reached and is of this code's version, without making it."""
    from sqlalchemy import inspect

    from common.store import RunStore
    from common.store.database import told_in_one_line
    from common.store.engine import connect, parse_url, place_of
    from common.store.schema import known_versions

    address = parse_url(home, None)
    newest = f"version {known_versions()[-1]}"
    if address.drivername == "sqlite":
        empty = not Path(address.database or "").exists()
    else:
        engine = connect(address, read_only=True)
        with told_in_one_line(place_of(address)):
            empty = not inspect(engine).get_table_names()
        engine.dispose()
    if empty:
        return Check("database", "ok", f"{place_of(address)} will be made, {newest}")
    with RunStore.open(home, read_only=True) as store:
        return Check("database", "ok", f"{place_of(address)}, {newest}, {len(store.runs())} runs")


def check_base_model(folder: Path | None = None) -> Check:
    """Check that the demo's base model is whole and loads."""
    from safetensors import safe_open

    from common.tasks.causal_lm import BUILTIN_BASE

    file = (folder or BUILTIN_BASE) / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != BASE_SHA256:
        text = f"{file} has sha256 {digest[:12]}…, expected {BASE_SHA256[:12]}…"
        return Check("base model", "fail", text, "install LoRAFleet again, or restore the file from the repository")
    with safe_open(file, framework="np") as tensors:
        count = len(tensors.keys())
    return Check("base model", "ok", f"{count} tensors, sha256 {digest[:12]}…")


def check_corpus() -> Check:
    """Check that Python's library has the packages that play the demo's owners."""
    from common.text.stdlib import OWNERS, resolve_owners, resolve_unseen

    owners, substituted = resolve_owners(OWNERS)
    _, also = resolve_unseen()
    text = f"owners {', '.join(owners.values())}"
    if notices := [*substituted, *also]:
        return Check(
            "corpus", "warn", f"{text}: {'; '.join(notices)}", "results differ from those of a complete library"
        )
    return Check("corpus", "ok", text)


def _careful(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except ImportError as error:
        return Check(name, "fail", f"{error.name or error} cannot be imported", _INSTALL)
    except LoRAFleetError as error:
        return Check(name, "fail", str(error), "")
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "")
