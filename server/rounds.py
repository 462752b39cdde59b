"""The round loop: plan, train, screen, aggregate, evaluate, commit, and again.

A plain function over Flower's Grid. Whatever kills the process, a run goes on at the first round that was not
committed, with the replies it had received.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from common.errors import RunError
from common.experiment import Experiment, quorum
from common.federation import ServerState
from common.workspace import cpu_threads
from server.certificate import write_certificate
from server.cohort import absent, is_evaluated, training_cohort
from server.evaluation import evaluation_phase
from server.federation import Federation
from server.members import record_members
from server.orders import as_sent
from server.progress import announce
from server.record import RoundRecord, best_metric
from server.secure.sums import secure_phase
from server.spending import leave_out_the_spent, record_least_noise, spent_out
from server.training import Collection, training_phase


def run_rounds(
    federation: Federation, state: ServerState, first: int, best: float | None = None, best_round: int | None = None
) -> ServerState:
    """Run the rounds that are left.

    Parameters
    ----------
    federation : Federation
        The run.
    state : ServerState
        After the last committed round, or fresh.
    first : int
        Round to begin with; 0 evaluates the untrained model.
    best : float, optional
        Best loss so far.
    best_round : int, optional
        Round that had it.

    Returns
    -------
    ServerState
        After the last round.

    Raises
    ------
    RunError
        If too few nodes join, a failed round stops the run, or no round trained anything.
    """
    settings = federation.experiment.federation
    federation.nodes.wait_for(federation.clients, settings.cohort_size or 1, settings.join_timeout_s)
    for number in range(first, settings.rounds + 1):
        if out_of_patience(federation.experiment, number - 1, best_round):
            words = f"stopped: {settings.patience} rounds without a better loss (federation.patience)"
            announce("notice", words, number - 1)
            break
        leave_out_the_spent(federation, number)
        if reason := spent_out(federation):
            announce("notice", reason, number - 1)
            break
        record, state = run_round(federation, state, number)
        loss = best_metric(record)
        improved = loss is not None and (best is None or loss < best)
        best, best_round = (loss, number) if improved else (best, best_round)
        record.repeated = record.status == "failed" and settings.on_failure == "stop"
        federation.journal.commit(record, state, improved)
        _announce_end(record, federation)
        if record.repeated:
            raise RunError(f"round {number} failed: {record.reason}; mend it and resume the run")
    if state.round == 0:
        raise RunError(
            f"no round brought a valid reply, so nothing was trained; see why: lorafleet runs show {federation.run}"
        )
    return state


def out_of_patience(experiment: Experiment, done: int, best_round: int | None) -> bool:
    """Tell whether ``federation.patience`` ends a run after ``done`` rounds."""
    patience = experiment.federation.patience
    return patience is not None and done - (best_round or 0) >= patience


def run_round(federation: Federation, state: ServerState, number: int) -> tuple[RoundRecord, ServerState]:
    """Run one round up to its commit."""
    online = federation.nodes.online()
    record_members(federation, online)
    able = online.keys() - federation.exhausted
    cohort = training_cohort(federation.experiment, federation.clients, number, able) if number else []
    begun = federation.journal.begin(number, cohort, state.base_version)
    record = RoundRecord(number, begun.cohort, state.base_version, datetime.now(UTC), begun.attempt)
    total = federation.experiment.federation.rounds
    announce("round_started", f"round {number} of {total}", number, clients=list(begun.cohort), rounds=total)
    collection = None
    if number:
        away = absent(federation.experiment, federation.clients, number, online)
        record.clients = {name: {"status": "offline", "reason": reason} for name, reason in away.items()}
        with _timed(record, "train"):
            phase = secure_phase if federation.experiment.secure_aggregation.enabled else training_phase
            collection = phase(federation, state, record, online)
        with _timed(record, "aggregate"):
            state = _merged(federation, state, collection)

    def certify() -> None:
        if collection is not None and record.status == "committed":
            write_certificate(federation, state, collection)

    if is_evaluated(federation.experiment, number):
        with _timed(record, "evaluate"):
            evaluation_phase(federation, state, record, online, certify)
    else:
        certify()
    return record, replace(state, merged=None, metrics={})


def _merged(federation: Federation, state: ServerState, collection: Collection) -> ServerState:
    """Merge what was collected if the quorum holds; otherwise the round has failed and changes nothing."""
    record = collection.record
    settings = federation.experiment.federation
    needed = max(quorum(settings.min_completion, len(record.cohort)), federation.rule.least_updates)
    if record.status != "failed" and len(collection.accepted) < needed:
        record.status = "failed"
        count = len(collection.accepted)
        replies = "valid reply" if count == 1 else "valid replies"
        record.reason = f"{count} {replies} of {len(record.cohort)}, {needed} needed"
    if record.status == "failed":
        announce("round_failed", f"round {record.number} failed: {record.reason}", record.number)
        return state
    with cpu_threads(federation.experiment.training.threads):
        merged = as_sent(collection.merge(), federation.strategy, federation.experiment.federation.wire_down)
    for name, value in sorted(merged.metrics.items()):
        record.measure(name, value)
    _mean_train_loss(collection)
    record_least_noise(record)
    taken, asked = len(collection.accepted), len(record.cohort)
    announce("aggregated", f"{taken} updates merged", record.number, k=taken, n=asked, needed=needed)
    return merged


def _mean_train_loss(collection: Collection) -> None:
    record, weights = collection.record, collection.weights
    told = {client: value for name, value, client, _ in record.metrics if name == "train_loss"}
    losses = {client: told[client] for client in collection.accepted if client in told}
    if losses:
        total = sum(weights[client] for client in losses)
        record.measure("train_loss", sum(weights[client] * loss for client, loss in losses.items()) / total)


@contextmanager
def _timed(record: RoundRecord, phase: str) -> Iterator[None]:
    begun = record.timeline.now()
    try:
        yield
    finally:
        record.phases[phase] = record.timeline.serve(phase, begun)


def _announce_end(record: RoundRecord, federation: Federation) -> None:
    if record.status == "failed":
        return
    numbers = {name: value for name, value, client, layer in record.metrics if not client and not layer}
    announce(
        "committed",
        f"round {record.number} committed",
        record.number,
        metrics=numbers,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        error=record.error,
        epsilon=record.epsilon,
        rounds_left=record.rounds_left,
        rounds=federation.experiment.federation.rounds,
    )
