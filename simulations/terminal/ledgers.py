"""The privacy ledgers of a home, as plain values: every data set, run and round with its cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.privacy.ledger import Book, Entry, read_ledger
from client.privacy.ledger.book import DataSet
from client.privacy.places import ledgers
from common.errors import LedgerError, StoreError, UnknownNameError
from common.privacy.accounting import Spending
from common.store import RunStore

NOTES = {False: "simulated budget: counts this run only", True: "counts all experiments of this home"}
"""What a ledger's spending is of."""


def ledger_values(home: Path, run: str | None = None, client: str | None = None) -> list[dict[str, Any]]:
    """Describe the ledgers of a home, those that count all experiments first.

    Parameters
    ----------
    home : Path
        Where runs are kept.
    run : str, optional
        Only this run's rounds: its id, the beginning of an id, or ``last``.
    client : str, optional
        Only this client's ledgers.

    Raises
    ------
    UnknownNameError
        If no ledger is of that client, or none knows the run.
    """
    found = [_described(*place) for place in ledgers(home)]
    if client is not None:
        _check_known("client with a privacy ledger", client, [one["client"] for one in found])
        found = [one for one in found if one["client"] == client]
    if run is None:
        return found
    wanted = _run_id(home, run)
    runs = [row["run"] for one in found for data in one["data"] for row in data["rounds"]]
    if not any(one["error"] for one in found):
        _check_known("run in the privacy ledgers", wanted, runs)
    return [chosen for one in found if (chosen := _only(one, wanted))["data"] or one["error"]]


def _described(path: Path, client: str, everything: bool) -> dict[str, Any]:
    described = {"client": client, "path": str(path), "all_experiments": everything, "note": NOTES[everything]}
    try:
        book = read_ledger(path)
    except LedgerError as error:
        return described | {"error": str(error), "data": []}
    return described | {"error": None, "data": [_data(data, book) for data in book.data_sets()]}


def _data(data: DataSet, book: Book) -> dict[str, Any]:
    last = data.entries[-1]
    delta = last.budget_delta or last.delta
    rounds = list(_rounds(data, book, delta))
    return {
        "label": last.label,
        "fingerprint": hashlib.sha256(last.fingerprint.encode()).hexdigest(),
        "epsilon": rounds[-1]["data_epsilon"] if rounds else 0.0,
        "delta": delta,
        "budget": last.budget_epsilon,
        "private": all(entry.test_seed is None for entry in data.entries),
        "rounds": rounds,
    }


def _rounds(data: DataSet, book: Book, delta: float) -> Iterator[dict[str, Any]]:
    """Describe each reservation; what data of several runs have cost is added up by Rényi orders."""
    spent, runs = Spending(), set()
    for entry in data.entries:
        if entry.kind != "reserve":
            continue
        spent += Spending.of(entry.mechanism, entry.steps, book.curves[entry.mechanism])
        runs.add(entry.run)
        alone = runs == {entry.run} and entry.delta == delta
        yield _round(entry, book) | {"data_epsilon": entry.spent if alone else spent.epsilon(delta)}


def _round(entry: Entry, book: Book) -> dict[str, Any]:
    return {
        "run": entry.run,
        "round": entry.round,
        "attempt": entry.attempt,
        "time": datetime.fromtimestamp(entry.moment / 1e6, UTC).isoformat(timespec="seconds"),
        "steps": entry.steps,
        "noise_multiplier": entry.noise_multiplier,
        "sample_rate": entry.sample_rate,
        "clipping_norm": entry.clipping_norm,
        "state": "done" if entry.sequence in book.settled else "reserved",
        "run_epsilon": entry.spent,
    }


def _only(one: dict[str, Any], run: str) -> dict[str, Any]:
    data = [it | {"rounds": [row for row in it["rounds"] if row["run"] == run]} for it in one["data"]]
    return one | {"data": [it for it in data if it["rounds"]]}


def _run_id(home: Path, run: str) -> str:
    """Complete a run's id; a run that was deleted may still be in a ledger, by its whole id."""
    try:
        with RunStore.open(home, read_only=True) as store:
            return store.get_run(run).id
    except (UnknownNameError, StoreError):
        return run


def _check_known(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, sorted(set(known)))
