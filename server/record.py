"""What is known of a round while it goes on, until its commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from common.wording import size
from server.timeline import Timeline


@dataclass
class RoundRecord:
    """All that is known of a round when it is committed; ``repeated``: a resumed run tries this failed round again."""

    number: int
    cohort: tuple[str, ...]
    base_version: int
    started_at: datetime
    attempt: int = 1
    status: str = "committed"
    reason: str | None = None
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: list[tuple[str, float, str, str]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    error: float | None = None
    exact: bool = False
    samples: str | None = None
    repeated: bool = False
    statistics: dict[str, Any] = field(default_factory=dict)
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.timeline = Timeline(self.started_at.timestamp())

    def measure(self, name: str, value: float, client: str = "", layer: str = "") -> None:
        """Add a number, of the whole federation unless a client or layer is named."""
        self.metrics.append((name, value, client, layer))

    @property
    def epsilon(self) -> float | None:
        """The largest privacy spending a client has reported in this round."""
        return max((value for name, value, client, _ in self.metrics if name == "epsilon" and client), default=None)

    @property
    def rounds_left(self) -> int | None:
        """The fewest further rounds a client's privacy budget allows, as reported in this round."""
        told = (value for name, value, client, _ in self.metrics if name == "rounds_left" and client)
        return int(least) if (least := min(told, default=None)) is not None else None

    def value(self, name: str) -> float | None:
        """Return a number of the whole federation."""
        return next(
            (value for key, value, client, layer in self.metrics if (key, client, layer) == (name, "", "")),
            None,
        )


def best_metric(record: RoundRecord) -> float | None:
    """Return the number runs are judged by: held-out loss, or the server's where clients do not evaluate."""
    held_out = record.value("held_out_loss")
    return record.value("unseen_loss") if held_out is None else held_out


def sentence(record: RoundRecord) -> str:
    """Say in one line how a round ended."""
    if record.status == "failed":
        return f"round {record.number} failed: {record.reason}"
    replied = sum(values["status"] == "accepted" for values in record.clients.values())
    loss = best_metric(record)
    shown = "" if loss is None else f", loss {loss:.4f}"
    if record.number == 0:
        return f"before training{shown}"
    return f"round {record.number}: {replied} of {len(record.cohort)} replied, {size(record.bytes_up)} up{shown}"
