"""Fill a home with invented runs through the real store, to look at the dashboard and to measure it.

``python tests/benchmarks/fill_store.py --home DIR`` writes 10 runs of 100 clients and 500 rounds, some minutes of work.
Runs that are already there are left as they are, half-written ones are begun anew. With ``--live-last`` the last run
is written round by round as time goes on, by a process that lives, until it is stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from rich.progress import Progress
from safetensors.numpy import save

from common.errors import UnknownNameError
from common.store import (
    Artefact,
    ClientRound,
    Metric,
    Round,
    RunLock,
    RunStatus,
    RunStore,
    Statistic,
    write_artefact,
)
from server.heartbeat import heartbeat
from server.record import best_metric
from tests.benchmarks.invented_rounds import events, recorded
from tests.benchmarks.invented_runs import START, STORIES, InventedRun, Size

STATES_EVERY = 50
"""Of how many rounds one keeps a file of its state; real runs keep one of each."""


class Clock:
    """A store's clock that shows the time it is set to."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        """Return that time."""
        return self.time


def fill(
    home: Path,
    runs: int = 10,
    clients: int = 100,
    rounds: int = 500,
    layers: int = 8,
    seed: int = 0,
    statistics_every: int = 10,
    advance: Callable[[], object] = lambda: None,
) -> list[str]:
    """Write runs that a store does not hold yet; return the ids of all, oldest first.

    Parameters
    ----------
    home : Path
        The home folder.
    runs, clients, rounds, layers : int
        How much of each.
    seed : int
        Every number derives from it.
    statistics_every : int
        Of how many rounds one (and the last) keeps its timeline, similarities and layers; with 1 a store of
        10 × 100 × 500 is half as large again.
    advance : callable
        Is called after every round.
    """
    size = Size(clients, rounds, layers, seed, statistics_every)
    clock = Clock()
    with RunStore.open(home, clock=clock) as store:
        return [_fill_one(store, clock, story_run(size, place), advance) for place in range(runs)]


def story_run(size: Size, place: int, live: bool = False) -> InventedRun:
    """Draw the run at a place of a store; there are ten stories, told again with other seeds."""
    again, which = divmod(place, len(STORIES))
    story = STORIES[which]
    story = replace(story, seed=story.seed + 3 * again, status="running" if live else story.status)
    return InventedRun(story, size, place)


def id_of(run: InventedRun) -> str:
    """Return the run's id, which changes with whatever its numbers depend on."""
    mark = hashlib.sha256(repr((asdict(run.size), run.story)).encode()).hexdigest()[:4]
    return f"{run.started_at(0):%Y%m%d-%H%M%S}-{run.experiment.name}-{mark}"


def _fill_one(store: RunStore, clock: Clock, run: InventedRun, advance: Callable[[], object]) -> str:
    name = id_of(run)
    if not _is_there(store, name, run):
        clock.time = run.started_at(0)
        _create(store, name, run)
        for number in range(run.ended + 1):
            clock.time = run.started_at(number + 1)
            commit(store, name, run, number, run.started_at(number), clock.time)
            advance()
        _end(store, name, run, run.ended, run.story.status)
    return name


def _is_there(store: RunStore, name: str, run: InventedRun) -> bool:
    """Tell whether the run is there as a whole; what is there of a half-written one is deleted."""
    try:
        found = store.get_run(name)
    except UnknownNameError:
        return False
    if found.status == run.story.status and found.rounds_done == run.ended:
        return True
    store.delete_run(name)
    return False


def _create(store: RunStore, name: str, run: InventedRun) -> None:
    experiment = run.experiment
    store.create_run(
        name,
        name=experiment.name,
        task=experiment.task.name,
        strategy=experiment.strategy.name,
        seed=experiment.seed,
        experiment=experiment.model_dump_json(),
        rounds_planned=experiment.federation.rounds,
        fingerprint=hashlib.sha256(b"invented").hexdigest(),
    )
    store.record_members(run.members(name))


def _end(store: RunStore, name: str, run: InventedRun, last: int, status: RunStatus) -> None:
    """Settle how a run ended; all but failed ones have an adapter."""
    if status == "failed":
        reason = f"round {last + 1} failed: 41 valid replies of {run.size.clients}, 50 needed"
        store.set_status(name, "failed", reason)
        store.add_event(name, "run_failed", reason)
        return
    content = save({"adapter": np.zeros(run.bytes_of(0) // 4, dtype=np.float32)})
    file = write_artefact(store.run_folder(name), f"adapter-{last:04d}.safetensors", content)
    store.update_run(name, adapter_path=file.path, adapter_sha256=file.sha256)
    if status == "interrupted":
        store.set_status(name, "interrupted", f"interrupted; go on with: lorafleet resume {name}")
        return
    store.set_status(name, "completed")
    store.add_event(name, "run_finished", f"run {name} completed", round=last)


def commit(
    store: RunStore, name: str, run: InventedRun, number: int, started: datetime, ended: datetime, told: int = 0
) -> None:
    """Commit one round, with everything a server records of it; of its events, the first were told before."""
    record = recorded(run, number, started)
    accepted = [i for i, fate in enumerate(run.fates[number]) if number and fate == 0]
    keeps = number % run.size.statistics_every == 0 or number == run.ended
    statistics = run.statistics(number, accepted) if keeps else {}
    spent = run.epsilon(number)
    best = int(np.argmin(run.held_out[: number + 1].mean(axis=1)))
    row = Round(
        name,
        number,
        started,
        "committed",
        cohort=record.cohort,
        base_version=max(0, number - 1),
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        seconds=(ended - started).total_seconds(),
        phases=record.phases,
        error=record.error,
        exact=record.exact,
        epsilon=None if spent is None else float(spent.max()),
        committed_at=ended,
    )
    files = []
    if number % STATES_EVERY == 0 or number == run.ended:
        file = write_artefact(store.run_folder(name), f"rounds/{number:04d}/state.safetensors", bytes(64 << 10))
        files = [Artefact(name, number, "state", file.path, file.sha256, file.nbytes)]
        row = replace(row, state_path=file.path, state_sha256=file.sha256)
    store.commit_round(
        row,
        [ClientRound(name, number, client, **values) for client, values in sorted(record.clients.items())],
        [Metric(name, number, key, value, client, layer) for key, value, client, layer in record.metrics],
        files,
        events(name, run, record, started, ended)[told:],
        [Statistic(name, number, kind, data) for kind, data in statistics.items()],
        rounds_done=number,
        best_round=best,
        best_metric=float(run.held_out[best].mean()) if best < number else best_metric(record),
    )


def go_on(home: Path, size: Size, place: int, pause_s: float) -> str:
    """Write a run as time goes on: half of its rounds at once, then one every few seconds while its lock is held."""
    run = story_run(size, place, live=True)
    name, half = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{run.experiment.name}-live", run.ended
    clock = Clock()
    clock.time = datetime.now(UTC) - timedelta(seconds=pause_s * (half + 1))
    with RunStore.open(home, clock=clock) as past:
        _create(past, name, run)
        for number in range(half + 1):
            started, clock.time = clock.time, clock.time + timedelta(seconds=pause_s)
            commit(past, name, run, number, started, clock.time)
    with RunStore.open(home) as store, RunLock(store.run_folder(name)), heartbeat(store, name):
        for number in range(half + 1, size.rounds + 1):
            _commit_slowly(store, name, run, number, pause_s)
        _end(store, name, run, size.rounds, "completed")
    return name


def _commit_slowly(store: RunStore, name: str, run: InventedRun, number: int, pause_s: float) -> None:
    """Begin a round, say so, and commit it after a while."""
    started = store.begin_round(name, number, run.names, number - 1).started_at
    first = events(name, run, recorded(run, number, started), started, started)[:2]
    for event in first:
        store.add_event(name, event.kind, event.text, round=number, data=event.data)
    time.sleep(pause_s)
    commit(store, name, run, number, started, datetime.now(UTC), told=len(first))


def main() -> None:
    """Read the arguments, fill, and tell how large the database is and how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--home", type=Path, required=True)
    for option, default in {"runs": 10, "clients": 100, "rounds": 500, "layers": 8, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--statistics-every", type=int, default=10, help="1: of every round; half as large again")
    parser.add_argument("--live-last", action="store_true", help="go on writing the last run")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds per round of the live run")
    given = parser.parse_args()
    began = time.perf_counter()
    size = Size(given.clients, given.rounds, given.layers, given.seed, given.statistics_every)
    past = given.runs - given.live_last
    with Progress(transient=True) as bar:
        row = bar.add_task("rounds", total=sum(story_run(size, place).ended + 1 for place in range(past)))
        fill(given.home, past, **asdict(size), advance=lambda: bar.advance(row))
    nbytes = sum(file.stat().st_size for file in given.home.glob("lorafleet.db*"))
    sys.stdout.write(f"{past} runs, {nbytes / 1e6:.0f} MB, {time.perf_counter() - began:.0f} s\n")
    if given.live_last:
        go_on(given.home, size, past, given.pause)


if __name__ == "__main__":
    main()
