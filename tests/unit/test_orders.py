"""Orders: what server and client each make of a start must be the same numbers, whatever format it travels in."""

from __future__ import annotations

import pytest
import torch

from common.adapter import Adapter
from common.errors import RunError
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.flower import identify_task
from common.lowrank import LowRank
from common.messages import TrainOrder
from common.start import starting_adapter
from common.travel import complete, take
from common.wire import FloatFormat, read_message, unseal
from server.orders import Order, OrderBook, as_sent
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from tests.reference import cohorts
from tests.tiny import synthetic

NAMES = AGGREGATION.names()
SPEC = cohorts.model_spec()


def merged(strategy: AggregationStrategy, rounds: int, wire: FloatFormat) -> ServerState:
    """Run some rounds of clients that move what travels, each state rounded as it is sent."""
    state = strategy.init(SPEC)
    for _ in range(rounds):
        updates = []
        for name in cohorts.NAMES[:3]:
            dispatch = strategy.dispatch(state, ClientInfo(name, 3))
            start = starting_adapter(dispatch, SPEC)
            numbers = take(start, dispatch.sends, dispatch)
            noise = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            known = start if dispatch.sends in ("a", "b") else None
            adapter = complete(numbers + 0.1 * noise, start.layout, dispatch.sends, dispatch, known)
            updates.append(ClientUpdate(name, adapter, 1.0, state.base_version))
        state = as_sent(strategy.aggregate(state, updates), strategy, wire)
    return state


def ordered(strategy: AggregationStrategy, state: ServerState, wire: str, *options: str) -> Order:
    identify_task(1)
    experiment = synthetic(f"federation.wire_down={wire}", *options)
    return OrderBook("r", experiment, strategy, state).train(state.round + 1, 1, ClientInfo("ada", 3), 7)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_both_sides_begin_with_the_same_numbers(name: str, rounds: int, wire: FloatFormat) -> None:
    strategy = aggregation_strategy(name)
    state = merged(strategy, rounds, wire)
    order = ordered(strategy, state, wire)
    _, parcels = read_message(order.message.content, TrainOrder)
    assert ("frames" in parcels) == (order.dispatch.frames is not None)
    if order.dispatch.frames is not None:
        assert torch.equal(unseal(parcels["frames"]).flat, order.dispatch.frames.flat)
    given = unseal(parcels["start"], order.dispatch)
    client = starting_adapter(strategy.dispatch(state, ClientInfo("ada", 3)), SPEC)
    tolerance = 1e-6 if order.dispatch.frames is not None else 0.0  # a core is worked out from b
    for layer, part in given.layers.items():
        sent, held = part.dense(), order.dispatch.start.layers[layer].dense()
        torch.testing.assert_close(sent, held, rtol=0, atol=tolerance)
    if not order.dispatch.keeps_b:
        torch.testing.assert_close(order.start.flat, client.flat, rtol=0, atol=tolerance)


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_rounded_once_stays(name: str, wire: FloatFormat) -> None:
    strategy = aggregation_strategy(name)
    state = merged(strategy, 3, wire)
    again = as_sent(state, strategy, wire)
    torch.testing.assert_close(again.start.flat, state.start.flat, rtol=0, atol=1e-6)
    assert again.start.layout == state.start.layout
    assert as_sent(state, strategy, "fp32") is state


def test_what_a_client_keeps_is_zero_to_the_server() -> None:
    strategy = aggregation_strategy("fedsa_lora")
    order = ordered(strategy, merged(strategy, 2, "fp32"), "fp32")
    layout = order.start.layout
    assert not order.start.flat[: layout.head_numel].any()
    assert order.start.inner_factors.all()
    assert dict(layout.extras) == {name: tuple(value.shape) for name, value in SPEC.heads.items()}


def test_a_bound_that_cannot_be_kept_stops_the_run_with_the_clients_name() -> None:
    strategy = aggregation_strategy("flora")
    with pytest.raises(RunError, match="client ada: download_bytes = 7 holds not even rank 1"):
        ordered(strategy, merged(strategy, 1, "fp32"), "fp32", "federation.download_bytes=7")


def test_an_adapter_is_cut_once_for_all_clients_of_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    identify_task(1)
    cuts = []
    truncate = LowRank.truncate

    def counting(update: LowRank, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        cuts.append(rank)
        return truncate(update, rank, energy)

    strategy = aggregation_strategy("flora")
    layers = {
        name: cohorts.low_rank(*shape, 3, torch.Generator().manual_seed(0), torch.float32)
        for name, shape in SPEC.layers.items()
    }
    state = strategy.init(SPEC)
    state = ServerState(SPEC, state.start, Adapter.pack(layers))
    monkeypatch.setattr(LowRank, "truncate", counting)
    book = OrderBook("r", synthetic("federation.download_rank=1"), strategy, state)
    orders = [book.train(1, 1, ClientInfo(name, 2), 7) for name in cohorts.NAMES]
    assert cuts == [1] * len(SPEC.layers)
    assert len({order.header.global_hash for order in orders}) == 1
    assert len({order.lost for order in orders}) == 1
    assert 0 < orders[0].lost < 1
