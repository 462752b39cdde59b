"""Frames and cores: orthonormal whatever the update, one product, and what fed_sb makes of them over the rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter import Adapter
from common.adapter_file import read_state, state_bytes
from common.errors import ConfigurationError, RejectedUpdate
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.lowrank import LowRank
from common.start import starting_adapter
from common.travel import complete, core_of, take
from strategies import AggregationStrategy, aggregation_strategy
from strategies.aggregation.fed_sb import SEARCH_ROUNDS, frames_of
from strategies.frames import framed
from tests.reference import cohorts

SPEC = cohorts.model_spec()


def low_rank(out: int, inn: int, rank: int, own_rank: int | None = None) -> LowRank:
    """Draw an update with so many slots, of a matrix rank of its own."""
    numbers = torch.Generator().manual_seed(out + inn + rank)
    b, a = torch.randn(out, rank, generator=numbers), torch.randn(rank, inn, generator=numbers)
    if own_rank is not None:
        b[:, own_rank:] = b[:, :1]
        a[own_rank:] = a[:1]
    return LowRank(b, a)


@pytest.mark.parametrize(
    ("update", "rank"),
    [
        (low_rank(12, 9, 4), 4),
        (low_rank(12, 9, 4, own_rank=2), 4),
        (low_rank(12, 9, 4).scaled(0.0), 4),
        (low_rank(3, 9, 5), 3),
        (low_rank(9, 3, 3), 3),
        (low_rank(4, 4, 4, own_rank=1), 4),
        (low_rank(12, 9, 2).scaled(1e-20), 2),
        (low_rank(400, 300, 32), 32),
    ],
    ids=["full", "deficient", "zero", "wider than out", "as wide as in", "square", "tiny", "large"],
)
def test_frames_are_orthonormal_and_the_product_stays(update: LowRank, rank: int) -> None:
    frame, core = framed(update, 3, "layer")
    assert core.shape == (rank, rank)
    for gram in (frame.b.double().T @ frame.b.double(), frame.a.double() @ frame.a.double().T):
        assert float((gram - torch.eye(rank)).abs().max()) < 1e-6
    wanted, found = update.dense().double(), (frame.b @ core @ frame.a).double()
    assert float((found - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert float(core.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
    torch.testing.assert_close(
        core_of(LowRank(frame.b @ core, frame.a), frame), core, rtol=1e-4, atol=1e-6 * (1 + float(core.norm()))
    )


def test_missing_directions_follow_from_seed_and_layer() -> None:
    update = low_rank(12, 9, 4, own_rank=2)
    one, again = framed(update, 3, "layer"), framed(update, 3, "layer")
    assert torch.equal(one.frame.b, again.frame.b)
    assert torch.equal(one.frame.a, again.frame.a)
    for other in (framed(update, 4, "layer"), framed(update, 3, "other")):
        assert torch.equal(other.frame.b[:, :2], one.frame.b[:, :2])
        assert not torch.allclose(other.frame.b[:, 2:], one.frame.b[:, 2:])


STRATEGY: AggregationStrategy = aggregation_strategy("fed_sb")


def trained(state: ServerState, name: str, rank: int, seed: int = 0, weight: float = 1.0) -> ClientUpdate:
    """Move what travels, as a client would."""
    dispatch = STRATEGY.dispatch(state, ClientInfo(name, rank))
    start = starting_adapter(dispatch, SPEC)
    numbers = take(start, dispatch.sends, dispatch)
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    moved = numbers + 0.2 * torch.randn(numbers.shape, generator=generator)
    adapter = complete(moved, start.layout, dispatch.sends, dispatch, start)
    return ClientUpdate(name, adapter, weight, state.base_version)


def after(rounds: int, ranks: tuple[int, ...] = (2, 4, 3)) -> ServerState:
    state = STRATEGY.init(SPEC)
    for number in range(rounds):
        updates = [trained(state, *each, seed=number) for each in zip(cohorts.NAMES, ranks, strict=False)]
        state = STRATEGY.aggregate(state, updates)
    return state


def block(adapter: Adapter, state: ServerState, layer: str) -> torch.Tensor:
    part, frame = adapter.layers[layer], frames_of(state).layers[layer]
    assert isinstance(part, LowRank)
    assert isinstance(frame, LowRank)
    return core_of(part, frame)


def test_the_frames_are_found_once_and_never_change() -> None:
    found = after(SEARCH_ROUNDS)
    frames = frames_of(found)
    assert {part.rank for part in frames.layers.values() if isinstance(part, LowRank)} == {4}
    for part in frames.layers.values():
        assert isinstance(part, LowRank)
        assert float((part.b.T @ part.b - torch.eye(part.rank)).abs().max()) < 1e-6
        assert float((part.a @ part.a.T - torch.eye(part.rank)).abs().max()) < 1e-6
    later = after(SEARCH_ROUNDS + 3)
    assert frames_of(later).sha256() == frames.sha256()
    assert later.start.sha256() != found.start.sha256()


def test_finding_the_frames_leaves_the_model_as_it_is() -> None:
    state = after(1)
    updates = [trained(state, name, rank, seed=1) for name, rank in zip(cohorts.NAMES, (2, 4, 3), strict=False)]
    found = STRATEGY.aggregate(state, updates)
    for layer in SPEC.layers:
        mean = sum(update.adapter.layers[layer].dense() for update in updates) / 3
        torch.testing.assert_close(found.start.layers[layer].dense(), mean, rtol=1e-4, atol=1e-5)


def test_only_squares_travel_afterwards() -> None:
    state = after(SEARCH_ROUNDS)
    dispatch = STRATEGY.dispatch(state, ClientInfo("ada", 3))
    start = starting_adapter(dispatch, SPEC)
    heads = sum(value.numel() for value in SPEC.heads.values())
    assert (dispatch.sends, dispatch.receives) == ("core", "core")
    assert len(take(start, "core", dispatch)) == heads + 3 * 3 * len(SPEC.layers)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_client_begins_with_the_leading_block(rank: int) -> None:
    state = after(SEARCH_ROUNDS + 1)
    start = starting_adapter(STRATEGY.dispatch(state, ClientInfo("ada", rank)), SPEC)
    for layer in SPEC.layers:
        whole, own = block(state.start, state, layer), block(start, state, layer)
        torch.testing.assert_close(own, whole[:rank, :rank], rtol=1e-4, atol=1e-6)


def test_the_mean_of_blocks_of_many_ranks_is_padded_and_exact() -> None:
    state = after(SEARCH_ROUNDS)
    ranks, weights = (1, 4, 2), (1.0, 2.0, 5.0)
    given = zip(cohorts.NAMES, ranks, weights, strict=False)
    updates = [trained(state, name, rank, 9, weight) for name, rank, weight in given]
    merged = STRATEGY.aggregate(state, updates)
    assert cohorts.error(merged, updates) < 1e-6
    for layer in SPEC.layers:
        mean = torch.zeros(4, 4)
        for update, rank, weight in zip(updates, ranks, weights, strict=True):
            mean[:rank, :rank] += weight / 8 * block(update.adapter, state, layer)
        torch.testing.assert_close(block(merged.start, merged, layer), mean, rtol=1e-4, atol=1e-5)


def test_a_wider_newcomer_trains_the_whole_core_and_no_more() -> None:
    state = after(SEARCH_ROUNDS + 1)
    update = trained(state, "newcomer", 9)
    assert {part.rank for part in update.adapter.layers.values() if isinstance(part, LowRank)} == {4}
    merged = STRATEGY.aggregate(state, [update, trained(state, "ada", 2)])
    assert frames_of(merged).sha256() == frames_of(state).sha256()


def test_an_update_from_between_other_frames_is_refused_and_changes_nothing() -> None:
    state = after(SEARCH_ROUNDS)
    good, other = trained(state, "ada", 4), trained(state, "bo", 4)
    part = other.adapter.layers["out"]
    assert isinstance(part, LowRank)
    moved = {
        "frozen factor differs from its frame": [
            LowRank(part.b, part.a + 1e-3),
            LowRank(part.b + 0.1 * torch.randn(part.b.shape, generator=torch.Generator().manual_seed(0)), part.a),
        ],
        "fits no frame of this run": [low_rank(12, 12, 5)],
    }
    for said, parts in moved.items():
        for bad in parts:
            accumulated = STRATEGY.add(STRATEGY.begin(state), good)
            with pytest.raises(RejectedUpdate, match=said):
                STRATEGY.add(accumulated, cohorts.with_factors(other, {**other.adapter.layers, "out": bad}))  # type: ignore[dict-item]
            alone = STRATEGY.finish(state, accumulated)
            assert cohorts.bits(alone) == cohorts.bits(STRATEGY.aggregate(state, [good]))


def test_a_run_goes_on_from_its_file(tmp_path: Path) -> None:
    for rounds in range(1, 4):
        state = after(rounds)
        (tmp_path / "state").write_bytes(state_bytes(state))
        resumed = read_state(tmp_path / "state", SPEC)
        updates = [trained(state, "ada", 2), trained(state, "bo", 4)]
        assert cohorts.bits(STRATEGY.aggregate(resumed, updates)) == cohorts.bits(STRATEGY.aggregate(state, updates))


def test_what_others_remember_survives_every_stage() -> None:
    kept = torch.ones(2)
    for rounds in range(4):
        state = after(rounds)
        state = replace(state, extras={**state.extras, "optimizer.momentum": kept})
        assert STRATEGY.aggregate(state, [trained(state, "ada", 2)]).extras["optimizer.momentum"] is kept


def test_a_state_without_frames_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="this state holds no frames for fed_sb; begin a new run"):
        STRATEGY.begin(replace(STRATEGY.init(SPEC), round=5))
