"""Where a client starts."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from common.adapter import Adapter, Layout, tensor_bytes
from common.errors import ConfigurationError
from common.federation import Dispatch, ModelSpec
from common.lowrank import Dense, LowRank
from common.start import fresh_a, frozen_factors, frozen_hash, starting_adapter

SPEC = ModelSpec({"q": (6, 5), "v": (3, 5)}, seed=1, heads={"score": torch.arange(4.0)})


def given(rank: int) -> LowRank:
    return LowRank(torch.full((6, rank), 2.0), torch.full((rank, 5), 3.0))


@pytest.mark.parametrize("inn", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 255, 768, 1000, 4096])
def test_fewer_rows_are_the_first_of_more(inn: int) -> None:
    """Bit for bit, for every pair of ranks: nested ranks and a shared frozen factor rest on it."""
    most = 65
    whole = fresh_a(3, "layer", most, inn)
    for rank in [*range(20), 31, 32, 33, 63, 64]:
        assert torch.equal(fresh_a(3, "layer", rank, inn), whole[:rank])


def test_rows_are_the_same_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fresh_a(3, "layer", 256, 1024)
        torch.set_num_threads(2)
        assert torch.equal(fresh_a(3, "layer", 256, 1024), one)
        assert torch.equal(fresh_a(3, "layer", 3, 1024), one[:3])
    finally:
        torch.set_num_threads(before)


def test_rows_are_drawn_as_peft_does() -> None:
    """Kaiming uniform with a = √5: uniform in ±1/√in, so a row's squared norm is 1/3 on average."""
    a = fresh_a(3, "layer", 200, 500)
    assert a.dtype == torch.float32
    assert float(a.abs().max()) <= 1 / math.sqrt(500)
    assert float(a.abs().max()) > 0.999 / math.sqrt(500)
    assert float(a.square().sum(1).mean()) == pytest.approx(1 / 3, rel=0.02)
    assert abs(float(a.mean())) < 1e-3


def test_rows_differ_by_layer_and_seed_and_not_by_the_global_state() -> None:
    state = torch.get_rng_state()
    a = fresh_a(3, "layer", 2, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(a, fresh_a(3, "other", 2, 8))
    assert not torch.equal(a, fresh_a(4, "layer", 2, 8))


def test_nothing_sent_means_fresh_rows_and_zero_b() -> None:
    start = starting_adapter(Dispatch(Adapter.empty(), rank=4, seed=9), SPEC)
    for layer, (out, inn) in SPEC.layers.items():
        part = start.layers[layer]
        assert isinstance(part, LowRank)
        assert part.rank == min(4, out, inn)
        assert not part.b.any()
        assert torch.equal(part.a, fresh_a(9, layer, part.rank, inn))
    assert torch.equal(start.extras["score"], SPEC.heads["score"])


def test_a_narrow_start_is_filled_up() -> None:
    heads = {"score": torch.ones(4)}
    dispatch = Dispatch(Adapter.pack({"q": given(2)}, heads), rank=4, seed=9)
    part = starting_adapter(dispatch, SPEC).layers["q"]
    assert isinstance(part, LowRank)
    assert part.b.tolist() == [[2.0, 2.0, 0.0, 0.0]] * 6
    assert bool((part.a[:2] == 3).all())
    assert torch.equal(part.a[2:], fresh_a(9, "q", 4, 5)[2:])
    assert torch.equal(starting_adapter(dispatch, SPEC).extras["score"], torch.ones(4))


def test_a_wide_start_is_cut() -> None:
    part = starting_adapter(Dispatch(Adapter.pack({"q": given(4)}), rank=3, seed=9), SPEC).layers["q"]
    assert isinstance(part, LowRank)
    assert (part.rank, bool((part.b == 2).all()), bool((part.a == 3).all())) == (3, True, True)


def test_a_frozen_factor_comes_from_its_own_seed() -> None:
    dispatch = Dispatch(Adapter.pack({"q": given(2)}), rank=4, seed=9, trains="b", frozen_a=5)
    part = starting_adapter(dispatch, SPEC).layers["q"]
    assert isinstance(part, LowRank)
    assert torch.equal(part.a, fresh_a(5, "q", 4, 5))
    assert part.b.tolist() == [[2.0, 2.0, 0.0, 0.0]] * 6


def test_a_dense_start_is_refused() -> None:
    dispatch = Dispatch(Adapter.pack({"q": Dense(torch.zeros(6, 5))}), rank=2, seed=9)
    with pytest.raises(ConfigurationError, match="layer q is to start from a dense matrix"):
        starting_adapter(dispatch, SPEC)


def test_frozen_factors_are_those_of_an_adapter() -> None:
    adapter = starting_adapter(Dispatch(Adapter.empty(), rank=3, seed=9, frozen_a=5), SPEC)
    assert torch.equal(frozen_factors(adapter.layout, 5), adapter.inner_factors)
    assert frozen_hash(adapter.layout, 5) == hashlib.sha256(tensor_bytes(adapter.inner_factors)).hexdigest()
    assert frozen_hash(adapter.layout, 5) != frozen_hash(adapter.layout, 6)


def test_dense_and_empty_layers_have_no_frozen_factor() -> None:
    layout = Layout((("p", 4, 4, -1), ("q", 6, 5, 2), ("v", 3, 5, 0)))
    assert torch.equal(frozen_factors(layout, 5), fresh_a(5, "q", 2, 5).flatten())
