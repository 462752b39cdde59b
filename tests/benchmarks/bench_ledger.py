"""How long a client's ledger takes: to decide on a round and charge it, and to verify all entries when it is opened."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from reporting import report
from torch import Tensor

from client.node import Node
from client.privacy import balance
from client.privacy.account import admit
from client.privacy.ledger import file, open_ledger, read_ledger
from client.privacy.ledger.entry import Entry, curve_bytes
from common.experiment import Experiment
from common.messages import TrainOrder
from common.privacy.accounting import Mechanism, curve
from common.privacy.settings import Budget
from common.tasks import Batch

ROUNDS = 30


class Numbers:
    """Rows that are their own number."""

    def __len__(self) -> int:
        return 1_000

    def take(self, numbers: Tensor) -> Batch:
        return {"x": numbers.double()}


ROWS = Numbers()


def node(folder: Path) -> Node:
    """Describe a client whose owner has a budget, so that everything on its data counts."""
    table = {
        "task": {"name": "low_rank_regression"},
        "clients": {"ada": {}},
        "training": {"steps": 8},
        "federation": {"rounds": 1_000},
        "privacy": {"mode": "sample", "sample_rate": 0.05, "epsilon": 1e6, "noise_multiplier": 2.0},
    }
    experiment = Experiment.parse(table)
    clients = tuple(experiment.clients.items())
    return Node("ada", experiment, clients, folder, None, folder / "privacy.db", Budget(epsilon=1e6))


def order(number: int) -> TrainOrder:
    """Ask for one round."""
    return TrainOrder(
        run="now", round=number, attempt=1, rounds=1_000, fingerprint="", client="ada", base_version=0,
        global_hash="0" * 64, rank=1, seed=0, trains="ab",
    )  # fmt: skip


def filled(folder: Path, mechanisms: int, entries: int) -> Node:
    """Fill a ledger with reservations of other runs on the same data."""
    client = node(folder)
    permit = admit(client, order(1), ROWS)
    drafts: list[Entry] = []
    for number in range(entries):
        mechanism = Mechanism(2.0 + (number % mechanisms) / 100, 0.05)
        values = curve_bytes(curve(mechanism))
        past = replace(permit.reserved, run=f"past{number}", noise_multiplier=mechanism.noise_multiplier, curve=values)
        drafts.append(past)
    assert client.ledger is not None
    with open_ledger(client.ledger) as ledger:
        ledger.append(*drafts)
    return client


def decide(client: Node, number: int) -> None:
    """Decide on one more round."""
    admit(client, order(number), ROWS)


def milliseconds(work: Callable[[int], object]) -> tuple[float, float]:
    """Return median and largest time over the rounds."""
    taken = []
    for number in range(2, ROUNDS + 2):
        start = time.perf_counter()
        work(number)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken), max(taken)


def main() -> None:
    """Measure ledgers of several sizes."""
    balance.SECOND_STEPS = 0  # the number by the other accountant is found after the charge, and measured apart
    rows = []
    for mechanisms, entries in ((1, 10), (100, 100), (100, 10_000)):
        with tempfile.TemporaryDirectory() as name:
            client = filled(Path(name), mechanisms, entries)
            median, most = milliseconds(partial(decide, client))
            file._verified.clear()
            start = time.perf_counter()
            assert client.ledger is not None
            read_ledger(client.ledger)
            opened = 1000 * (time.perf_counter() - start)
        rows.append([f"{mechanisms:,}", f"{entries:,}", f"{median:.0f} ms", f"{most:.0f} ms", f"{opened:.0f} ms"])
    report(
        "ledger",
        "A privacy ledger's decisions",
        f"A round is decided on and charged, entry, hash and mark on the disk ({ROUNDS} rounds: median and longest), "
        "and a ledger is opened and verified whole, as after a restart. The number by the other accountant, which "
        "people are shown beside the one that decides, comes on top, after the charge.",
        ["mechanisms", "entries", "decision", "longest", "opened and verified"],
        rows,
    )


torch.set_num_threads(1)

if __name__ == "__main__":
    main()
