"""What a release must be under every linear strategy: the mean of clipped updates, noised where they travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import server.privacy.release as module
from client.secure.masking import within
from common.adapter import Adapter
from common.experiment_file import load_experiment
from common.federation import ClientInfo, ClientUpdate, ServerState
from common.flower import identify_task
from common.privacy.clipping import Clipped
from common.secure.upload import widened
from common.travel import complete, take
from server.federation import Federation
from server.journal import Released
from server.orders import Order
from server.privacy.release import Release
from server.record import RoundRecord
from strategies import AGGREGATION, AggregationStrategy, aggregation_strategy
from tests.reference import cohorts

LINEAR = [name for name in AGGREGATION.names() if AGGREGATION.plugin(name).capabilities.linear_uplink]
NO_LIMIT = "privacy.clipping_norm=1e9"
SEEDED = ("privacy.mode=client", "privacy.test_seed=3", "privacy.noise_multiplier=2")


class NothingBefore:
    """A journal of a run that begins."""

    def released(self) -> Sequence[Released]:
        return ()


def open_release(strategy: AggregationStrategy, merged: int, *options: str, spec: Any = None) -> Release:
    """Open the release of a round after so many others, for four clients as wide as the strategy allows."""
    identify_task(1)
    state = strategy.init(spec or cohorts.model_spec())
    ranks = (2, 5, 3, 6) if strategy.capabilities.mixed_ranks else (3,) * 4
    known = [f"clients.client-{number}.rank={rank}" for number, rank in enumerate(ranks, 1)]
    chosen = f"strategy.name={strategy.plugin_name}"
    experiment = load_experiment("synthetic", [*known, "federation.rounds=8", chosen, *SEEDED, *options])
    clients = experiment.simulated_clients()
    federation = Federation(
        "r", experiment, strategy, clients, state.spec, 3, None, None, NothingBefore()  # type: ignore[arg-type]
    )  # fmt: skip
    for number in range(merged):
        state = strategy.aggregate(state, [trained(each, number) for each in orders(federation, state).values()])
    return Release(federation, state, orders(federation, state))


def orders(federation: Federation, state: ServerState) -> dict[str, Order]:
    book = federation.order_book(state)
    infos = [ClientInfo(name, settings.rank or 3) for name, settings in federation.clients.items()]
    return {info.name: book.train(state.round + 1, 1, info, 0) for info in infos}


def moved(order: Order, change: Tensor) -> ClientUpdate:
    """Return the update of a client that changed the numbers that travel."""
    start, dispatch = order.start, order.dispatch
    known = start if dispatch.sends in ("a", "b") else None
    adapter = complete(travelling(order) + change, start.layout, dispatch.sends, dispatch, known)
    return ClientUpdate(order.client, adapter, 1.0)


def trained(order: Order, seed: int = 0, scale: float = 0.1) -> ClientUpdate:
    generator = torch.Generator().manual_seed(seed + sum(map(ord, order.client)))
    return moved(order, scale * torch.randn(len(travelling(order)), generator=generator))


def travelling(order: Order, adapter: Adapter | None = None) -> Tensor:
    return take(order.start if adapter is None else adapter, order.dispatch.sends, order.dispatch)


def merged(release: Release, updates: Sequence[ClientUpdate]) -> ServerState:
    for update in updates:
        release.add(update)
    record = RoundRecord(release.state.round + 1, tuple(release.orders), 0, datetime.now(UTC))
    return release.merged(record, [update.client for update in updates])


def model(state: ServerState) -> dict[str, np.ndarray[Any, Any]]:
    """Return every layer as a matrix, and the heads; of a strategy without one model, the shared factors."""
    if state.merged is None:
        return {"a": state.start.flat.double().numpy()}
    layers = {name: cohorts.matrix(state.merged, name) for name in state.merged.layers}
    return layers | {name: value.double().numpy() for name, value in state.merged.extras.items()}


def assert_same(one: ServerState, other: ServerState) -> None:
    found, wanted = model(one), model(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)
    assert one.start.layout == other.start.layout


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the noise off."""
    monkeypatch.setattr(module, "gaussian", lambda like, std, generator: torch.zeros(like.shape))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("name", LINEAR)
def test_without_noise_and_limit_it_is_the_strategys_own_equal_mean(name: str, before: int) -> None:
    """In every stage of every strategy: factors that take turns, entries, cores between frames."""
    strategy = aggregation_strategy(name)
    release = open_release(strategy, before, NO_LIMIT)
    updates = [trained(order, seed=9) for order in release.orders.values()]
    assert_same(merged(release, updates), strategy.aggregate(release.state, updates))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", LINEAR)
def test_updates_are_clipped_and_whoever_is_missing_changes_nothing(name: str) -> None:
    """Against numpy: clip by hand, put a start in the place of each missing client, and let the strategy average."""
    strategy, limit = aggregation_strategy(name), 0.5
    for before in (0, 2):
        release = open_release(strategy, before, f"privacy.clipping_norm={limit}")
        *there, missing = release.orders.values()
        updates = [trained(order, seed=9, scale=scale) for order, scale in zip(there, (3.0, 0.1, 1e-3), strict=True)]
        by_hand = [clipped_by_hand(order, update, limit) for order, update in zip(there, updates, strict=True)]
        still = moved(missing, torch.zeros(len(travelling(missing))))
        assert_same(merged(release, updates), strategy.aggregate(release.state, [*by_hand, still]))


def clipped_by_hand(order: Order, update: ClientUpdate, limit: float) -> ClientUpdate:
    before, after = travelling(order).double().numpy(), travelling(order, update.adapter).double().numpy()
    length = math.sqrt(sum(float(value) ** 2 for value in after - before))
    shorter = (after - before) * min(1.0, limit / length)
    return moved(order, torch.from_numpy(shorter).float())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", LINEAR)
def test_absent_clients_of_a_smaller_cohort_count_as_well(name: str) -> None:
    """Six clients are drawn in a round as planned; four are there: the mean is still divided by six."""
    strategy = aggregation_strategy(name)
    few = open_release(strategy, 0, NO_LIMIT)
    settings = next(iter(few.federation.clients.values()))
    more = {**few.federation.clients, "eve": settings, "fay": settings}
    many = Release(replace(few.federation, clients=more), few.state, few.orders)
    assert (few.clients, many.clients) == (4, 6)
    updates = [trained(order) for order in few.orders.values()]
    wide = many.orders[many.widest]
    still = [replace(moved(wide, torch.zeros(len(travelling(wide)))), client=name) for name in ("eve", "fay")]
    assert_same(merged(many, updates), strategy.aggregate(few.state, [*updates, *still]))


HOSTILE = {
    "huge": lambda size: torch.full((size,), 1e30),
    "one number": lambda size: torch.eye(size)[0] * -1e20,
    "just above": lambda size: torch.full((size,), 1.0001 / math.sqrt(size)),
    "tiny": lambda size: torch.full((size,), 1e-20),
}


def influence(name: str, change: Callable[[int], Tensor]) -> float:
    """Return by how much one client's update, against none, moves the noise-free sum, in clipping norms."""
    strategy, found = aggregation_strategy(name), []
    for hostile in (True, False):
        release = open_release(strategy, 1, "privacy.clipping_norm=1")
        first, *others = release.orders.values()
        for order in others:
            release.add(trained(order, scale=3.0))
        if hostile:
            release.add(moved(first, change(len(travelling(first)))))
        found.append(release._sum.clone())
    return float(torch.linalg.vector_norm(found[0] - found[1]))


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", LINEAR)
def test_no_client_moves_the_sum_by_more_than_the_clipping_norm(name: str, kind: str) -> None:
    assert influence(name, HOSTILE[kind]) <= 1 + 1e-9


def test_an_update_that_is_not_clipped_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(trained: Tensor, start: Tensor, limit: float) -> Clipped:
        change = trained.double() - start.double()
        return Clipped(change * min(1.0, limit / float(change.abs().max())), 0.0)  # the largest number, not the norm

    monkeypatch.setattr(module, "clip_change", careless)
    assert influence("fedavg", HOSTILE["just above"]) > 1.00005


@pytest.mark.parametrize("name", LINEAR)
def test_a_sum_of_updates_that_clients_clipped_is_the_same(name: str) -> None:
    """As under secure aggregation: as wide as the widest of those that are in it, and clipped before it is summed."""
    for before in (0, 2):
        strategy, options = aggregation_strategy(name), "privacy.clipping_norm=0.5"
        one, other = (open_release(strategy, before, options) for _ in range(2))
        *there, _ = one.orders.values()
        wide = max(there, key=lambda order: order.dispatch.rank)
        total = torch.zeros(len(travelling(wide)), dtype=torch.float64)
        for order, scale in zip(there, (3.0, 0.1, 1e-3), strict=True):
            update, part = trained(order, scale=scale), order.dispatch.sends
            one.add(update)
            sent = within(travelling(order, update.adapter), travelling(order), 0.5)
            total += widened(sent, part, order.start.layout, wide.start.layout)
        other.add_sum(total, wide, [order.client for order in there])
        torch.testing.assert_close(other._sum, one._sum, rtol=1e-6, atol=1e-9)


BIG = cohorts.model_spec({"w": (60, 80), "v": (40, 40)})


def noise_of(name: str) -> Tensor:
    """Return the noise of the first release: n times what came out of updates of zero, where all start as one."""
    release = open_release(aggregation_strategy(name), 0, "privacy.clipping_norm=0.5", spec=BIG)
    after = merged(release, [])
    wide = release.orders[release.widest]
    sent = release.federation.order_book(after).train(2, 1, ClientInfo(wide.client, wide.dispatch.rank), 0)
    return 4 * (travelling(wide, sent.start) - travelling(wide)).double()


def deviations(noise: Tensor, std: float) -> float:
    """Return how many standard deviations the sum of squares lies from what it should be (chi-square)."""
    squares = float((noise / std).square().sum())
    return (squares - len(noise)) / math.sqrt(2 * len(noise))


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedsa_lora"])
def test_the_noise_of_what_is_released_has_the_promised_size(name: str) -> None:
    """z = 2 and S = 0.5: n times the mean has standard deviation 1."""
    noise = noise_of(name)
    assert len(noise) > 300
    assert bool((noise != 0).all())
    assert abs(deviations(noise, 1.0)) < 4.5
    assert abs(float(noise.mean())) * math.sqrt(len(noise)) < 4.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1 / math.sqrt(2)])
def test_missing_or_halved_noise_is_seen(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    drawn = module.gaussian
    monkeypatch.setattr(module, "gaussian", lambda like, std, generator: share * drawn(like, std, generator))
    assert deviations(noise_of("ffa_lora"), 1.0) < -8


def test_noise_covers_the_slots_of_a_wide_client_that_is_missing() -> None:
    """What is released has the cohort's shape, whoever answered."""
    release = open_release(aggregation_strategy("ffa_lora"), 0)
    assert release.widest == "client-4"
    after = merged(release, [trained(order) for name, order in release.orders.items() if name != "client-4"])
    assert max(rank for *_, rank in after.start.layout.layers) == 6
    assert bool((after.start.flat[: after.start.layout.head_numel] != 0).all())


def test_the_clipping_norm_follows_the_updates_and_stays_with_the_state() -> None:
    options = ("privacy.adaptive_clipping=true", "privacy.clipping_norm=100", "privacy.noise_multiplier=0.01")
    strategy = aggregation_strategy("fed_sb")  # the one with extras of its own
    release, norms = open_release(strategy, 0, *options, "privacy.epsilon=1e9"), []
    for _ in range(4):
        norms.append(release.norm)
        state = merged(release, [trained(order) for order in release.orders.values()])
        release = Release(release.federation, state, orders(release.federation, state))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] == pytest.approx(100 * math.exp(-0.2 * 0.5) ** 3, rel=0.2)
    assert {key.split("/")[0] for key in state.extras} == {"fed_sb.b", "fed_sb.a", "privacy.clipping_norm"}


def test_what_is_recorded_tells_nothing_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(scale: float) -> Mapping[str, float]:
        release = open_release(aggregation_strategy("fedavg"), 0)
        for order in release.orders.values():
            release.add(trained(order, scale=scale))
        record = RoundRecord(1, tuple(release.orders), 0, datetime.now(UTC))
        release.merged(record, list(release.orders))
        return {f"{name} {client}": value for name, value, client, _ in record.metrics}

    assert told(1e-3) == told(10.0)
    assert {name.split()[0] for name in told(1.0)} == {
        "noise_multiplier", "clipping_norm", "epsilon", "second_epsilon", "rounds_left",
    }  # fmt: skip
