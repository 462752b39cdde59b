"""The sign of life of a run: noted in the store every few seconds, as long as the process that writes the run lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import StoreError
from common.store import RunStore

INTERVAL_S = 5.0
LAST_WAIT_S = 1.0
"""How long the end waits for a beat that hangs at a database."""

log = logging.getLogger(__name__)


@contextmanager
def heartbeat(store: RunStore, run: str, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """Note in the store that the run's process lives, now and every few seconds while the block goes on.

    A beat that fails is tried again; the first one of a row is logged.

    Parameters
    ----------
    store : RunStore
        Where the run is.
    run : str
        Its id.
    interval_s : float, seconds
        From one beat to the next.
    """
    stop = threading.Event()

    def beat() -> None:
        well = _beat(store, run, well=True)
        while not stop.wait(interval_s):
            well = _beat(store, run, well)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LAST_WAIT_S)


def _beat(store: RunStore, run: str, well: bool) -> bool:
    """Note a sign of life and tell whether that went well."""
    try:
        store.mark_alive(run)
    except StoreError as error:
        if well:
            log.warning("run %s cannot say that it lives, and goes on: %s", run, error)
        return False
    return True
