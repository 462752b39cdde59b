"""The error of a merge and its companions, against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import Adapter
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank
from strategies import aggregation_strategy
from strategies.certificate import Certificate, certificate, energy_rank, squared_spectrum
from strategies.updates import parts_by_layer
from tests.reference import cohorts, dense

SPEC = cohorts.model_spec()


def certify(merged: Adapter | None, updates: list[ClientUpdate]) -> Certificate:
    assert merged is not None
    weights = {update.client: update.num_examples for update in updates}
    return certificate(merged, parts_by_layer(updates).items(), weights)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 1000))
@pytest.mark.parametrize("form", ["factors", "dense"])
def test_every_number_is_that_of_the_matrices(form: str, ranks: list[int], seed: int) -> None:
    updates = cohorts.cohort(SPEC, ranks, seed)
    merged = cohorts.cohort(SPEC, [3], seed + 1)[0].adapter
    if form == "dense":
        merged = Adapter.pack({name: Dense(part.dense()) for name, part in merged.layers.items()})
    given_ = certify(merged, updates)

    average = {layer: cohorts.exact(updates, layer) for layer in SPEC.layers}
    matrices = {layer: cohorts.matrix(merged, layer) for layer in SPEC.layers}
    apart = math.sqrt(sum(float(np.sum((matrices[n] - average[n]) ** 2)) for n in average))
    whole = math.sqrt(sum(float(np.sum(average[n] ** 2)) for n in average))
    assert given_.error == pytest.approx(apart / whole, rel=1e-9)
    for layer, value in matrices.items():
        assert given_.norm[layer] == pytest.approx(np.linalg.norm(value), rel=1e-9)
        assert given_.effective_rank[layer] == dense.energy_rank(value, 0.95)
    for update in updates:
        own = {layer: cohorts.matrix(update.adapter, layer) for layer in SPEC.layers}
        norm = math.sqrt(sum(float(np.sum(value**2)) for value in own.values()))
        assert given_.client_norm[update.client] == pytest.approx(norm, rel=1e-9)
        assert given_.cosine[update.client] == pytest.approx(dense.cosine(own, average), abs=1e-9)
    alone = [{layer: cohorts.matrix(update.adapter, layer) for layer in SPEC.layers} for update in updates]
    similar = [[dense.cosine(one, other) for other in alone] for one in alone]
    np.testing.assert_allclose(given_.similarity.numpy(), similar, atol=1e-9)
    for layer in SPEC.layers:
        assert given_.ranks[layer] == tuple(ranks)
        assert given_.energy_ranks[layer] == tuple(dense.energy_rank(one[layer], 0.95) for one in alone)


@pytest.mark.parametrize("fault", ["never trained", "twice the same", "of unequal scales"])
def test_the_effective_rank_of_slots_that_depend_on_each_other(fault: str) -> None:
    update = cohorts.cohort(SPEC, [4])[0]
    layers = {}
    for layer, part in update.adapter.layers.items():
        assert isinstance(part, LowRank)
        b, gain = part.b.clone(), torch.tensor([1e-9, 1.0, 1e9, 1e-3], dtype=part.b.dtype)
        if fault == "of unequal scales":
            layers[layer] = cohorts.scaled_slots(part, gain)
        else:
            b[:, 1] = 0 if fault == "never trained" else b[:, 0]
            layers[layer] = LowRank(b, part.a)
    given_ = certify(Adapter.empty(), [cohorts.with_factors(update, layers)])
    for layer, part in layers.items():
        matrix = dense.product(cohorts.numpy(part.b), cohorts.numpy(part.a))
        assert given_.energy_ranks[layer] == (dense.energy_rank(matrix, 0.95),)


def test_a_matrix_among_the_updates_has_no_rank() -> None:
    ada, bo = cohorts.cohort(SPEC, [2, 3])
    whole = {layer: Dense(part.dense()) for layer, part in bo.adapter.layers.items() if layer == "out"}
    bo = cohorts.with_factors(bo, {**bo.adapter.layers, **whole})  # type: ignore[dict-item]
    given_ = certify(Adapter.empty(), [ada, bo])
    assert given_.ranks == {"down": (2, 3), "out": (2, None), "up": (2, 3)}
    assert given_.energy_ranks["out"] == (None, None)
    assert given_.energy_ranks["up"] == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_merge_has_next_to_no_error(dtype: torch.dtype) -> None:
    strategy = aggregation_strategy("flora")
    updates = cohorts.cohort(SPEC, [3, 2, 5], dtype=dtype)
    error = certify(strategy.aggregate(strategy.init(SPEC), updates).merged, updates).error
    assert error < (1e-12 if dtype == torch.float64 else 2e-6)


def test_fedavg_has_its_covariance_as_error() -> None:
    strategy = aggregation_strategy("fedavg")
    updates = cohorts.cohort(SPEC, [3, 3, 3])
    state = strategy.aggregate(strategy.init(SPEC), updates)
    error = certify(state.merged, updates).error
    apart = sum(float(np.sum((cohorts.matrix(state.merged, n) - cohorts.exact(updates, n)) ** 2)) for n in SPEC.layers)
    whole = sum(float(np.sum(cohorts.exact(updates, n) ** 2)) for n in SPEC.layers)
    assert error == pytest.approx(math.sqrt(apart / whole))
    assert error > 0.3


def test_a_layer_missing_anywhere_counts_as_zero() -> None:
    updates = cohorts.cohort(SPEC, [2, 2])
    only = {"out": updates[0].adapter.layers["out"]}
    updates[0] = cohorts.with_factors(updates[0], only)  # type: ignore[arg-type]
    merged = Adapter.pack({"out": updates[1].adapter.layers["out"]})
    given_ = certify(merged, updates)
    average = {n: cohorts.exact(updates, n) for n in SPEC.layers}
    apart = sum(float(np.sum((average[n] - (cohorts.matrix(merged, n) if n == "out" else 0)) ** 2)) for n in average)
    whole = sum(float(np.sum(value**2)) for value in average.values())
    assert given_.error == pytest.approx(math.sqrt(apart / whole))
    assert list(given_.norm) == ["out"]
    assert given_.ranks == {"down": (None, 2), "out": (2, 2), "up": (None, 2)}
    assert [given_.energy_ranks[layer][0] for layer in ("down", "up")] == [None, None]


def test_nothing_merged_to_nothing_has_no_error() -> None:
    updates = [
        cohorts.with_factors(u, {n: LowRank(p.b * 0, p.a) for n, p in u.adapter.layers.items()})  # type: ignore[union-attr]
        for u in cohorts.cohort(SPEC, [2, 2])
    ]
    strategy = aggregation_strategy("lora_lego")
    given_ = certify(strategy.aggregate(strategy.init(SPEC), updates).merged, updates)
    assert given_.error == 0
    assert set(given_.effective_rank.values()) == {0}
    assert given_.cosine == {"ada": 0.0, "bo": 0.0}
    assert given_.similarity.tolist() == [[0, 0], [0, 0]]
    assert set(given_.energy_ranks.values()) == {(0, 0)}
    assert certify(Adapter.empty(), updates).error == 0
    assert certify(cohorts.cohort(SPEC, [1])[0].adapter, updates).error == math.inf


def test_updates_that_cancel_leave_no_noise() -> None:
    one, two = cohorts.cohort(SPEC, [2, 2], weights=(1, 1))
    opposite = {n: part.scaled(-1) for n, part in one.adapter.layers.items()}
    two = cohorts.with_factors(two, opposite)  # type: ignore[arg-type]
    given_ = certify(Adapter.empty(), [one, two])
    assert given_.error == 0
    assert given_.cosine == {"ada": 0.0, "bo": 0.0}


def test_one_layer_is_looked_at_a_time() -> None:
    """A generator is enough: nothing asks for a second layer before it is done with the first."""
    updates = cohorts.cohort(SPEC, [2, 3])
    merged = updates[0].adapter
    weights = {u.client: u.num_examples for u in updates}
    lazily = certificate(merged, ((name, parts) for name, parts in parts_by_layer(updates).items()), weights)
    assert lazily == certify(merged, updates)


def test_the_rank_of_an_energy() -> None:
    assert energy_rank(torch.tensor([94.0, 5.0, 1.0])) == 2
    assert energy_rank(torch.tensor([96.0, 4.0])) == 1
    assert energy_rank(torch.zeros(3)) == 0
    assert energy_rank(torch.zeros(0)) == 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_spectrum_of_both_forms(shape: tuple[int, int]) -> None:
    update = cohorts.low_rank(*shape, 3, torch.Generator().manual_seed(0), torch.float64)
    wanted = np.linalg.svd(update.dense().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(squared_spectrum(update).numpy(), wanted[:3], rtol=1e-9)
    np.testing.assert_allclose(squared_spectrum(Dense(update.dense())).numpy()[:3], wanted[:3], rtol=1e-9)
