"""Laws of single strategies, on random cohorts: each against its closed form in dense, slow arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import LowRank
from strategies import AggregationStrategy, aggregation_strategy
from strategies.aggregation.hetlora import norm_shares
from strategies.residual import covariance
from tests.reference import cohorts, dense

SEEDS = st.integers(0, 10_000)
RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
EQUAL_RANKS = st.builds(lambda rank, count: [rank] * count, st.integers(1, 6), st.integers(1, 5))
ENERGIES = st.floats(0.05, 0.999)
LAYERS = sorted(cohorts.SHAPES)


def merge(
    name: str, ranks: Sequence[int], seed: int, shared_a: bool = False, **options: Any
) -> tuple[AggregationStrategy, ServerState, list[ClientUpdate]]:
    """Merge a random cohort's first round."""
    strategy = aggregation_strategy(name, **options)
    spec = cohorts.model_spec()
    updates = cohorts.cohort(spec, ranks, seed, shared_a=shared_a)
    return strategy, strategy.aggregate(strategy.init(spec), updates), updates


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    return [update.num_examples / sum(u.num_examples for u in updates) for update in updates]


def factor_list(updates: Sequence[ClientUpdate], layer: str) -> list[tuple[dense.Matrix, dense.Matrix]]:
    return [cohorts.factors(update.adapter, layer) for update in updates]


def energy(matrices: Sequence[dense.Matrix]) -> float:
    return sum(float(np.sum(matrix**2)) for matrix in matrices)


@given(RANKS, SEEDS, st.integers(1, 8))
@pytest.mark.parametrize("split", ["balanced", "paper"])
def test_flexlora_sends_the_nearest_of_every_rank(split: str, ranks: list[int], seed: int, server_rank: int) -> None:
    """Eckart and Young: nothing of that rank is nearer, and the distance is the tail of the singular values."""
    strategy, after, updates = merge("flexlora", ranks, seed, server_rank=server_rank, split=split)
    for layer in LAYERS:
        exact = cohorts.exact(updates, layer)
        for rank in range(1, server_rank + 1):
            sent = cohorts.matrix(strategy.dispatch(after, ClientInfo("any", rank)).start, layer)
            assert np.sum((sent - exact) ** 2) == pytest.approx(dense.tail(exact, rank), rel=1e-9, abs=1e-18)
        assert dense.distance(cohorts.matrix(after.merged, layer), dense.nearest(exact, server_rank)) < 1e-9
    exacts = [cohorts.exact(updates, layer) for layer in LAYERS]
    lost = sum(dense.tail(exact, server_rank) for exact in exacts)
    assert after.metrics["discarded_energy"] == pytest.approx(lost / energy(exacts), rel=1e-9, abs=1e-18)


@given(RANKS, SEEDS)
def test_flexlora_is_exact_where_nothing_is_cut(ranks: list[int], seed: int) -> None:
    _, after, updates = merge("flexlora", ranks, seed, server_rank=sum(ranks))
    assert cohorts.error(after, updates) < 1e-12
    assert after.metrics["discarded_energy"] < 1e-24


@given(RANKS, SEEDS)
def test_the_papers_split_has_rows_of_length_one(ranks: list[int], seed: int) -> None:
    _, after, _ = merge("flexlora", ranks, seed, split="paper")
    for layer in LAYERS:
        b, a = cohorts.factors(after.start, layer)
        np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-12)
        np.testing.assert_allclose(b.T @ b, np.diag(np.sum(b**2, axis=0)), atol=1e-9)


@given(RANKS, SEEDS)
@pytest.mark.parametrize("name", ["flexlora", "fedavg_svd"])
def test_what_is_sent_does_not_depend_on_signs(name: str, ranks: list[int], seed: int) -> None:
    """Slots whose factors both change their sign are the same update, and give the same factors, not negated ones."""
    strategy, after, updates = merge(name, ranks, seed)
    generator = torch.Generator().manual_seed(seed)
    flipped = []
    for update in updates:
        layers = {}
        for layer, part in update.adapter.layers.items():
            assert isinstance(part, LowRank)
            layers[layer] = cohorts.scaled_slots(part, torch.rand(part.rank, generator=generator).round() * 2 - 1)
        flipped.append(cohorts.with_factors(update, layers))
    again = strategy.aggregate(strategy.init(after.spec), flipped)
    for layer in LAYERS:
        b, _ = cohorts.factors(after.start, layer)
        other, _ = cohorts.factors(again.start, layer)
        np.testing.assert_allclose(np.sum(b * other, axis=0) / np.sum(b**2, axis=0), 1, rtol=1e-3)
        assert all(b[np.argmax(np.abs(b[:, slot])), slot] > 0 for slot in range(b.shape[1]))


@given(st.integers(1, 6), st.integers(1, 5), SEEDS)
def test_no_mean_of_that_rank_is_nearer_than_fedavg_svd(rank: int, count: int, seed: int) -> None:
    _, svd, updates = merge("fedavg_svd", [rank] * count, seed)
    for layer in LAYERS:
        exact = cohorts.exact(updates, layer)
        best = dense.distance(cohorts.matrix(svd.merged, layer), exact)
        for name in ("fedavg", "lora_fair", "hetlora"):
            _, other, _ = merge(name, [rank] * count, seed)
            assert best <= dense.distance(cohorts.matrix(other.merged, layer), exact) + 1e-12


@given(RANKS, SEEDS)
def test_fedavg_svd_sends_everybody_the_evaluated_model(ranks: list[int], seed: int) -> None:
    strategy, after, updates = merge("fedavg_svd", ranks, seed)
    for update, rank in zip(updates, ranks, strict=True):
        sent = strategy.dispatch(after, ClientInfo(update.client, rank))
        assert sent.start.sha256() == after.start.sha256()
    for layer in LAYERS:
        wanted = dense.nearest(cohorts.exact(updates, layer), min(ranks))
        assert dense.distance(cohorts.matrix(after.merged, layer), wanted) < 1e-9


@given(RANKS, SEEDS, ENERGIES)
def test_florist_keeps_no_more_than_the_energy_needs(ranks: list[int], seed: int, share: float) -> None:
    _, after, updates = merge("florist", ranks, seed, energy=share)
    lost, exacts = 0.0, [cohorts.exact(updates, layer) for layer in LAYERS]
    for layer, exact in zip(LAYERS, exacts, strict=True):
        rank = dense.energy_rank(exact, share)
        assert dense.distance(cohorts.matrix(after.merged, layer), dense.nearest(exact, rank)) < 1e-9
        assert dense.distance(cohorts.matrix(after.global_adapter, layer), dense.nearest(exact, rank)) < 1e-9
        lost += dense.tail(exact, rank)
    assert after.metrics["discarded_energy"] == pytest.approx(lost / energy(exacts), rel=1e-9, abs=1e-18)
    assert after.metrics["discarded_energy"] <= 1 - share + 1e-12


@given(RANKS, SEEDS, ENERGIES, ENERGIES)
def test_more_energy_keeps_no_fewer_values(ranks: list[int], seed: int, one: float, other: float) -> None:
    kept = [merge("florist", ranks, seed, energy=share)[1].merged for share in sorted((one, other))]
    for layer in LAYERS:
        ranks_kept = [adapter.layers[layer].rank for adapter in kept if adapter]  # type: ignore[union-attr]
        assert ranks_kept == sorted(ranks_kept)


@given(RANKS, SEEDS)
def test_florist_of_all_energy_is_flora(ranks: list[int], seed: int) -> None:
    strategy, florist, _ = merge("florist", ranks, seed, energy=1)
    _, flora, _ = merge("flora", ranks, seed)
    for layer in LAYERS:
        wanted = cohorts.matrix(flora.global_adapter, layer)
        assert dense.distance(cohorts.matrix(florist.global_adapter, layer), wanted) < 1e-12
    assert strategy.is_exact()
    assert florist.metrics == {}


@given(SEEDS, ENERGIES, st.integers(1, 4))
def test_with_feedback_nothing_is_lost_for_good(seed: int, share: float, rounds: int) -> None:
    """What was merged and what is remembered add up to all exact averages; without feedback they do not."""
    spec = cohorts.model_spec({"out": (6, 6)})
    strategy = aggregation_strategy("florist", energy=share, error_feedback=True)
    state, total = strategy.init(spec), np.zeros((6, 6))
    for number in range(rounds):
        updates = cohorts.cohort(spec, [3, 4], seed + number, base_version=number)
        state = strategy.aggregate(state, updates)
        total = total + cohorts.exact(updates, "out")
    lost = dense.product(
        cohorts.numpy(state.extras["florist.lost_b/out"]), cohorts.numpy(state.extras["florist.lost_a/out"])
    )
    assert dense.distance(cohorts.matrix(state.global_adapter, "out") + lost, total) < 1e-12


@given(EQUAL_RANKS, SEEDS)
def test_fedex_lora_is_exact(ranks: list[int], seed: int) -> None:
    strategy, after, updates = merge("fedex_lora", ranks, seed)
    assert strategy.is_exact()
    assert cohorts.error(after, updates) < 1e-12
    _, mean, _ = merge("fedavg", ranks, seed)
    assert after.start.sha256() == mean.start.sha256()
    for layer, shape in cohorts.SHAPES.items():
        model = cohorts.matrix(after.start, layer)
        if layer in after.global_adapter.layers:
            residual = cohorts.matrix(after.global_adapter, layer)
            assert np.linalg.matrix_rank(residual) <= min((len(ranks) - 1) * ranks[0], *shape)
            model = model + residual
        assert dense.distance(model, cohorts.exact(updates, layer)) < 1e-12


@given(EQUAL_RANKS, SEEDS)
def test_the_residual_is_the_covariance_of_the_factors(ranks: list[int], seed: int) -> None:
    _, mean, updates = merge("fedavg", ranks, seed)
    for layer in LAYERS:
        parts = [update.adapter.layers[layer] for update in updates]
        centre = mean.start.layers[layer]
        assert isinstance(centre, LowRank)
        given_one = covariance(parts, shares(updates), centre)  # type: ignore[arg-type]
        wanted = np.zeros(cohorts.SHAPES[layer])
        b_mean, a_mean = cohorts.factors(mean.start, layer)
        for (b, a), share in zip(factor_list(updates, layer), shares(updates), strict=True):
            wanted = wanted + share * (b - b_mean) @ (a - a_mean)
        assert given_one.rank == (len(ranks) - 1) * ranks[0]
        assert np.linalg.norm(given_one.dense().numpy() - wanted) < 1e-12 * max(1, float(np.linalg.norm(wanted)))


@given(EQUAL_RANKS, SEEDS)
def test_over_one_input_factor_the_mean_misses_nothing(ranks: list[int], seed: int) -> None:
    _, fedex, updates = merge("fedex_lora", ranks, seed, shared_a=True)
    assert fedex.global_adapter.layers == {}
    assert cohorts.error(fedex, updates) < 1e-12
    _, fair, _ = merge("lora_fair", ranks, seed, shared_a=True)
    _, mean, _ = merge("fedavg", ranks, seed, shared_a=True)
    assert fair.start.sha256() == mean.start.sha256()


@given(st.integers(1, 4), st.integers(2, 5), SEEDS, st.integers(1, 4))
def test_a_truncated_residual_is_the_nearest(rank: int, count: int, seed: int, cap: int) -> None:
    strategy, after, updates = merge("fedex_lora", [rank] * count, seed, residual_rank=cap)
    assert not strategy.is_exact()
    missed = [cohorts.exact(updates, layer) - cohorts.matrix(after.start, layer) for layer in LAYERS]
    for layer, residual in zip(LAYERS, missed, strict=True):
        kept = cohorts.matrix(after.global_adapter, layer)
        assert dense.distance(kept, dense.nearest(residual, cap)) < 1e-9
    lost = sum(dense.tail(residual, cap) for residual in missed)
    assert after.metrics["discarded_energy"] == pytest.approx(lost / energy(missed), rel=1e-9, abs=1e-18)


@given(st.integers(2, 5), st.integers(2, 5), SEEDS)
def test_no_deviation_of_an_owner_is_sent(rank: int, count: int, seed: int) -> None:
    """The residual's factors are neither an owner's nor its distance from the mean, at any length."""
    _, after, updates = merge("fedex_lora", [rank] * count, seed)
    for layer, part in after.global_adapter.layers.items():
        centre = after.start.layers[layer]
        assert isinstance(centre, LowRank)
        for update in updates:
            owned = update.adapter.layers[layer]
            assert isinstance(owned, LowRank)
            if isinstance(part, LowRank):
                for rows in (owned.a, owned.a - centre.a):
                    assert_not_parallel(part.a, rows)
                for columns in (owned.b, owned.b - centre.b):
                    assert_not_parallel(part.b.T, columns.T)


def assert_not_parallel(xs: torch.Tensor, ys: torch.Tensor) -> None:
    cosine = torch.nn.functional.normalize(xs) @ torch.nn.functional.normalize(ys).T
    assert float(cosine.abs().max()) < 1 - 1e-10


@given(EQUAL_RANKS, SEEDS, st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e6]))
def test_lora_fair_solves_its_ridge_regression(ranks: list[int], seed: int, ridge: float) -> None:
    _, after, updates = merge("lora_fair", ranks, seed, ridge=ridge)
    _, mean, _ = merge("fedavg", ranks, seed)
    for layer in LAYERS:
        b_mean, a_mean = cohorts.factors(mean.start, layer)
        b, a = cohorts.factors(after.start, layer)
        np.testing.assert_array_equal(a, a_mean)
        exact = cohorts.exact(updates, layer)
        missed = exact - dense.product(b_mean, a_mean)
        penalty = ridge * float(np.sum(a_mean**2)) / len(a_mean)
        wanted = dense.ridge(missed, a_mean, penalty)
        assert np.linalg.norm(b - b_mean - wanted) < 1e-8 * max(1, float(np.linalg.norm(wanted)))
        normal = (missed - (b - b_mean) @ a) @ a.T - penalty * (b - b_mean)
        assert np.abs(normal).max() < 1e-10 * max(1, penalty)
        error, plain = dense.distance(dense.product(b, a), exact), dense.distance(dense.product(b_mean, a_mean), exact)
        assert error <= plain + 1e-12
        if ridge == 1e6:
            assert dense.distance(b, b_mean) < 1e-5


@given(RANKS, SEEDS)
@pytest.mark.parametrize("weights", ["norm", "examples"])
@pytest.mark.parametrize("renormalise", ["none", "slot"])
def test_hetlora_is_the_padded_mean(renormalise: str, weights: str, ranks: list[int], seed: int) -> None:
    strategy, after, updates = merge("hetlora", ranks, seed, weights=weights, renormalise=renormalise)
    for layer in LAYERS:
        parts = factor_list(updates, layer)
        norms = [float(np.linalg.norm(dense.product(b, a))) for b, a in parts]
        held = [norm / sum(norms) for norm in norms] if weights == "norm" else shares(updates)
        b, a = dense.padded_mean(parts, held, per_slot=renormalise == "slot")
        got_b, got_a = cohorts.factors(after.start, layer)
        assert max(dense.distance(got_b, b), dense.distance(got_a, a)) < 1e-12
        for rank in range(1, max(ranks) + 1):
            sent = strategy.dispatch(after, ClientInfo("any", rank)).start
            np.testing.assert_array_equal(cohorts.factors(sent, layer)[1], got_a[:rank])
            assert sent.narrowed(rank) is sent


@given(RANKS, SEEDS)
def test_norm_shares_add_up_to_one(ranks: list[int], seed: int) -> None:
    parts = [update.adapter.layers["out"] for update in cohorts.cohort(cohorts.model_spec(), ranks, seed)]
    given_ones = norm_shares(parts)  # type: ignore[arg-type]
    assert sum(given_ones) == pytest.approx(1, rel=1e-12)
    assert norm_shares([part.scaled(0.0) for part in parts]) == [1 / len(parts)] * len(parts)  # type: ignore[misc]


@given(EQUAL_RANKS, SEEDS)
def test_hetlora_of_equal_ranks_by_examples_is_fedavg(ranks: list[int], seed: int) -> None:
    _, het, _ = merge("hetlora", ranks, seed, weights="examples")
    _, mean, _ = merge("fedavg", ranks, seed)
    torch.testing.assert_close(het.start.flat, mean.start.flat, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), SEEDS)
def test_slot_weights_keep_what_nested_clients_agree_on(ranks: list[int], seed: int) -> None:
    """Clients whose factors are the first slots of one adapter merge to that adapter; plain padding shrinks it."""
    spec = cohorts.model_spec()
    (widest,) = cohorts.cohort(spec, [max(ranks)], seed)
    updates = [
        ClientUpdate(name, widest.adapter.narrowed(rank), 1.0 + rank)
        for name, rank in zip(cohorts.NAMES, ranks, strict=False)
    ]
    strategy = aggregation_strategy("hetlora", renormalise="slot")
    start = strategy.aggregate(strategy.init(spec), updates).start
    torch.testing.assert_close(start.flat, widest.adapter.flat, rtol=1e-12, atol=1e-12)
