"""Where clients of a simulation keep their ledgers.

::

    <home>/privacy/<client>/ledger.db               counts all experiments of the home
    <home>/runs/<run>/clients/<client>/privacy.db   counts one run only
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LEDGER = "ledger.db"
"""Also the name of the ledger beside an owner's file."""

_HOMES, _RUNS = "privacy/{client}/" + LEDGER, "runs/{run}/clients/{client}/privacy.db"


def home_ledger(home: Path, client: str) -> Path:
    """Return the ledger that counts all experiments."""
    return home / _HOMES.format(client=client)


def run_ledger(home: Path, run: str, client: str) -> Path:
    """Return the ledger that counts one run."""
    return home / _RUNS.format(run=run, client=client)


def ledgers(home: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield every ledger's path, its client, and whether it counts all experiments; also those that were deleted."""
    for pattern, everything in ((_HOMES, True), (_RUNS, False)):
        database = Path(pattern.format(run="*", client="*"))
        found = {path for kind in (".db", ".mark") for path in home.glob(str(database.with_suffix(kind)))}
        yield from ((path, path.parent.name, everything) for path in sorted({it.with_suffix(".db") for it in found}))
