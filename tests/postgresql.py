"""A PostgreSQL server of a test's own: created in a folder, started, stopped, and started again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class Cluster:
    """A server on a socket in a folder, run by nobody where the tests are run by root.

    Parameters
    ----------
    folder : Path
        Of its files; a short one, since the socket's path must be.
    """

    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not programs:
            pytest.skip("postgresql is not installed")
        self.programs, self.folder = programs[-1].parent, folder
        self.user = "nobody" if os.getuid() == 0 else None
        if self.user is not None:
            os.chown(self.folder, 65534, 65534)
        self.call("initdb", "--no-sync", "--auth=trust", "--username=lorafleet", "--encoding=UTF8", "--locale=C")

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"postgresql://lorafleet@/postgres?host={self.folder}"

    def start(self) -> None:
        """Let it answer."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self.call("pg_ctl", "--wait", f"--log={self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        """End it at once, with all its connections."""
        self.call("pg_ctl", "--wait", "--mode=immediate", "stop")

    def call(self, program: str, *given: str) -> None:
        """Run one of PostgreSQL's programs on it."""
        command = [str(self.programs / program), f"--pgdata={self.folder / 'data'}", *given]
        subprocess.run(command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, check=True, timeout=120)
