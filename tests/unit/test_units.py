"""Pooled units and their centroids, against loops over single units."""

from __future__ import annotations

import pytest
import torch

from common.lowrank import LowRank
from strategies.kmeans import Clusters, kmeans, singletons
from strategies.units import Norm, Units, centroids, pool, stretch
from tests.reference import cohorts, dense

SHARES = [0.5, 0.3, 0.2]


def parts(seed: int = 0, ranks: tuple[int, ...] = (2, 3, 1)) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [cohorts.low_rank(7, 5, rank, generator, torch.float64) for rank in ranks]


def reference(held: list[LowRank]) -> list[dense.Unit]:
    return dense.units([(s, cohorts.numpy(p.b), cohorts.numpy(p.a)) for s, p in zip(SHARES, held, strict=True)])


def test_units_are_balanced_signed_and_ordered() -> None:
    units = pool(parts(), SHARES)
    torch.testing.assert_close(units.a.norm(dim=1), units.b.norm(dim=1), rtol=1e-12, atol=0)
    assert bool((units.a.gather(1, units.a.abs().argmax(1, keepdim=True)) > 0).all())
    lengths = units.a.norm(dim=1)
    assert bool((lengths[:-1] >= lengths[1:]).all())
    assert sorted(units.owner.tolist()) == [0, 0, 1, 1, 1, 2]
    assert units.mean_rank == 2
    for unit in range(len(units)):
        assert units.mass[unit] == units.weight[unit] == SHARES[int(units.owner[unit])]


def test_a_clients_weight_may_be_divided_among_its_slots() -> None:
    units = pool(parts(), SHARES, per_rank=True)
    ranks = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)[units.owner]
    torch.testing.assert_close(units.weight * ranks, units.mass)


def test_the_gram_matrix_is_of_the_features() -> None:
    units = pool(parts(), SHARES)
    features = torch.cat([units.a, units.b], dim=1)
    torch.testing.assert_close(units.gram(), features @ features.T)


def test_zero_slots_are_left_out() -> None:
    held = parts()
    b = held[1].b.clone()
    b[:, 1] = 0
    units = pool([held[0], LowRank(b, held[1].a), LowRank(held[2].b * 0, held[2].a)], SHARES)
    assert sorted(units.owner.tolist()) == [0, 0, 1, 1]
    assert bool(units.a.isfinite().all())
    assert bool(units.b.isfinite().all())
    nothing = pool([LowRank(torch.zeros(4, 2), torch.ones(2, 3))], [1.0])
    assert len(nothing) == 0
    assert len(pool([LowRank(torch.zeros(4, 0), torch.ones(0, 3))], [1.0])) == 0


@pytest.mark.parametrize("factor", ["mass", "inf", "l2"])
@pytest.mark.parametrize("seed", range(4))
def test_the_merge_equals_the_best_partition_by_hand(seed: int, factor: str) -> None:
    held = parts(seed)
    units = pool(held, SHARES)
    clusters = kmeans(units.gram(), units.weight, 3, seed=0, n_init=60)
    means = centroids(units, clusters)
    if factor == "mass":
        scale = means.mass
    else:
        scale = stretch(units, clusters, means, "inf" if factor == "inf" else "l2", 1e9)[0].square()
    given = means.update(scale, torch.float64)
    by_hand = reference(held)
    _, groups = dense.best_partition(by_hand, 3)
    wanted = dense.lego_delta(by_hand, groups, 5, factor)
    assert dense.distance(dense.product(given.b.numpy(), given.a.numpy()), wanted) < 1e-12
    assert float(means.mass.sum()) == pytest.approx(0.5 * 2 + 0.3 * 3 + 0.2)


@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_averaging_never_lengthens(norm: Norm) -> None:
    units = pool(parts(), SHARES)
    alone = stretch(units, singletons(6), centroids(units, singletons(6)), norm, 10)
    torch.testing.assert_close(alone[0], torch.ones(6, dtype=torch.float64))
    together = kmeans(units.gram(), units.weight, 2, seed=0)
    factor, capped = stretch(units, together, centroids(units, together), norm, 1e9)
    assert bool((factor >= 1 - 1e-12).all())
    assert float(factor.max()) > 1.01
    assert capped == 0


@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_the_factor_of_units_that_cancel_is_capped(norm: Norm) -> None:
    a, b = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[5.0]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    units = Units(a.repeat(2, 1), b.repeat(2, 1), torch.tensor([0, 1]), ones, ones, 1.0)
    against = Clusters(torch.tensor([0, 0]), torch.tensor([1.0, -1.0], dtype=torch.float64), 1)
    means = centroids(units, against)
    assert not means.a.any()
    factor, capped = stretch(units, against, means, norm, 10)
    assert (factor.tolist(), capped) == ([10.0], 1)
    assert not means.update(factor, torch.float64).dense().any()


def test_a_cluster_of_one_owner_is_seen() -> None:
    units = pool(parts(), SHARES)
    assert centroids(units, singletons(6)).sole_owner
    everything = Clusters(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.float64), 1)
    assert not centroids(units, everything).sole_owner


def test_the_heaviest_slot_comes_first() -> None:
    units = pool(parts(), SHARES)
    update = centroids(units, singletons(6)).update(units.mass, torch.float32)
    assert update.a.dtype == torch.float32
    weight = (update.b.norm(dim=0) * update.a.norm(dim=1)).tolist()
    assert weight == sorted(weight, reverse=True)
