"""Running sums of whole adapters."""

from __future__ import annotations

import pytest
import torch

from common.adapter import Adapter, Layout
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank, Update
from strategies.mean import WeightedSum, joint_layout, mean_extras
from strategies.updates import shares


def update(name: str, rank: int, value: float, weight: float, dtype: torch.dtype = torch.float32) -> ClientUpdate:
    layer = LowRank(torch.full((2, rank), value, dtype=dtype), torch.ones(rank, 3, dtype=dtype))
    return ClientUpdate(name, Adapter.pack({"x": layer}, {"h": torch.full((2,), value, dtype=dtype)}), weight)


def test_the_mean_of_equal_layouts() -> None:
    mean = WeightedSum().add(update("a", 2, 1.0, 1)).add(update("b", 2, 4.0, 2)).mean()
    part = mean.layers["x"]
    assert isinstance(part, LowRank)
    assert part.b.tolist() == [[3.0, 3.0]] * 2
    assert part.a.tolist() == [[1.0] * 3] * 2
    assert mean.extras["h"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_nested_ranks_are_padded_with_zeros_and_count_in_full(ranks: tuple[int, int]) -> None:
    total = WeightedSum(nested=True)
    for name, rank in zip("ab", ranks, strict=True):
        total.add(update(name, rank, 8.0 if rank == 1 else 4.0, 3.0 if rank == 1 else 1.0))
    part = total.mean(torch.ones(2 * 3)).layers["x"]
    assert isinstance(part, LowRank)
    assert part.b.tolist() == [[7.0, 1.0]] * 2  # (3 · 8 + 4) / 4 and (0 + 4) / 4


def test_a_nested_sum_takes_layers_as_they_come() -> None:
    total = WeightedSum(nested=True)
    for layer in "zay":
        part: dict[str, Update] = {layer: LowRank(torch.ones(2, 1), torch.ones(1, 3))}
        total.add(ClientUpdate(layer, Adapter.pack(part), 1.0))
    mean = total.mean(torch.ones(9))
    assert [name for name, *_ in mean.layout.layers] == ["a", "y", "z"]
    torch.testing.assert_close(mean.flat[:6], torch.full((6,), 1 / 3))


def test_half_precision_is_summed_in_float32() -> None:
    total = WeightedSum()
    for number in range(3000):
        total.add(update(f"c{number}", 1, 1.0, 1.0, torch.float16))
    assert total.total is not None
    assert total.total.dtype == torch.float32
    assert total.total[0] == 3000.0  # float16 stops counting at 2048


def test_the_sum_does_not_touch_its_first_update() -> None:
    first = update("a", 2, 1.0, 1.0)
    WeightedSum().add(first).add(update("b", 2, 5.0, 1.0))
    assert bool((first.adapter.flat == 1).all())


ONE: tuple[tuple[str, int, int, int], ...] = (("x", 2, 3, 1),)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Layout((("x", 2, 4, 1),), (("h", (2,)),)), id="shape"),
        pytest.param(Layout((("x", 2, 3, -1),), (("h", (2,)),)), id="dense"),
        pytest.param(Layout(ONE, (("h", (3,)),)), id="head"),
        pytest.param(Layout(ONE), id="no head"),
        pytest.param(Layout(ONE, (("h", (2,)),), "dora"), id="method"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_does_not_fit_is_refused_and_leaves_the_sum_alone(nested: bool, other: Layout) -> None:
    total = WeightedSum(nested).add(update("a", 1, 1.0, 1.0))
    assert total.total is not None
    before, layout = total.total.clone(), total.layout
    with pytest.raises(RejectedUpdate, match="client b sent other layers, ranks or heads"):
        total.add(ClientUpdate("b", Adapter(torch.ones(other.numel), other), 1.0))
    assert torch.equal(total.total, before)
    assert (total.layout, total.weight) == (layout, 1.0)


def test_other_ranks_are_refused_unless_nested() -> None:
    with pytest.raises(RejectedUpdate, match="client b sent other layers, ranks"):
        WeightedSum().add(update("a", 1, 1.0, 1.0)).add(update("b", 2, 1.0, 1.0))


def test_a_joint_layout_has_the_larger_ranks() -> None:
    x, y = Layout((("a", 2, 3, 1), ("b", 4, 4, 5))), Layout((("b", 4, 4, 2), ("c", 1, 1, 1)))
    joint = Layout((("a", 2, 3, 1), ("b", 4, 4, 5), ("c", 1, 1, 1)))
    assert joint_layout(x, y) == joint_layout(y, x) == joint


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ConfigurationError, match="a round without any update cannot be merged"):
        WeightedSum().mean()
    with pytest.raises(ConfigurationError, match="a round without any update cannot be merged"):
        shares([])


def test_heads_are_weighted_means() -> None:
    updates = [update("a", 1, 2.0, 1.0, torch.float16), update("b", 1, 6.0, 3.0, torch.float16)]
    heads = mean_extras(updates, shares(updates))
    assert heads["h"].tolist() == [5.0, 5.0]
    assert heads["h"].dtype == torch.float32


def test_dense_layers_are_averaged_like_any_numbers() -> None:
    updates = [
        ClientUpdate(name, Adapter.pack({"x": Dense(torch.full((2, 2), value))}), 1.0)
        for name, value in (("a", 1.0), ("b", 3.0))
    ]
    total = WeightedSum()
    for each in updates:
        total.add(each)
    assert total.mean().layers["x"].dense().tolist() == [[2.0, 2.0]] * 2
