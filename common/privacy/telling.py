"""What may be told under differential privacy: settings that would leak around the guarantee are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.experiment import Experiment

PRIVATE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "federation": {"weighting": "equal"},
    "evaluation": {"on": ["server"]},
}
"""Defaults that differ where a mode of privacy is set: nobody tells how many rows it has, or its losses."""


def with_private_defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that differ under privacy; what the table says itself stays."""
    filled, privacy = dict(table), table.get("privacy")
    if not isinstance(privacy, Mapping) or privacy.get("mode", "none") == "none":
        return filled
    for name, defaults in PRIVATE_DEFAULTS.items():
        section = filled.get(name, {})
        public = name == "federation" and privacy.get("row_counts") == "public" and privacy.get("mode") == "sample"
        if isinstance(section, Mapping) and not public:
            filled[name] = {**defaults, **section}
    return filled


def private_contradictions(experiment: Experiment) -> list[str]:
    """List settings that privacy excludes, in sentences."""
    privacy = experiment.privacy
    found = _idle_budgets(experiment)
    if privacy.mode == "none":
        return found
    found += _of_both(experiment)
    return found + (_of_rows(experiment) if privacy.protects_rows else _of_clients(experiment))


def _idle_budgets(experiment: Experiment) -> list[str]:
    """Refuse to train without noise, or with noise that can be repeated, on data whose owner allows only so much."""
    privacy = experiment.privacy
    if privacy.protects_rows and privacy.test_seed is None:
        return []
    instead = (
        "privacy.test_seed is set; leave it out"
        if privacy.protects_rows
        else (f'privacy.mode is "{privacy.mode}"; set it to "sample"')
    )
    owners = [name for name, client in experiment.clients.items() if client.budget is not None]
    return [
        f"clients.{name}.budget allows only training that protects rows, but {instead}, or remove the budget"
        for name in owners
    ]


def _of_both(experiment: Experiment) -> list[str]:
    federation, privacy = experiment.federation, experiment.privacy
    found = []
    if federation.weighting == "examples" and (privacy.protects_clients or privacy.row_counts == "private"):
        public = ', or declare row counts public with privacy.row_counts = "public"' if privacy.protects_rows else ""
        found.append(
            'federation.weighting = "examples" would tell how many rows a client has, which privacy hides; set it to '
            f'"equal"{public}'
        )
    if privacy.participations is not None and privacy.participations > federation.rounds:
        found.append(
            f"privacy.participations = {privacy.participations} is more than federation.rounds = {federation.rounds}; "
            "lower it or leave it out"
        )
    return found


def _of_rows(experiment: Experiment) -> list[str]:
    training, privacy = experiment.training, experiment.privacy
    found = []
    if training.precision == "fp16":
        found.append('training.precision "fp16" scales the loss, and with it what is clipped; use bf16 or fp32')
    if training.accumulation != 1:
        found.append(
            'training.accumulation has no meaning under privacy.mode = "sample": a step takes the rows that were '
            "drawn, training.batch_size at a time; remove it and choose privacy.sample_rate"
        )
    if privacy.adaptive_clipping:
        found.append('privacy.adaptive_clipping clips clients\' updates; it needs privacy.mode = "client"')
    return found


def _of_clients(experiment: Experiment) -> list[str]:
    federation, privacy = experiment.federation, experiment.privacy
    found = []
    if federation.keep_replies:
        found.append("federation.keep_replies keeps every client's update without noise; privacy excludes it")
    if federation.max_update_norm is not None:
        found.append(
            "federation.max_update_norm tells whose update is large, which privacy of clients does not cover; leave it "
            "out: privacy.clipping_norm bounds every update"
        )
    if federation.max_weight_share is not None:
        found.append('federation.max_weight_share has no meaning under privacy.mode = "client": all weigh the same')
    if experiment.robust.name != "none":
        found.append(
            f"robust rule {experiment.robust.name} chooses by updates without noise, which privacy of clients does not "
            'cover; use robust.name = "none": clipping bounds every client already'
        )
    if privacy.adaptive_clipping and experiment.secure_aggregation.enabled:
        found.append(
            "privacy.adaptive_clipping needs to see each update's norm, which secure_aggregation hides; switch one off"
        )
    return found
