"""A real process, killed with SIGKILL at every point of a round and resumed: the adapter has the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.store import RunStore, is_locked
from strategies import AGGREGATION
from tests.tiny import RANKS, tiny

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]

# A launcher that has imported everything and forks one process per job, since importing takes ten times as long as a
# run. Each job runs or resumes an experiment, notes its trainings, and dies at a point of round 2: at the n-th step of
# a kind, or around a transaction. A forked process must not have inherited threads, and says so if it has.
LAUNCHER = """
import json, os, signal, sys, traceback
from pathlib import Path
import transformers
import common.tasks.causal_lm
import simulations.drivers.inprocess
import client.app, client.work, server.app
from common.experiment import Experiment
from common.store import RunStore
from server.progress import listening
from simulations import resume, simulate

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def work(home, experiment, point):
    notes, seen = Path(home) / "notes", {}

    def note(*words):
        with notes.open("a") as file:
            file.write(json.dumps(words) + chr(10))

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def listen(step):
        if step.round == 2:
            seen[step.kind] = seen.get(step.kind, 0) + 1
            if point == f"{step.kind} {seen[step.kind]}":
                die()

    def training(place, rows, position, *more):
        note("trained", position.round, position.client)
        return train(place, rows, position, *more)

    def committing(store, row, *given, **more):
        if (row.round, point) == (2, "before the transaction"):
            die()
        done = commit(store, row, *given, **more)
        if (row.round, point) == (2, "after the transaction"):
            die()
        return done

    def publishing(store, run, **changes):
        if point == "before the end" and "adapter_path" in changes:
            die()
        return update(store, run, **changes)

    train, client.work.train = client.work.train, training
    commit, RunStore.commit_round = RunStore.commit_round, committing
    update, RunStore.update_run = RunStore.update_run, publishing
    with listening(listen):
        run = simulate(Experiment.from_json(experiment), home) if experiment else resume("last", home)
    note("ended", run.run.status, run.run.adapter_sha256)

assert len(os.listdir("/proc/self/task")) == 1, "there are threads to be forked"
print("ready", flush=True)
for line in sys.stdin:
    job = os.fork()
    if job == 0:
        try:
            work(**json.loads(line))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]), flush=True)
"""

CLIENTS = ("ada", "ben", "cyd", "dot")
STRATEGIES = ("flora", "fedavg", "lora_lego", "rolora", "florist")
"""Stacks, means and clusters."""
POINTS = (
    "round_started 1",
    "dispatched 1",
    "reply 1",
    "reply 3",
    "aggregated 1",
    "evaluated 1",
    "before the transaction",
    "after the transaction",
    "committed 1",
    "before the end",
)
RECEIVED = {"reply 1": 1, "reply 3": 3}
"""Replies on the server's disk at a point; 0 before, all after."""


Launcher = subprocess.Popen[str]


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code, the adapter's hash, and its trainings as (round, client)."""

    code: int
    sha256: str
    trained: list[tuple[int, str]]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # its threads start at import
    command = [sys.executable, "-W", "ignore", "-c", LAUNCHER]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Place:
    """Where the runs of this module lie, and what the undisturbed ones came to."""

    launcher: Launcher
    folder: Path
    undisturbed: dict[str, str] = field(default_factory=dict)

    def run(self, home: Path, experiment: str = "", point: str = "") -> Ended:
        """Begin a run in a process of its own, or go on with it."""
        home.mkdir(exist_ok=True)
        (home / "notes").write_text("")
        assert self.launcher.stdin is not None
        assert self.launcher.stdout is not None
        job = {"home": str(home), "experiment": experiment, "point": point}
        self.launcher.stdin.write(json.dumps(job) + "\n")
        self.launcher.stdin.flush()
        code = int(self.launcher.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        notes = [json.loads(line) for line in (home / "notes").read_text().splitlines()]
        trained = [(note[1], note[2]) for note in notes if note[0] == "trained"]
        ends = [note[2] for note in notes if note[:2] == ["ended", "completed"]]
        assert (code == 0) == (len(ends) == 1)
        return Ended(code, "".join(ends), trained)

    def experiment(self, strategy: str, *options: str) -> str:
        """Write the experiment every test of this module runs."""
        mixed = AGGREGATION.plugin(strategy).capabilities.mixed_ranks
        ranks = RANKS if mixed else dict.fromkeys(RANKS, 4)
        options = (f"strategy.name={strategy}", "federation.rounds=3", *options)
        return tiny(self.folder, *options, ranks=ranks).model_dump_json()

    def whole(self, strategy: str) -> Path:
        """Return the home of a run that nobody kills."""
        return self.folder / f"whole-{strategy}"

    def bits(self, strategy: str) -> str:
        """Return the hash a run comes to that nobody kills."""
        if strategy not in self.undisturbed:
            ended = self.run(self.whole(strategy), self.experiment(strategy))
            assert sorted(ended.trained) == [(number, name) for number in (1, 2, 3) for name in CLIENTS]
            self.undisturbed[strategy] = ended.sha256
        return self.undisturbed[strategy]


@pytest.fixture(scope="module")
def place(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(launcher, tmp_path_factory.mktemp("kill"))


def kept(home: Path) -> set[str]:
    """Name the clients whose replies of round 2 the server had received and kept."""
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("last")
        assert run.status == "running"
        assert not is_locked(store.run_folder(run.id))
        rows = store.client_rounds(run.id, 2)
        return {row.client for row in rows if row.status in ("received", "accepted")}


def memories(home: Path) -> dict[tuple[str, str], bytes]:
    """Return all that clients keep to themselves, by client and file."""
    return {(path.parts[-3], path.name): path.read_bytes() for path in home.glob("runs/*/clients/*/memory/*")}


def check(place: Place, home: Path, strategy: str, point: str) -> None:
    """Kill a run at a point, resume it, and compare."""
    killed = place.run(home, place.experiment(strategy), point)
    assert killed.code == -signal.SIGKILL
    received = kept(home)
    index = POINTS.index(point)
    assert len(received) == RECEIVED.get(point, 0 if index < POINTS.index("reply 1") else 4)
    resumed = place.run(home)
    assert resumed.sha256 == place.bits(strategy)
    assert memories(home) == memories(place.whole(strategy))
    again = {name for number, name in resumed.trained if number == 2}
    assert not again & received
    # A client that had begun to answer, though nobody listened any more, may return its stored answer.
    assert again | {name for number, name in killed.trained if number == 2} == set(CLIENTS)
    late = index >= POINTS.index("after the transaction")
    last = index == POINTS.index("before the end")
    assert {number for number, _ in resumed.trained} <= (set() if last else {3} if late else {2, 3})
    check_store(home)


def check_store(home: Path) -> None:
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("last")
        assert (run.status, run.rounds_done) == ("completed", 3)
        assert [row.status for row in store.rounds(run.id)] == ["committed"] * 4
        assert {row.status for row in store.client_rounds(run.id)} == {"accepted"}
        folder = store.run_folder(run.id)
        assert not list(folder.rglob("*.tmp"))
        assert not list(folder.glob("rounds/*/replies/*"))


# Every point once, the strategies in turn; `make test-long` has all strategies at all points.
SOME = [(STRATEGIES[number % len(STRATEGIES)], point) for number, point in enumerate(POINTS)]


@pytest.mark.parametrize(("strategy", "point"), SOME, ids=[" ".join(case) for case in SOME])
def test_a_killed_run_comes_to_the_same_end(place: Place, strategy: str, point: str) -> None:
    check(place, place.folder / f"{strategy}-{point.replace(' ', '-')}", strategy, point)


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("strategy", AGGREGATION.names())
def test_every_strategy_killed_everywhere(place: Place, strategy: str, point: str) -> None:
    check(place, place.folder / f"long-{strategy}-{point.replace(' ', '-')}", strategy, point)


def test_a_run_killed_again_and_again_comes_to_the_same_end(place: Place) -> None:
    home = place.folder / "often"
    killed = [place.run(home, place.experiment("flora"), "round_started 1")]
    killed += [place.run(home, point=point) for point in ("dispatched 1", "reply 2", "evaluated 1", "committed 1")]
    assert [ended.code for ended in killed] == [-signal.SIGKILL] * 5
    resumed = place.run(home)
    assert resumed.sha256 == place.bits("flora")
    trained = sorted(training for ended in [*killed, resumed] for training in ended.trained if training[0] != 2)
    assert trained == [(number, name) for number in (1, 3) for name in CLIENTS]
    with RunStore.open(home, read_only=True) as store:
        events = store.events(store.get_run("last").id)
    assert [event.round for event in events if event.kind == "round_started"] == [0, 1, 2, 2, 2, 2, 3]


def test_another_seed_has_other_bits(place: Place) -> None:
    other = place.run(place.folder / "other", place.experiment("flora", "seed=1"))
    assert other.sha256 != place.bits("flora")
