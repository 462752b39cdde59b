"""What a round's timeline says, as far as it is what it should be: who was busy with what, and how long."""

from __future__ import annotations

from typing import Any

Spans = dict[str, list[tuple[str, float, float]]]
"""By client: phase, start and end in seconds since the round began."""

LONGEST_S = 1e9
"""What would be longer, some thirty years, is no duration of anything here."""
WORK = ("download", "train", "upload")
"""Phases of a training order that are a client's own, in their order; before them it may wait for its turn."""


def client_spans(data: Any) -> Spans:
    """Return the spans of the clients in the data of a statistic ``timeline``; whatever is malformed is left out."""
    clients = data.get("clients") if isinstance(data, dict) else None
    if not isinstance(clients, dict):
        return {}
    found = {name: _spans(spans) for name, spans in clients.items() if isinstance(spans, list)}
    return {name: spans for name, spans in found.items() if spans}


def trained(spans: Spans) -> dict[str, dict[str, float]]:
    """Return the seconds of each phase of training by client, of those whose training was not lost."""
    phases = {client: {phase for phase, _, _ in parts} for client, parts in spans.items()}
    return {
        client: _lengths(parts)
        for client, parts in spans.items()
        if "train" in phases[client] and "lost" not in phases[client]
    }


def _lengths(parts: list[tuple[str, float, float]]) -> dict[str, float]:
    """Add up the phases of training, up to the first evaluation: the wait before that is another one."""
    lengths = dict.fromkeys(WORK, 0.0)
    trained = False
    for phase, start, end in parts:
        if trained and phase not in ("train", "upload"):
            break
        trained = trained or phase == "train"
        if phase in lengths:
            lengths[phase] += end - start
    return lengths


def _spans(spans: list[Any]) -> list[tuple[str, float, float]]:
    return [(span[0], float(span[1]), float(span[2])) for span in spans if _is_span(span)]


def _is_span(span: Any) -> bool:
    if not (isinstance(span, list) and len(span) == 3 and isinstance(span[0], str)):
        return False
    start, end = span[1:]
    if not all(isinstance(at, int | float) and not isinstance(at, bool) for at in (start, end)):
        return False
    return bool(0 <= start <= end < LONGEST_S)
