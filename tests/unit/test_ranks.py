"""The rank a client trains: its own, the adapter's, what its device carries, what its bytes allow."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ConfigurationError
from common.experiment import ClientSettings
from common.federation import ModelSpec
from common.messages import Presence
from server.plan import make_plan
from server.ranks import RankChoice, choose_rank, explained
from strategies import AGGREGATION, aggregation_strategy
from tests.tiny import synthetic

SPEC = ModelSpec({"wide": (4, 60), "tall": (60, 4)}, seed=1)
"""A rank of both layers is 128 numbers, clamped to 4; 64 of them in b, 64 in a."""


def choice(strategy: str = "flora", device: int | None = None, wire: str = "fp32", **settings: object) -> RankChoice:
    experiment = synthetic(f"federation.wire={wire}")
    client = ClientSettings.model_validate(settings)
    node = Presence(client="ada", max_rank=device, memory_bytes=8_000_000_000)
    return choose_rank(experiment, aggregation_strategy(strategy), SPEC, client, 8, node)


def rank(strategy: str = "flora", device: int | None = None, wire: str = "fp32", **settings: object) -> int:
    return choice(strategy, device, wire, **settings).rank


@pytest.mark.parametrize(
    ("own", "device", "expected"),
    [(None, None, 8), (None, 2, 8), (3, None, 3), (16, 2, 16), ("auto", None, 8), ("auto", 2, 2), ("auto", 99, 8)],
)
def test_a_rank_without_a_budget(own: object, device: int | None, expected: int) -> None:
    assert rank(rank=own, device=device) == expected


@pytest.mark.parametrize(
    ("strategy", "wire", "budget", "expected"),
    [
        ("flora", "fp32", 4 * 128 * 3, 3),
        ("flora", "fp32", 4 * 128 * 3 - 1, 2),
        ("flora", "fp16", 4 * 128 * 3, 4),  # ranks above 4 are clamped there, and cost no more
        ("flora", "int8", 130, 1),
        ("ffa_lora", "fp32", 4 * 64 * 3, 3),
        ("fedsa_lora", "fp32", 4 * 64 * 3, 3),
        ("rolora", "fp32", 4 * 64 * 3, 3),
        ("fed_sb", "fp32", 4 * 64 * 3, 3),  # the rounds that seek its frames cost most
        ("slora", "fp32", 4 * 128 * 3, 3),
    ],
)
def test_the_largest_rank_whose_every_upload_fits(strategy: str, wire: str, budget: int, expected: int) -> None:
    found = rank(strategy, wire=wire, upload_bytes=budget)
    assert min(found, 4) == expected
    assert found == (8 if expected == 4 else expected)


def test_a_budget_never_raises_a_rank() -> None:
    assert rank(rank=2, upload_bytes=10**9) == 2
    assert rank(rank="auto", device=1, upload_bytes=10**9) == 1


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, None, (8, "the adapter's rank")),
        ({"rank": 3}, 2, (3, "set in the experiment")),
        ({"rank": "auto"}, 2, (2, "largest that fits the device (8.0 GB free)")),
        ({"rank": "auto"}, 99, (8, "the adapter's rank, which fits the device (8.0 GB free)")),
        ({"rank": "auto"}, None, (8, "the adapter's rank, as its device did not say what fits")),
        ({"upload_bytes": 4 * 128 * 3}, None, (3, "largest whose upload fits 1,536 bytes")),
        ({"rank": 2, "upload_bytes": 10**9}, None, (2, "set in the experiment")),
    ],
)
def test_every_rank_has_its_reason(settings: dict[str, Any], device: int | None, expected: RankChoice) -> None:
    assert choice(device=device, **settings) == expected


def test_a_rank_above_the_size_of_layers_says_so() -> None:
    spec = ModelSpec({"narrow": (2, 60), "small": (60, 4), "wide": (60, 60)}, seed=1)
    said = [explained(RankChoice(rank, "so"), spec) for rank in (2, 4, 8)]
    assert said == ["so", "so; clamped to 2 in 1 of 3 layers", "so; clamped to 2 to 4 in 2 of 3 layers"]


def test_every_round_counts_however_many_are_planned() -> None:
    """Were only planned rounds to count, a run that is extended would change its ranks."""
    lopsided = ModelSpec({"wide": (4, 60)}, seed=1)
    client = ClientSettings(upload_bytes=4 * 60 * 2)
    for rounds in (1, 2, 9):
        experiment = synthetic(f"federation.rounds={rounds}")
        assert choose_rank(experiment, aggregation_strategy("rolora"), lopsided, client, 4).rank == 2


def test_too_small_a_budget_is_refused_with_what_it_takes() -> None:
    said = r"upload_bytes = 511 holds not even rank 1, which needs 512; raise it, or choose a smaller federation\.wire"
    with pytest.raises(ConfigurationError, match=said):
        rank(upload_bytes=511)


def test_the_plan_names_every_client_whose_budget_is_too_small() -> None:
    options = (f"clients.client-{number}.upload_bytes=10" for number in (1, 3))
    with pytest.raises(ConfigurationError) as caught:
        make_plan(synthetic(*options))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["client client-1", "client client-3"]


@pytest.mark.parametrize("name", AGGREGATION.names())
def test_planned_uploads_keep_the_budgets(name: str) -> None:
    equal = not AGGREGATION.plugin(name).capabilities.mixed_ranks
    budgets = [1500] * 4 if equal else [900, 1200, 1500, 2000]
    given = [f"clients.client-{number}.upload_bytes={budget}" for number, budget in enumerate(budgets, 1)]
    plan = make_plan(synthetic(f"strategy.name={name}", *given, ranks=(16,) * 4))
    for client, budget in zip(plan.clients, budgets, strict=True):
        assert 0 < client.bytes_up <= budget
        assert client.rank < 16
