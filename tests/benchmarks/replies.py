"""Rounds of any strategy without training: every client moves what it is to send by random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from common.federation import ClientInfo, ClientUpdate, Dispatch, ModelSpec, Part, ServerState
from common.seeds import derive_seed
from common.start import starting_adapter
from common.travel import complete, take
from strategies import AggregationStrategy, aggregation_strategy
from strategies.updates import check_update

MIXED = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
EQUAL = (16,) * len(MIXED)
WEIGHTS = MIXED
"""Examples of the clients, whatever their ranks."""

OPTIONS: dict[str, dict[str, Any]] = {"lora_lego": {"clusters": 16}}
"""Other options than the default ones."""

LAST = 3
"""Rounds that are played: by then every strategy has seen each kind of round it has."""

LENGTH = 0.01
"""Standard deviation of what a number moves by."""


class Round(NamedTuple):
    """A round before its merge."""

    number: int
    upload: Part
    state: ServerState
    replies: list[ClientUpdate]


def measured_strategy(name: str) -> AggregationStrategy:
    """Build a strategy as it is measured."""
    return aggregation_strategy(name, **OPTIONS.get(name, {}))


def ranks_for(strategy: AggregationStrategy) -> tuple[int, ...]:
    """Return mixed ranks where a strategy takes them."""
    return MIXED if strategy.capabilities.mixed_ranks else EQUAL


def measured_rounds(strategy: AggregationStrategy) -> dict[int, Part]:
    """Return the rounds worth measuring and what travels up in them: the last one played of each kind."""
    last = {strategy.travels(number).up: number for number in range(1, LAST + 1)}
    return {number: part for part, number in sorted(last.items(), key=lambda item: item[1])}


def reply(
    dispatch: Dispatch, spec: ModelSpec, client: str, weight: float, base_version: int, seed: int
) -> ClientUpdate:
    """Return what a client answers that trained nothing but moved all that it sends, whole."""
    start = starting_adapter(dispatch, spec)
    generator = torch.Generator().manual_seed(derive_seed(seed, client))
    numbers = take(start, dispatch.sends, dispatch)
    moved = torch.randn(numbers.shape, generator=generator).mul_(LENGTH).add_(numbers)
    known = start if dispatch.sends in ("a", "b") else None
    return ClientUpdate(client, complete(moved, start.layout, dispatch.sends, dispatch, known), weight, base_version)


def replies(
    strategy: AggregationStrategy, state: ServerState, ranks: Sequence[int], weights: Sequence[float] = WEIGHTS
) -> list[ClientUpdate]:
    """Return a round's replies, in the order of the clients' names."""
    found = []
    for place, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        client = ClientInfo(f"client-{place:02d}", rank)
        dispatch = strategy.dispatch(state, client)
        found.append(reply(dispatch, state.spec, client.name, weight, state.base_version, state.round))
    return found


def play(strategy: AggregationStrategy, spec: ModelSpec, ranks: Sequence[int]) -> Iterator[Round]:
    """Yield the rounds worth measuring, each before its merge; the others are merged here."""
    wanted, state = measured_rounds(strategy), strategy.init(spec)
    for number in range(1, max(wanted) + 1):
        given = replies(strategy, state, ranks)
        if number in wanted:
            yield Round(number, wanted[number], state, given)
        if number < max(wanted):
            state = strategy.aggregate(state, given)


def take_in(strategy: AggregationStrategy, given: Round) -> Any:
    """Check and add a round's replies, as the server does one by one; return what is to be finished."""
    accumulated = strategy.begin(given.state)
    for update in given.replies:
        check_update(update, given.state)
        accumulated = strategy.add(accumulated, update)
    return accumulated
