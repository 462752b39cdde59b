"""What is special to the strategies that merge in product space or correct a mean, and to their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adapter import Adapter
from common.adapter_file import read_state, state_bytes
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import Dense, LowRank
from common.start import starting_adapter
from strategies import aggregation_strategy
from strategies.aggregation.hetlora import kept_slots, tail_norm
from strategies.aggregation.lora_fair import correction
from tests.reference import cohorts, dense

SPEC = cohorts.model_spec()
MIXED = ["fedavg_svd", "flexlora", "florist", "hetlora"]
EQUAL = ["fedex_lora", "lora_fair"]


def merged(name: str, ranks: Sequence[int] = (2, 4, 3), **options: Any) -> tuple[ServerState, list[ClientUpdate]]:
    strategy = aggregation_strategy(name, **options)
    updates = cohorts.cohort(SPEC, ranks)
    return strategy.aggregate(strategy.init(SPEC), updates), updates


def zero(update: ClientUpdate) -> ClientUpdate:
    layers = {name: part.scaled(0.0) for name, part in update.adapter.layers.items()}
    return cohorts.with_factors(update, layers)  # type: ignore[arg-type]


def slots(adapter: Adapter) -> set[int]:
    return {part.rank for part in adapter.layers.values() if isinstance(part, LowRank)}


def factors(adapter: Adapter, layer: str = "out") -> LowRank:
    part = adapter.layers[layer]
    assert isinstance(part, LowRank)
    return part


def one_layer(*parts: LowRank) -> tuple[ServerState, list[ClientUpdate]]:
    """Build equally weighted clients of a model of one layer."""
    spec = cohorts.model_spec({"out": parts[0].shape}, heads=False)
    updates = [
        ClientUpdate(name, Adapter.pack({"out": part}), 1.0) for name, part in zip(cohorts.NAMES, parts, strict=False)
    ]
    return aggregation_strategy("fedavg").init(spec), updates


class TestAll:
    @pytest.mark.parametrize("name", MIXED + EQUAL)
    def test_what_others_remember_survives(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        state = replace(strategy.init(SPEC), extras={"optimizer.momentum": torch.ones(2)})
        after = strategy.aggregate(state, cohorts.cohort(SPEC, (2, 2)))
        assert torch.equal(after.extras["optimizer.momentum"], torch.ones(2))

    @pytest.mark.parametrize("name", MIXED + EQUAL)
    def test_dense_replies_are_refused(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        update = ClientUpdate("ada", Adapter.pack({"out": Dense(torch.ones(12, 12))}), 1)
        with pytest.raises(RejectedUpdate, match="client ada, layer out: a dense matrix"):
            strategy.add(strategy.begin(strategy.init(SPEC)), update)

    @pytest.mark.parametrize("name", MIXED + EQUAL)
    def test_numbers_that_are_none_are_refused(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        one, other = cohorts.cohort(SPEC, (2, 2))
        bad = replace(other, adapter=other.adapter.with_flat(other.adapter.flat.clone().fill_(float("nan"))))
        with pytest.raises(RejectedUpdate, match="client bo, layer down: NaN or infinity"):
            strategy.aggregate(strategy.init(SPEC), [one, bad])

    @pytest.mark.parametrize("name", EQUAL)
    def test_other_ranks_are_refused_and_change_nothing(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        one, other = cohorts.cohort(SPEC, (2, 3))
        accumulated = strategy.add(strategy.begin(strategy.init(SPEC)), one)
        with pytest.raises(RejectedUpdate, match="client bo sent other layers, ranks or heads"):
            strategy.add(accumulated, other)
        after = strategy.finish(strategy.init(SPEC), accumulated)
        assert cohorts.bits(after) == cohorts.bits(strategy.aggregate(strategy.init(SPEC), [one]))

    @pytest.mark.parametrize("name", EQUAL)
    def test_clients_of_the_first_round_start_alike(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        orders = [strategy.dispatch(strategy.init(SPEC), ClientInfo(client, 2)) for client in cohorts.NAMES]
        assert len({order.seed for order in orders}) == 1

    @pytest.mark.parametrize("name", ["fedavg_svd", "flexlora", "hetlora"])
    def test_missing_rows_are_the_same_for_all_clients_of_a_round(self, name: str) -> None:
        strategy = aggregation_strategy(name)
        state = strategy.init(SPEC)
        seeds = [strategy.dispatch(state, ClientInfo(client, 2)).seed for client in cohorts.NAMES]
        later = strategy.dispatch(replace(state, round=1), ClientInfo("ada", 2)).seed
        assert (len(set(seeds)), later in seeds) == (1, False)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("flexlora", {"server_rank": 0}),
            ("flexlora", {"split": "unit"}),
            ("fedavg_svd", {"rank": 0}),
            ("florist", {"energy": 0}),
            ("florist", {"energy": 1.01}),
            ("fedex_lora", {"residual_rank": 0}),
            ("lora_fair", {"ridge": -0.1}),
            ("lora_fair", {"ridge": float("inf")}),
            ("hetlora", {"prune": 0}),
            ("hetlora", {"prune": 1}),
            ("hetlora", {"prune_strength": -1}),
            ("hetlora", {"weights": "rank"}),
            ("hetlora", {"renormalise": "all"}),
        ],
    )
    def test_options_have_limits(self, name: str, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            aggregation_strategy(name, **options)


class TestFlexLora:
    def test_the_server_keeps_the_largest_rank_of_the_round(self) -> None:
        assert slots(merged("flexlora")[0].start) == {4}
        assert slots(merged("flexlora", server_rank=2)[0].start) == {2}

    def test_wider_clients_are_filled_up_without_changing_the_model(self) -> None:
        strategy = aggregation_strategy("flexlora")
        state, _ = merged("flexlora", (1, 1))
        assert slots(state.start) == {1}
        start = starting_adapter(strategy.dispatch(state, ClientInfo("ada", 5)), SPEC)
        for layer in SPEC.layers:
            held = factors(start, layer)
            assert held.rank == 5
            assert held.a[1:].norm(dim=1).min() > 0
            assert dense.distance(cohorts.matrix(start, layer), cohorts.matrix(state.start, layer)) < 1e-6

    def test_a_layer_of_zeros_starts_afresh(self) -> None:
        strategy = aggregation_strategy("flexlora")
        state, updates = merged("flexlora")
        layers = {**updates[0].adapter.layers, "out": updates[0].adapter.layers["out"].scaled(0.0)}
        after = strategy.aggregate(state, [cohorts.with_factors(updates[0], layers)])  # type: ignore[arg-type]
        assert set(after.start.layers) == {"down", "up"}
        start = factors(starting_adapter(strategy.dispatch(after, ClientInfo("ada", 2)), SPEC))
        assert not start.b.any()
        assert start.a.all()

    def test_the_plan_knows_the_ranks(self) -> None:
        assert aggregation_strategy("flexlora").expected_ranks(4, [4, 8, 2], 0) == (0, 0)
        assert aggregation_strategy("flexlora").expected_ranks(16, [4, 8, 2], 3) == (8, 0)
        assert aggregation_strategy("flexlora", server_rank=3).expected_ranks(4, [4, 8, 2], 3) == (3, 0)
        assert aggregation_strategy("flexlora", server_rank=99).expected_ranks(99, [4, 8, 2], 3) == (14, 0)


class TestFedavgSvd:
    def test_the_smallest_rank_of_the_round_counts(self) -> None:
        assert slots(merged("fedavg_svd")[0].start) == {2}
        assert slots(merged("fedavg_svd", rank=3)[0].start) == {3}

    def test_a_rank_that_a_client_cannot_hold_is_refused(self) -> None:
        assert aggregation_strategy("fedavg_svd", rank=4).refusals({"ada": 4, "bo": 8}) == []
        assert aggregation_strategy("fedavg_svd", rank=8).refusals({"ada": 4, "bo": 8, "cy": 2}) == [
            "strategy fedavg_svd starts all clients from rank 8, more than ada (4), cy (2) can hold; "
            "lower rank to 2 or use flexlora"
        ]

    def test_a_round_without_narrow_clients_is_narrowed_for_them(self) -> None:
        strategy = aggregation_strategy("fedavg_svd")
        state, _ = merged("fedavg_svd", (4, 5))
        assert slots(strategy.dispatch(state, ClientInfo("ada", 2)).start) == {2}

    def test_the_plan_knows_the_rank(self) -> None:
        assert aggregation_strategy("fedavg_svd").expected_ranks(8, [4, 8, 2], 3) == (2, 0)
        assert aggregation_strategy("fedavg_svd", rank=3).expected_ranks(2, [4, 8, 3], 3) == (2, 0)


class TestFlorist:
    def test_it_sends_no_layer_and_another_seed_each_time(self) -> None:
        strategy = aggregation_strategy("florist")
        state, _ = merged("florist")
        orders = [strategy.dispatch(state, ClientInfo(name, 2)) for name in cohorts.NAMES[:3]]
        assert [order.start.layers for order in orders] == [{}, {}, {}]
        assert len({order.seed for order in orders}) == 3

    def test_zeros_grow_nothing(self) -> None:
        strategy = aggregation_strategy("florist", error_feedback=True)
        after = strategy.aggregate(strategy.init(SPEC), [zero(update) for update in cohorts.cohort(SPEC, (2, 2))])
        assert (after.global_adapter.layers, after.base_version) == ({}, 1)
        assert after.metrics == {"discarded_energy": 0.0}

    def test_rounding_does_not_count_as_a_singular_value(self) -> None:
        """Two clients of one direction: the sum has rank 1, not the rank of its stack."""
        part = LowRank(torch.ones(12, 1), torch.ones(1, 12))
        state, updates = one_layer(part, part.scaled(0.1))
        after = aggregation_strategy("florist", energy=1).aggregate(state, updates)
        assert slots(after.global_adapter) == {1}

    def test_feedback_is_off_by_default_and_remembers_nothing(self) -> None:
        assert merged("florist", energy=0.5)[0].extras == {}

    def test_what_was_left_out_comes_back(self) -> None:
        """Directions of length 4 and 3: alone the first is kept, then both have waited and the second is longer."""
        b, a = torch.zeros(6, 2, dtype=torch.float64), torch.eye(2, 6, dtype=torch.float64)
        b[0, 0], b[1, 1] = 4, 3
        state, updates = one_layer(LowRank(b, a))
        strategy = aggregation_strategy("florist", energy=0.6, error_feedback=True)
        one = strategy.aggregate(state, updates)
        assert one.metrics["discarded_energy"] == pytest.approx(9 / 25)
        assert one.global_adapter.layers["out"].dense().diagonal()[:2].tolist() == pytest.approx([4, 0])
        two = strategy.aggregate(one, [replace(update, base_version=1) for update in updates])
        assert two.metrics["discarded_energy"] == pytest.approx(16 / 52)
        assert two.global_adapter.layers["out"].dense().diagonal()[:2].tolist() == pytest.approx([4, 6])

    def test_what_is_left_out_never_has_more_slots_than_the_round(self) -> None:
        strategy = aggregation_strategy("florist", energy=0.1, error_feedback=True)
        state = strategy.init(SPEC)
        for number in range(4):
            state = strategy.aggregate(state, cohorts.cohort(SPEC, (1, 2), number, base_version=number))
            for layer in SPEC.layers:
                assert state.extras[f"florist.lost_a/{layer}"].shape[0] <= 3

    def test_what_is_left_out_survives_a_resumption(self, tmp_path: Path) -> None:
        strategy = aggregation_strategy("florist", error_feedback=True)
        state, _ = merged("florist", energy=0.5, error_feedback=True)
        file = tmp_path / "state"
        file.write_bytes(state_bytes(state))
        again = [replace(update, base_version=1) for update in cohorts.cohort(SPEC, (2, 3), 1)]
        resumed = strategy.aggregate(read_state(file, SPEC), again)
        assert cohorts.bits(resumed) == cohorts.bits(strategy.aggregate(state, again))

    def test_only_all_energy_is_exact(self) -> None:
        assert not aggregation_strategy("florist").is_exact()
        assert aggregation_strategy("florist", energy=1).is_exact()
        assert aggregation_strategy("florist").expected_ranks(4, [4, 8, 2], 3) == (0, 42)


class TestFedexLora:
    def test_one_client_leaves_no_residual(self) -> None:
        state, updates = merged("fedex_lora", (3,))
        assert (state.global_adapter.layers, state.base_version) == ({}, 1)
        assert cohorts.error(state, updates) < 1e-12

    def test_residuals_add_up_and_the_start_is_replaced(self) -> None:
        strategy = aggregation_strategy("fedex_lora")
        one, _ = merged("fedex_lora", (2, 2))
        updates = cohorts.cohort(SPEC, (2, 2), 1, base_version=1)
        two = strategy.aggregate(one, updates)
        for layer in SPEC.layers:
            model = cohorts.matrix(two.global_adapter, layer) + cohorts.matrix(two.start, layer)
            wanted = cohorts.matrix(one.global_adapter, layer) + cohorts.exact(updates, layer)
            assert dense.distance(model, wanted) < 1e-12

    def test_float32_is_exact_to_rounding(self) -> None:
        strategy = aggregation_strategy("fedex_lora")
        updates = cohorts.cohort(SPEC, (3, 3, 3), dtype=torch.float32)
        after = strategy.aggregate(strategy.init(SPEC), updates)
        assert cohorts.error(after, updates) < 1e-6
        assert after.global_adapter.flat.dtype == torch.float32

    def test_an_update_of_another_base_is_refused(self) -> None:
        strategy = aggregation_strategy("fedex_lora")
        state, updates = merged("fedex_lora", (2, 2))
        with pytest.raises(RejectedUpdate, match="trained on base version 0, not on 1"):
            strategy.aggregate(state, updates)

    def test_a_truncated_residual_is_not_exact(self) -> None:
        strategy = aggregation_strategy("fedex_lora", residual_rank=2)
        assert not strategy.is_exact()
        assert slots(merged("fedex_lora", (2, 2, 2), residual_rank=1)[0].global_adapter) == {1}
        assert strategy.expected_ranks(4, [4, 4, 4], 3) == (4, 6)
        assert aggregation_strategy("fedex_lora").expected_ranks(4, [4, 4, 4], 3) == (4, 24)


class TestLoraFair:
    def test_a_singular_factor_without_ridge_is_solved_by_least_squares(self) -> None:
        """Two equal rows of a: the correction is split between them, and no number explodes."""
        generator = torch.Generator().manual_seed(0)
        row = torch.randn(1, 9, generator=generator)
        residual = LowRank(torch.randn(5, 1, generator=generator), row)
        found = correction(residual, torch.cat([row, row]), 0.0)
        torch.testing.assert_close(found[:, 0], residual.b[:, 0].double() / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[:, 0], found[:, 1])

    @pytest.mark.parametrize("ridge", [0.0, 0.01])
    def test_a_factor_of_zeros_is_left_alone(self, ridge: float) -> None:
        part = LowRank(torch.ones(5, 2), torch.ones(2, 9))
        state, updates = one_layer(part, LowRank(part.b * 2, -part.a))
        after = factors(aggregation_strategy("lora_fair", ridge=ridge).aggregate(state, updates).start)
        assert not after.a.any()
        assert torch.equal(after.b, torch.full((5, 2), 1.5))

    def test_it_comes_nearer_than_the_mean(self) -> None:
        fair, updates = merged("lora_fair", (3, 3, 3))
        mean, _ = merged("fedavg", (3, 3, 3))
        assert cohorts.error(fair, updates) < 0.95 * cohorts.error(mean, updates)


class TestHetLora:
    def test_larger_updates_weigh_more(self) -> None:
        """Norms 12 and 36 make shares 1/4 and 3/4, whatever the examples."""
        part = LowRank(torch.ones(12, 1), torch.ones(1, 12))
        state, updates = one_layer(part, part.scaled(3.0))
        after = aggregation_strategy("hetlora").aggregate(state, [replace(updates[0], num_examples=99), updates[1]])
        torch.testing.assert_close(factors(after.start).b, torch.full((12, 1), 2.5))

    def test_zeros_in_the_first_round_count_alike(self) -> None:
        strategy = aggregation_strategy("hetlora")
        updates = [zero(update) for update in cohorts.cohort(SPEC, (2, 2))]
        after = factors(strategy.aggregate(strategy.init(SPEC), updates).start)
        parts = [factors(update.adapter) for update in updates]
        torch.testing.assert_close(after.a, (parts[0].a + parts[1].a) / 2)
        assert not after.b.any()

    @pytest.mark.parametrize("renormalise", ["none", "slot"])
    def test_slots_without_any_weight_start_afresh(self, renormalise: str) -> None:
        strategy = aggregation_strategy("hetlora", renormalise=renormalise)
        narrow, wide = cohorts.cohort(SPEC, (2, 4))
        state = strategy.aggregate(strategy.init(SPEC), [narrow, zero(wide)])
        assert slots(state.start) == {2}
        start = factors(starting_adapter(strategy.dispatch(state, ClientInfo("bo", 4)), SPEC))
        assert not start.b[:, 2:].any()
        assert start.a[2:].all()

    def test_padding_shrinks_what_few_clients_have(self) -> None:
        part = LowRank(torch.eye(4)[:, :2], torch.eye(2, 4))
        narrow = LowRank(part.b[:, :1], part.a[:1])
        state, updates = one_layer(narrow, part)
        plain = aggregation_strategy("hetlora", weights="examples").aggregate(state, updates)
        slot = aggregation_strategy("hetlora", weights="examples", renormalise="slot").aggregate(state, updates)
        assert factors(plain.start).dense().diagonal().tolist() == [1, 0.25, 0, 0]
        assert factors(slot.start).dense().diagonal().tolist() == [1, 1, 0, 0]

    @pytest.mark.parametrize(
        ("rank", "share", "kept"), [(4, 0.99, 3), (4, 0.5, 2), (5, 0.5, 2), (4, 0.1, 0), (1, 0.99, 0), (8, 0.9, 7)]
    )
    def test_a_small_rank_has_a_tail_too(self, rank: int, share: float, kept: int) -> None:
        assert kept_slots(rank, share) == kept

    def test_clients_are_told_of_the_tail_if_they_may_shrink(self) -> None:
        state = aggregation_strategy("hetlora").init(SPEC)
        prunes = aggregation_strategy("hetlora", prune=0.5, prune_strength=0.2)
        assert aggregation_strategy("hetlora").dispatch(state, ClientInfo("ada", 4)).tail is None
        assert prunes.dispatch(state, ClientInfo("ada", 4)).tail == (0.5, 0.2)
        assert prunes.dispatch(state, ClientInfo("ada", 1)).tail is None

    def test_whose_tail_became_smaller_has_fewer_slots_from_then_on(self, tmp_path: Path) -> None:
        strategy = aggregation_strategy("hetlora", prune=0.5)
        state, _ = merged("hetlora", (4, 4), prune=0.5)
        assert (state.metrics["pruned_clients"], state.extras) == (0, {})  # every tail began at b = 0

        def reply(name: str, factor: float) -> ClientUpdate:
            start = starting_adapter(strategy.dispatch(state, ClientInfo(name, 4)), SPEC)
            layers = {}
            for layer in SPEC.layers:
                part = factors(start, layer)
                layers[layer] = LowRank(torch.cat([part.b[:, :2], part.b[:, 2:] * factor], dim=1), part.a)
            return ClientUpdate(name, Adapter.pack(layers, start.extras), 1.0)

        after = strategy.aggregate(state, [reply("ada", 0.5), reply("bo", 1.5), reply("cy", 1.0)])
        assert {name: int(rank) for name, rank in after.extras.items()} == {"hetlora.rank/ada": 2}
        assert after.metrics["pruned_clients"] == 1
        file = tmp_path / "state"
        file.write_bytes(state_bytes(after))
        for held in (after, read_state(file, SPEC)):
            order = strategy.dispatch(held, ClientInfo("ada", 4))
            assert (order.rank, slots(order.start), order.tail) == (2, {2}, (0.5, 0.001))
            assert strategy.dispatch(held, ClientInfo("bo", 4)).rank == 4
            assert strategy.dispatch(held, ClientInfo("ada", 1)).rank == 1

    def test_the_tail_is_the_product_of_both_factors_norms(self) -> None:
        layers = {
            "x": LowRank(torch.tensor([[1.0, 3.0], [1.0, 4.0]]), torch.tensor([[9.0], [2.0]])),
            "y": LowRank(torch.ones(2, 1), torch.ones(1, 2)),
        }
        assert tail_norm(Adapter.pack(layers), 1) == 10
