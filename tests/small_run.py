"""The smallest run with one of everything, for tests that move it."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.store import (
    Artefact,
    Client,
    ClientRound,
    Event,
    Metric,
    Round,
    RunStore,
    Statistic,
    write_artefact,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
RUN = "r1"
ADAPTER = "adapter-0001.bin"
STATE = "rounds/0001/state.bin"
REPLY = "rounds/0001/replies/ada.bin"


def make_run(home: Path, url: str | None = None) -> None:
    """Enter one small run into a home: a state, a kept reply, an adapter, and a number of every kind."""
    with RunStore.open(home, url, clock=lambda: START) as store:
        store.create_run(RUN, name="n", task="t", strategy="s", seed=1, experiment="{}", rounds_planned=2)
        store.record_members([Client(RUN, "ada", START, 4, "asked for", "cpu", 8, 16)])
        store.begin_round(RUN, 1, ["ada", "ben"])
        commit(store)
        made = write_artefact(store.run_folder(RUN), ADAPTER, b"adapter")
        store.update_run(RUN, adapter_path=made.path, adapter_sha256=made.sha256)
        store.set_status(RUN, "completed")


def commit(store: RunStore, number: int = 1) -> None:
    state = write_artefact(store.run_folder(RUN), f"rounds/{number:04d}/state.bin", b"state" * 100)
    reply = write_artefact(store.run_folder(RUN), f"rounds/{number:04d}/replies/ada.bin", b"reply")
    store.commit_round(
        Round(
            RUN, number, START, "committed", None, ("ada", "ben"), error=math.nan, epsilon=math.inf,
            phases={"train": 0.1}, state_path=state.path, state_sha256=state.sha256,
        ),
        [
            ClientRound(
                RUN, number, "ada", "accepted", rank=4, artefact_path=reply.path, artefact_sha256=reply.sha256,
                metadata={"\0": [math.nan, None]},
            ),
            ClientRound(RUN, number, "ben", "rejected", "x\0\ud800" * 9_999, num_examples=10**30),
        ],
        [Metric(RUN, number, f"m{k}", value) for k, value in enumerate((math.nan, math.inf, -math.inf, 5e-324))],
        [
            Artefact(RUN, number, "state", state.path, state.sha256, state.nbytes),
            Artefact(RUN, number, "reply", reply.path, reply.sha256, reply.nbytes),
        ],
        [Event(RUN, "committed", "done\0", START, number, "ada", {"a": "\ud800"})],
        [Statistic(RUN, number, "timeline", None)],
        rounds_done=number,
        best_metric=-math.inf,
    )  # fmt: skip


def everything(home: Path, run: str = RUN, url: str | None = None) -> str:
    """Tell all rows of a run but the ids of its events; as repr, since NaN is not equal to itself."""
    with RunStore.open(home, url, read_only=True) as store:
        told: list[Any] = [store.get_run(run), store.rounds(run), store.members(run), store.client_rounds(run)]
        told += [store.metrics(run), store.statistics(run), store.artefacts(run)]
        return repr(told) + re.sub(r"\bid=\d+", "id=#", repr(store.events(run)))


def files(home: Path, run: str = RUN) -> dict[str, bytes]:
    folder = home / "runs" / run
    places = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in places}
