"""What of an adapter travels: each part by hand, and whole again on the other side."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from common.adapter import Adapter, tensor_bytes
from common.errors import ClientError
from common.federation import Dispatch, Part
from common.lowrank import Dense, LowRank
from common.start import fresh_a
from common.travel import complete, entries, part_numel, places, take, untrained_hash

OUT, IN = 6, 5
RANKS = {"p": 2, "q": 3}
HEAD = 4
OUTER, INNER = OUT * 5, IN * 5
"""Numbers in all b and in all a."""


def factors(seed: int) -> Adapter:
    numbers = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(OUT, rank, generator=numbers), torch.randn(rank, IN, generator=numbers))
        for name, rank in RANKS.items()
    }
    return Adapter.pack(layers, {"head": torch.randn(HEAD, generator=numbers)})


def frames() -> Adapter:
    """Orthonormal columns and rows, wider than any layer's rank."""
    made = factors(9).layers
    return Adapter.pack(
        {name: LowRank(torch.linalg.qr(torch.randn(OUT, 4, generator=torch.Generator().manual_seed(1)))[0],
                       torch.linalg.qr(torch.randn(IN, 4, generator=torch.Generator().manual_seed(2)))[0].T)
         for name in made}
    )  # fmt: skip


def between_frames(seed: int) -> Adapter:
    """b = frame b @ core, a = frame a."""
    given, numbers = frames().layers, torch.Generator().manual_seed(seed)
    layers = {}
    for name, rank in RANKS.items():
        frame = given[name]
        assert isinstance(frame, LowRank)
        layers[name] = LowRank(frame.b[:, :rank] @ torch.randn(rank, rank, generator=numbers), frame.a[:rank])
    return Adapter.pack(layers, {"head": torch.randn(HEAD, generator=numbers)})


def masked(seed: int, dispatch: Dispatch) -> Adapter:
    """Matrices with numbers at the mask's places alone."""
    numbers, layers = torch.Generator().manual_seed(seed), {}
    for name in RANKS:
        matrix = torch.zeros(OUT * IN)
        chosen = places(dispatch.seed, name, OUT * IN, dispatch.density or 1.0)
        matrix[chosen] = torch.randn(len(chosen), generator=numbers)
        layers[name] = Dense(matrix.view(OUT, IN))
    return Adapter.pack(layers, {"head": torch.randn(HEAD, generator=numbers)})


PLAIN = Dispatch(Adapter.empty(), 3, 0)
CORE = replace(PLAIN, trains="core", frames=frames())
SPARSE = replace(PLAIN, trains="sparse", seed=5, density=0.1)


@pytest.mark.parametrize(
    ("part", "numel"), [("ab", OUTER + HEAD + INNER), ("b", OUTER + HEAD), ("a", HEAD + INNER), ("inner", INNER)]
)
def test_parts_of_the_factors_by_hand(part: Part, numel: int) -> None:
    adapter = factors(0)
    numbers = take(adapter, part)
    assert len(numbers) == part_numel(adapter.layout, part) == numel
    pieces = {
        "ab": adapter.flat,
        "b": torch.cat([adapter.layers["p"].b.flatten(), adapter.layers["q"].b.flatten(), adapter.extras["head"]]),  # type: ignore[union-attr]
        "a": torch.cat([adapter.extras["head"], adapter.layers["p"].a.flatten(), adapter.layers["q"].a.flatten()]),  # type: ignore[union-attr]
        "inner": torch.cat([adapter.layers["p"].a.flatten(), adapter.layers["q"].a.flatten()]),  # type: ignore[union-attr]
    }
    assert torch.equal(numbers, pieces[part])


@pytest.mark.parametrize("part", ["ab", "b", "a", "inner"])
def test_what_did_not_travel_is_as_it_was_at_the_start(part: Part) -> None:
    start, trained = factors(0), factors(1)
    whole = complete(take(trained, part), start.layout, part, PLAIN, start)
    assert torch.equal(take(whole, part), take(trained, part))
    rest = {"ab": 0, "b": INNER, "a": OUTER, "inner": OUTER + HEAD}[part]
    assert int((whole.flat == start.flat).sum()) == rest


def test_what_a_client_keeps_counts_as_zero_to_others() -> None:
    whole = complete(take(factors(1), "inner"), factors(1).layout, "inner", PLAIN)
    assert torch.equal(whole.inner_factors, factors(1).inner_factors)
    assert not whole.flat[: OUTER + HEAD].any()


def test_a_frozen_a_is_drawn_again() -> None:
    layers = {name: LowRank(torch.ones(OUT, rank), fresh_a(7, name, rank, IN)) for name, rank in RANKS.items()}
    adapter = Adapter.pack(layers, {"head": torch.ones(HEAD)})
    assert torch.equal(complete(take(adapter, "b"), adapter.layout, "b", replace(PLAIN, frozen_a=7)).flat, adapter.flat)


def test_a_core_travels_between_frames_both_sides_hold() -> None:
    adapter = between_frames(3)
    numbers = take(adapter, "core", CORE)
    assert len(numbers) == part_numel(adapter.layout, "core") == 2 * 2 + 3 * 3 + HEAD
    whole = complete(numbers, adapter.layout, "core", CORE)
    assert whole.layout == adapter.layout
    assert torch.allclose(whole.flat, adapter.flat, atol=1e-6)
    assert torch.equal(whole.inner_factors, adapter.inner_factors)


def test_sparse_entries_travel_without_their_places() -> None:
    adapter = masked(4, SPARSE)
    numbers = take(adapter, "sparse", SPARSE)
    assert len(numbers) == part_numel(adapter.layout, "sparse", 0.1) == 2 * 3 + HEAD
    assert torch.equal(complete(numbers, adapter.layout, "sparse", SPARSE).flat, adapter.flat)


@pytest.mark.parametrize(("numel", "density", "count"), [(30, 0.1, 3), (30, 1.0, 30), (30, 0.001, 1), (1, 0.5, 1)])
def test_a_mask_has_its_share_and_at_least_one(numel: int, density: float, count: int) -> None:
    chosen = places(0, "p", numel, density)
    assert entries(numel, density) == len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    assert 0 <= chosen[0] <= chosen[-1] < numel


def test_masks_differ_by_layer_and_seed() -> None:
    drawn = {tuple(places(seed, layer, 1000, 0.05).tolist()) for seed in (0, 1) for layer in ("p", "q")}
    assert len(drawn) == 4


@pytest.mark.parametrize("part", ["b", "a", "core", "sparse"])
@pytest.mark.parametrize("dispatch", [None, PLAIN], ids=["no dispatch", "a dispatch that does not tell"])
def test_a_part_that_nobody_can_complete_is_refused(part: Part, dispatch: Dispatch | None) -> None:
    layout = factors(0).layout
    with pytest.raises(ClientError, match=f"came as {part} alone, and nothing here tells the rest"):
        complete(torch.zeros(part_numel(layout, part)), layout, part, dispatch)


def test_a_start_of_another_layout_is_no_help() -> None:
    layout = factors(0).layout
    with pytest.raises(ClientError, match="nothing here tells the rest"):
        complete(torch.zeros(part_numel(layout, "b")), layout, "b", PLAIN, between_frames(0).narrowed(1))


@pytest.mark.parametrize("given", [None, Adapter.empty(), frames().narrowed(2)], ids=["none", "empty", "too narrow"])
def test_frames_that_are_not_there_are_asked_for(given: Adapter | None) -> None:
    adapter = between_frames(3)
    with pytest.raises(ClientError, match=r"no frames of rank \d for layer [pq]; they must be sent again"):
        take(adapter, "core", replace(CORE, frames=given))


def test_the_factor_that_was_to_rest_is_hashed() -> None:
    adapter = factors(0)

    def digest(numbers: torch.Tensor) -> str:
        return hashlib.sha256(tensor_bytes(numbers)).hexdigest()

    assert untrained_hash(adapter, replace(PLAIN, trains="b")) == digest(adapter.inner_factors)
    assert untrained_hash(adapter, replace(PLAIN, trains="a")) == digest(adapter.flat[:OUTER])
    assert untrained_hash(adapter, PLAIN) is None
    assert untrained_hash(adapter, replace(PLAIN, keeps_b=True)) is None
