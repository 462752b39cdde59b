"""Whole private runs, killed at any moment and resumed: store and ledgers agree, and no budget is overspent."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tests.private_runs
from client.privacy.ledger import Book, read_ledger
from client.privacy.places import ledgers
from common.store import RunStore
from tests.private_runs import EPSILON, ROUNDS, STEPS

ROOT = Path(tests.private_runs.__file__).parents[1]


@pytest.mark.long
def test_a_hundred_runs_killed_at_random_moments_overspend_nothing(tmp_path: Path) -> None:
    moments = random.Random(7)
    shares = [moments.uniform(0.02, 0.95) for _ in range(100)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.private_runs", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, input=json.dumps(shares), capture_output=True, text=True, timeout=3000)
    assert ended.returncode == 0, ended.stderr
    lives = json.loads(ended.stdout.splitlines()[-1])
    assert sum(life["killed"] == -signal.SIGKILL for life in lives) > 50
    assert [life for life in lives if life["resumed"] != 0] == []
    lost = [check(Path(life["home"])) for life in lives]
    assert sum(lost) > 2  # rounds were really charged and lost


def check(home: Path) -> int:
    """Compare what the store says with the ledgers; count the rounds that were charged and brought no answer."""
    books = {client: read_ledger(path) for path, client, _ in ledgers(home)}
    with RunStore.open(home, read_only=True) as store:
        runs = store.runs()
        told = {
            (metric.run, metric.round, metric.client): metric.value
            for run in runs
            for metric in store.metrics(run.id, "epsilon")
        }
    assert runs
    assert told
    for (run, number, client), epsilon in told.items():
        spent = [entry.spent for entry in books[client].entries if (entry.run, entry.round) == (run, number)]
        assert epsilon in spent
    return sum(lost_in(book, run.id) for book in books.values() for run in runs)


def lost_in(book: Book, run: str) -> int:
    assert book.steps_of(run) <= ROUNDS * STEPS
    assert book.spent_by(run).epsilon(1e-5) <= EPSILON
    reserved = [entry for entry in book.entries if entry.kind == "reserve" and entry.run == run]
    return len(reserved) - len({entry.round for entry in reserved})
