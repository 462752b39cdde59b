"""One client of a few sends finite numbers of any size: no rule on products lets it carry the merge off."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from common.adapter import Adapter
from common.federation import ClientInfo, ClientUpdate
from common.lowrank import Dense, LowRank, Update
from common.start import starting_adapter
from strategies import aggregation_strategy
from strategies.gram import gram_of_changes, squared_distances
from strategies.merging import merge_gathered
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST, Judgement
from strategies.robust.geometric_median import median_weights
from tests.reference import cohorts

SPEC = cohorts.model_spec()
SIZES = [1e2, 1e4, 1e6, 1e9, 1e12, 1e15, 1e18]
ON_PRODUCTS = [name for name in ROBUST.names() if name != "none" and not ROBUST.plugin(name).needs_linear]
LIAR = 1
"""Its place."""


def on_a_line(values: Sequence[float]) -> Judgement:
    """Judge clients whose one number is the value."""
    updates = [
        ClientUpdate(f"c{i}", Adapter.pack({"x": LowRank(torch.tensor([[value]]), torch.ones(1, 1))}), 1.0 + i)
        for i, value in enumerate(values)
    ]
    return ROBUST.create("geometric_median").judge(updates, {each.client: Adapter.empty() for each in updates})


def mean_of(judgement: Judgement) -> float:
    whole = sum(each.num_examples for each in judgement.updates)
    return sum(each.num_examples / whole * float(each.adapter.flat[0]) for each in judgement.updates)


class TestGeometricMedian:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("size", [1e3, *SIZES[1:], 1e37])
    def test_a_liar_is_left_out_and_the_rest_share_its_weight(self, size: float, sign: int) -> None:
        judgement = on_a_line([1, 2, 4, sign * size])
        assert judgement.trust["c3"] == 0
        assert sum(each.num_examples for each in judgement.updates) == pytest.approx(10)
        assert 1 <= mean_of(judgement) <= 4

    @pytest.mark.parametrize("size", SIZES)
    def test_the_median_of_the_honest_stays_within_their_triangle(self, size: float) -> None:
        """A liar on an axis of its own pulls across their plane, so their weights stay near those without it."""
        points = torch.tensor([[0.0, 0, 0], [4, 0, 0], [1, 3, 0], [0, 0, size]], dtype=torch.float64)
        squares = (points[:, None] - points).square().sum(2)
        weights = median_weights(squares, 1000, 1e-12)
        honest = weights[:3] / weights[:3].sum()
        alone = median_weights(squares[:3, :3], 1000, 1e-12)
        torch.testing.assert_close(honest, alone, rtol=0, atol=0.1)
        assert float(weights[3]) < 2 * 3 / size

    def test_who_weighs_next_to_nothing_is_left_out(self) -> None:
        """A hundredth of an equal share: beyond some hundred times the others' distance."""
        assert on_a_line([1, 2, 4, 60]).trust["c3"] > 0
        assert on_a_line([1, 2, 4, 6000]).trust["c3"] == 0

    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_distances_have_no_unit(self, scale: float) -> None:
        values = [1.0, 2.0, 4.0, 7.0, 1e9]
        scaled = on_a_line([scale * value for value in values])
        assert scaled.trust == pytest.approx(on_a_line(values).trust, abs=1e-4)


def round_of(name: str, size: float) -> tuple[list[ClientUpdate], dict[str, Adapter]]:
    """Return five clients that learned something alike, but for one with ``size`` in every number."""
    strategy = aggregation_strategy(name)
    state, updates, starts = strategy.init(SPEC), [], {}
    for place, client in enumerate(cohorts.NAMES[:5]):
        starts[client] = start = starting_adapter(strategy.dispatch(state, ClientInfo(client, 3)), SPEC)
        noise = torch.randn(start.flat.numel(), generator=torch.Generator().manual_seed(place))
        flat = torch.full_like(start.flat, size) if place == LIAR else start.flat + 0.1 + 0.02 * noise
        updates.append(ClientUpdate(client, start.with_flat(flat), 10.0 + place, state.base_version))
    return updates, starts


def merged(
    rule: str, name: str, updates: list[ClientUpdate], starts: dict[str, Adapter]
) -> tuple[torch.Tensor, Judgement]:
    strategy = aggregation_strategy(name)
    state, judgement = merge_gathered(
        strategy, ROBUST.create(rule), OPTIMIZERS.create("none"), strategy.init(SPEC), updates, starts
    )
    assert state.merged is not None
    assert bool(state.start.flat.isfinite().all())
    return products(state.merged), judgement


def products(adapter: Adapter) -> torch.Tensor:
    return torch.cat([part.dense().double().reshape(-1) for part in adapter.layers.values()])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flora", "fedavg", "lora_lego"])
@pytest.mark.parametrize("rule", ON_PRODUCTS)
def test_the_merge_stays_among_the_honest(rule: str, name: str, size: float) -> None:
    updates, starts = round_of(name, size)
    honest = updates[:LIAR] + updates[LIAR + 1 :]
    found, judgement = merged(rule, name, updates, starts)
    wanted, _ = merged("none", name, honest, starts)
    rows = torch.stack([products(update.adapter) for update in honest])
    radius = float((rows - wanted).norm(dim=1).max())
    liar = judgement.trust[updates[LIAR].client]
    if rule == "norm_bounding":  # all count, the liar for a fifth with a change no longer than the others'
        assert liar <= 1 / size
        assert float((found - wanted).norm()) <= radius + float(wanted.norm()) / 4
    else:
        assert liar == 0
        assert float((found - wanted).norm()) <= radius


@pytest.mark.parametrize("rule", ON_PRODUCTS)
@pytest.mark.parametrize(("size", "left"), [(1e6, 1e3), (1e9, 1e1), (1e12, 1e3), (1e16, 1e5)])
def test_slots_that_cancel_hide_nothing(rule: str, size: float, left: float) -> None:
    """Two slots ``±size`` in one row, ``left`` in another: a product that float64's squares no longer show."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 6, generator=generator)
    start = Adapter.pack({"x": LowRank(torch.zeros(8, 2), a)})
    updates = [
        ClientUpdate(f"c{i}", Adapter.pack({"x": LowRank(0.1 + 0.05 * torch.randn(8, 2, generator=generator), a)}), 1.0)
        for i in range(4)
    ]
    b = torch.zeros(8, 2)
    b[0, 0], b[0, 1], b[1, 0] = size, -size, left
    updates.append(ClientUpdate("liar", Adapter.pack({"x": LowRank(b, a[:1].expand(2, -1).clone())}), 1.0))
    trust = ROBUST.create(rule).judge(updates, dict.fromkeys((each.client for each in updates), start)).trust
    assert trust["liar"] <= (1e-2 if rule == "norm_bounding" else 0)


@pytest.mark.parametrize("size", [*SIZES, 1e30, 1e37])
@pytest.mark.parametrize("thin", [True, False], ids=["factors", "matrix"])
@pytest.mark.parametrize("start", ["factors", "matrix"])
def test_distances_are_numbers_whatever_was_sent(size: float, thin: bool, start: str) -> None:
    """Products of float32 factors may be beyond float32."""
    values = [1.0, size, -size, 2.0]
    layers: list[Update] = [
        LowRank(torch.full((3, 2), value), torch.full((2, 4), abs(value))) if thin else Dense(torch.full((3, 4), value))
        for value in values
    ]
    updates = [ClientUpdate(f"c{i}", Adapter.pack({"x": layer}), 1.0) for i, layer in enumerate(layers)]
    before: Update = LowRank(torch.ones(3, 2), torch.ones(2, 4)) if start == "factors" else Dense(torch.ones(3, 4))
    starts = {each.client: Adapter.pack({"x": before}) for each in updates}
    squares = squared_distances(gram_of_changes(updates, starts))
    assert bool(squares.isfinite().all())
    assert float(squares[1, 2]) == pytest.approx(12 * (4 * size**2 if thin else 2 * size) ** 2, rel=1e-6)
    for rule in ("krum", "geometric_median"):
        trust = ROBUST.create(rule).judge(updates, starts).trust
        assert all(0 <= share <= 1 for share in trust.values())
