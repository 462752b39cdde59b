"""What privacy may be asked for: numbers out of range, settings that would tell what it hides, and other defaults."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.experiment import Experiment
from common.privacy.settings import Budget, PrivacySettings


def parsed(privacy: dict[str, Any], **others: Any) -> Experiment:
    return Experiment.parse(
        {"task": {"name": "low_rank_regression"}, "clients": {"ada": {}, "ben": {}}, "privacy": privacy, **others}
    )


def problems(privacy: dict[str, Any], **others: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parsed(privacy, **others)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


ROWS, CLIENTS = {"mode": "sample"}, {"mode": "client"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epsilon", value) for value in (0, -1, math.inf, math.nan, "much")),
        *(("delta", value) for value in (0, -1e-5, 1, 2, math.nan)),
        *(("clipping_norm", value) for value in (0, -1, math.inf, math.nan)),
        *(("noise_multiplier", value) for value in (0, -0.5, math.inf, math.nan)),
        *(("sample_rate", value) for value in (0, -0.1, 1.01, math.nan)),
        *(("participations", value) for value in (0, -1, 1.5)),
        *(("target_quantile", value) for value in (0, 1)),
        *(("clipping_rate", value) for value in (0, 1.5)),
        ("mode", "record"),
        ("accountant", "gdp"),
        ("gradients", "ew"),
        ("test_seed", -1),
        ("sigma", 1),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(key: str, value: object) -> None:
    (problem,) = problems({**ROWS, key: value})
    assert f"privacy.{key}" in problem


@pytest.mark.parametrize(("key", "value"), [("epsilon", 0), ("epsilon", math.inf), ("delta", 1), ("delta", 0)])
def test_an_owners_budget_is_a_budget(key: str, value: float) -> None:
    (problem,) = problems(ROWS, clients={"ada": {"budget": {"epsilon": 3, key: value}}})
    assert f"clients.ada.budget.{key}" in problem
    assert Budget(epsilon=3).delta == 1e-5


def test_every_bad_number_is_told_at_once() -> None:
    assert len(problems({**ROWS, "epsilon": 0, "delta": 1, "sample_rate": 2})) == 3


def test_without_privacy_nothing_changes() -> None:
    plain = parsed({})
    assert plain == Experiment.parse({"task": {"name": "low_rank_regression"}, "clients": {"ada": {}, "ben": {}}})
    assert (plain.privacy, plain.federation.weighting, plain.evaluation.on) == (
        PrivacySettings(),
        "examples",
        ("clients",),
    )
    assert not any((plain.privacy.protects_rows, plain.privacy.protects_clients, plain.privacy.hides_counts))


@pytest.mark.parametrize("privacy", [ROWS, CLIENTS])
def test_under_privacy_nobody_tells_its_rows_or_its_losses(privacy: dict[str, Any]) -> None:
    made = parsed(privacy)
    assert (made.federation.weighting, made.evaluation.on) == ("equal", ("server",))
    assert made.privacy.hides_counts
    assert made.privacy.protects_rows is (privacy is ROWS)
    assert made.privacy.protects_clients is (privacy is CLIENTS)
    said = parsed(privacy, evaluation={"on": ["server", "clients"]}, federation={"rounds": 3})
    assert (said.evaluation.on, said.federation.rounds, said.federation.weighting) == (
        ("server", "clients"),
        3,
        "equal",
    )


def test_row_counts_that_are_public_weigh_again() -> None:
    public = parsed({**ROWS, "row_counts": "public"})
    assert public.federation.weighting == "examples"
    assert not public.privacy.hides_counts
    assert parsed({**CLIENTS, "row_counts": "public"}).federation.weighting == "equal"


BY_ROWS = {"weighting": "examples"}


@pytest.mark.parametrize(
    ("privacy", "others", "words"),
    [
        (ROWS, {"federation": BY_ROWS}, 'federation.weighting = "examples" would tell how many rows'),
        (CLIENTS, {"federation": BY_ROWS}, 'federation.weighting = "examples" would tell how many rows'),
        (
            {**ROWS, "participations": 9},
            {"federation": {"rounds": 4}},
            "participations = 9 is more than federation.rounds = 4",
        ),
        (ROWS, {"training": {"precision": "fp16"}}, "scales the loss"),
        (ROWS, {"training": {"accumulation": 2}}, "training.accumulation has no meaning"),
        ({**ROWS, "adaptive_clipping": True}, {}, 'needs privacy.mode = "client"'),
        (CLIENTS, {"federation": {"keep_replies": True}}, "federation.keep_replies keeps every client's update"),
        (CLIENTS, {"federation": {"max_update_norm": 2.0}}, "federation.max_update_norm tells whose update is large"),
        (CLIENTS, {"federation": {"max_weight_share": 0.5}}, "federation.max_weight_share has no meaning"),
        (CLIENTS, {"robust": {"name": "krum"}}, "robust rule krum chooses by updates without noise"),
        (
            {**CLIENTS, "adaptive_clipping": True},
            {"secure_aggregation": {"enabled": True}},
            "adaptive_clipping needs to see each update's norm",
        ),
        (
            CLIENTS,
            {"clients": {"ada": {"budget": {"epsilon": 1}}, "ben": {}}},
            "clients.ada.budget allows only training",
        ),
        (
            {**ROWS, "test_seed": 1},
            {"clients": {"ada": {"budget": {"epsilon": 1}}, "ben": {}}},
            "privacy.test_seed is set; leave it out",
        ),
    ],
)
def test_what_privacy_excludes_is_refused_with_what_to_do(
    privacy: dict[str, Any], others: dict[str, Any], words: str
) -> None:
    found = problems(privacy, **others)
    assert any(words in problem for problem in found), found


def test_rows_may_be_protected_with_what_only_clients_exclude() -> None:
    """Updates carry their noise already: they may be kept, weighed by a rule, and bounded."""
    parsed(ROWS, federation={"keep_replies": True, "max_update_norm": 2.0}, robust={"name": "krum"})
    parsed({**ROWS, "row_counts": "public"}, federation=BY_ROWS)


def test_contradictions_are_told_together() -> None:
    found = problems(ROWS, federation=BY_ROWS, training={"precision": "fp16", "accumulation": 2})
    assert len(found) == 3
