"""The sign of life: at once, again and again, in spite of the database, and no longer than the run."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from common.errors import StoreError
from server.heartbeat import heartbeat

FOR_EVER_S = 3600.0
WITHIN_S = 20.0


class Store:
    """Counts beats; those it is told to fail do."""

    def __init__(self, *fails: int) -> None:
        self.fails = fails
        self.beats: list[str] = []
        self.changed = threading.Condition()

    def mark_alive(self, run: str) -> None:
        """Beat."""
        with self.changed:
            self.beats.append(run)
            self.changed.notify_all()
        if len(self.beats) in self.fails:
            raise StoreError("the database is busy; try again later")

    def wait_for(self, count: int) -> bool:
        """Wait until there were so many beats."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.beats) >= count, WITHIN_S)


def beating(store: Any, interval_s: float) -> Any:
    return heartbeat(store, "r1", interval_s)


def test_the_first_beat_comes_at_once_and_the_end_does_not_wait_for_the_next() -> None:
    store = Store()
    with beating(store, FOR_EVER_S):
        assert store.wait_for(1)
    assert store.beats == ["r1"]
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_it_goes_on_after_failures_and_logs_each_row_of_them_once(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(1, 2, 4)
    with caplog.at_level(logging.WARNING), beating(store, 0.001):
        assert store.wait_for(6)
    said = "run r1 cannot say that it lives, and goes on: the database is busy; try again later"
    assert caplog.messages == [said, said]


def test_it_ends_with_a_run_that_fails() -> None:
    store = Store()
    with pytest.raises(ZeroDivisionError), beating(store, FOR_EVER_S):
        raise ZeroDivisionError
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
