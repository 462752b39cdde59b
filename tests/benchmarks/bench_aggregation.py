"""Aggregating mixed ranks: thin QR of the factors against a dense SVD, in one run, on one thread."""

from __future__ import annotations

import sys

import torch
from reporting import report, seconds

from common.lowrank import LowRank, stack
from strategies.kmeans import kmeans
from strategies.units import pool

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def main() -> None:
    """Time one layer of SIZE × SIZE."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    updates = [
        LowRank(torch.randn(SIZE, rank, generator=generator) * 0.01, torch.randn(rank, SIZE, generator=generator) * 0.01)
        for rank in RANKS
    ]
    shares = [rank / sum(RANKS) for rank in RANKS]
    exact = sum((share * (update.b.double() @ update.a.double()) for share, update in zip(shares, updates, strict=True)))
    assert isinstance(exact, torch.Tensor)

    def error(update: torch.Tensor) -> str:
        return f"{float((update.double() - exact).norm() / exact.norm()):.1e}"

    def dense_svd() -> torch.Tensor:
        total = torch.zeros(SIZE, SIZE)
        for share, update in zip(shares, updates, strict=True):
            total += share * update.dense()
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        keep = sum(RANKS)
        return u[:, :keep] * s[:keep] @ vh[:keep]

    def stacked() -> LowRank:
        return stack(updates, shares)

    def refactored() -> LowRank:
        return stacked().truncate()[0]

    def clustered() -> object:
        units = pool(updates, shares)
        return kmeans(units.gram(), units.weight, 16, 0)

    result: list[torch.Tensor] = []
    slow = seconds(lambda: result.append(dense_svd()), repeats=1, warm_up=0)
    rows = [["dense sum and SVD", f"{slow:.2f} s", "1", error(result[0])]]
    for name, work in (("stack (FLoRA)", stacked), ("stack, QR, small SVD (what leaves the server)", refactored)):
        taken = seconds(work)
        rows.append([name, f"{taken * 1000:.2f} ms", f"{slow / taken:,.0f}", error(work().dense())])
    taken = seconds(clustered, repeats=3)
    rows.append(["k-means of 160 units, k = 16 (LEGO)", f"{taken * 1000:.0f} ms", f"{slow / taken:,.0f}", "lossy"])
    report(
        "aggregation",
        "Aggregation of mixed ranks",
        f"One layer of {SIZE} × {SIZE}, ranks {', '.join(map(str, RANKS))}, one thread. Error relative to the fp64 sum.",
        ["method", "time", "times faster", "error"],
        rows,
    )


if __name__ == "__main__":
    main()
