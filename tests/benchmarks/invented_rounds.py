"""One round of an invented run, as the server would hold it before its commit, and as it would tell it."""

from __future__ import annotations

from datetime import datetime

import numpy as np

from common.store import Event
from server.record import RoundRecord, sentence
from tests.benchmarks.invented_runs import FATES, REASONS, InventedRun


def recorded(run: InventedRun, number: int, started: datetime) -> RoundRecord:
    """Return a round as the server would hold it before the commit."""
    record = RoundRecord(number, tuple(run.names) if number else (), max(0, number - 1), started)
    if number:
        _add_clients(record, run, number)
        _add_merge(record, run, number)
        trained = float(run.durations[number]) - run.aggregation - run.evaluation
        record.phases = {"train": trained, "aggregate": run.aggregation}
    record.phases["evaluate"] = run.evaluation
    _add_evaluation(record, run, number)
    return record


def _add_clients(record: RoundRecord, run: InventedRun, number: int) -> None:
    for i, client in enumerate(run.names):
        fate = FATES[run.fates[number, i]]
        nbytes = run.bytes_of(i)
        up, down = nbytes if fate in ("accepted", "rejected") else 0, 0 if fate == "offline" else nbytes
        values = {"status": fate, "rank": int(run.ranks[i]), "bytes_up": up, "bytes_down": down}
        if fate == "accepted":
            values |= {"num_examples": int(run.examples[i]), "seconds": float(run.seconds[number, i])}
            if not run.story.private:
                record.measure("train_loss", float(run.train_loss[number, i]), client)
        else:
            values["reason"] = REASONS[fate]
        record.clients[client] = values
        record.bytes_up += up
        record.bytes_down += down


def _add_merge(record: RoundRecord, run: InventedRun, number: int) -> None:
    accepted = run.fates[number] == 0
    weights = run.examples * accepted
    if not run.story.private:
        record.measure("train_loss", float(np.average(run.train_loss[number], weights=weights)))
    record.exact = run.story.strategy in ("flora", "ffa_lora")
    record.error = 2e-8 if record.exact else 0.08 + 0.001 * float(run.norm[number].mean())
    if run.story.strategy in ("flexlora", "lora_lego"):
        record.measure("discarded_energy", 0.02 + 0.01 * float(run.cosine[number].std()))
    for i in np.flatnonzero(accepted):
        record.measure("cosine_to_mean", float(run.cosine[number, i]), run.names[i])
        record.measure("update_norm", float(run.norm[number, i]), run.names[i])
    for layer, rank in zip(run.layers, run.layer_ranks(number), strict=True):
        record.measure("effective_rank", float(rank), layer=layer)
        record.measure("merged_norm", 0.1 * float(rank), layer=layer)


def _add_evaluation(record: RoundRecord, run: InventedRun, number: int) -> None:
    """Add losses; a client under differential privacy tells none, but what it has spent."""
    losses = run.held_out[number]
    record.measure("unseen_loss", float(losses.mean()) * 1.02)
    spent = run.epsilon(number)
    if spent is not None:
        for client, epsilon in zip(run.names, spent, strict=True):
            record.measure("epsilon", float(epsilon), client)
            record.measure("noise_multiplier", 1.1, client)
        return
    for client, loss in zip(run.names, losses, strict=True):
        record.measure("held_out_loss", float(loss), client)
    record.measure("held_out_loss", float(np.average(losses, weights=run.examples)))
    record.measure("worst_client_loss", float(losses.max()))
    record.measure("client_loss_spread", float(losses.max() - losses.min()))


def events(name: str, run: InventedRun, record: RoundRecord, started: datetime, ended: datetime) -> list[Event]:
    """Tell a round as the server does."""
    number, total = record.number, run.size.rounds
    asked = [client for client, values in record.clients.items() if values["status"] != "offline"]
    taken = sum(values["status"] == "accepted" for values in record.clients.values())
    begun = {"clients": list(record.cohort), "rounds": total}
    told = [Event(name, "round_started", f"round {number} of {total}", started, number, data=begun)]
    if number:
        told.append(Event(name, "dispatched", f"{len(asked)} clients train", started, number, data={"n": len(asked)}))
    for client, values in record.clients.items():
        if values["status"] not in ("accepted", "offline"):
            text = f"{client} is left out: {values['reason']}"
            told.append(Event(name, "left_out", text, ended, number, client, {"status": values["status"]}))
    if number:
        needed = (len(record.cohort) + 1) // 2
        numbers = {"k": taken, "n": len(record.cohort), "needed": needed}
        told.append(Event(name, "aggregated", f"{taken} updates merged", ended, number, data=numbers))
    return [*told, Event(name, "committed", sentence(record), ended, number)]
