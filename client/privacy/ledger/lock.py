"""One writer per ledger: processes are kept apart by a lock that falls with its holder, threads wait for each other."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import LedgerError
from common.store.lock import held_by_other, sign

PATIENCE_S = 10.0
"""An order holds its ledger for milliseconds, or as long as the noise for a new run is searched."""

_threads: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
_guard = threading.Lock()


@contextmanager
def alone(ledger: Path, patience_s: float | None = None) -> Iterator[None]:
    """Be the only one who writes a ledger.

    Raises
    ------
    LedgerError
        If another process keeps it for longer than ``patience_s``.
    OSError
        If the folder cannot be written.
    """
    with _guard:
        mine = _threads[ledger]
    with mine:
        descriptor = os.open(ledger.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if other := held_by_other(descriptor, PATIENCE_S if patience_s is None else patience_s):
                raise LedgerError(f"the privacy ledger {ledger} is in use by {other}; wait for it or stop it first")
            sign(descriptor)
            yield
        finally:
            os.close(descriptor)
