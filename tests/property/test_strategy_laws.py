"""Laws that every merge must keep, on random cohorts, against the slow dense reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import Dense, LowRank
from common.start import fresh_a
from strategies import AggregationStrategy, aggregation_strategy
from strategies.aggregation.ffa_lora import frozen_seed
from strategies.global_adapter import grow
from strategies.units import pool
from tests.reference import cohorts, dense

SEEDS = st.integers(0, 10_000)
RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
EQUAL_RANKS = st.builds(lambda rank, count: [rank] * count, st.integers(1, 6), st.integers(1, 5))
SHAPES = st.sampled_from(
    [
        {
            "square": (8, 8),
            "tall": (30, 7),
            "wide": (7, 30),
        },  # a convolution over one position is such a matrix
        {"rank": (6, 6), "column": (9, 1), "row": (1, 9)},
        {"thin": (40, 40)},
    ]
)
MIXED = ["flora", "flexlora", "florist", "lora_lego"]
LOSSLESS: dict[str, dict[str, Any]] = {
    "flexlora": {"server_rank": 100},
    "florist": {"energy": 1},
    "lora_lego": {"clusters": 100},
}
"""Options under which a strategy discards nothing."""


def frozen(state: ServerState, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Give every client the input factor that ffa_lora freezes."""
    seed = frozen_seed(state)
    return [
        cohorts.with_factors(
            update,
            {
                layer: LowRank(part.b, fresh_a(seed, layer, *part.a.shape).to(part.b.dtype))
                for layer, part in update.adapter.layers.items()
                if isinstance(part, LowRank)
            },
        )
        for update in updates
    ]


def round_of(
    name: str,
    ranks: Sequence[int],
    seed: int,
    shapes: dict[str, tuple[int, int]] | None = None,
    **options: Any,
) -> tuple[AggregationStrategy, ServerState, list[ClientUpdate]]:
    """Prepare a strategy, its first state and a cohort it can merge."""
    strategy = aggregation_strategy(name, **options)
    spec = cohorts.model_spec(shapes or cohorts.SHAPES)
    state = strategy.init(spec)
    updates = cohorts.cohort(spec, ranks, seed)
    return strategy, state, frozen(state, updates) if name == "ffa_lora" else updates


@given(RANKS, SEEDS, SHAPES)
def test_flora_equals_the_sum_of_the_products(ranks: list[int], seed: int, shapes: dict[str, tuple[int, int]]) -> None:
    strategy, state, updates = round_of("flora", ranks, seed, shapes)
    after = strategy.aggregate(state, updates)
    assert cohorts.error(after, updates) < 1e-12
    for layer in shapes:
        assert dense.distance(cohorts.matrix(after.global_adapter, layer), cohorts.exact(updates, layer)) < 1e-12


@given(RANKS, SEEDS, SHAPES)
def test_ffa_lora_is_exact_for_any_ranks(ranks: list[int], seed: int, shapes: dict[str, tuple[int, int]]) -> None:
    strategy, state, updates = round_of("ffa_lora", ranks, seed, shapes)
    after = strategy.aggregate(state, updates)
    assert cohorts.error(after, updates) < 1e-12
    for layer, (_, inn) in shapes.items():
        part = after.start.layers[layer]
        assert isinstance(part, LowRank)
        assert part.rank == max(ranks)
        assert torch.equal(part.a, fresh_a(frozen_seed(state), layer, max(ranks), inn).double())


@given(RANKS, SEEDS)
def test_lora_lego_with_a_cluster_per_unit_is_exact(ranks: list[int], seed: int) -> None:
    strategy, state, updates = round_of("lora_lego", ranks, seed, clusters=sum(ranks))
    assert cohorts.error(strategy.aggregate(state, updates), updates) < 1e-12


@given(RANKS, SEEDS, st.randoms(use_true_random=False))
@pytest.mark.parametrize("name", [*MIXED, "fedavg_svd", "ffa_lora", "hetlora"])
def test_the_order_of_clients_does_not_change_a_bit(
    name: str, ranks: list[int], seed: int, shuffle: random.Random
) -> None:
    strategy, state, updates = round_of(name, ranks, seed)
    shuffled = list(updates)
    shuffle.shuffle(shuffled)
    assert cohorts.bits(strategy.aggregate(state, updates)) == cohorts.bits(strategy.aggregate(state, shuffled))


@given(EQUAL_RANKS, SEEDS)
def test_fedavg_is_exact_where_the_input_factor_is_shared(ranks: list[int], seed: int) -> None:
    strategy = aggregation_strategy("fedavg")
    spec = cohorts.model_spec()
    updates = cohorts.cohort(spec, ranks, seed, shared_a=True)
    assert cohorts.error(strategy.aggregate(strategy.init(spec), updates), updates) < 1e-12


@given(EQUAL_RANKS, SEEDS)
def test_over_one_input_factor_all_linear_merges_agree(ranks: list[int], seed: int) -> None:
    matrices = []
    for name in ("fedavg", "flora", "ffa_lora"):
        strategy, state, updates = round_of(name, ranks, seed)
        after = strategy.aggregate(state, frozen(aggregation_strategy("ffa_lora").init(state.spec), updates))
        matrices.append(cohorts.matrix(after.merged, "out"))
    assert dense.distance(matrices[1], matrices[0]) < 1e-12
    assert dense.distance(matrices[2], matrices[0]) < 1e-12


@given(st.integers(1, 6), st.integers(1, 5), SEEDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("fedavg", {}, id="fedavg"),
        pytest.param("flora", {}, id="flora"),
        pytest.param("ffa_lora", {}, id="ffa_lora"),
        pytest.param("lora_lego", {}, id="lego-mass"),
        pytest.param("lora_lego", {"scale": "paper"}, id="lego-inf"),
        pytest.param("lora_lego", {"scale": "paper", "norm": "l2", "unit_weight": "rank"}, id="lego-l2"),
        pytest.param("lora_lego", {"canonical": "svd", "mode": "merge"}, id="lego-svd-merge"),
        pytest.param("flexlora", {"split": "paper"}, id="flexlora"),
        pytest.param("fedavg_svd", {}, id="fedavg_svd"),
        pytest.param("florist", {"energy": 1}, id="florist"),
        pytest.param("fedex_lora", {}, id="fedex_lora"),
        pytest.param("lora_fair", {}, id="lora_fair"),
        pytest.param("hetlora", {}, id="hetlora"),
        pytest.param("hetlora", {"weights": "examples", "renormalise": "slot"}, id="hetlora-slot"),
    ],
)
def test_identical_clients_keep_their_update(
    name: str, options: dict[str, Any], rank: int, count: int, seed: int
) -> None:
    """One client or many copies of it: the merge is that client's update."""
    strategy, state, updates = round_of(name, [rank], seed, None, **options)
    copies = [replace(updates[0], client=f"c{i}", num_examples=1.0 + i) for i in range(count)]
    after = strategy.aggregate(state, copies)
    for layer in cohorts.SHAPES:
        alone = dense.product(*cohorts.factors(updates[0].adapter, layer))
        assert dense.distance(cohorts.matrix(after.merged, layer), alone) < 1e-12
    for head, value in updates[0].adapter.extras.items():
        torch.testing.assert_close(after.start.extras[head], value, rtol=1e-12, atol=1e-12)


@given(RANKS, SEEDS)
@pytest.mark.parametrize("name", [*MIXED, "fedavg_svd"])
def test_the_gauge_of_the_factors_does_not_matter(name: str, ranks: list[int], seed: int) -> None:
    """Slots permuted, rescaled and with signs flipped are the same update."""
    strategy, state, updates = round_of(name, ranks, seed)
    generator = torch.Generator().manual_seed(seed)
    scrambled = []
    for update in updates:
        layers = {}
        for layer, part in update.adapter.layers.items():
            assert isinstance(part, LowRank)
            order = torch.randperm(part.rank, generator=generator)
            gain = torch.randn(part.rank, generator=generator, dtype=torch.float64).exp()
            gain = gain * torch.where(torch.rand(part.rank, generator=generator) < 0.5, -1.0, 1.0)
            layers[layer] = cohorts.scaled_slots(LowRank(part.b[:, order], part.a[order]), gain)
        scrambled.append(cohorts.with_factors(update, layers))
    one, other = strategy.aggregate(state, updates), strategy.aggregate(state, scrambled)
    for layer in cohorts.SHAPES:
        assert dense.distance(cohorts.matrix(other.merged, layer), cohorts.matrix(one.merged, layer)) < 1e-10


def test_fedavg_does_depend_on_the_order_of_slots() -> None:
    """The documented weakness of averaging factors: it mixes slot j of one client with slot j of another."""
    strategy, state, updates = round_of("fedavg", [3, 3], 0)
    layers = {
        layer: LowRank(part.b.flip(1), part.a.flip(0))
        for layer, part in updates[1].adapter.layers.items()
        if isinstance(part, LowRank)
    }
    one = strategy.aggregate(state, updates)
    other = strategy.aggregate(state, [updates[0], cohorts.with_factors(updates[1], layers)])
    assert dense.distance(cohorts.matrix(other.merged, "out"), cohorts.matrix(one.merged, "out")) > 0.1


@given(EQUAL_RANKS, SEEDS)
@pytest.mark.parametrize("name", [*MIXED, "fedavg", "fedavg_svd", "fedex_lora", "ffa_lora", "hetlora", "lora_fair"])
def test_heads_are_averaged_and_inputs_left_alone(name: str, ranks: list[int], seed: int) -> None:
    strategy, state, updates = round_of(name, ranks, seed)
    before = [update.adapter.sha256() for update in updates], cohorts.bits(state)
    after = strategy.aggregate(state, updates)
    assert ([update.adapter.sha256() for update in updates], cohorts.bits(state)) == before
    whole = sum(update.num_examples for update in updates)
    for head in cohorts.HEADS:
        wanted = np.zeros(cohorts.HEADS[head])
        for update in updates:
            wanted = wanted + update.num_examples / whole * cohorts.numpy(update.adapter.extras[head])
        np.testing.assert_allclose(cohorts.numpy(after.start.extras[head]), wanted, rtol=1e-12, atol=1e-12)


@given(RANKS, SEEDS)
@pytest.mark.parametrize("name", MIXED)
def test_a_layer_of_some_clients_counts_as_zero_at_the_others(name: str, ranks: list[int], seed: int) -> None:
    strategy, state, updates = round_of(name, [*ranks, 2], seed, None, **LOSSLESS.get(name, {}))
    layers = {n: part for n, part in updates[-1].adapter.layers.items() if n != "up"}
    updates[-1] = cohorts.with_factors(updates[-1], layers)  # type: ignore[arg-type]
    after = strategy.aggregate(state, updates)
    wanted = cohorts.exact(updates, "up")
    assert dense.distance(cohorts.matrix(after.merged, "up"), wanted) < 1e-12


@given(SEEDS)
@pytest.mark.parametrize("name", [*MIXED, "fedavg_svd", "ffa_lora", "hetlora"])
def test_zero_updates_merge_to_exactly_zero(name: str, seed: int) -> None:
    strategy, state, updates = round_of(name, [2, 3], seed)
    zeros = [
        cohorts.with_factors(
            update,
            {n: LowRank(part.b * 0, part.a) for n, part in update.adapter.layers.items() if isinstance(part, LowRank)},
        )
        for update in updates
    ]
    after = strategy.aggregate(state, zeros)
    for layer in cohorts.SHAPES:
        assert not cohorts.matrix(after.merged, layer).any()
        if layer in after.global_adapter.layers:  # never as factors of rank 0, which no adapter can be loaded from
            assert isinstance(after.global_adapter.layers[layer], Dense)
            assert not cohorts.matrix(after.global_adapter, layer).any()


@given(SEEDS)
@pytest.mark.parametrize("name", [*MIXED, "ffa_lora"])
def test_a_client_without_slots_contributes_nothing_but_its_weight(name: str, seed: int) -> None:
    strategy, state, updates = round_of(name, [0, 4], seed, None, **LOSSLESS.get(name, {}))
    assert cohorts.error(strategy.aggregate(state, updates), updates) < 1e-12


@given(st.lists(st.integers(2, 6), min_size=2, max_size=5), SEEDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("flora", {}, id="flora"),
        pytest.param("flora", {"global_rank": 3}, id="flora-capped"),
        pytest.param("lora_lego", {}, id="lego"),
        pytest.param("lora_lego", {"mode": "merge"}, id="lego-merge"),
        pytest.param("lora_lego", {"clusters": 100}, id="lego-all-units"),
        pytest.param("flexlora", {"server_rank": 100}, id="flexlora"),
        pytest.param("fedavg_svd", {}, id="fedavg_svd"),
        pytest.param("florist", {"energy": 1}, id="florist"),
    ],
)
def test_no_factor_of_an_owner_is_sent(name: str, options: dict[str, object], ranks: list[int], seed: int) -> None:
    """Neither an owner's matrix nor a column of its b or a row of its a leaves the server, at any length."""
    strategy, state, updates = round_of(name, ranks, seed, None, **options)
    after = strategy.aggregate(state, updates)
    sent = [after.global_adapter]
    sent += [strategy.dispatch(after, ClientInfo(update.client, 100)).start for update in updates]
    for adapter in sent:
        for layer, part in adapter.layers.items():
            for update in updates:
                owned = update.adapter.layers[layer]
                assert isinstance(owned, LowRank)
                assert_not_parallel(part.dense().reshape(1, -1), owned.dense().reshape(1, -1))
                if isinstance(part, LowRank):
                    assert_not_parallel(part.a, owned.a)
                    assert_not_parallel(part.b.T, owned.b.T)


def assert_not_parallel(xs: torch.Tensor, ys: torch.Tensor) -> None:
    cosine = torch.nn.functional.normalize(xs) @ torch.nn.functional.normalize(ys).T
    assert float(cosine.abs().max()) < 1 - 1e-10


@given(st.lists(st.integers(1, 3), min_size=3, max_size=8), SEEDS)
def test_the_global_adapter_is_the_sum_of_all_rounds(ranks: list[int], seed: int) -> None:
    """From factors to a dense sum, in float32, against a dense float64 sum."""
    strategy = aggregation_strategy("flora")
    spec = cohorts.model_spec({"big": (24, 20), "small": (4, 6)})
    state = strategy.init(spec)
    total = {layer: np.zeros(shape) for layer, shape in spec.layers.items()}
    kinds = []
    for number, rank in enumerate(ranks):
        updates = cohorts.cohort(spec, [rank, 1], seed + number, dtype=torch.float32, base_version=number)
        state = strategy.aggregate(state, updates)
        assert (state.round, state.base_version) == (number + 1, number + 1)
        kinds.append(type(state.global_adapter.layers["big"]))
        for layer in total:
            total[layer] = total[layer] + cohorts.exact(updates, layer)
            given = cohorts.matrix(state.global_adapter, layer)
            assert dense.distance(given, total[layer]) < 2e-6
    assert kinds == sorted(kinds, key=lambda kind: kind is Dense)
    assert kinds[0] is LowRank
    assert state.global_adapter.flat.dtype == torch.float32


@given(RANKS, SEEDS, st.integers(1, 5))
def test_a_capped_global_adapter_loses_the_tail_and_says_so(ranks: list[int], seed: int, cap: int) -> None:
    strategy = aggregation_strategy("flora", global_rank=cap)
    assert not strategy.is_exact()
    spec = cohorts.model_spec({"big": (24, 20)})
    state = strategy.init(spec)
    before = np.zeros((24, 20))
    for version in range(3):
        updates = cohorts.cohort(spec, ranks, seed + version, base_version=version)
        wanted = before + cohorts.exact(updates, "big")
        state = strategy.aggregate(state, updates)
        held = state.global_adapter.layers["big"]
        assert isinstance(held, LowRank)
        assert held.rank <= cap
        after = cohorts.matrix(state.global_adapter, "big")
        lost = dense.tail(wanted, cap)
        assert np.sum((after - wanted) ** 2) == pytest.approx(lost, rel=1e-6, abs=1e-18)
        assert state.metrics["discarded_energy"] == pytest.approx(lost / np.sum(wanted**2), rel=1e-6, abs=1e-18)
        assert dense.distance(cohorts.matrix(state.merged, "big"), after - before) < 1e-10
        before = after


@given(RANKS, SEEDS)
def test_lora_lego_has_no_more_slots_than_clusters(ranks: list[int], seed: int) -> None:
    strategy, state, updates = round_of("lora_lego", ranks, seed)
    after = strategy.aggregate(state, updates)
    for layer, shape in cohorts.SHAPES.items():
        part = after.start.layers[layer]
        assert isinstance(part, LowRank)
        assert part.rank <= max(ranks)
        assert np.linalg.matrix_rank(cohorts.matrix(after.merged, layer)) <= min(max(ranks), *shape)
        weight = part.b.norm(dim=0) * part.a.norm(dim=1)
        assert torch.all(weight[:-1] >= weight[1:] * (1 - 1e-9))


@given(RANKS, SEEDS)
def test_pooled_units_sum_to_the_average(ranks: list[int], seed: int) -> None:
    _, _, updates = round_of("flora", ranks, seed)
    whole = sum(update.num_examples for update in updates)
    parts = [update.adapter.layers["out"] for update in updates]
    units = pool(parts, [update.num_examples / whole for update in updates])  # type: ignore[arg-type]
    total = (units.mass[:, None] * units.b).T @ units.a
    assert dense.distance(total.numpy(), cohorts.exact(updates, "out")) < 1e-12
    expected_mass = sum(rank * update.num_examples for rank, update in zip(ranks, updates, strict=True))
    assert float(units.mass.sum()) == pytest.approx(expected_mass / whole)
    torch.testing.assert_close(units.a.norm(dim=1), units.b.norm(dim=1))


@settings(max_examples=20)
@given(RANKS, SEEDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["flora", "flexlora", "florist", "fedavg_svd", "ffa_lora", "hetlora"])
def test_half_precision_replies_are_summed_in_float32(
    name: str, dtype: torch.dtype, ranks: list[int], seed: int
) -> None:
    strategy, state, updates = round_of(name, ranks, seed)
    narrow = [replace(u, adapter=Adapter(u.adapter.flat.to(dtype), u.adapter.layout)) for u in updates]
    after = strategy.aggregate(state, narrow)
    assert after.merged is not None
    assert after.merged.flat.dtype == torch.float32
    if name == "flora":
        assert cohorts.error(after, narrow) < 2e-6


def test_growing_leaves_other_layers_and_the_method() -> None:
    generator = torch.Generator().manual_seed(0)
    one = Adapter.pack({"x": cohorts.low_rank(9, 8, 2, generator, torch.float64)}, method="dora")
    two = Adapter.pack({"y": cohorts.low_rank(9, 8, 2, generator, torch.float64)})
    grown, discarded = grow(one, two)
    assert (list(grown.layers), grown.method, discarded) == (["x", "y"], "dora", 0.0)
    assert dense.distance(cohorts.matrix(grown, "x"), cohorts.matrix(one, "x")) < 1e-14
