"""A real process, killed with SIGKILL at every point of a round and resumed: the adapter has the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.store import RunStore, is_locked
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]

# Runs or resumes an experiment; notes every training; dies at a point of round 2: at the n-th step of a kind, or around
# the transaction that commits the round. Whoever is asked to die in vain says so.
CHILD = """
import json, logging, os, signal, sys
from pathlib import Path
import transformers
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
import client.work
from common.experiment import Experiment
from common.store import RunStore
from server.progress import listening
from simulations import resume, simulate

home, experiment, point, notes = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
seen = {}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def listen(step):
    if step.round == 2:
        seen[step.kind] = seen.get(step.kind, 0) + 1
        if point == f"{step.kind} {seen[step.kind]}":
            die()

def noted(place, rows, position, trains):
    with notes.open("a") as file:
        file.write(json.dumps([position.round, position.client]) + chr(10))
    return train(place, rows, position, trains)

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

train, client.work.train = client.work.train, noted
commit, RunStore.commit_round = RunStore.commit_round, committing
update, RunStore.update_run = RunStore.update_run, publishing
with listening(listen):
    run = simulate(Experiment.from_json(experiment), home) if experiment else resume("last", home)
print(json.dumps({"sha256": run.run.adapter_sha256, "status": run.run.status}))
"""

CLIENTS = ("ada", "ben", "cyd", "dot")
STRATEGIES = ("flora", "ffa_lora", "lora_lego")
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


@dataclass(frozen=True)
class Ended:
    """What a child left: its code, what it said, and the trainings it noted, as (round, client)."""

    code: int
    said: dict[str, str]
    trained: list[tuple[int, str]]


def child(home: Path, experiment: str = "", point: str = "") -> Ended:
    notes = home / "notes"
    home.mkdir(exist_ok=True)
    notes.write_text("")
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(home), experiment, point, str(notes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else {}
    return Ended(ended.returncode, said, [tuple(json.loads(line)) for line in notes.read_text().splitlines()])


def experiment(folder: Path, strategy: str, *options: str) -> str:
    return tiny(folder, f"strategy.name={strategy}", "federation.rounds=3", *options).model_dump_json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    """Cache of the adapters of runs nobody killed."""
    return {}


def bits(undisturbed: dict[str, str], folder: Path, strategy: str) -> str:
    if strategy not in undisturbed:
        ended = child(folder / f"whole-{strategy}", experiment(folder, strategy))
        assert ended.trained == sorted(ended.trained, key=lambda training: training[0])
        assert sorted(ended.trained) == [(number, name) for number in (1, 2, 3) for name in CLIENTS]
        undisturbed[strategy] = ended.said["sha256"]
    return undisturbed[strategy]


def kept(home: Path) -> set[str]:
    """Name the clients whose replies of round 2 the server had received and kept."""
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("last")
        assert run.status == "running"
        assert not is_locked(store.run_folder(run.id))
        rows = store.client_rounds(run.id, 2)
        return {row.client for row in rows if row.status in ("received", "accepted")}


def check(home: Path, strategy: str, point: str, undisturbed: dict[str, str], folder: Path) -> None:
    """Kill a run at a point, resume it, and compare."""
    killed = child(home, experiment(folder, strategy), point)
    assert killed.code == -signal.SIGKILL
    received = kept(home)
    index = POINTS.index(point)
    assert len(received) == RECEIVED.get(point, 0 if index < POINTS.index("reply 1") else 4)
    resumed = child(home)
    assert resumed.said == {"sha256": bits(undisturbed, folder, strategy), "status": "completed"}
    again = {name for number, name in resumed.trained if number == 2}
    assert not again & received
    # A client that had answered, though nobody listened any more, returns its stored answer.
    answered = {name for number, name in killed.trained if number == 2}
    assert again | answered == set(CLIENTS)
    late = index >= POINTS.index("after the transaction")
    assert {number for number, _ in resumed.trained} <= ({3} if late else {2, 3})
    check_store(home)


def check_store(home: Path) -> None:
    with RunStore.open(home, read_only=True) as store:
        run = store.get_run("last")
        assert (run.status, run.rounds_done) == ("completed", 3)
        assert [row.status for row in store.rounds(run.id)] == ["committed"] * 4
        assert {row.status for row in store.client_rounds(run.id)} == {"accepted"}
        folder = store.run_folder(run.id)
        assert not list(folder.rglob(".*.tmp"))
        assert not list(folder.glob("rounds/*/replies/*"))


SOME = [
    ("flora", "reply 1"),
    ("flora", "before the transaction"),
    ("ffa_lora", "reply 3"),
    ("lora_lego", "aggregated 1"),
    ("lora_lego", "after the transaction"),
]


@pytest.mark.parametrize(("strategy", "point"), SOME, ids=[" ".join(case) for case in SOME])
def test_a_killed_run_comes_to_the_same_end(
    folder: Path, undisturbed: dict[str, str], strategy: str, point: str
) -> None:
    check(folder / f"{strategy}-{point.replace(' ', '-')}", strategy, point, undisturbed, folder)


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_killed_everywhere(
    folder: Path, undisturbed: dict[str, str], strategy: str, point: str
) -> None:
    check(folder / f"long-{strategy}-{point.replace(' ', '-')}", strategy, point, undisturbed, folder)


def test_a_run_killed_again_and_again_comes_to_the_same_end(folder: Path, undisturbed: dict[str, str]) -> None:
    home = folder / "often"
    killed = [child(home, experiment(folder, "flora"), "round_started 1")]
    for point in ("dispatched 1", "reply 2", "evaluated 1", "committed 1"):
        killed.append(child(home, point=point))
    assert [ended.code for ended in killed] == [-signal.SIGKILL] * 5
    resumed = child(home)
    assert resumed.said == {"sha256": bits(undisturbed, folder, "flora"), "status": "completed"}
    assert sorted(training for ended in [*killed, resumed] for training in ended.trained if training[0] != 2) == [
        (number, name) for number in (1, 3) for name in CLIENTS
    ]
    with RunStore.open(home, read_only=True) as store:
        events = store.events(store.get_run("last").id)
    assert [event.round for event in events if event.kind == "round_started"] == [0, 1, 2, 2, 2, 2, 3]


def test_another_seed_has_other_bits(folder: Path, undisturbed: dict[str, str]) -> None:
    other = child(folder / "other", experiment(folder, "flora", "seed=1"))
    assert other.said["status"] == "completed"
    assert other.said["sha256"] != bits(undisturbed, folder, "flora")
