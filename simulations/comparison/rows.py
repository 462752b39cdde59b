"""What a comparison measures: the numbers of one run, and their mean and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.store import ClientRound, Metric, Round

Status = Literal["completed", "partial", "refused", "failed"]

MEASURES = (
    "held_out_loss",
    "best_loss",
    "perplexity",
    "excess_loss",
    "worst_client_loss",
    "unseen_loss",
    "change",
    "bytes_up_per_client",
    "bytes_down_per_client",
    "bytes_up",
    "bytes_down",
    "seconds",
    "error",
    "epsilon",
    "left_out",
)
"""Losses are those of the last evaluated round, ``best_loss`` the lowest, ``change`` the fall or rise of the
held-out loss since round 0; ``error`` is the mean over rounds, ``epsilon`` what the client that spent most has spent of
its privacy, ``left_out`` counts replies that were."""

TASK_MEASURES = ("perplexity", "excess_loss")
"""Measured by some tasks only: how far the loss is above the known optimum, and so on."""

LOSSES = ("held_out_loss", "worst_client_loss", "unseen_loss")
"""Of each round, as the server names them."""


@dataclass(frozen=True)
class Point:
    """A federation after one round.

    Parameters
    ----------
    round : int
        0 is before training.
    held_out, worst, unseen : float or None
        Losses; None where the round was not evaluated.
    nbytes : float or None
        Sent so far per client, up and down together; None where nothing needs to travel.
    """

    round: int
    held_out: float | None = None
    worst: float | None = None
    unseen: float | None = None
    nbytes: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one row's run under one seed; several runs where each owner trains alone.

    Parameters
    ----------
    seed : int
        Of the experiment.
    runs : tuple of str
        Ids in the store.
    curve : tuple of Point
        One per round, 0 first.
    measures : mapping of str to float
        By the names of ``MEASURES``; what was not measured is missing.
    """

    seed: int
    runs: tuple[str, ...]
    curve: tuple[Point, ...]
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Trouble:
    """Why a row has no numbers for a seed: refused before it began, or failed."""

    seed: int
    status: Literal["refused", "failed"]
    sentence: str


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and sample standard deviation, which takes two of them."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class CurvePoint:
    """Mean over seeds after one round."""

    round: int
    loss: Estimate
    nbytes: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    label : str
        What people call it.
    settings : mapping of str to str
        Varied keys and their values; empty for references.
    reference : bool
        Whether it is there to compare with.
    outcomes : tuple of Outcome
        One per seed that has numbers.
    troubles : tuple of Trouble
        Of the other seeds.
    """

    label: str
    settings: Mapping[str, str]
    reference: bool
    outcomes: tuple[Outcome, ...]
    troubles: tuple[Trouble, ...] = ()

    @property
    def status(self) -> Status:
        """Sum up how its runs ended."""
        if not self.troubles:
            return "completed"
        return "partial" if self.outcomes else self.troubles[0].status

    @property
    def sentences(self) -> tuple[str, ...]:
        """Why numbers are missing, each reason once."""
        return tuple(dict.fromkeys(trouble.sentence for trouble in self.troubles))

    @property
    def measures(self) -> dict[str, Estimate]:
        """Mean and spread of every measure all its outcomes have."""
        return {
            name: estimate([outcome.measures[name] for outcome in self.outcomes])
            for name in MEASURES
            if self.outcomes and all(name in outcome.measures for outcome in self.outcomes)
        }

    def curve(self, loss: Callable[[Point], float | None]) -> list[CurvePoint]:
        """Average a loss over the seeds, round by round, where all of them were evaluated."""
        found = []
        for points in zip(*(outcome.curve for outcome in self.outcomes), strict=False):
            losses = [value for point in points if (value := loss(point)) is not None]
            sent = [point.nbytes for point in points if point.nbytes is not None]
            if len(losses) == len(points):
                found.append(CurvePoint(points[0].round, estimate(losses), sum(sent) / len(sent) if sent else None))
        return found


def has_losses(rows: Iterable[Row]) -> bool:
    """Tell whether there is anything to draw."""
    return any(name in row.measures for row in rows for name in ("held_out_loss", "unseen_loss"))


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and sample standard deviation; NaN as soon as a value is not finite."""
    count = len(values)
    if not all(map(math.isfinite, values)):
        return Estimate(math.nan, None, count)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None, count)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)), count)


def outcome_of(
    seed: int,
    run: str,
    rounds: Sequence[Round],
    metrics: Iterable[Metric],
    clients: Iterable[ClientRound],
    sharing: int | None,
) -> Outcome:
    """Read one run's numbers.

    Parameters
    ----------
    seed : int
        Of the experiment.
    run : str
        Id.
    rounds, metrics, clients
        What the store holds of the run.
    sharing : int or None
        Clients among whom the bytes are shared; None leaves bytes and merge error out, for references.
    """
    federation = {(m.round, m.name): m.value for m in metrics if not m.client and not m.layer}
    curve, sent = [], 0
    for row in rounds:
        sent += row.bytes_up + row.bytes_down
        held_out, worst, unseen = (federation.get((row.round, name)) for name in LOSSES)
        curve.append(Point(row.round, held_out, worst, unseen, sent / sharing if sharing else None))
    measures = measures_of(curve)
    measures |= _of_the_task(federation)
    measures["seconds"] = sum(row.seconds for row in rounds)
    measures["left_out"] = sum(client.status not in ("received", "accepted") for client in clients)
    if sharing:
        measures |= _traffic(rounds, sharing)
        if errors := [row.error for row in rounds if row.error is not None]:
            measures["error"] = sum(errors) / len(errors)
    if spent := [row.epsilon for row in rounds if row.epsilon is not None]:
        measures["epsilon"] = max(spent)
    return Outcome(seed, (run,), tuple(curve), measures)


def alone(parts: Sequence[tuple[Outcome, float]]) -> Outcome:
    """Put the runs of owners that train alone together, as a federation puts its clients' losses together.

    Parameters
    ----------
    parts : sequence of (Outcome, examples)
        One per owner, with the held-out examples its loss counts for.
    """
    outcomes = [outcome for outcome, _ in parts]
    weights = [examples for _, examples in parts]
    curve = [_together(points, weights) for points in zip(*(outcome.curve for outcome in outcomes), strict=False)]
    measures = measures_of(curve)
    if all("perplexity" in outcome.measures for outcome in outcomes) and "held_out_loss" in measures:
        measures["perplexity"] = math.exp(min(measures["held_out_loss"], 700.0))
    for name in ("seconds", "left_out"):
        measures[name] = sum(outcome.measures[name] for outcome in outcomes)
    if spent := [outcome.measures["epsilon"] for outcome in outcomes if "epsilon" in outcome.measures]:
        measures["epsilon"] = max(spent)
    runs = tuple(run for outcome in outcomes for run in outcome.runs)
    return Outcome(outcomes[0].seed, runs, tuple(curve), measures)


def measures_of(curve: Sequence[Point]) -> dict[str, float]:
    """Return the measures that follow from the losses round by round."""
    found: dict[str, float] = {}
    if held_out := [point.held_out for point in curve if point.held_out is not None]:
        last = held_out[-1]
        found["held_out_loss"], found["best_loss"], found["change"] = last, min(held_out), last - held_out[0]
    if worst := [point.worst for point in curve if point.worst is not None]:
        found["worst_client_loss"] = worst[-1]
    if unseen := [point.unseen for point in curve if point.unseen is not None]:
        found["unseen_loss"] = unseen[-1]
    return found


def _of_the_task(federation: Mapping[tuple[int, str], float]) -> dict[str, float]:
    """Pick what some tasks measure beside the loss, of the last round that has it; keys are round and name."""
    newest = {name: federation[number, name] for number, name in sorted(federation)}
    return {name: newest[f"held_out_{name}"] for name in TASK_MEASURES if f"held_out_{name}" in newest}


def _together(points: Sequence[Point], weights: Sequence[float]) -> Point:
    judged = [(p.held_out, weight) for p, weight in zip(points, weights, strict=True) if p.held_out is not None]
    unseen = [point.unseen for point in points if point.unseen is not None]
    total = sum(weight for _, weight in judged)
    return Point(
        points[0].round,
        sum(loss * weight for loss, weight in judged) / total if judged else None,
        max(loss for loss, _ in judged) if judged else None,
        sum(unseen) / len(unseen) if unseen else None,
    )


def _traffic(rounds: Sequence[Round], sharing: int) -> dict[str, float]:
    up, down = sum(row.bytes_up for row in rounds), sum(row.bytes_down for row in rounds)
    shared = {"bytes_up_per_client": up / sharing, "bytes_down_per_client": down / sharing}
    return {**shared, "bytes_up": up, "bytes_down": down}
