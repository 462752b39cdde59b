"""Coordinator memory with linear strategies: peak above the idle process, in replies, for 4 to 64 clients."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from reporting import in_fresh_process, peak_memory, report, resident_memory

COHORTS = (4, 16, 64)
STRATEGIES = ("fedavg", "ffa_lora")


def one(strategy_name: str, clients: int) -> None:
    """Aggregate replies read from disk one at a time and print the peak above idle, in bytes of a reply."""
    import torch

    from common.adapter import Adapter
    from common.federation import ClientInfo, ClientUpdate, ModelSpec
    from common.messages import TrainAnswer
    from common.parcel_file import parcel_bytes, read_parcel
    from common.start import starting_adapter
    from common.wire import seal, unseal
    from strategies import aggregation_strategy

    torch.set_num_threads(1)
    spec = ModelSpec({f"layer.{i:02d}": (3906, 3906) for i in range(32)}, seed=0)
    strategy = aggregation_strategy(strategy_name)
    state = strategy.init(spec)
    dispatch = strategy.dispatch(state, ClientInfo("client", 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply"
        adapter: Adapter = starting_adapter(dispatch, spec)
        reply = adapter.nbytes
        answer = TrainAnswer(client="client", round=1, base_version=0, num_examples=1, seconds=0)
        path.write_bytes(parcel_bytes(seal(adapter, part=dispatch.sends, dispatch=dispatch), answer.model_dump_json()))
        del adapter
        idle = resident_memory()
        Path("/proc/self/clear_refs").write_text("5")
        accumulated = strategy.begin(state)
        for number in range(clients):
            parcel, _, _ = read_parcel(path)
            update = ClientUpdate(f"client-{number}", unseal(parcel, dispatch, adapter), 1.0)
            accumulated = strategy.add(accumulated, update)
            del parcel, update
        strategy.finish(state, accumulated)
    sys.stdout.write(f"{(peak_memory() - idle) / reply:.2f}\n")


def main() -> None:
    """Measure every strategy and cohort in a process of its own."""
    if len(sys.argv) == 3:
        one(sys.argv[1], int(sys.argv[2]))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    rows = [[name, *(in_fresh_process([__file__, name, str(clients)]) for clients in COHORTS)] for name in STRATEGIES]
    report(
        "memory",
        "Coordinator memory of linear strategies",
        "Peak resident memory above the idle process while replies of 8 MB are read from disk and merged, in replies. "
        "Freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_=1000000), so that the figure is what is "
        "held; with glibc's default, fragmentation adds up to two replies.",
        ["strategy", *(f"{clients} clients" for clients in COHORTS)],
        rows,
    )


if __name__ == "__main__":
    main()
