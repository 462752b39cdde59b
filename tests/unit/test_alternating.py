"""The sum behind rolora and fed_sb's search: one factor learns, the other one must be the one that was given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientUpdate, ModelSpec, ServerState
from common.lowrank import LowRank
from common.start import fresh_a
from strategies.alternating import AlternatingSum, Factor

SPEC = ModelSpec({"layer": (4, 6)}, seed=1)
SEED = 5
B, A = torch.arange(1.0, 13.0).view(4, 3), torch.arange(1.0, 19.0).view(3, 6)


def state(rank: int = 3) -> ServerState:
    """Return a state whose start has this many slots."""
    layers = {"layer": LowRank(B[:, :rank], A[:rank])} if rank else {}
    return ServerState(SPEC, Adapter.pack(layers), Adapter.empty())


def update(b: Tensor, a: Tensor, weight: float = 1.0, layer: str = "layer") -> ClientUpdate:
    return ClientUpdate("ada", Adapter.pack({layer: LowRank(b, a)}), weight)


def merged(total: AlternatingSum) -> LowRank:
    layer = total.mean().layers["layer"]
    assert isinstance(layer, LowRank)
    return layer


def test_the_mean_of_b_over_the_given_a_is_exact_for_mixed_ranks() -> None:
    total = AlternatingSum(state(), SEED, "b")
    wide, narrow = torch.full((4, 3), 2.0), torch.full((4, 1), 6.0)
    mean = merged(total.add(update(wide, A)).add(update(narrow, A[:1], 3.0)))
    assert torch.equal(mean.dense(), (wide @ A + 3 * narrow @ A[:1]) / 4)
    assert torch.equal(mean.a, A)


def test_the_mean_of_a_over_the_given_b_is_exact_for_mixed_ranks() -> None:
    total = AlternatingSum(state(), SEED, "a")
    wide, narrow = torch.full((3, 6), 2.0), torch.full((1, 6), 6.0)
    mean = merged(total.add(update(B, wide)).add(update(B[:, :1], narrow, 3.0)))
    assert torch.equal(mean.dense(), (B @ wide + 3 * B[:, :1] @ narrow) / 4)
    assert torch.equal(mean.b, B)


def test_slots_the_state_lacks_begin_with_drawn_rows_and_a_b_of_zero() -> None:
    drawn = fresh_a(SEED, "layer", 3, 6)
    begun = torch.cat([A[:1], drawn[1:]])
    b = torch.ones(4, 3)
    total = AlternatingSum(state(1), SEED, "b").add(update(b[:, :2], begun[:2])).add(update(b, begun))
    assert torch.equal(merged(total).a, begun)
    assert torch.equal(merged(AlternatingSum(state(0), SEED, "b").add(update(b, drawn))).a, drawn)
    padded = torch.nn.functional.pad(B[:, :1], (0, 2))
    assert torch.equal(merged(AlternatingSum(state(1), SEED, "a").add(update(padded, A))).a, A[:1])


@pytest.mark.parametrize(
    ("learns", "b", "a"),
    [
        ("b", B, A + torch.eye(3, 6) * 1e-5),
        ("a", B + torch.eye(4, 3) * 1e-5, A),
        ("a", torch.cat([B, torch.ones(4, 1)], 1), torch.ones(4, 6)),  # a slot that was to be zero
    ],
)
def test_a_factor_other_than_the_given_one_is_refused(learns: Factor, b: Tensor, a: Tensor) -> None:
    total = AlternatingSum(state(), SEED, learns).add(update(B, A))
    with pytest.raises(RejectedUpdate, match=f"client ada, layer layer: frozen factor differs.*only {learns} may"):
        total.add(update(b, a))
    assert total.total.weight == 1


@pytest.mark.parametrize(("learns", "begun", "layer"), [("b", 3, "other"), ("a", 3, "other"), ("a", 0, "layer")])
def test_a_layer_nobody_was_given_is_refused(learns: Factor, begun: int, layer: str) -> None:
    with pytest.raises(RejectedUpdate, match=f"unknown layer '{layer}'"):
        AlternatingSum(state(begun), SEED, learns).add(update(B, A, layer=layer))


def test_it_holds_no_more_than_the_factor_that_learns() -> None:
    for learns, numbers in (("b", B.numel()), ("a", A.numel())):
        total = AlternatingSum(state(), SEED, learns)  # type: ignore[arg-type]
        for _ in range(3):
            total.add(update(B, A))
        assert total.total.total is not None
        assert total.total.total.numel() == numbers
        assert not total._drawn
