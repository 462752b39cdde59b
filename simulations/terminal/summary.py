"""A run as plain values, for ``--json`` and for whoever asks how it stands."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.store import Client, ClientRound, Metric, Round, Run, RunStore, shown_status
from common.store.engine import URL_VARIABLE
from simulations.terminal.privacy_summary import privacy_summary

EARLY_EVENTS = 20
"""What a run promises is told among so many events at its beginning."""

OF_CLIENTS = ("cosine_to_mean", "update_norm", "trust", "download_discarded_energy")
OF_LAYERS = ("effective_rank", "merged_norm")
"""Numbers a round's certificate has for each client and each layer."""


def run_line(store: RunStore, run: Run) -> dict[str, Any]:
    """Describe a run without its rounds."""
    return {
        "id": run.id,
        "status": shown_status(store, run),
        "reason": run.reason,
        "name": run.name,
        "task": run.task,
        "strategy": run.strategy,
        "seed": run.seed,
        "rounds_done": run.rounds_done,
        "rounds_planned": run.rounds_planned,
        "best_round": run.best_round,
        "best_metric": run.best_metric,
        "created_at": run.created_at.isoformat(),
        "finished_at": run.finished_at.isoformat() if run.finished_at else None,
        "adapter": str(store.home / run.adapter_path) if run.adapter_path else None,
        "sha256": run.adapter_sha256,
    }


def list_summary(home: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Describe the runs of a home, newest first; a home that was not made yet has none."""
    if not home.exists() and URL_VARIABLE not in os.environ:
        return []
    with RunStore.open(home, read_only=True) as store:
        return [run_line(store, run) for run in store.runs(limit)]


def run_summary(store: RunStore, name: str) -> dict[str, Any]:
    """Describe a run with its rounds that ended, what clients did in them and are, and its files.

    Parameters
    ----------
    store : RunStore
        Where it is.
    name : str
        Its id, the beginning of it, or ``last``.

    Raises
    ------
    UnknownNameError
        If there is no such run.
    """
    run = store.get_run(name)
    metrics = store.metrics(run.id)
    return run_line(store, run) | {
        "home": str(store.home),
        "rounds": [_round(row, metrics) for row in ended_rounds(store, run.id)],
        "clients": [_client(row) for row in store.client_rounds(run.id)],
        "members": [_member(row) for row in store.members(run.id)],
        "privacy": privacy_summary(run, metrics, store.events(run.id, limit=EARLY_EVENTS)),
        "artifacts": [
            {"kind": file.kind, "path": str(store.home / file.path), "sha256": file.sha256, "round": file.round}
            for file in store.artefacts(run.id)
        ],
    }


def ended_rounds(store: RunStore, run_id: str) -> list[Round]:
    """Return the rounds that were committed or failed, in order."""
    return [row for row in store.rounds(run_id) if row.status != "running"]


def round_metrics(metrics: list[Metric], number: int) -> dict[str, float]:
    """Pick the federation's numbers of one round."""
    return {m.name: m.value for m in metrics if m.round == number and not m.client and not m.layer}


def json_text(value: Any) -> str:
    """Write JSON for a script, in one line: numbers that JSON does not know become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _round(row: Round, metrics: list[Metric]) -> dict[str, Any]:
    return {
        "round": row.round,
        "status": row.status,
        "reason": row.reason,
        "cohort": list(row.cohort),
        "metrics": round_metrics(metrics, row.round),
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "seconds": row.seconds,
        "phases": dict(row.phases),
        "error": row.error,
        "exact": row.exact,
        "epsilon": row.epsilon,
        "certificate": _certificate(metrics, row.round),
    }


def _certificate(metrics: list[Metric], number: int) -> dict[str, Any]:
    """Pick what is known of a round's merge beside its error: by layer, by client, and of the whole."""
    here = [metric for metric in metrics if metric.round == number]
    by_client = {name: {m.client: m.value for m in here if m.name == name and m.client} for name in OF_CLIENTS}
    by_layer = {name: {m.layer: m.value for m in here if m.name == name and m.layer} for name in OF_LAYERS}
    lost = next((m.value for m in here if m.name == "discarded_energy" and not m.client and not m.layer), None)
    return {"discarded_energy": lost} | {name: found for name, found in (by_client | by_layer).items() if found}


def _client(row: ClientRound) -> dict[str, Any]:
    return {
        "round": row.round,
        "client": row.client,
        "status": row.status,
        "reason": row.reason,
        "rank": row.rank,
        "num_examples": row.num_examples,
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "seconds": row.seconds,
    }


def _member(row: Client) -> dict[str, Any]:
    return {
        "client": row.client,
        "joined_at": row.joined_at.isoformat(),
        "rank": row.rank,
        "rank_reason": row.rank_reason,
        "device": row.device,
        "memory_bytes": row.memory_bytes,
        "max_rank": row.max_rank,
    }
