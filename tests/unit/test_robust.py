"""Every robust rule on cohorts small enough to judge by hand, and the parts they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from client.faults import is_attacker, lied
from client.node import Node
from common.adapter import Adapter
from common.errors import ConfigurationError, RejectedUpdate
from common.experiment import Experiment
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank
from strategies import aggregation_strategy
from strategies.gram import difference, gram_of_changes, squared_distances
from strategies.merging import merge_gathered, robust_refusals
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST, Judgement, RobustRule
from strategies.robust.geometric_median import median_weights
from strategies.robust.norm_bounding import path_of
from strategies.weights import capped_weights
from tests.reference import cohorts

SPEC = cohorts.model_spec()
START = Adapter.pack({"x": LowRank(torch.zeros(2, 1), torch.ones(1, 2))}, {"h": torch.zeros(1)})
FULL = cohorts.cohort(SPEC, [2, 4, 3, 2, 5], seed=3)


def update(client: str, value: float, weight: float = 1.0) -> ClientUpdate:
    """A client whose change is ``value`` in every number of the layer, and in the head."""
    layer = LowRank(torch.full((2, 1), value), torch.ones(1, 2))
    return ClientUpdate(client, Adapter.pack({"x": layer}, {"h": torch.tensor([value])}), weight)


def judge(rule: str, values: Sequence[float], **options: Any) -> Judgement:
    updates = [update(f"c{i}", value, 1.0 + i) for i, value in enumerate(values)]
    return ROBUST.create(rule, options).judge(updates, dict.fromkeys((u.client for u in updates), START))


def values_of(judgement: Judgement) -> list[float]:
    """Each update's value, having seen that all its numbers moved alike."""
    found = []
    for each in judgement.updates:
        part = each.adapter.layers["x"]
        assert isinstance(part, LowRank)
        assert torch.equal(part.a, torch.ones(1, 2))
        value = float(each.adapter.extras["h"])
        assert part.b.flatten().tolist() == [value] * 2
        found.append(value)
    return found


def no_starts(updates: Sequence[ClientUpdate]) -> dict[str, Adapter]:
    return {each.client: Adapter.empty() for each in updates}


class TestGram:
    def test_it_is_that_of_the_dense_changes(self) -> None:
        starts = {u.client: s.adapter for u, s in zip(FULL, cohorts.cohort(SPEC, [2, 4, 3, 2, 5], seed=9), strict=True)}
        rows = []
        for each in FULL:
            start = starts[each.client]
            parts = [cohorts.matrix(each.adapter, n) - cohorts.matrix(start, n) for n in SPEC.layers]
            parts += [cohorts.numpy(each.adapter.extras[n] - start.extras[n]) for n in SPEC.heads]
            rows.append(np.concatenate([part.ravel() for part in parts]))
        wanted = np.stack(rows) @ np.stack(rows).T
        np.testing.assert_allclose(gram_of_changes(FULL, starts).numpy(), wanted, rtol=1e-12, atol=1e-9)

    def test_ranks_may_differ_from_the_start_and_layers_be_missing(self) -> None:
        one, other = FULL[0], cohorts.with_factors(FULL[1], {"out": FULL[1].adapter.layers["out"]})  # type: ignore[dict-item]
        starts = {one.client: FULL[2].adapter, other.client: Adapter.empty()}
        gram = gram_of_changes([one, other], starts)
        change = cohorts.matrix(one.adapter, "out") - cohorts.matrix(FULL[2].adapter, "out")
        heads = sum(
            float(((value - FULL[2].adapter.extras[n]) * other.adapter.extras[n]).sum())
            for n, value in one.adapter.extras.items()
        )
        assert float(gram[0, 1]) == pytest.approx(float(np.sum(change * cohorts.matrix(other.adapter, "out"))) + heads)

    def test_dense_layers_count_too(self) -> None:
        w = torch.arange(6.0).view(2, 3)
        updates = [ClientUpdate(name, Adapter.pack({"x": Dense(w * scale)}), 1) for name, scale in (("a", 1), ("b", 3))]
        starts = {"a": Adapter.pack({"x": Dense(torch.ones(2, 3))}), "b": Adapter.empty()}
        assert gram_of_changes(updates, starts).tolist() == [[31.0, 120.0], [120.0, 495.0]]

    def test_terms_that_are_zero_take_no_rank(self) -> None:
        part = LowRank(torch.ones(4, 2), torch.ones(2, 3))
        assert difference(part, LowRank(torch.zeros(4, 2), torch.rand(2, 3))).rank == 2  # type: ignore[union-attr]
        assert difference(part, LowRank(torch.rand(4, 2), part.a)).rank == 2  # type: ignore[union-attr]
        assert difference(part, LowRank(torch.rand(4, 2), torch.rand(2, 3))).rank == 4  # type: ignore[union-attr]
        assert difference(part, part).norm() == 0

    def test_no_distance_is_rounding(self) -> None:
        copies = [ClientUpdate(name, FULL[0].adapter, 1) for name in "abc"]
        assert torch.equal(squared_distances(gram_of_changes(copies, no_starts(copies))), torch.zeros(3, 3).double())


class TestKrum:
    def test_the_score_counts_the_nearest_only(self) -> None:
        # K = 5, f = 1: two nearest. Of (0, 1, 3, 4.5, 100) the scores go 1 + 9, 1 + 4, 4 + 2.25, 2.25 + 12.25, …
        judgement = judge("krum", [0, 1, 3, 4.5, 100], attackers=1)
        assert values_of(judgement) == [1]
        assert judgement.trust == {"c0": 0, "c1": 1, "c2": 0, "c3": 0, "c4": 0}

    def test_equal_scores_go_by_name(self) -> None:
        assert [each.client for each in judge("krum", [2, 2, 2]).updates] == ["c0"]

    @pytest.mark.parametrize(("count", "wanted"), [(1, [5.0]), (2, [5.0])])
    def test_one_or_two_updates_leave_the_first(self, count: int, wanted: list[float]) -> None:
        assert values_of(judge("krum", [5.0, 6.0][:count])) == wanted

    @pytest.mark.parametrize("rule", ["krum", "multi_krum"])
    def test_too_few_updates_for_the_liars_are_refused(self, rule: str) -> None:
        assert ROBUST.create(rule, {"attackers": 1}).least_updates == 5
        with pytest.raises(ConfigurationError, match="attackers = 1 a round needs 5 updates, it has 4"):
            judge(rule, [0, 0, 0, 9], attackers=1)

    def test_multi_krum_keeps_the_best_with_their_weights(self) -> None:
        judgement = judge("multi_krum", [1, 90, 1.5, 2, 2.5, -80, 3], attackers=2)
        assert values_of(judgement) == [1, 1.5, 2, 2.5, 3]
        assert [each.num_examples for each in judgement.updates] == [1, 3, 4, 5, 7]
        assert [name for name, trust in judgement.trust.items() if trust == 0] == ["c1", "c5"]

    def test_multi_krum_keeps_no_more_than_may_be_honest(self) -> None:
        assert len(judge("multi_krum", [1, 2, 3, 4, 5], attackers=1, kept=2).updates) == 2
        assert len(judge("multi_krum", [1, 2, 3, 4, 5], attackers=1, kept=5).updates) == 4


class TestGeometricMedian:
    def test_on_a_line_it_is_the_median(self) -> None:
        judgement = judge("geometric_median", [1, 2, 3, 50, -1000])
        weights = [each.num_examples for each in judgement.updates]
        mean = sum(w * v for w, v in zip(weights, values_of(judgement), strict=True)) / sum(weights)
        assert mean == pytest.approx(2, abs=1e-2)
        assert sum(weights) == pytest.approx(15)
        assert max(judgement.trust, key=judgement.trust.__getitem__) == "c1"
        assert judgement.trust["c4"] < 1e-4

    def test_of_a_triangle_it_is_the_point_that_sees_all_sides_at_120_degrees(self) -> None:
        points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
        weights = median_weights(torch.cdist(points, points).square(), 1000, 1e-12)
        rays = points - weights @ points
        rays = rays / rays.norm(dim=1, keepdim=True)
        cosines = rays @ rays.T
        torch.testing.assert_close(cosines[~torch.eye(3, dtype=torch.bool)], torch.full((6,), -0.5).double())

    def test_where_most_points_agree_it_is_there(self) -> None:
        judgement = judge("geometric_median", [7, 7, 7, 1e6])
        assert values_of(judgement) == [7, 7, 7]
        assert judgement.trust == {"c0": 1, "c1": 1, "c2": 1, "c3": 0}

    @pytest.mark.parametrize("values", [[4.0], [4.0, 6.0], [4.0, 4.0]])
    def test_one_or_two_points_weigh_the_same(self, values: list[float]) -> None:
        assert set(judge("geometric_median", values).trust.values()) == {1.0}

    def test_claims_do_not_count(self) -> None:
        points = [0.0, 1.0, 3.0]
        rule = ROBUST.create("geometric_median")
        trusts = []
        for weight in (1.0, 1e7):
            updates = [update(f"c{i}", value, weight if i == 2 else 1.0) for i, value in enumerate(points)]
            trusts.append(rule.judge(updates, dict.fromkeys(("c0", "c1", "c2"), START)).trust)
        assert trusts[0] == trusts[1]


class TestNormBounding:
    def test_the_default_bound_is_the_median_norm(self) -> None:
        judgement = judge("norm_bounding", [1, -30, 2])
        assert values_of(judgement) == pytest.approx([1, -2, 2])
        assert judgement.trust == pytest.approx({"c0": 1, "c1": 2 / 30, "c2": 1})
        assert [each.num_examples for each in judgement.updates] == [1, 2, 3]

    def test_a_stated_bound_is_a_norm_of_the_product(self) -> None:
        # change value v: 2 × 2 entries of v and a head of v, so √5 |v|
        assert values_of(judge("norm_bounding", [1, 3], bound=math.sqrt(5) * 2)) == pytest.approx([1, 2])

    def test_what_is_within_the_bound_keeps_its_bits(self) -> None:
        updates = [update("a", 1.0), update("b", 1.0)]
        judged = ROBUST.create("norm_bounding").judge(updates, dict.fromkeys("ab", START))
        assert [each.adapter for each in judged.updates] == [each.adapter for each in updates]

    @pytest.mark.parametrize("gain", [1.0, 1e4])
    def test_the_bound_holds_however_the_factors_are_split(self, gain: float) -> None:
        """Rewritten factors make the path's end far away in numbers, but not in the product."""
        start = cohorts.cohort(SPEC, [3], seed=1)[0].adapter
        liar = cohorts.cohort(SPEC, [3], seed=2)[0]
        gains = torch.tensor([gain, 1 / gain, -gain], dtype=torch.float64)
        liar = cohorts.with_factors(
            liar,
            {
                n: cohorts.scaled_slots(part, gains)
                for n, part in liar.adapter.layers.items()
                if isinstance(part, LowRank)
            },
        )
        assert path_of(liar, start).norm(1.0) > 1
        (short,) = ROBUST.create("norm_bounding", {"bound": 1.0}).judge([liar], {liar.client: start}).updates
        norm = math.sqrt(float(gram_of_changes([short], {liar.client: start})))
        assert norm <= 1 + 1e-6
        if gain == 1:
            assert norm == pytest.approx(1)

    def test_a_frozen_factor_keeps_its_bits(self) -> None:
        a = torch.rand(2, 5)
        start = Adapter.pack({"x": LowRank(torch.rand(4, 2), a)})
        liar = ClientUpdate("a", Adapter.pack({"x": LowRank(torch.rand(4, 2) * 90, a)}), 1)
        (short,) = ROBUST.create("norm_bounding", {"bound": 0.1}).judge([liar], {"a": start}).updates
        assert torch.equal(short.adapter.inner_factors, start.inner_factors)

    def test_dense_layers_are_shortened_too(self) -> None:
        liar = ClientUpdate("a", Adapter.pack({"x": Dense(torch.full((2, 2), 9.0))}), 1)
        start = Adapter.pack({"x": Dense(torch.ones(2, 2))})
        (short,) = ROBUST.create("norm_bounding", {"bound": 4.0}).judge([liar], {"a": start}).updates
        torch.testing.assert_close(short.adapter.layers["x"].dense(), torch.full((2, 2), 3.0))

    def test_who_changed_nothing_is_left_alone(self) -> None:
        assert values_of(judge("norm_bounding", [0, 0, 5])) == [0, 0, 0]

    def test_a_change_needs_its_start(self) -> None:
        with pytest.raises(RejectedUpdate, match="client a sent other layers, ranks or heads than it started from"):
            ROBUST.create("norm_bounding").judge([update("a", 1.0)], {"a": Adapter.empty()})


class TestNumbers:
    @pytest.mark.parametrize(
        ("rule", "options", "values", "wanted"),
        [
            ("median", {}, [1, 50, 2], 2),
            ("median", {}, [1, 2, 4, 50], 3),
            ("median", {}, [8], 8),
            ("median", {}, [8, 10], 9),
            ("trimmed_mean", {"share": 0.2}, [1, 2, 3, 10, -90], 2),
            ("trimmed_mean", {"share": 0.4}, [1, 2, 3, 10, -90], 2),
            ("trimmed_mean", {"share": 0.2}, [1, 2, 3, 10], 4),
            ("trimmed_mean", {"share": 0}, [1, 2, 6], 3),
            ("trimmed_mean", {}, [1, 2, 4, 90], 3),
        ],
    )
    def test_the_middle_of_every_number(
        self, rule: str, options: dict[str, float], values: list[float], wanted: float
    ) -> None:
        judgement = judge(rule, values, **options)
        assert values_of(judgement) == [wanted]
        (cohort,) = judgement.updates
        assert (cohort.client, cohort.num_examples) == ("cohort", sum(range(1, len(values) + 1)))

    def test_trust_is_the_share_of_numbers_a_client_had_a_say_in(self) -> None:
        rows = {"a": [1.0, 1.0, 5.0, 7.0], "b": [2.0, 9.0, 5.0, 8.0], "c": [9.0, 2.0, 5.0, 9.0]}
        updates = [
            ClientUpdate(name, Adapter.pack({}, {"h": torch.tensor(row)}), 1, base_version=4)
            for name, row in rows.items()
        ]
        judgement = ROBUST.create("median").judge(updates, no_starts(updates))
        assert judgement.updates[0].adapter.flat.tolist() == [2.0, 2.0, 5.0, 8.0]
        assert judgement.updates[0].base_version == 4
        assert judgement.trust == pytest.approx({"a": 0, "b": 2 / 3, "c": 1 / 3})  # all agree on the third

    @pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
    def test_other_layouts_are_refused(self, rule: str) -> None:
        with pytest.raises(RejectedUpdate, match="client bo sent other layers, ranks or heads than ada"):
            ROBUST.create(rule).judge(FULL[:2], no_starts(FULL[:2]))

    def test_blocks_make_one_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        updates = cohorts.cohort(SPEC, [3] * 5)
        whole = ROBUST.create("trimmed_mean").judge(updates, no_starts(updates))
        monkeypatch.setattr("strategies.trimming.BLOCK", 7)
        blocks = ROBUST.create("trimmed_mean").judge(updates, no_starts(updates))
        assert torch.equal(blocks.updates[0].adapter.flat, whole.updates[0].adapter.flat)
        assert blocks.trust == whole.trust


class TestWeights:
    @pytest.mark.parametrize(
        ("weights", "share", "wanted"),
        [
            ([1, 1, 8], 0.5, [2.5, 2.5, 5]),
            ([1, 2, 3], 0.9, [1, 2, 3]),
            ([1, 2, 97], 0.2, [100 / 3] * 3),  # fewer than 1 / share
            ([1, 1, 4, 94], 0.3, [20, 20, 30, 30]),  # the third is above the cap once the fourth is cut
            ([5], 0.1, [5]),
            ([1, 99], 1.0, [1, 99]),
        ],
    )
    def test_nobody_is_above_the_share(self, weights: list[float], share: float, wanted: list[float]) -> None:
        named = {f"c{i}": weight for i, weight in enumerate(weights)}
        assert list(capped_weights(named, share).values()) == pytest.approx(wanted)

    def test_a_false_claim_moves_the_merge_no_further_than_the_cap(self) -> None:
        updates = [update("a", 0.0, 10), update("b", 0.0, 20), update("liar", 8.0, 1e7)]
        for each, wanted in ((None, 8.0), (0.5, 4.0)):
            state, judgement = merge_gathered(
                aggregation_strategy("fedavg"),
                ROBUST.create("none"),
                OPTIMIZERS.create("none"),
                aggregation_strategy("fedavg").init(_tiny_spec()),
                updates[::-1],
                dict.fromkeys(("a", "b", "liar"), START),
                each,
            )
            assert float(state.start.extras["h"]) == pytest.approx(wanted, rel=1e-5)
            assert [each.client for each in judgement.updates] == ["a", "b", "liar"]


def _tiny_spec() -> Any:
    return cohorts.ModelSpec({"x": (2, 2)}, 0, {"h": torch.zeros(1)})


class TestRefusals:
    RANKS = dict.fromkeys("abcde", 4)

    def refusals(self, rule: RobustRule, strategy: str, ranks: dict[str, int] | None = None, cohort: int = 5) -> str:
        return "\n".join(robust_refusals(rule, aggregation_strategy(strategy), ranks or self.RANKS, cohort))

    def test_numbers_need_a_strategy_that_averages_them(self) -> None:
        words = self.refusals(ROBUST.create("median"), "flora")
        assert words.startswith("robust rule median works on the numbers themselves, which strategy flora does not")
        assert "fedavg, " in words
        assert words.endswith("geometric_median, krum, multi_krum, norm_bounding")
        assert self.refusals(ROBUST.create("median"), "fedavg") == ""

    def test_numbers_need_equal_ranks(self) -> None:
        words = self.refusals(ROBUST.create("trimmed_mean"), "ffa_lora", {"a": 4, "b": 2, "c": 4})
        assert "robust rule trimmed_mean needs equal ranks, the clients have 2, 4" in words
        assert self.refusals(ROBUST.create("krum"), "ffa_lora", {"a": 4, "b": 2, "c": 4}) == ""

    def test_a_cohort_must_be_large_enough(self) -> None:
        words = self.refusals(ROBUST.create("krum", {"attackers": 2}), "flora")
        assert "robust rule krum needs 7 updates a round, 5 clients train" in words
        assert self.refusals(ROBUST.create("krum", {"attackers": 2}), "flora", cohort=7) == ""

    def test_products_must_reach_the_server(self) -> None:
        words = self.refusals(ROBUST.create("krum"), "fedsa_lora")
        assert words.startswith("robust rule krum compares products b a, which the server of strategy fedsa_lora never")
        assert words.endswith("median, trimmed_mean")
        assert self.refusals(ROBUST.create("median"), "fedsa_lora") == ""

    def test_weights_must_count(self) -> None:
        words = self.refusals(ROBUST.create("geometric_median"), "hetlora")
        assert words.startswith("robust rule geometric_median changes weights, but strategy hetlora with these options")
        (cap,) = robust_refusals(ROBUST.create("none"), aggregation_strategy("hetlora"), self.RANKS, 5, 0.5)
        assert cap.startswith("federation.max_weight_share changes weights")
        by_examples = aggregation_strategy("hetlora", weights="examples")
        assert robust_refusals(ROBUST.create("geometric_median"), by_examples, self.RANKS, 5, 0.5) == []

    def test_none_is_never_refused(self) -> None:
        assert self.refusals(ROBUST.create("none"), "flora", {"a": 1, "b": 9}, 1) == ""


class TestAttackers:
    def node(self, name: str, **simulation: Any) -> Node:
        clients = {f"c{i}": {"trains": i != 0} for i in range(8)}
        table = {"seed": 3, "task": {"name": "t"}, "clients": clients, "simulation": simulation}
        return Node(name, Experiment.parse(table), (), None, None)

    def test_so_many_of_those_that_train_are_drawn_from_the_seed(self) -> None:
        assert not any(is_attacker(self.node(f"c{i}")) for i in range(8))
        liars = [i for i in range(8) if is_attacker(self.node(f"c{i}", attackers=3))]
        assert len(liars) == 3
        assert 0 not in liars
        assert liars == [i for i in range(8) if is_attacker(self.node(f"c{i}", attackers=3))]
        assert [is_attacker(self.node(f"c{i}", attackers=7)) for i in range(8)] == [False] + [True] * 7

    def test_a_lie_is_what_was_learnt_times_the_scale(self) -> None:
        start, trained = update("a", 1.0).adapter, update("a", 1.5).adapter
        lie = lied(start, trained, -10.0)
        assert lie.extras["h"].tolist() == [-4.0]
        assert torch.equal(lie.inner_factors, trained.inner_factors)
