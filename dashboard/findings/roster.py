"""The clients of a run as a page shows them: who there is, what each is known to be, and how quick it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from sqlalchemy import Connection

from common.store import Client
from dashboard.findings.slowness import Pace, Work
from dashboard.queries import client_metrics, clients
from dashboard.words import labels

SHOWN = ("held_out_loss", "train_loss", "cosine_to_mean", "trust")
"""Numbers of each client that its row in a table has, in the order of preference for the loss."""


@dataclass(frozen=True)
class Roster:
    """All that a page needs to know of a run's clients, of one moment.

    Parameters
    ----------
    members : mapping of str to Client
        As the server met them, by name; empty for runs of older versions.
    totals, declared : DataFrame
        Of :mod:`dashboard.queries.clients`, with the client as index.
    latest : mapping of str to Series
        Each client's last value of a number, by the number's name.
    work : mapping of str to Work
        What each client needs for a round, of those that finished one lately.
    """

    members: Mapping[str, Client]
    totals: pd.DataFrame
    declared: pd.DataFrame
    latest: Mapping[str, pd.Series]
    work: Mapping[str, Work]

    @cached_property
    def names(self) -> list[str]:
        """Return all clients, numbers in their names counted as numbers."""
        found = {*self.members, *self.totals.index}
        for values in self.latest.values():
            found.update(values.index)
        return sorted(found, key=natural)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Return what each client is called on the page."""
        return labels(self.names)

    @cached_property
    def paces(self) -> dict[str, Pace]:
        """Return how quick each client is."""
        return {name: self._pace(name) for name in self.names}

    @cached_property
    def slowest_first(self) -> list[str]:
        """Return all clients, those that need longest for a round first and those without one last."""
        return sorted(self.names, key=lambda name: -(self.paces[name].seconds or 0.0))

    def trains(self, name: str) -> bool:
        """Tell whether a client trains: it was asked to, or its row says so."""
        member = self.members.get(name)
        return name in self.totals.index or (member is not None and member.rank is not None)

    def _pace(self, name: str) -> Pace:
        label, work = self.labels[name], self.work.get(name)
        asked, late = (
            (int(self.totals.at[name, key]) for key in ("asked", "late")) if name in self.totals.index else (0, 0)
        )
        if work is None:
            return Pace(label, None, asked=asked, late=late)
        return Pace(label, work.seconds, work.rounds, work.last, asked, late, work.phases)


def roster(connection: Connection, run: str) -> Roster:
    """Ask for all that is known of a run's clients, so that it is kept as a whole until the run changes."""
    found = Roster(
        {member.client: member for member in clients.members(connection, run)},
        _by_client(clients.totals(connection, run)),
        _by_client(clients.declared(connection, run)),
        {name: _by_client(client_metrics.latest(connection, run, name))["value"] for name in SHOWN},
        clients.work(connection, run),
    )
    _ = found.paces, found.labels  # worked out now, they are kept with it
    return found


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort by this, and ``client-2`` comes before ``client-10``."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts)]


def worst_first(names: Iterable[str], totals: pd.DataFrame) -> list[str]:
    """Sort clients by the share of rounds they did not take part in, the highest first."""
    rounds = (totals["asked"] + totals["offline"]).clip(lower=1)
    missed = (1 - totals["accepted"] / rounds).to_dict()
    return sorted(names, key=lambda name: -missed.get(name, 0.0))


def _by_client(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("client")
