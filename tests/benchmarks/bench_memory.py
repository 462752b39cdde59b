"""Coordinator memory with linear strategies: peak above the idle process, in replies, for 4 to 64 clients."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from reporting import in_fresh_process, peak_above, report

COHORTS = (4, 16, 64)
RANK = 8
WIDTH, LAYERS = 3906, 32
MATRIX_WIDTH, MATRICES = 512, 8
"""The model, and the smaller one of strategies that send whole matrices: a reply is 8 MB in both."""


def one(name: str, number: int, clients: int) -> None:
    """Merge a round's replies, read from disk one at a time; print the peak above idle in whole replies."""
    import torch
    from replies import measured_rounds, reply

    from common.adapter import Adapter
    from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, ServerState
    from common.messages import TrainAnswer
    from common.parcel_file import parcel_bytes, read_parcel
    from common.start import starting_adapter
    from common.wire import seal, unseal
    from strategies import aggregation_strategy

    torch.set_num_threads(1)
    strategy = aggregation_strategy(name)
    whole = "sparse" in measured_rounds(strategy).values()
    width, layers = (MATRIX_WIDTH, MATRICES) if whole else (WIDTH, LAYERS)
    spec = ModelSpec({f"layer.{i:02d}": (width, width) for i in range(layers)}, seed=0)

    def asked(state: ServerState) -> tuple[Dispatch, ClientUpdate]:
        dispatch = strategy.dispatch(state, ClientInfo("client", RANK))
        return dispatch, reply(dispatch, spec, "client", 1.0, state.base_version, state.round)

    def merge(path: Path, state: ServerState, dispatch: Dispatch, start: Adapter) -> ServerState:
        accumulated = strategy.begin(state)
        for place in range(clients):
            parcel, _, _ = read_parcel(path)
            update = ClientUpdate(f"client-{place:02d}", unseal(parcel, dispatch, start if partial else None), 1.0)
            accumulated = strategy.add(accumulated, update)
            del parcel, update
        return strategy.finish(state, accumulated)

    state = strategy.init(spec)
    for _ in range(1, number):
        state = strategy.aggregate(state, [asked(state)[1]])
    dispatch, answer = asked(state)
    strategy.aggregate(state, [answer])  # loads the code that merges
    adapter: Adapter = answer.adapter
    nbytes = adapter.nbytes
    with tempfile.TemporaryDirectory() as folder:
        start, partial = starting_adapter(dispatch, spec), dispatch.sends in ("a", "b")
        path = Path(folder) / "reply"
        header = TrainAnswer(client="client", round=1, base_version=0, num_examples=1, seconds=0).model_dump_json()
        path.write_bytes(parcel_bytes(seal(adapter, part=dispatch.sends, dispatch=dispatch), header))
        travelled = path.stat().st_size
        del adapter, answer
        _, peak = peak_above(lambda: merge(path, state, dispatch, start))
    sys.stdout.write(f"{peak / nbytes:.2f} {travelled / nbytes:.2f}\n")


def main() -> None:
    """Measure every strategy and cohort in a process of its own."""
    if len(sys.argv) == 4:
        one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        return
    from replies import measured_rounds

    from strategies import AGGREGATION, aggregation_strategy

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    rows = []
    for name in AGGREGATION.names():
        if not AGGREGATION.plugin(name).capabilities.linear_uplink:
            continue
        for number, upload in measured_rounds(aggregation_strategy(name)).items():
            found = [in_fresh_process([__file__, name, str(number), str(clients)]).split() for clients in COHORTS]
            flat = [float(peak) for peak, _ in found]
            met = "yes" if max(flat) <= 3.05 else "NO"
            rows.append([name, upload, found[0][1], *(peak for peak, _ in found), met])
            print(*rows[-1], flush=True)
    report(
        "memory",
        "Coordinator memory of linear strategies",
        "Peak",
        ["strategy", "upload", "travels", *(f"{clients} clients" for clients in COHORTS), "at most 3"],
        rows,
    )


if __name__ == "__main__":
    main()
