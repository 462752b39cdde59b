"""Coordinator memory with linear strategies: peak above the idle process, in replies, for 4 to 64 clients."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from replies import measured_rounds, reply
from reporting import in_fresh_process, peak_above, report

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
from common.messages import TrainAnswer
from common.parcel_file import parcel_bytes, read_parcel
from common.start import starting_adapter
from common.wire import seal, unseal
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy

COHORTS = (4, 16, 64)
MOST = 3.05
"""Replies: three, and what Python itself takes."""


class Size(NamedTuple):
    """A model's layers, and its clients' rank."""

    layers: int
    width: int
    rank: int


FACTORS, MATRICES = Size(32, 3906, 8), Size(8, 512, 64)
"""The model, and that of strategies that send matrices: their replies are 8 MB."""


def begun(strategy: AggregationStrategy, number: int) -> tuple[ServerState, Dispatch, ClientUpdate]:
    """Return the state before a round, what its clients get, and one reply; the code that merges is loaded then."""
    size = MATRICES if "sparse" in measured_rounds(strategy).values() else FACTORS
    spec = ModelSpec({f"layer.{i:02d}": (size.width, size.width) for i in range(size.layers)}, seed=0)
    state = strategy.init(spec)
    while True:
        dispatch = strategy.dispatch(state, ClientInfo("client", size.rank))
        answer = reply(dispatch, spec, "client", 1.0, state.base_version, state.round)
        after = strategy.aggregate(state, [answer])
        if state.round + 1 == number:
            return state, dispatch, answer
        state = after


def write(path: Path, adapter: Adapter, dispatch: Dispatch) -> None:
    """Write what of a reply travels, as the server keeps it."""
    header = TrainAnswer(client="client", round=1, base_version=0, num_examples=1, seconds=0).model_dump_json()
    path.write_bytes(parcel_bytes(seal(adapter, part=dispatch.sends, dispatch=dispatch), header))


def merge(
    strategy: AggregationStrategy, state: ServerState, dispatch: Dispatch, start: Adapter, path: Path, clients: int
) -> ServerState:
    """Merge a round whose replies are read from disk one at a time."""
    known = start if dispatch.sends in ("a", "b") else None
    accumulated = strategy.begin(state)
    for place in range(clients):
        parcel, _, _ = read_parcel(path)
        update = ClientUpdate(f"client-{place:02d}", unseal(parcel, dispatch, known), 1.0)
        accumulated = strategy.add(accumulated, update)
        del parcel, update
    return strategy.finish(state, accumulated)


def one(name: str, number: int, clients: int) -> None:
    """Print a merge's peak above idle and what of a reply travelled, both in whole replies."""
    torch.set_num_threads(1)
    strategy = aggregation_strategy(name)
    state, dispatch, answer = begun(strategy, number)
    start, nbytes = starting_adapter(dispatch, state.spec), answer.adapter.nbytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply"
        write(path, answer.adapter, dispatch)
        del answer
        _, peak = peak_above(lambda: merge(strategy, state, dispatch, start, path, clients))
        sys.stdout.write(f"{peak / nbytes:.2f} {path.stat().st_size / nbytes:.2f}\n")


def main() -> None:
    """Measure every strategy and cohort in a process of its own."""
    if len(sys.argv) == 4:
        one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for name in (name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.linear_uplink):
        for number, upload in measured_rounds(aggregation_strategy(name)).items():
            found = [in_fresh_process([__file__, name, str(number), str(clients)]).split() for clients in COHORTS]
            met = "yes" if max(float(peak) for peak, _ in found) <= MOST else "NO"
            rows.append([name, upload, found[0][1], *(peak for peak, _ in found), met])
            print(*rows[-1], flush=True)
    report(
        "memory",
        "Coordinator memory of linear strategies",
        "Peak resident memory while replies are read from disk one at a time, made whole and merged, and the state "
        "becomes the next one; above the idle process, which holds the state and the start the clients were given. "
        'The unit is one reply made whole, 8 MB (slora in factors: 2 MB); "travels" is what of it came from the '
        "client. Measured is the last of the first three rounds in which a part travels up. Freed blocks go back to "
        "the system at once (MALLOC_MMAP_THRESHOLD_=65536), so that the figure is what is held; with glibc's default, "
        "fragmentation adds up to two replies.",
        ["strategy", "upload", "travels", *(f"{clients} clients" for clients in COHORTS), "at most 3"],
        rows,
    )


if __name__ == "__main__":
    main()
