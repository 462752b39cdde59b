"""Real processes, killed with SIGKILL where it hurts: what was committed stays, the rest never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import common.store
from common.errors import StoreError
from common.store import ClientRound, RunLock, RunStore, is_locked, verify

ROOT = Path(common.store.__file__).parents[2]

# A run of nine rounds, each the replies of two clients, a draft, the state and the commit. The process
# kills itself at the hook in the round "at".
WRITER = """
import os, signal, sys
from dataclasses import replace
from sqlalchemy import event
from sqlalchemy.engine import Engine
from common.store import Artefact, ClientRound, Event, Metric, RunLock, RunStore, write_artefact

home, hook, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
now = [0]

def die(*_):
    if now[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)

def die_before(owner, name):
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **more: (die(), original(*given, **more))[1])

def die_after(owner, name):
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **more: (original(*given, **more), die())[0])

def half(path):
    path.write_bytes(b"half a file")
    if hook == "half a file":
        die()

if hook == "before the rename":
    die_before(os, "replace")
elif hook == "after the rename":
    die_after(os, "replace")
elif hook == "between artefact and transaction":
    die_before(RunStore, "commit_round")
elif hook == "inside the transaction":
    event.listen(Engine, "before_cursor_execute", lambda c, cursor, sql, *_: "INTO events" in sql and die())
elif hook == "before COMMIT":
    met = []
    event.listen(Engine, "before_cursor_execute", lambda c, cursor, sql, *_: met.append("INTO events" in sql))
    event.listen(Engine, "commit", lambda c: any(met) and die())
    event.listen(Engine, "begin", lambda c: met.clear())
elif hook == "after COMMIT":
    die_after(RunStore, "commit_round")

def reply_of(store, number, name):
    file = write_artefact(store.run_folder("r"), f"rounds/{number}/{name}.bin", bytes([number]) * 70_000)
    client = ClientRound("r", number, name, "received", artefact_path=file.path, artefact_sha256=file.sha256)
    store.record_client(client)
    kept = Artefact("r", number, "reply", file.path, file.sha256, file.nbytes)
    return replace(client, status="accepted"), kept

with RunStore.open(home) as store:
    if not store.runs():
        store.create_run("r", name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=9)
    with RunLock(store.run_folder("r")):
        for number in range(store.get_run("r").rounds_done + 1, 10):
            now[0] = number
            begun = store.begin_round("r", number, ["alice", "bob"])
            replies = [reply_of(store, number, name) for name in begun.cohort]
            write_artefact(store.run_folder("r"), f"rounds/{number}/draft.bin", half)
            state = write_artefact(
                store.run_folder("r"), f"rounds/{number}/state.bin", bytes([number]) * 100_000
            )
            artefact = Artefact("r", number, "state", state.path, state.sha256, state.nbytes)
            store.commit_round(
                replace(begun, status="committed", state_path=state.path, state_sha256=state.sha256),
                [client for client, _ in replies],
                [Metric("r", number, f"m{k}", float(k), name) for k in range(10) for name in begun.cohort],
                [artefact, *(kept for _, kept in replies)],
                [Event("r", "round", f"Round {number}.", begun.started_at, number)],
                rounds_done=number,
            )
            print(number, flush=True)
"""

HOOKS = [
    "half a file",
    "before the rename",
    "after the rename",
    "between artefact and transaction",
    "inside the transaction",
    "before COMMIT",
    "after COMMIT",
]


def write(home: Path, hook: str = "", at: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITER, str(home), hook, str(at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def check_consistent(store: RunStore) -> int:
    """Check that each round is there with all that belongs to it or not at all; return the last one."""
    rounds = store.rounds("r")
    done = store.get_run("r").rounds_done
    for round in rounds:
        committed = round.round <= done
        assert round.status == ("committed" if committed else "running")
        assert len(store.metrics("r", round=round.round)) == (20 if committed else 0)
        artefacts = store.artefacts("r", round=round.round)
        assert len(artefacts) == (3 if committed else 0)
        for artefact in artefacts:
            verify(store.artefact_file("r", artefact.path), artefact.sha256)
        for client in store.client_rounds("r", round.round):
            assert client.status == ("accepted" if committed else "received")
            check_reply(store, client)
    assert [event.round for event in store.events("r")] == list(range(1, done + 1))
    return done


def check_reply(store: RunStore, client: ClientRound) -> None:
    assert client.artefact_path is not None
    assert client.artefact_sha256 is not None
    verify(store.artefact_file("r", client.artefact_path), client.artefact_sha256)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_killed_writer_leaves_whole_rounds_and_is_resumed(tmp_path: Path, hook: str) -> None:
    killed = write(tmp_path, hook, at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    expected = 3 if hook == "after COMMIT" else 2
    with RunStore.open(tmp_path, read_only=True) as store:
        assert check_consistent(store) == expected
        assert store.get_run("r").status == "running"
        assert not is_locked(store.run_folder("r"))
        begun = store.round("r", 3)
    resumed = write(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == [str(number) for number in range(expected + 1, 10)]
    with RunStore.open(tmp_path, read_only=True) as store:
        assert check_consistent(store) == 9
        again = store.round("r", 3)
        assert again is not None
        assert begun is not None
        assert (again.cohort, again.started_at) == (begun.cohort, begun.started_at)
    assert not list(tmp_path.glob("runs/**/.*"))


@pytest.mark.parametrize("lines", [1, 4, 8])
def test_every_round_a_killed_writer_reported_is_there(tmp_path: Path, lines: int) -> None:
    with running(WRITER, str(tmp_path), "", "0") as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(lines)]
        writer.kill()
        told += [int(line) for line in writer.stdout.read().split()]
    with RunStore.open(tmp_path) as store:
        assert check_consistent(store) >= told[-1]


def test_a_writer_killed_while_it_makes_the_tables_leaves_none(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from sqlalchemy import event; from sqlalchemy.engine import Engine\n"
        "def die(c, cursor, sql, *_):\n"
        "    if 'CREATE TABLE artefacts' in sql: os.kill(os.getpid(), signal.SIGKILL)\n"
        "event.listen(Engine, 'before_cursor_execute', die)\n"
        "from common.store import RunStore; RunStore.open(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(StoreError, match="holds no runs yet"):
        RunStore.open(tmp_path, read_only=True)
    assert write(tmp_path).returncode == 0


@contextmanager
def running(program: str, *given: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *given]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_several_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from common.store import RunStore; import alembic.command; print('ready', flush=True);"
        "sys.stdin.readline(); RunStore.open(sys.argv[1]).runs(); print('done')"
    )
    with running(program, str(tmp_path)) as one, running(program, str(tmp_path)) as two:
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert one.communicate()[0] == "done\n"
        assert two.communicate()[0] == "done\n"


def test_a_lock_names_the_other_process_and_falls_with_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from common.store import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    )
    folder = tmp_path / "runs" / "r"
    with running(program, str(folder)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(folder)
        told = rf"run r is being written by process {holder.pid} on {os.uname().nodename};"
        with pytest.raises(StoreError, match=told):
            RunLock(folder).__enter__()
        holder.kill()
        holder.wait()
        assert not is_locked(folder)
        with RunLock(folder):
            assert is_locked(folder)


def test_a_reader_in_the_middle_of_reading_does_not_keep_the_writer_waiting(tmp_path: Path) -> None:
    assert write(tmp_path).returncode == 0
    program = (
        "import sys; from common.store import RunStore; from sqlalchemy import text\n"
        "store = RunStore.open(sys.argv[1], read_only=True)\n"
        "with store._database.reading() as connection:\n"
        "    rows = connection.execute(text('SELECT * FROM metrics'))\n"
        "    rows.fetchone(); print('reading', flush=True); sys.stdin.readline()\n"
        "    print(len(rows.fetchall()))"
    )
    with running(program, str(tmp_path)) as reader, RunStore.open(tmp_path) as store:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        begun = store.begin_round("r", 10, [])
        committed = store.commit_round(replace(begun, status="committed"), rounds_done=10)
        assert committed.status == "committed"
        assert reader.communicate("\n")[0] == "179\n"
