"""What the store knows of a run's privacy, as plain values: promised, spent, left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.errors import ConfigurationError
from common.experiment import Experiment
from common.privacy.settings import UNIT
from common.store import Event, Metric, Run

PROMISE = "privacy"
"""Kind of the event that says what a run's privacy protects."""


def privacy_summary(run: Run, metrics: Sequence[Metric], events: Sequence[Event]) -> dict[str, Any] | None:
    """Describe a run's privacy; None without, and where its settings cannot be read.

    Parameters
    ----------
    run : Run
        With its settings.
    metrics : sequence of Metric
        Of all rounds; clients' ``epsilon``, ``second_epsilon``, ``noise_multiplier`` and ``rounds_left`` are looked at.
    events : sequence of Event
        One of them may say what one row is.
    """
    try:
        experiment = Experiment.from_json(run.experiment)
    except ConfigurationError:
        return None
    privacy = experiment.privacy
    if privacy.mode == "none":
        return None
    clients = _clients(metrics)
    left = [client["rounds_left"] for client in clients if client["rounds_left"] is not None]
    return {
        "mode": privacy.mode,
        "unit": next((event.data.get("unit") for event in events if event.kind == PROMISE), UNIT[privacy.mode]),
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "clipping_norm": privacy.clipping_norm,
        "private": privacy.test_seed is None,
        "counts": "the data" if experiment.simulation.persistent_ledger else "this run",
        "epsilon": max((client["epsilon"] for client in clients), default=None),
        "rounds_left": min(left, default=None),
        "clients": clients,
    }


def _clients(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """List what each client last reported, by name."""
    latest: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        held = latest.setdefault(metric.client, {}) if metric.client and not metric.layer else {}
        if metric.name not in held or held[metric.name].round <= metric.round:
            held[metric.name] = metric
    return [_client(name, held) for name, held in sorted(latest.items()) if "epsilon" in held]


def _client(name: str, held: dict[str, Metric]) -> dict[str, Any]:
    def value(of: str) -> float | None:
        return held[of].value if of in held else None

    left = value("rounds_left")
    return {
        "client": name,
        "epsilon": held["epsilon"].value,
        "second_epsilon": value("second_epsilon"),
        "noise_multiplier": value("noise_multiplier"),
        "rounds_left": None if left is None else int(left),
        "round": held["epsilon"].round,
    }
