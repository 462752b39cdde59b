"""The code in use, as one hash: server and nodes must agree on theirs, and so must a run and its resumption."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from common.plugins import PLUGINS_VARIABLE

NODE_PACKAGES = ("client", "common")
"""What decides the meaning of an update; server and nodes install the same."""

RUN_PACKAGES = (*NODE_PACKAGES, "server", "strategies")
"""What decides the bits of a run."""

ROOT = Path(__file__).resolve().parents[1]


@cache
def code_fingerprint() -> str:
    """Hash the packages that run on a node: first 16 hex digits of a sha256."""
    return _hash(ROOT / package for package in NODE_PACKAGES)


def run_fingerprint() -> str:
    """Hash the packages that decide a run's result, and the user's own plug-ins."""
    return _run_fingerprint(os.environ.get(PLUGINS_VARIABLE, ""))


@cache
def _run_fingerprint(plugins: str) -> str:
    return _hash([*(ROOT / package for package in RUN_PACKAGES), *([Path(plugins)] if plugins else [])])


def _hash(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
