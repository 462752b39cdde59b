"""Bounds on downloads: the nearest adapter, what it loses, and the largest rank that fits the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from common.adapter import Adapter, Layout
from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, Update
from server.bounds import Bound, cut, download_bound, fitting_rank, numbers_at, rank_limit, widest
from tests.tiny import synthetic

OUT, IN = 12, 20


def update(rank: int, seed: int = 0) -> LowRank:
    numbers = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(OUT, rank, generator=numbers), torch.randn(rank, IN, generator=numbers))


def adapter(*ranks: int, head: bool = True) -> Adapter:
    """Build an adapter with a layer per rank; -1 is a matrix of full rank."""
    layers: dict[str, Update] = {
        f"layer{i}": Dense(update(OUT, i).dense()) if rank < 0 else update(rank, i) for i, rank in enumerate(ranks)
    }
    return Adapter.pack(layers, {"head": torch.arange(3.0)} if head else {})


def values(part: Update) -> torch.Tensor:
    return torch.linalg.svdvals(part.dense().double())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_cut_is_the_nearest_and_what_it_loses_is_the_tail(rank: int) -> None:
    whole = adapter(6, 3, -1)
    smaller, lost = cut(whole, rank, None)
    tail = total = 0.0
    for name, part in whole.layers.items():
        s = values(part)
        u, _, vh = torch.linalg.svd(part.dense().double(), full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(smaller.layers[name].dense().double(), nearest, rtol=1e-4, atol=1e-5)
        tail, total = tail + float(s[rank:].square().sum()), total + float(s.square().sum())
    assert lost == pytest.approx(tail / total, rel=1e-5)
    assert widest(smaller.layout) == rank
    assert torch.equal(smaller.extras["head"], whole.extras["head"])


def test_a_cut_by_energy_keeps_the_fewest_values_of_every_layer() -> None:
    whole = adapter(6, 3)
    smaller, lost = cut(whole, None, 0.8)
    for name, part in whole.layers.items():
        share = values(part).square().cumsum(0) / values(part).square().sum()
        kept = smaller.layers[name]
        assert isinstance(kept, LowRank)
        assert kept.rank == int((share < 0.8).sum()) + 1
    assert 0 < lost < 0.2


def test_what_is_small_enough_is_not_touched() -> None:
    whole = adapter(4, 2)
    for rank in (None, 4, 9):
        assert cut(whole, rank, None) == (whole, 0.0)
    assert cut(Adapter.empty(), 1, 0.5)[1] == 0.0


@pytest.mark.parametrize(("rank", "energy"), [(8, None), (None, 0.999999), (8, 0.999999)])
def test_a_matrix_that_factors_would_not_make_smaller_stays(rank: int | None, energy: float | None) -> None:
    """Rank 8 of 12 × 20 is 256 numbers, the matrix 240."""
    whole = adapter(-1)
    smaller, lost = cut(whole, rank, energy)
    assert smaller.layers["layer0"].dense().equal(whole.layers["layer0"].dense())
    assert lost == 0


def test_zeros_lose_nothing() -> None:
    whole = Adapter.pack({"layer": update(3).scaled(0.0), "matrix": Dense(torch.zeros(OUT, IN))})
    smaller, lost = cut(whole, 1, None)
    assert lost == 0
    assert widest(smaller.layout) == 0


def test_numbers_by_hand() -> None:
    layout = adapter(6, 3, -1).layout
    size = OUT + IN
    assert numbers_at(layout, None) == layout.numel == 3 + 6 * size + 3 * size + OUT * IN
    assert numbers_at(layout, 4) == 3 + 4 * size + 3 * size + 4 * size
    assert numbers_at(layout, 9) == layout.numel


@pytest.mark.parametrize("nbytes", [0, 4, 399, 400, 401, 4000, 10**9])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_the_rank_that_fits_is_the_largest(wire: str, nbytes: int) -> None:
    layout = adapter(6, 3, -1).layout
    size = 4 if wire == "fp32" else 2
    slow = max((k for k in range(1, 13) if numbers_at(layout, k) * size <= nbytes), default=0)
    assert fitting_rank(lambda k: numbers_at(layout, k), 12, nbytes, wire) == slow  # type: ignore[arg-type]


def limit(layouts: Sequence[Layout], fixed: int = 0, **bound: int) -> int | None:
    return rank_limit(layouts, fixed, Bound(**bound), "fp32")  # type: ignore[arg-type]


def test_all_that_may_be_cut_shares_the_bytes() -> None:
    one, two = adapter(6, head=False).layout, adapter(3, head=False).layout
    size = 4 * (OUT + IN)
    assert limit([one, two]) is None
    assert limit([one, two], rank=5) == 5
    assert limit([one, two], nbytes=9 * size) is None
    assert limit([one, two], nbytes=9 * size - 1) == 5
    assert limit([one, two], nbytes=4 * size) == 2
    assert limit([one, two], nbytes=4 * size, rank=1) == 1
    assert limit([one, two], fixed=2 * size, nbytes=4 * size) == 1


@pytest.mark.parametrize(("fixed", "nbytes"), [(0, 100), (100, 200), (201, 200)])
def test_not_even_rank_1_is_refused(fixed: int, nbytes: int) -> None:
    said = (
        rf"download_bytes = {nbytes} holds not even rank 1 beside {fixed} bytes that cannot be cut; raise it or lower"
    )
    with pytest.raises(ConfigurationError, match=said):
        limit([adapter(6).layout], fixed, nbytes=nbytes)


def test_what_cannot_be_cut_may_fill_the_bound() -> None:
    assert limit([Layout()], 200, nbytes=200) is None
    with pytest.raises(ConfigurationError, match="beside 200 bytes"):
        limit([Layout()], 200, nbytes=199)


def test_a_client_may_have_bytes_of_its_own() -> None:
    experiment = synthetic("federation.download_bytes=9000", "clients.client-2.download_bytes=7000")
    assert download_bound(experiment, "client-1") == Bound(None, None, 9000)
    assert download_bound(experiment, "client-2").nbytes == 7000
    assert download_bound(experiment, "stranger").nbytes == 9000
    assert download_bound(synthetic(), "client-1").is_none
