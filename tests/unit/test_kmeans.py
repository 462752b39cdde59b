"""k-means up to sign, against trying every partition and every sign."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from strategies.kmeans import Clusters, _fill_empty, kmeans, singletons
from tests.reference import dense


def gram(points: Tensor) -> Tensor:
    return points @ points.T


def cost(points: Tensor, weight: Tensor, found: Clusters) -> float:
    """Compute the scatter of a clustering point by point."""
    total = 0.0
    for cluster in range(found.count):
        members = [i for i in range(len(points)) if found.labels[i] == cluster]
        assert members
        whole = sum(float(weight[i]) for i in members)
        mean = sum(float(weight[i]) / whole * found.signs[i] * points[i] for i in members)
        total += sum(float(weight[i] * (found.signs[i] * points[i] - mean).square().sum()) for i in members)
    return total


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_of_all_partitions(seed: int, count: int) -> None:
    """Lloyd's iteration promises a local optimum only; on these points enough starts reach the global one."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    pool = [
        dense.Unit(1.0, float(w), point[:2].numpy(), point[2:].numpy()) for w, point in zip(weight, points, strict=True)
    ]
    best, _ = dense.best_partition(pool, count)
    found = kmeans(gram(points), weight, count, seed=0, n_init=60)
    assert cost(points, weight, found) == pytest.approx(best, rel=1e-12)
    assert found.inertia == pytest.approx(best, rel=1e-6)


def test_a_point_and_its_mirror_image_are_one_cluster() -> None:
    points = torch.tensor([[5.0, 0.1], [-5.1, 0.0], [0.2, 3.0], [0.0, -3.1]], dtype=torch.float64)
    found = kmeans(gram(points), torch.ones(4, dtype=torch.float64), 2, seed=1)
    assert found.labels[0] == found.labels[1] != found.labels[2] == found.labels[3]
    assert found.signs[0] == -found.signs[1]
    assert found.signs[2] == -found.signs[3]


def test_the_same_seed_gives_the_same_bits_and_starts_matter() -> None:
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.ones(40, dtype=torch.float64)

    def labels(seed: int) -> list[int]:
        found: list[int] = kmeans(gram(points), weight, 8, seed, n_init=1).labels.tolist()
        return found

    assert labels(3) == labels(3)
    assert len({tuple(labels(seed)) for seed in range(5)}) > 1
    many = kmeans(gram(points), weight, 8, 3, n_init=20)
    assert many.inertia <= kmeans(gram(points), weight, 8, 3, n_init=1).inertia


def test_zero_is_a_seed() -> None:
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.ones(30, dtype=torch.float64)
    one, other = (kmeans(gram(points), weight, 6, 0, n_init=1) for _ in range(2))
    assert torch.equal(one.labels, other.labels)


def test_weights_pull_the_centroid() -> None:
    """Three points on a line, two clusters: the light one joins whoever costs less."""
    points = torch.tensor([[1.0], [2.0], [3.1]], dtype=torch.float64)

    def together(weights: Sequence[float]) -> list[bool]:
        labels = kmeans(gram(points), torch.tensor(weights, dtype=torch.float64), 2, seed=0).labels
        return [bool(labels[0] == labels[1]), bool(labels[1] == labels[2])]

    assert together([1, 1, 1]) == [True, False]
    assert together([100, 1, 0.1]) == [False, True]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equal_points_fill_all_clusters(count: int) -> None:
    points = torch.ones(4, 2, dtype=torch.float64)
    found = kmeans(gram(points), torch.ones(4, dtype=torch.float64), count, seed=0)
    assert sorted(set(found.labels.tolist())) == list(range(count))
    assert found.inertia == 0


def test_an_empty_cluster_takes_the_farthest_point_that_is_not_alone() -> None:
    labels, signs = torch.tensor([0, 0, 1, 0]), -torch.ones(4, dtype=torch.float64)
    distance = torch.tensor([1.0, 4.0, 9.0, 4.0], dtype=torch.float64)
    _fill_empty(labels, signs, distance, 4)
    assert labels.tolist() == [0, 2, 1, 3]  # 9 is alone; of the two fours the lowest index goes first
    assert signs.tolist() == [-1, 1, -1, 1]
    assert distance.tolist() == [1, 0, 9, 0]


def test_one_step_is_enough_to_end() -> None:
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = kmeans(gram(points), torch.ones(10, dtype=torch.float64), 3, seed=0, n_init=1, max_iter=1)
    assert sorted(set(found.labels.tolist())) == [0, 1, 2]


def test_singletons() -> None:
    found = singletons(3)
    assert (found.labels.tolist(), found.signs.tolist(), found.count) == ([0, 1, 2], [1, 1, 1], 3)
    assert torch.equal(found.membership(), torch.eye(3, dtype=torch.float64))
