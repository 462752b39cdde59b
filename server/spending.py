"""What clients report of their privacy: checked, recorded, and the reason for a run to end early."""

from __future__ import annotations

from common.errors import RejectedUpdate
from common.experiment import Experiment
from common.messages import PrivacyReport, TrainAnswer
from server.federation import Federation
from server.progress import announce
from server.record import RoundRecord

SLACK = 1e-9
"""Relative: sums of floats on two machines."""


def check_report(answer: TrainAnswer, experiment: Experiment) -> None:
    """Refuse an answer that does not say what the experiment's privacy demands, or tells more.

    Raises
    ------
    RejectedUpdate
        With what is missing or wrong.
    """
    privacy, report = experiment.privacy, answer.privacy
    if privacy.mode != "none" and answer.metrics:
        raise RejectedUpdate(f"it tells {', '.join(sorted(answer.metrics))[:200]}, which privacy forbids")
    if privacy.hides_counts and answer.num_examples != 1:
        raise RejectedUpdate("it tells how many rows it has, which privacy hides")
    if not privacy.protects_rows:
        if report is not None:
            raise RejectedUpdate("it says what protecting its rows cost, which the experiment does not ask for")
        return
    if report is None:
        raise RejectedUpdate("it does not say what privacy its training cost")
    asked = {
        "clipping_norm": privacy.clipping_norm,
        "delta": privacy.delta,
        "steps": experiment.training.steps,
        "sample_rate": _sample_rate(experiment, answer.client),
    }
    for name, value in asked.items():
        if getattr(report, name) != value:
            raise RejectedUpdate(f"it trained with {name} {getattr(report, name):g}, the experiment says {value:g}")
    if report.epsilon > privacy.epsilon * (1 + SLACK):
        raise RejectedUpdate(f"it has spent ε = {report.epsilon:.4g} of privacy.epsilon = {privacy.epsilon:g}")


def record_report(federation: Federation, record: RoundRecord, client: str, report: PrivacyReport | None) -> None:
    """Write what a client's training cost, where it says so, into the record; one with no round left is done."""
    if report is None:
        return
    if not report.rounds_left:
        federation.exhausted.add(client)
    record.measure("epsilon", report.epsilon, client)
    if report.second_epsilon is not None:
        record.measure("second_epsilon", report.second_epsilon, client)
    record.measure("noise_multiplier", report.noise_multiplier, client)
    record.measure("rounds_left", float(report.rounds_left), client)


def record_least_noise(record: RoundRecord) -> None:
    """Write the least noise of the round's clients as the federation's."""
    told = [value for name, value, client, _ in record.metrics if name == "noise_multiplier" and client]
    if told:
        record.measure("noise_multiplier", min(told))


def leave_out_the_spent(federation: Federation, number: int) -> None:
    """Where clients are protected as a whole, draw nobody any more whose budget allows no further round."""
    if not federation.experiment.privacy.protects_clients:
        return
    if new := sorted(federation.account.spent() - federation.exhausted):
        federation.exhausted.update(new)
        words = f"{', '.join(new)} will not be drawn any more: the privacy budget is spent"
        announce("notice", words, max(number - 1, 0), clients=new)


def spent_out(federation: Federation) -> str | None:
    """Say why the run ends where privacy budgets are spent; None where it can go on."""
    spent = sorted(federation.exhausted)
    if not spent:
        return None
    if federation.experiment.privacy.on_exhausted == "stop":
        return f"stopped: the privacy budget of {', '.join(spent)} is spent (privacy.on_exhausted)"
    training = [name for name, settings in federation.clients.items() if settings.trains]
    if training and not set(training) - federation.exhausted:
        return "stopped: the privacy budget of every client is spent"
    return None


def _sample_rate(experiment: Experiment, client: str) -> float:
    settings = experiment.simulated_clients().get(client)
    own = settings.sample_rate if settings is not None else None
    return own if own is not None else experiment.privacy.sample_rate
