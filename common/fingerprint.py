"""The code a node runs, as one hash: server and nodes must agree on it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

SHARED_PACKAGES = ("common", "client")
"""Packages that decide what an update means; both sides install them."""


@cache
def code_fingerprint() -> str:
    """Hash the source files of the packages that run on a node.

    Returns
    -------
    str
        First 16 hex digits of a sha256 over relative paths and contents.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in SHARED_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
