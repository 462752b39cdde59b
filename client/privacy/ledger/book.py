"""A verified ledger in memory: what was spent, by run and by data set.

A data set is known by its label and by hashes of its records. One of them is enough: changed records under an old
label, and an old record under a new one, keep what was spent before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from client.privacy.ledger.entry import Entry, stored_curve
from common.privacy.accounting import Curve, Mechanism, Spending

Steps = dict[Mechanism, int]


@dataclass(eq=False)
class DataSet:
    """What is, or is linked to, one data set.

    Parameters
    ----------
    keys : list of (str, str)
        Its labels, and hashes of its records.
    entries : list of Entry
        Plans and reservations of its own.
    runs : dict
        Reserved steps by run and mechanism.
    """

    keys: list[tuple[str, str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    runs: dict[str, Steps] = field(default_factory=dict)

    def spent(self, curves: dict[Mechanism, Curve], but: str = "") -> Spending:
        """Return what was spent in all, leaving out one run."""
        counts: Steps = {}
        for run, steps in self.runs.items():
            for mechanism, count in steps.items() if run != but else ():
                counts[mechanism] = counts.get(mechanism, 0) + count
        return spending(counts, curves)


@dataclass(eq=False)
class Book:
    """All entries of a ledger, and their sums, kept up to date as entries are added."""

    entries: list[Entry] = field(default_factory=list)
    curves: dict[Mechanism, Curve] = field(default_factory=dict)
    plans: dict[str, Entry] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    _runs: dict[str, Steps] = field(default_factory=dict)
    _rounds: dict[str, set[int]] = field(default_factory=dict)
    _data: dict[tuple[str, str], DataSet] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Book:
        """Add verified entries up."""
        book = cls()
        for entry in entries:
            book.add(entry)
        return book

    def add(self, entry: Entry) -> None:
        """Add one more entry; its curve is kept once for all entries of its mechanism."""
        kept = replace(entry, curve=b"")
        self.entries.append(kept)
        if entry.kind == "done":
            self.settled.add(entry.settles or 0)
            return
        if entry.mechanism not in self.curves:
            self.curves[entry.mechanism] = stored_curve(entry.mechanism, entry.curve)
        data = self._linked(entry.label, entry.fingerprint)
        data.entries.append(kept)
        if entry.kind == "plan":
            self.plans.setdefault(entry.run, kept)
            return
        self._rounds.setdefault(entry.run, set()).add(entry.round)
        for steps in (self._runs.setdefault(entry.run, {}), data.runs.setdefault(entry.run, {})):
            steps[entry.mechanism] = steps.get(entry.mechanism, 0) + entry.steps

    @property
    def last(self) -> Entry | None:
        """The newest entry."""
        return self.entries[-1] if self.entries else None

    def steps_of(self, run: str) -> int:
        """Count the steps that were reserved for a run."""
        return sum(self._runs.get(run, {}).values())

    def rounds_of(self, run: str) -> frozenset[int]:
        """Return the rounds of a run that something was reserved for."""
        return frozenset(self._rounds.get(run, ()))

    def spent_by(self, run: str) -> Spending:
        """Return what a run has spent, on whichever data."""
        return spending(self._runs.get(run, {}), self.curves)

    def spent_on(self, label: str, fingerprint: str, but: str = "") -> Spending:
        """Return what was spent on a data set, leaving out one run."""
        found = {id(data): data for key in _keys(label, fingerprint) if (data := self._data.get(key))}
        counted = [data.spent(self.curves, but) for data in found.values()]
        return sum(counted[1:], counted[0]) if counted else Spending()

    def data_sets(self) -> list[DataSet]:
        """List the data sets in the order of their first entries."""
        return list({id(data): data for data in self._data.values()}.values())

    def _linked(self, label: str, fingerprint: str) -> DataSet:
        """Return the data set of a label and a fingerprint; if these belonged to two, they are one from now on."""
        keys = _keys(label, fingerprint)
        found = list({id(self._data[key]): self._data[key] for key in keys if key in self._data}.values())
        data = found[0] if found else DataSet()
        for other in found[1:]:
            _merge(data, other)
        data.keys += [key for key in keys if key not in data.keys]
        self._data |= dict.fromkeys(data.keys, data)
        return data


def spending(counts: Steps, curves: dict[Mechanism, Curve]) -> Spending:
    """Add up steps of many mechanisms at once."""
    if not counts:
        return Spending()
    numbers = np.array(list(counts.values()), dtype=np.float64)
    return Spending(dict(counts), (numbers[:, None] * np.stack([curves[one] for one in counts])).sum(axis=0))


def _merge(data: DataSet, other: DataSet) -> None:
    data.keys += other.keys
    data.entries = sorted([*data.entries, *other.entries], key=lambda entry: entry.sequence)
    for run, steps in other.runs.items():
        mine = data.runs.setdefault(run, {})
        for mechanism, count in steps.items():
            mine[mechanism] = mine.get(mechanism, 0) + count


def _keys(label: str, fingerprint: str) -> list[tuple[str, str]]:
    return [("label", label), *(("record", record) for record in fingerprint.split())]
