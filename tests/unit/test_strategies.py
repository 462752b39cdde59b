"""What is special to one strategy or one of its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import Dense, LowRank
from common.start import fresh_a, starting_adapter
from strategies import AggregationStrategy, aggregation_strategy
from tests.reference import cohorts, dense

SPEC = cohorts.model_spec()


def merged(name: str, ranks: Sequence[int] = (2, 4, 3), **options: Any) -> tuple[ServerState, list[ClientUpdate]]:
    strategy = aggregation_strategy(name, **options)
    updates = cohorts.cohort(SPEC, ranks)
    return strategy.aggregate(strategy.init(SPEC), updates), updates


def zero(update: ClientUpdate) -> ClientUpdate:
    layers = {n: part.scaled(0.0) for n, part in update.adapter.layers.items()}
    return cohorts.with_factors(update, layers)  # type: ignore[arg-type]


def seeds(strategy: AggregationStrategy, state: ServerState) -> list[int]:
    return [strategy.dispatch(state, ClientInfo(name, 2)).seed for name in cohorts.NAMES[:3]]


class TestFlora:
    def test_it_sends_no_layer_and_another_seed_each_time(self) -> None:
        strategy = aggregation_strategy("flora")
        state, _ = merged("flora")
        assert strategy.dispatch(state, ClientInfo("ada", 2)).start.layers == {}
        every = seeds(strategy, state) + seeds(strategy, replace(state, round=2))
        every += seeds(strategy, replace(state, spec=cohorts.model_spec(seed=8)))
        assert len(set(every)) == 9

    def test_the_plan_knows_the_cap(self) -> None:
        assert aggregation_strategy("flora").expected_ranks(4, [4, 8, 2], 3) == (0, 42)
        assert aggregation_strategy("flora", global_rank=16).expected_ranks(4, [4, 8, 2], 3) == (0, 16)

    def test_a_stack_that_does_not_pay_is_merged_dense(self) -> None:
        state, updates = merged("flora", (2, 3))
        assert state.merged is not None
        kinds = {name: type(part) for name, part in state.merged.layers.items()}
        assert kinds == {"down": Dense, "out": LowRank, "up": LowRank}  # 5·26 ≥ 120, 5·24 < 144, 5·27 < 162
        assert cohorts.error(state, updates) < 1e-12

    def test_each_weight_counts_once(self) -> None:
        """Two clients of the same direction: 10 · 1 and 30 · 5 make 4, not the squares' mean."""
        spec = replace(SPEC, layers={"out": (12, 12)}, heads={})
        part = LowRank(torch.ones(12, 1), torch.ones(1, 12))
        updates = [
            ClientUpdate("a", Adapter.pack({"out": part}), 10),
            ClientUpdate("b", Adapter.pack({"out": part.scaled(5.0)}), 30),
        ]
        strategy = aggregation_strategy("flora")
        total = strategy.aggregate(strategy.init(spec), updates).global_adapter.layers["out"].dense()
        torch.testing.assert_close(total, torch.full((12, 12), 4.0))

    def test_a_dense_layer_stays_one_sum(self) -> None:
        strategy = aggregation_strategy("flora")
        state, updates = merged("flora", (6, 6))
        assert isinstance(state.global_adapter.layers["down"], Dense)
        again = [replace(update, base_version=1) for update in updates]
        twice = strategy.aggregate(state, again).global_adapter.layers["down"]
        assert isinstance(twice, Dense)
        assert dense.distance(twice.w.numpy(), 2 * cohorts.exact(updates, "down")) < 1e-12

    def test_a_cap_above_what_pays_loses_nothing(self) -> None:
        state, updates = merged("flora", (6, 6), global_rank=6)
        assert isinstance(state.global_adapter.layers["down"], Dense)
        assert cohorts.error(state, updates) < 1e-12
        assert state.metrics["discarded_energy"] == 0

    def test_growing_keeps_every_bit_of_the_factors(self) -> None:
        strategy = aggregation_strategy("flora")
        one, updates = merged("flora", (1, 1))
        two = strategy.aggregate(one, [replace(update, base_version=1) for update in updates])
        assert two.merged is not None
        for layer, total in two.global_adapter.layers.items():
            parts = [one.global_adapter.layers[layer], two.merged.layers[layer]]
            assert isinstance(total, LowRank)
            assert torch.equal(total.b, torch.cat([part.b for part in parts if isinstance(part, LowRank)], dim=1))
            assert torch.equal(total.a, torch.cat([part.a for part in parts if isinstance(part, LowRank)]))

    @pytest.mark.parametrize("options", [{}, {"global_rank": 2}, {"global_energy": 0.9}])
    def test_each_layer_is_decomposed_once_a_round(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strategy = aggregation_strategy("flora", **options)
        state, calls, svd = strategy.init(SPEC), [], torch.linalg.svd
        monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: calls.append(args) or svd(*args, **options))
        for number in range(2):
            updates = cohorts.cohort(SPEC, (1, 1), number, base_version=number)
            state = strategy.aggregate(state, updates)
            assert len(calls) == (number + 1) * len(SPEC.layers)

    @pytest.mark.parametrize("options", [{"global_rank": 1}, {"global_energy": 0.5}])
    def test_caps_are_not_exact(self, options: dict[str, Any]) -> None:
        assert not aggregation_strategy("flora", **options).is_exact()
        assert merged("flora", **options)[0].metrics["discarded_energy"] > 0.01

    @pytest.mark.parametrize("options", [{"global_rank": 0}, {"global_energy": 0}, {"global_energy": 1}])
    def test_caps_have_limits(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            aggregation_strategy("flora", **options)

    def test_dense_replies_are_refused(self) -> None:
        strategy = aggregation_strategy("flora")
        update = ClientUpdate("ada", Adapter.pack({"out": Dense(torch.ones(12, 12))}), 1)
        with pytest.raises(RejectedUpdate, match="client ada, layer out: a dense matrix"):
            strategy.add(strategy.begin(strategy.init(SPEC)), update)


class TestFfaLora:
    strategy = aggregation_strategy("ffa_lora")
    state = strategy.init(SPEC)

    def reply(self, name: str, rank: int, b: float = 1.0, **changes: Any) -> ClientUpdate:
        start = starting_adapter(self.strategy.dispatch(self.state, ClientInfo(name, rank)), SPEC)
        layers = {n: LowRank(torch.full_like(p.b, b), p.a) for n, p in start.layers.items() if isinstance(p, LowRank)}
        return ClientUpdate(name, Adapter.pack({**layers, **changes}, start.extras), 1.0)

    def test_only_b_is_trained_over_one_seed(self) -> None:
        orders = [self.strategy.dispatch(self.state, ClientInfo(name, 2)) for name in "ab"]
        assert {(order.trains, order.frozen_a) for order in orders} == {("b", orders[0].seed)}
        assert starting_adapter(orders[0], SPEC).sha256() == starting_adapter(orders[1], SPEC).sha256()

    @pytest.mark.parametrize("change", ["one bit", "another seed", "zero", "a slot more"])
    def test_another_factor_is_refused(self, change: str) -> None:
        good = self.reply("ada", 3)
        part = good.adapter.layers["out"]
        assert isinstance(part, LowRank)
        a = part.a.clone()
        if change == "one bit":
            a[2, 11] = torch.nextafter(a[2, 11], torch.tensor(9.0))
        elif change == "another seed":
            a = fresh_a(1, "out", 3, 12)
        elif change == "zero":
            a.zero_()
        else:
            a, part = torch.cat([a, a[:1]]), LowRank(torch.ones(12, 4), torch.ones(4, 12))
        accumulated = self.strategy.begin(self.state)
        with pytest.raises(RejectedUpdate, match="client ada, layer out: frozen factor differs"):
            self.strategy.add(accumulated, self.reply("ada", 3, out=LowRank(part.b, a)))
        assert accumulated.total is None

    def test_half_precision_keeps_the_factor(self) -> None:
        good = self.reply("ada", 3)
        narrow = replace(good, adapter=Adapter(good.adapter.flat.half(), good.adapter.layout))
        after = self.strategy.aggregate(self.state, [narrow]).start.layers["out"]
        assert isinstance(after, LowRank)
        assert after.a.dtype == torch.float32
        assert torch.equal(after.a, good.adapter.layers["out"].a)  # type: ignore[union-attr]

    def test_narrow_clients_count_as_padded(self) -> None:
        after = self.strategy.aggregate(self.state, [self.reply("ada", 1, 4.0), self.reply("bo", 3, 2.0)])
        part = after.start.layers["out"]
        assert isinstance(part, LowRank)
        assert part.b[0].tolist() == [3.0, 1.0, 1.0]
        for client in (ClientInfo("ada", 1), ClientInfo("bo", 3), ClientInfo("cy", 5)):
            order = self.strategy.dispatch(after, client)
            sent = order.start.layers["out"]
            assert isinstance(sent, LowRank)
            assert sent.rank == min(client.rank, 3)
            held = starting_adapter(order, SPEC).layers["out"]
            assert isinstance(held, LowRank)
            assert held.b[0].tolist() == [3.0, 1.0, 1.0, 0.0, 0.0][: client.rank]

    def test_a_round_without_the_widest_client_is_exact_too(self) -> None:
        both = self.strategy.aggregate(self.state, [self.reply("ada", 1), self.reply("bo", 3)])
        updates = [self.reply("ada", 1, 5.0)]
        after = self.strategy.aggregate(both, updates)
        assert cohorts.error(after, updates) < 1e-6


class TestLoraLego:
    def test_as_many_clusters_as_the_largest_rank(self) -> None:
        state, _ = merged("lora_lego", (2, 4, 3))
        assert state.merged is not None
        assert {part.rank for part in state.merged.layers.values() if isinstance(part, LowRank)} == {4}
        assert (state.base_version, state.global_adapter.layers) == (0, {})

    def test_merge_mode_grows_the_global_adapter(self) -> None:
        state, _ = merged("lora_lego", mode="merge")
        assert (state.base_version, state.start.layers) == (1, {})
        for layer in SPEC.layers:
            one, other = cohorts.matrix(state.global_adapter, layer), cohorts.matrix(state.merged, layer)
            assert dense.distance(one, other) < 1e-12

    def test_the_plan_knows_the_clusters(self) -> None:
        assert aggregation_strategy("lora_lego").expected_ranks(4, [4, 8, 2], 0) == (0, 0)
        assert aggregation_strategy("lora_lego").expected_ranks(16, [4, 8, 2], 3) == (8, 0)
        assert aggregation_strategy("lora_lego", clusters=3).expected_ranks(4, [4, 8, 2], 3) == (3, 0)
        assert aggregation_strategy("lora_lego", clusters=30, mode="merge").expected_ranks(4, [4, 8], 2) == (0, 24)

    def test_narrow_clients_take_the_heaviest_slots(self) -> None:
        state, _ = merged("lora_lego", (2, 4, 3))
        sent = aggregation_strategy("lora_lego").dispatch(state, ClientInfo("ada", 2)).start.layers["out"]
        whole = state.start.layers["out"]
        assert isinstance(sent, LowRank)
        assert isinstance(whole, LowRank)
        assert torch.equal(sent.b, whole.b[:, :2])
        assert torch.equal(sent.a, whole.a[:2])

    @pytest.mark.parametrize(("seed_per", "different"), [("round", 1), ("client", 3)])
    def test_missing_rows_are_drawn_per_round_or_client(self, seed_per: str, different: int) -> None:
        strategy = aggregation_strategy("lora_lego", seed_per=seed_per)
        state = strategy.init(SPEC)
        assert len(set(seeds(strategy, state))) == different
        assert not set(seeds(strategy, state)) & set(seeds(strategy, replace(state, round=1)))

    def test_too_many_clusters_are_clamped_and_said(self) -> None:
        state, updates = merged("lora_lego", clusters=100)
        assert state.metrics["clamped_layers"] == 3
        assert cohorts.error(state, updates) < 1e-12
        assert merged("lora_lego", clusters=9)[0].metrics["clamped_layers"] == 0

    def test_too_many_clusters_are_refused_if_strict(self) -> None:
        strict = aggregation_strategy("lora_lego", clusters=10, strict=True)
        with pytest.raises(ConfigurationError, match="layer down: 10 clusters of 9 units"):
            strict.aggregate(strict.init(SPEC), cohorts.cohort(SPEC, (2, 4, 3)))
        assert strict.refusals({"ada": 4, "bo": 6}) == []
        assert strict.refusals({"ada": 4, "bo": 5}) == [
            "strategy lora_lego wants 10 clusters of 9 units; lower clusters or unset strict"
        ]
        assert aggregation_strategy("lora_lego", strict=True).refusals({"ada": 4, "bo": 5}) == []

    def test_the_papers_scaling_of_all_units_is_the_scaled_sum(self) -> None:
        """k = T: √(r / T) · Σ ΔWᵢ, whatever the weights."""
        state, updates = merged("lora_lego", (2, 4, 3), clusters=9, scale="paper")
        plain = [replace(update, num_examples=1) for update in updates]
        for layer in SPEC.layers:
            wanted = (3 / 9) ** 0.5 * 3 * cohorts.exact(plain, layer)
            assert dense.distance(cohorts.matrix(state.merged, layer), wanted) < 1e-12

    def test_units_of_one_owner_are_refactored(self) -> None:
        assert merged("lora_lego", clusters=9)[0].metrics["refactored_layers"] == 3
        assert merged("lora_lego", clusters=1)[0].metrics["refactored_layers"] == 0

    def test_a_layer_of_zeros_keeps_the_previous_start(self) -> None:
        strategy = aggregation_strategy("lora_lego")
        state, updates = merged("lora_lego", (2, 2))
        after = strategy.aggregate(state, [zero(update) for update in updates])
        assert after.metrics["zero_layers"] == 3
        for layer in SPEC.layers:
            assert torch.equal(after.start.layers[layer].dense(), state.start.layers[layer].dense())
            assert not cohorts.matrix(after.merged, layer).any()

    def test_zeros_in_the_first_round_leave_nothing_to_start_from(self) -> None:
        strategy = aggregation_strategy("lora_lego")
        updates = [zero(update) for update in cohorts.cohort(SPEC, (2, 2))]
        after = strategy.aggregate(strategy.init(SPEC), updates)
        assert after.start.layers == {}
        assert after.start.extras.keys() == SPEC.heads.keys()

    def test_singular_vectors_do_not_depend_on_any_gauge(self) -> None:
        """(b G)(G⁻¹ a) with any G is the same update; only the canonical form makes it the same merge."""
        updates = cohorts.cohort(SPEC, (3, 3))
        mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        turned = []
        for update in updates:
            layers = {
                n: LowRank(part.b @ mix, torch.linalg.solve(mix, part.a))
                for n, part in update.adapter.layers.items()
                if isinstance(part, LowRank)
            }
            turned.append(cohorts.with_factors(update, layers))
        apart = {}
        for canonical in ("none", "svd"):
            strategy = aggregation_strategy("lora_lego", canonical=canonical)
            one = strategy.aggregate(strategy.init(SPEC), updates)
            other = strategy.aggregate(strategy.init(SPEC), turned)
            apart[canonical] = dense.distance(cohorts.matrix(other.merged, "out"), cohorts.matrix(one.merged, "out"))
        assert apart["svd"] < 1e-9
        assert apart["none"] > 0.01

    def test_every_option_does_something(self) -> None:
        base = cohorts.bits(merged("lora_lego")[0])
        for options in (
            {"clusters": 2},
            {"scale": "paper"},
            {"scale": "paper", "norm": "l2"},
            {"unit_weight": "rank"},
            {"canonical": "svd"},
            {"mode": "merge"},
        ):
            assert cohorts.bits(merged("lora_lego", **options)[0]) != base

    def test_the_cap_of_the_papers_factor_is_counted(self) -> None:
        state, _ = merged("lora_lego", clusters=1, scale="paper", max_factor=1)
        assert state.metrics["capped_factors"] == 3
        assert merged("lora_lego", clusters=1, scale="paper", max_factor=100)[0].metrics["capped_factors"] == 0

    @pytest.mark.parametrize(
        "options", [{"clusters": 0}, {"n_init": 0}, {"max_iter": 0}, {"max_factor": 0.5}, {"scale": "sum"}]
    )
    def test_options_have_limits(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            aggregation_strategy("lora_lego", **options)


class TestFedAvg:
    def test_all_clients_start_from_one_factor(self) -> None:
        strategy = aggregation_strategy("fedavg")
        state = strategy.init(SPEC)
        assert len(set(seeds(strategy, state))) == 1

    def test_other_ranks_are_refused(self) -> None:
        with pytest.raises(RejectedUpdate, match="client bo sent other layers, ranks or heads"):
            merged("fedavg", (2, 3))

    def test_the_refusal_names_clients_and_what_to_do(self) -> None:
        (reason,) = aggregation_strategy("fedavg").refusals({"ada": 4, "bo": 8, "cy": 16, "di": 8})
        before, _, names = reason.partition(" mixed ranks: ")
        assert before == (
            "strategy fedavg needs equal ranks: ada (4), cy (16) differ from rank 8; "
            "give them rank 8 or use a strategy for"
        )
        assert names.split(", ") == sorted(names.split(", "))
        assert {"ffa_lora", "flora", "lora_lego"} <= set(names.split(", "))
        assert "fedavg" not in names.split(", ")
