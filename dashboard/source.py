"""One store as all sessions of a dashboard see it: what was asked before is not asked again until something changes.

A store that does not answer leaves the last view standing: whatever was asked of the last known moment is still in
the cache, and :attr:`Source.trouble` says since when the view is old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, TypeVar

import streamlit as st
from sqlalchemy import Connection

from common.errors import StoreError
from common.store import RunStore
from common.store.artefacts import RUNS
from common.store.engine import DATABASE_FILE
from common.store.run_store import utc_now
from dashboard.queries.moments import last_change

T = TypeVar("T")
FRESH_S = 0.05
"""A look is good for the rest of the script that took it, and for other viewers' at the same time."""
KEPT = 300
"""Answers that are kept, of all runs and moments together."""


class Source:
    """A store, opened for reading when it is first asked and again after every failure.

    Parameters
    ----------
    home : Path
        Folder of the runs.
    url : str or None
        Of the database, as for :class:`~common.store.RunStore`.

    Attributes
    ----------
    trouble : str
        Why the store does not answer now; empty when it does.
    answered_at : datetime or None
        When it last did.
    """

    def __init__(self, home: Path, url: str | None) -> None:
        self.home = home
        self.trouble = ""
        self.answered_at: datetime | None = None
        self._url = url
        self._store: RunStore | None = None
        self._lock = Lock()
        self._known: dict[str, tuple[str, str]] = {}
        self._looked: dict[str, float] = {}

    def look(self, run: str = "") -> Look:
        """Look at a run, or at the whole store.

        Raises
        ------
        StoreError
            If the store does not answer and never did for this run.
        """
        if monotonic() - self._looked.get(run, -math.inf) > FRESH_S:
            self._look_again(run)
        return Look(self, run, *self._known[run])

    def _look_again(self, run: str) -> None:
        try:
            with self.reading() as connection:
                token = last_change(connection, run)
        except StoreError as error:
            self.trouble = str(error)
            if run not in self._known:
                raise
        else:
            self.trouble, self.answered_at = "", utc_now()
            latest, before = self._known.get(run, (token, token))
            self._known[run] = (token, before if token == latest else latest)
            self._looked[run] = monotonic()

    @property
    def is_new(self) -> bool:
        """Whether no run was ever begun in this home, so that there is no store to answer."""
        return not (self._url or (self.home / RUNS).exists() or (self.home / DATABASE_FILE).exists())

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Hold a transaction that reads.

        Raises
        ------
        StoreError
            If the store does not answer.
        """
        try:
            with self.store.reading() as connection:
                yield connection
        except StoreError:
            self._forget()
            raise

    @property
    def store(self) -> RunStore:
        """The store itself, for what is asked of its files.

        Raises
        ------
        StoreError
            If it cannot be opened.
        """
        with self._lock:
            if self._store is None:
                self._store = RunStore.open(self.home, self._url, read_only=True)
            return self._store

    def _forget(self) -> None:
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()


@dataclass(frozen=True)
class Look:
    """A store at one moment: all answers to one look belong together.

    Parameters
    ----------
    source : Source
        Where it looks.
    run : str
        Id of the run looked at; empty for the whole store.
    token : str
        Another one for every change.
    before : str
        The one before it: its answers stand in for those that a store gone since can no longer give.
    """

    source: Source
    run: str
    token: str
    before: str

    def ask(self, query: Callable[..., T], *args: Any) -> T:
        """Ask a function of :mod:`dashboard.queries`; the connection is put before the arguments.

        Raises
        ------
        StoreError
            If it was not asked before and the store does not answer.
        """
        try:
            return self._answer(self.token, query, args)
        except StoreError as error:
            self.source.trouble = str(error)
            if self.before == self.token:
                raise
            return self._answer(self.before, query, args)

    def _answer(self, token: str, query: Callable[..., T], args: tuple[Any, ...]) -> T:
        name = f"{query.__module__}.{query.__name__}"
        answer: T = _answer(id(self.source), self.run, token, name, args, self.source, query)
        return answer


@st.cache_data(show_spinner=False, max_entries=KEPT)
def _answer(
    source: int,  # noqa: ARG001
    run: str,  # noqa: ARG001
    token: str,  # noqa: ARG001
    name: str,  # noqa: ARG001
    args: tuple[Any, ...],
    _source: Source,
    _query: Callable[..., Any],
) -> Any:
    with _source.reading() as connection:
        return _query(connection, *args)
