"""Merging mixed ranks: processor time of one layer on one thread, against a dense SVD of the same sum, in one run.

The argument is the layer's size; at 4096 the dense SVD alone takes more than a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from reporting import report, seconds
from torch import Tensor

from common.adapter import Adapter
from common.federation import ClientUpdate, ModelSpec, ServerState
from common.lowrank import LowRank, Update, stack
from strategies import aggregation_strategy
from strategies.certificate import certificate
from strategies.updates import by_layer

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SHARES = [rank / sum(RANKS) for rank in RANKS]


def draw_parts() -> list[LowRank]:
    """Draw one update per client."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.01

    return [LowRank(draw(SIZE, rank), draw(rank, SIZE)) for rank in RANKS]


def dense_svd(parts: Sequence[LowRank]) -> LowRank:
    """Sum the matrices and decompose the sum: what implementations without factors do."""
    total = torch.zeros(SIZE, SIZE)
    for share, part in zip(SHARES, parts, strict=True):
        total += share * part.dense()
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    keep = sum(RANKS)
    return LowRank(u[:, :keep] * s[:keep], vh[:keep])


def second_round(name: str, replies: list[ClientUpdate], **options: Any) -> Callable[[], ServerState]:
    """Prepare a strategy's second round, in which a global adapter grows by a layer it has."""
    strategy = aggregation_strategy(name, **options)
    state = strategy.aggregate(strategy.init(ModelSpec({"layer": (SIZE, SIZE)}, seed=0)), replies)
    later = [replace(reply, base_version=state.base_version) for reply in replies]
    return lambda: strategy.aggregate(state, later)


def main() -> None:
    """Measure and report."""
    torch.set_num_threads(1)
    parts = draw_parts()
    exact = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for share, part in zip(SHARES, parts, strict=True):
        exact.addmm_(part.b.double(), part.a.double(), alpha=share)

    def error(update: Update) -> str:
        assert isinstance(update, LowRank)
        return f"{float((update.b.double() @ update.a.double() - exact).norm() / exact.norm()):.1e}"

    start = time.process_time()
    decomposed = dense_svd(parts)
    slow = time.process_time() - start

    replies = [ClientUpdate(f"{i}", Adapter.pack({"layer": part}), part.rank) for i, part in enumerate(parts)]
    weights = {reply.client: reply.num_examples for reply in replies}
    flora, lego = second_round("flora", replies), second_round("lora_lego", replies, clusters=16)
    stacked, merged = stack(parts, SHARES), flora().merged
    assert merged is not None
    works: list[tuple[str, Callable[[], object], str]] = [
        ("plain stack", lambda: stack(parts, SHARES), error(stacked)),
        ("stack refactored by QR and a small SVD", stacked.truncate, error(stacked.truncate()[0])),
        ("FLoRA round: check, merge, grow", flora, error(merged.layers["layer"])),
        ("LoRA-LEGO round: check, pool, k-means, factors", lego, "lossy"),
        ("certificate of the FLoRA round", lambda: certificate(merged, by_layer(replies).items(), weights), "–"),
    ]
    rows = [["dense sum and SVD", f"{slow:.2f} s", "1", error(decomposed)]]
    for name, work, missed in works:
        taken = seconds(work, 15, clock=time.process_time)
        rows.append([name, f"{taken * 1000:.2f} ms", f"{slow / taken:,.0f}", missed])
    report(
        "aggregation",
        "Aggregation of mixed ranks",
        f"One layer of {SIZE} × {SIZE}, ranks {', '.join(map(str, RANKS))}; LoRA-LEGO makes 16 clusters. "
        "Median processor time on one thread; error relative to the fp64 sum.",
        ["work", "time", "times faster", "error"],
        rows,
    )


if __name__ == "__main__":
    main()
