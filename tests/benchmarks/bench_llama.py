"""A whole Llama-7B q,v set merged by every strategy: seconds, memory and error, one thread.

Argument is the layers' size. Every strategy runs in a process of its own; what is done is kept in
``docs/results/llama.json``, so that a program that was ended goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from replies import EQUAL, MIXED, Round, measured_rounds, measured_strategy, play, ranks_for, take_in
from reporting import RESULTS, in_fresh_process, peak_above, peak_memory, report

from common.federation import ModelSpec
from strategies import AGGREGATION, AggregationStrategy
from strategies.certificate import certificate
from strategies.updates import parts_by_layer

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
LAYERS = tuple(f"model.layers.{block}.self_attn.{letter}_proj" for block in range(32) for letter in "qv")
DONE = RESULTS / "llama.json"


def measured(strategy: AggregationStrategy, given: Round) -> list[str]:
    """Merge a round once; return upload, seconds, memory above the replies, memory in all, and error."""
    start = time.process_time()
    after, peak = peak_above(lambda: strategy.finish(given.state, take_in(strategy, given)))
    taken = time.process_time() - start
    in_all = peak_memory()
    apart = "–"
    if after.merged is not None:
        weights = {reply.client: reply.num_examples for reply in given.replies}
        error = certificate(after.merged, parts_by_layer(given.replies).items(), weights).error
        apart = f"{error:.1e}" if error else "below 3e-8"
    return [given.upload, f"{taken:.2f} s", f"{peak / 1e6:,.0f} MB", f"{in_all / 1e6:,.0f} MB", apart]


def one(name: str) -> None:
    """Measure a strategy's merges and print them."""
    strategy = measured_strategy(name)
    if "sparse" in measured_rounds(strategy).values():
        needed = len(LAYERS) * SIZE**2 * 4 * len(MIXED) / 1e9
        sys.stdout.write(
            json.dumps([["sparse", f"left out: ten replies of whole matrices take {needed:.0f} GB", *["–"] * 3]])
        )
        return
    spec = ModelSpec(dict.fromkeys(LAYERS, (SIZE, SIZE)), seed=0)
    sys.stdout.write(json.dumps([measured(strategy, given) for given in play(strategy, spec, ranks_for(strategy))]))


def known() -> dict[str, Any]:
    """Return what an earlier program measured at this size."""
    held = json.loads(DONE.read_text(encoding="utf-8")) if DONE.exists() else {}
    return held if held.get("size") == SIZE else {"size": SIZE, "strategies": {}}


def main() -> None:
    """Measure what is missing and report."""
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        one(sys.argv[2])
        return
    done = known()
    for name in AGGREGATION.names():
        if name not in done["strategies"]:
            start = time.perf_counter()
            done["strategies"][name] = json.loads(in_fresh_process([__file__, str(SIZE), name]))
            DONE.write_text(json.dumps(done, indent=1), encoding="utf-8")
            print(f"{name}: measured in {time.perf_counter() - start:.0f} s", flush=True)
    report(
        "llama",
        "A whole Llama-7B q,v set",
        f"{len(LAYERS)} matrices of {SIZE} × {SIZE}, ten clients: ranks {', '.join(map(str, MIXED))}, or rank "
        f"{EQUAL[0]} for all where a strategy needs equal ones; LoRA-LEGO makes 16 clusters. Processor time of one "
        "merge on one thread, replies checked, added and finished; peak memory above the replies, which are drawn and "
        "held in memory, and of the whole process; error relative to the exact average, from the factors. Replies are "
        "independent random changes, the worst case for lossy merges. SLoRA's second stage merges as FedAvg does.",
        ["strategy", "upload", "seconds", "memory above the replies", "memory of the process", "error"],
        [[name, *merge] for name, merges in sorted(done["strategies"].items()) for merge in merges],
    )
    DONE.unlink()


if __name__ == "__main__":
    main()
