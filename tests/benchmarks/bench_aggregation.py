"""One merge of every strategy: time, memory and error of one layer on one thread, against a dense SVD in one run.

The argument is the layer's size; at 4096 the dense SVD alone takes half a minute.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from replies import EQUAL, MIXED, Round, measured_strategy, play, ranks_for, take_in
from reporting import in_fresh_process, peak_above, report, seconds
from torch import Tensor

from common.federation import ClientUpdate, ModelSpec, ServerState
from common.lowrank import LowRank, Update, stack
from strategies import AGGREGATION, AggregationStrategy

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
REPEATS = 15
SLOW_S = 1.0
"""What takes longer is measured once more only."""


class Goal(NamedTuple):
    """What a merge must reach: seconds, and times faster than the dense SVD."""

    seconds: float
    faster: float = 0.0

    def text(self, taken: float, slow: float) -> str:
        """Write the goal and whether it is met."""
        met = taken <= self.seconds and slow >= self.faster * taken
        faster = f", {self.faster:g}×" if self.faster else ""
        return f"≤ {self.seconds:g} s{faster}: {'yes' if met else 'NO'}"


GOALS = {"flexlora": Goal(0.1, 300), "florist": Goal(0.1, 300), "lora_lego": Goal(0.3)}


class Merge(NamedTuple):
    """What one merge costs: seconds to take all replies in and to finish, peak bytes, and its relative error."""

    upload: str
    taking: float
    finishing: float
    peak: int
    error: float | None


def processor_times(strategy: AggregationStrategy, given: Round) -> Iterator[tuple[float, float]]:
    """Merge a round over and over; yield the seconds of taking the replies in and of finishing."""
    while True:
        start = time.process_time()
        accumulated = take_in(strategy, given)
        taken = time.process_time()
        strategy.finish(given.state, accumulated)
        yield taken - start, time.process_time() - taken


def measured(strategy: AggregationStrategy, given: Round) -> Merge:
    """Measure one merge: warm, in the median, then its memory."""
    times = processor_times(strategy, given)
    warm = sum(next(times))
    runs = sorted(next(times) for _ in range(REPEATS if warm < SLOW_S else 1))
    after, peak = peak_above(lambda: strategy.finish(given.state, take_in(strategy, given)))
    middle = len(runs) // 2
    taking, finishing = sorted(run[0] for run in runs)[middle], sorted(run[1] for run in runs)[middle]
    return Merge(given.upload, taking, finishing, peak, error(after, given.replies))


def error(after: ServerState, replies: Sequence[ClientUpdate]) -> float | None:
    """Return the distance of the merge from the exact average in float64, relative; None where there is no merge."""
    if after.merged is None:
        return None
    exact = weighted_sum([(reply.num_examples, reply.adapter.layers["layer"]) for reply in replies])
    exact /= sum(reply.num_examples for reply in replies)
    return distance(after.merged.layers["layer"], exact)


def weighted_sum(parts: Sequence[tuple[float, Update]]) -> Tensor:
    """Sum updates as a matrix in float64."""
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for weight, part in parts:
        if isinstance(part, LowRank):
            total.addmm_(part.b.double(), part.a.double(), alpha=weight)
        else:
            total.add_(part.w, alpha=weight)
    return total


def distance(update: Update, exact: Tensor) -> float:
    """Return the relative distance of an update from a matrix."""
    matrix = update.b.double() @ update.a.double() if isinstance(update, LowRank) else update.w.double()
    return float((matrix - exact).norm() / exact.norm())


def one(name: str) -> None:
    """Measure a strategy's merges and print them."""
    strategy = measured_strategy(name)
    rounds = play(strategy, ModelSpec({"layer": (SIZE, SIZE)}, seed=0), ranks_for(strategy))
    sys.stdout.write(json.dumps([measured(strategy, given) for given in rounds]))


def dense_svd(parts: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    """Sum the matrices and decompose the sum: what implementations without factors do."""
    total = torch.zeros(SIZE, SIZE)
    for share, part in zip(shares, parts, strict=True):
        total += share * part.dense()
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    keep = sum(MIXED)
    return LowRank(u[:, :keep] * s[:keep], vh[:keep])


def yardsticks() -> tuple[float, list[list[str]]]:
    """Measure what merges are compared with: the dense SVD's seconds; rows of it, of a copy and of the plain stack."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        LowRank(*(torch.randn(shape, generator=generator) * 0.01 for shape in ((SIZE, rank), (rank, SIZE))))
        for rank in MIXED
    ]
    shares = [rank / sum(MIXED) for rank in MIXED]
    exact = weighted_sum(list(zip(shares, parts, strict=True)))
    start = time.process_time()
    decomposed, peak = peak_above(lambda: dense_svd(parts, shares))
    slow = time.process_time() - start
    flat = torch.cat([factor.reshape(-1) for part in parts for factor in (part.b, part.a)])
    copied = seconds(flat.clone, REPEATS, clock=time.process_time)
    stacked = seconds(lambda: stack(parts, shares), REPEATS, clock=time.process_time)
    apart = distance(stack(parts, shares), exact)
    return slow, [
        ["dense sum and SVD", "", "", f"{slow:.1f} s", "1", megabytes(peak), f"{distance(decomposed, exact):.1e}", ""],
        ["copy of all factors", "", "", milliseconds(copied), f"{slow / copied:,.0f}", "", "", ""],
        [
            "plain stack",
            "",
            "",
            milliseconds(stacked),
            f"{slow / stacked:,.0f}",
            "",
            f"{apart:.1e}",
            f"at a copy's speed: {stacked / copied:.1f} × its time",
        ],
    ]


def row(name: str, merge: Merge, slow: float) -> list[str]:
    """Write one merge as a row of the table."""
    whole = merge.taking + merge.finishing
    return [
        name,
        merge.upload,
        milliseconds(merge.taking),
        milliseconds(merge.finishing),
        f"{slow / whole:,.0f}",
        megabytes(merge.peak),
        "–" if merge.error is None else f"{merge.error:.1e}",
        GOALS[name].text(whole, slow) if name in GOALS else "",
    ]


def milliseconds(taken: float) -> str:
    """Write seconds as milliseconds."""
    return f"{taken * 1000:.2f} ms"


def megabytes(count: int) -> str:
    """Write bytes as megabytes."""
    return f"{count / 1e6:.0f} MB"


def main() -> None:
    """Measure and report, every strategy in a process of its own."""
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        one(sys.argv[2])
        return
    slow, rows = yardsticks()
    for name in AGGREGATION.names():
        merges = json.loads(in_fresh_process([__file__, str(SIZE), name]))
        rows += [row(name, Merge(*merge), slow) for merge in merges]
    report(
        "aggregation",
        "Aggregation",
        f"One layer of {SIZE} × {SIZE}, ten clients: ranks {', '.join(map(str, MIXED))}, or rank {EQUAL[0]} for all "
        "where a strategy needs equal ones; LoRA-LEGO makes 16 clusters. Replies are independent random changes, in "
        "which clients have nothing in common: the worst case for lossy merges. Measured is the last of the first "
        'three rounds in which this part of the adapters travels up. Median processor time on one thread; "times '
        'faster" counts taking in and finishing; memory is the peak above the replies; the error is relative to the '
        "exact average in fp64.",
        ["work", "upload", "check and add ten replies", "finish", "times faster", "memory", "error", "goal"],
        rows,
    )


if __name__ == "__main__":
    main()
