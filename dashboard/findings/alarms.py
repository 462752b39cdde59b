"""What in a run needs somebody: rules over plain values, each with what to do next.

A rule says at most a few sentences, in words for people who never saw the code. The severity is ``error`` where the
run does not go on or its result cannot be used, ``warning`` where it will get there, ``note`` where it is worth
knowing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from common.wording import counted, duration
from dashboard.findings.pace import ago
from dashboard.findings.refusing import cause
from dashboard.findings.slowness import named, slow, took

Severity = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")

OFTEN = 3
"""Rounds of the last few that a client must have missed."""
NEARLY = 0.8
"""Share of a deadline or a budget that is nearly all of it."""
LARGE_ERROR = 0.25
QUIET_S = 60.0
QUIET_ROUNDS = 5.0
"""A run is quiet for long after this many of its usual rounds, and a minute at least."""
NAMED = 3
"""Clients that an alarm names, each in a sentence of its own."""


@dataclass(frozen=True)
class Alarm:
    """Something that needs somebody.

    Parameters
    ----------
    severity : {"error", "warning", "note"}
        How much.
    sentence : str
        What is the matter; may hold text of the store.
    action : str
        What to do or to look at.
    command : tuple of str
        What to type, after ``lorafleet``; empty for nothing.
    """

    severity: Severity
    sentence: str
    action: str
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """A client that was left out of so many of the last rounds: how and why the last time."""

    client: str
    rounds: int
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules look at.

    Parameters
    ----------
    run : str
        Id of the run.
    status, written_status : str
        Whether it lives, and what its row says: a run whose process is gone is still written as ``running``.
    reason : str
        Why it is what it is.
    done, planned : int
        Rounds.
    silence : float, seconds
        Since anything was recorded; ``since_sign``: since the process last gave a sign of life.
    usual : float, seconds
        What a round takes; 0 where none has ended.
    failed_rounds : int
        How many failed; ``last_failed`` and ``failure``: the newest, and why; ``last_ended``: the newest that ended.
    taken, asked, needed : int
        Replies of that last round.
    watched : int
        Rounds that ``missing`` and ``seconds`` are about.
    missing : tuple of Missing
        Clients left out, most often first.
    seconds : tuple of (str, float)
        What clients usually need for a round.
    slowest : (str, float) or None
        Client and seconds of the longest reply of the last round; ``deadline``: what it had.
    losses : tuple of (int, float)
        Round and loss of the last evaluations; ``best`` and ``best_round``: the lowest so far.
    error : float or None
        Of the last merge, whether it was ``exact``, and its round.
    epsilon, budget : float or None
        Privacy spent and allowed.
    """

    run: str
    status: str
    written_status: str
    reason: str = ""
    done: int = 0
    planned: int = 0
    silence: float = 0.0
    since_sign: float = 0.0
    usual: float = 0.0
    failed_rounds: int = 0
    last_failed: int | None = None
    failure: str = ""
    last_ended: int | None = None
    taken: int = 0
    asked: int = 0
    needed: int = 0
    watched: int = 0
    missing: tuple[Missing, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    slowest: tuple[str, float] | None = None
    deadline: float = math.inf
    losses: tuple[tuple[int, float], ...] = ()
    best: float | None = None
    best_round: int | None = None
    error: float | None = None
    exact: bool = False
    merged_round: int | None = None
    epsilon: float | None = None
    budget: float | None = None

    @property
    def lives(self) -> bool:
        """Whether something can still be done about its rounds."""
        return self.status == "running"

    @property
    def trouble(self) -> Severity:
        """How much it matters that rounds go badly: in a run that has ended it is worth knowing."""
        return "warning" if self.lives else "note"


def alarms(facts: Facts) -> list[Alarm]:
    """Return what needs somebody, the gravest first; nothing for a run that is well."""
    found = [alarm for rule in RULES for alarm in rule(facts)]
    return sorted(found, key=lambda alarm: ORDER.index(alarm.severity))


def _ended(facts: Facts) -> Iterator[Alarm]:
    resume = ("resume", facts.run)
    where = f"after round {facts.done} of {facts.planned}"
    if facts.written_status == "running" and facts.status == "interrupted":
        sign = f"its last sign of life was {ago(facts.since_sign)}, {where}"
        words = f"The process that wrote this run is gone; {sign}."
        yield Alarm("error", words, "Nothing is lost. Go on where it stopped:", resume)
    elif facts.status == "failed":
        sentence = f"The run failed {where}: {facts.reason or 'no reason was recorded'}"
        yield Alarm("error", sentence, "Mend the cause, then go on where it stopped:", resume)
    elif facts.status == "interrupted":
        yield Alarm("warning", f"The run was interrupted {where}.", "Go on where it stopped:", resume)


def _quiet(facts: Facts) -> Iterator[Alarm]:
    if facts.lives and facts.silence > max(QUIET_S, QUIET_ROUNDS * facts.usual):
        usually = f"; a round usually takes {duration(facts.usual)}" if facts.usual else ""
        until = duration(facts.deadline)
        latest = f" Clients that do not answer are given up after {until}." if _has_deadline(facts) else ""
        yield Alarm(
            "warning",
            f"Nothing has happened for {duration(facts.silence)}{usually}.",
            f"The process lives: see in its terminal what it waits for.{latest}",
        )


def _has_deadline(facts: Facts) -> bool:
    return math.isfinite(facts.deadline)


def _failed_rounds(facts: Facts) -> Iterator[Alarm]:
    if facts.last_failed is None:
        return
    newest = facts.last_failed == facts.last_ended
    others = f" {counted(facts.failed_rounds, 'round')} failed in all." if facts.failed_rounds > 1 else ""
    yield Alarm(
        facts.trouble if newest else "note",
        f"Round {facts.last_failed} failed: {facts.failure or 'no reason was recorded'}.{others}",
        f"It changed nothing. Choose round {facts.last_failed} below to see who did not reply, and why.",
    )


def _quorum(facts: Facts) -> Iterator[Alarm]:
    if facts.last_failed != facts.last_ended and 0 < facts.needed == facts.taken < facts.asked:
        yield Alarm(
            facts.trouble,
            f"Round {facts.last_ended} had {facts.taken} of {facts.asked} replies and needed {facts.needed}: "
            "with one less it would have failed.",
            "See below who did not reply. A round needs the share federation.min_completion of its clients.",
        )


def _left_out(facts: Facts) -> Iterator[Alarm]:
    often = [row for row in facts.missing if row.rounds >= OFTEN]
    for row in often[:NAMED]:
        what, hint = cause(row.status, row.reason)
        why = f" ({row.reason})" if row.reason else ""
        words = f"{row.client} was left out of {row.rounds} of the last {facts.watched} rounds. {what}{why}."
        yield Alarm(facts.trouble, words, hint)
    if len(often) > NAMED:
        yield Alarm(
            facts.trouble,
            f"{len(often) - NAMED} more clients were left out of at least {OFTEN} of the last {facts.watched} rounds.",
            "The page Clients lists them all.",
        )


def _straggler(facts: Facts) -> Iterator[Alarm]:
    found = slow(dict(facts.seconds))
    if not found.clients:
        return
    others = took(found.others)
    words = f"{named(found)} are slow: the others need {others} a round."
    if len(found.clients) == 1:
        client, seconds = found.clients[0]
        words = f"{client} is slow: it needs {took(seconds)} a round, the others {others}."
    yield Alarm(
        facts.trouble,
        f"{words} Every round waits.",
        "A smaller rank or fewer training.steps shorten its rounds; federation.deadline_s ends them earlier.",
    )


def _deadline(facts: Facts) -> Iterator[Alarm]:
    if facts.slowest and _has_deadline(facts) and facts.slowest[1] >= NEARLY * facts.deadline:
        client, seconds = facts.slowest
        yield Alarm(
            facts.trouble,
            f"{client} took {duration(seconds)} of the {duration(facts.deadline)} a client has to answer.",
            "A little slower and it is left out: raise federation.deadline_s.",
        )


def _loss(facts: Facts) -> Iterator[Alarm]:
    if not facts.losses:
        return
    export = ("export", facts.run, "--best", "--format", "peft", "--out", "adapter") if facts.best_round else ()
    number, last = facts.losses[-1]
    values = [loss for _, loss in facts.losses]
    if not math.isfinite(last):
        yield Alarm(
            "error",
            f"The loss of round {number} is not a finite number: training has run away.",
            "Begin again with a lower training.learning_rate, or take the best round's adapter:",
            export,
        )
    elif len(values) > OFTEN and facts.best is not None and _rises(values) and last > facts.best:
        yield Alarm(
            facts.trouble,
            f"The loss has risen for {len(values) - 1} evaluations, from {values[0]:.4g} to {last:.4g}; "
            f"the best was {facts.best:.4g} in round {facts.best_round}.",
            "Lower training.learning_rate or training.steps, or take the best round's adapter:",
            export,
        )


def _rises(values: list[float]) -> bool:
    return all(after > before for before, after in pairwise(values))


def _merge(facts: Facts) -> Iterator[Alarm]:
    if facts.error is None or facts.exact or facts.error <= LARGE_ERROR:
        return
    yield Alarm(
        "note",
        f"The merge of round {facts.merged_round} is {facts.error:.0%} away from the exact average of the updates."
        if math.isfinite(facts.error)
        else f"The merge of round {facts.merged_round} has no finite distance to the exact average of the updates.",
        "That is how this strategy works with these ranks; flora, ffa_lora and flexlora merge more exactly.",
    )


def _privacy(facts: Facts) -> Iterator[Alarm]:
    if facts.epsilon is None or not facts.budget or facts.epsilon < NEARLY * facts.budget:
        return
    spent = f"ε is {facts.epsilon:.3g} of {facts.budget:.3g}"
    if facts.epsilon >= facts.budget:
        yield Alarm(facts.trouble, f"The privacy budget is spent: {spent}.", "The page Privacy shows whose.")
    else:
        words = f"The privacy budget is nearly spent: {spent} ({facts.epsilon / facts.budget:.0%})."
        yield Alarm(facts.trouble, words, "The page Privacy shows whose, and how many rounds are left.")


RULES: tuple[Callable[[Facts], Iterator[Alarm]], ...] = (
    _ended,
    _loss,
    _quiet,
    _failed_rounds,
    _quorum,
    _left_out,
    _straggler,
    _deadline,
    _privacy,
    _merge,
)
