"""The head of a run's page: how it stands, how long it will take, and what needs somebody."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import NamedTuple

import streamlit as st

from common.experiment import quorum
from common.store import Run, RunStatus, last_sign
from common.wording import counted, duration, size
from dashboard.commands import typed
from dashboard.findings.alarms import Alarm, Facts, Missing, alarms
from dashboard.findings.budget import Policy
from dashboard.findings.pace import ago, phase, time_words
from dashboard.metric_words import metric_words
from dashboard.queries.standing import Clients, Standing
from dashboard.session import source
from dashboard.settings import amount, positive, setting
from dashboard.words import code, plain

SHOWN_ALARMS = 8
WIDTH = 168
"""Of a number at the top: two of them fit beside one another on a phone."""


@dataclass(frozen=True)
class Seen:
    """A run as it was when it was looked at."""

    run: Run
    status: RunStatus
    standing: Standing
    clients: Clients
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def mark(self) -> tuple[object, ...]:
        """Another one whenever more than the head of the page has changed."""
        return self.status, self.run.status, self.run.rounds_done, self.run.adapter_sha256, self.standing.newest_event

    @property
    def under_way(self) -> bool:
        """Whether the newest round has not ended in a run that goes on."""
        begun = self.standing.begun
        return self.status == "running" and begun is not None and begun.status == "running"


class Quorum(NamedTuple):
    """Replies a round has or had, clients it asked, and replies it needs."""

    replied: int
    asked: int
    needed: int


def head(seen: Seen) -> None:
    """Show how a run stands."""
    _numbers(seen)
    _bar(seen)
    found = alarms(facts_of(seen))
    with st.container():
        for alarm in found[:SHOWN_ALARMS]:
            _show(alarm)
        if len(found) > SHOWN_ALARMS:
            st.caption(f"And {counted(len(found) - SHOWN_ALARMS, 'lesser matter')}.")
        if not found:
            st.success("All is well: nothing here needs anybody.", icon=":material/check_circle:")


def quorum_of(seen: Seen) -> Quorum:
    """Return the replies of the round under way, or of the last training round that ended."""
    standing, begun = seen.standing, seen.standing.begun
    if seen.under_way and begun is not None and begun.round > 0:
        asked = len(begun.cohort)
        told = standing.needed if asked == standing.asked else 0
        return Quorum(standing.replied, asked, max(told, _needed(seen.run, asked)))
    needed = standing.needed or _needed(seen.run, standing.asked)
    return Quorum(standing.taken, standing.asked, needed)


def facts_of(seen: Seen) -> Facts:
    """Return what the alarms look at."""
    run, standing, clients = seen.run, seen.standing, seen.clients
    failed, merged, begun = standing.last_failed, standing.merged, standing.begun
    last_ended = max((row.round for row in (failed, merged) if row is not None), default=None)
    return Facts(
        run=run.id,
        status=seen.status,
        written_status=run.status,
        reason=run.reason or "",
        done=run.rounds_done,
        planned=max(0, run.rounds_planned),
        silence=_seconds(seen.at, run.updated_at) if begun else 0.0,
        since_sign=_seconds(seen.at, last_sign(run)),
        usual=median(standing.recent) if standing.recent else 0.0,
        failed_rounds=standing.failed,
        last_failed=failed.round if failed else None,
        failure=(failed.reason or "") if failed else "",
        last_ended=last_ended,
        taken=standing.taken,
        asked=standing.asked,
        needed=standing.needed or _needed(run, standing.asked),
        watched=clients.rounds,
        missing=tuple(Missing(*row) for row in clients.missing),
        seconds=clients.seconds,
        slowest=clients.slowest,
        deadline=positive(setting(run, "federation.deadline_s")) or math.inf,
        losses=standing.losses,
        best=run.best_metric,
        best_round=run.best_round,
        error=merged.error if merged else None,
        exact=merged.exact if merged else False,
        merged_round=merged.round if merged else None,
        epsilon=standing.epsilon,
        budget=policy.epsilon if (policy := Policy.of(run)).may_end_early else None,
    )


def _needed(run: Run, asked: int) -> int:
    return quorum(amount(run, "federation.min_completion", 0.5), asked) if asked else 0


def _seconds(later: datetime, earlier: datetime) -> float:
    return max(0.0, (later - earlier).total_seconds())


def _numbers(seen: Seen) -> None:
    run, standing, quorum = seen.run, seen.standing, quorum_of(seen)
    with st.container(horizontal=True, gap="small"):
        st.metric("State", plain(seen.status[:1].upper() + seen.status[1:], 40), help=_state_help(seen), width=WIDTH)
        _metric("Rounds done", f"{run.rounds_done:,} of {max(0, run.rounds_planned):,}")
        _metric(
            "Replies, this round" if seen.under_way else "Replies, last round",
            f"{quorum.replied} of {quorum.asked}" if quorum.asked else "–",
            f"{quorum.needed} needed" if quorum.asked else "",
            "Clients whose update is there, of those asked; with fewer than needed a round fails.",
        )
        _metric(*_time(seen))
        _metric(
            "Last sign of life" if seen.status == "running" else "Last change",
            ago(_seconds(seen.at, last_sign(run))),
            "",
            "A run that goes on gives one every few seconds.",
        )
        best = run.best_metric if run.best_metric is not None and math.isfinite(run.best_metric) else None
        _metric(
            "Best loss",
            "–" if best is None else f"{best:.4f}",
            _since_start(standing, best, run.best_round),
            f"The lowest {metric_words(standing.loss_name).title}, a mean over the clients."
            if best is not None
            else "",
        )
        _metric(
            "Traffic so far",
            size(max(0.0, standing.bytes_up + standing.bytes_down)),
            f"{size(max(0.0, standing.bytes_up))} up",
            "All adapters sent, to the clients and from them.",
        )
        _metric(
            "Privacy spent",
            "–" if standing.epsilon is None else f"ε {standing.epsilon:.3g}",
            "",
            "The largest ε over the clients so far."
            if standing.epsilon is not None
            else "This run adds no noise, so there is no ε; the page Privacy explains.",
        )


def _metric(label: str, value: str, below: str = "", meaning: str = "") -> None:
    st.metric(label, value, below or None, "off", delta_arrow="off", help=meaning or None, width=WIDTH)


def _state_help(seen: Seen) -> str | None:
    if seen.status == "interrupted" and seen.run.status == "running":
        return "Its process is gone."
    return plain(seen.run.reason) if seen.run.reason else None


def _time(seen: Seen) -> tuple[str, str, str, str]:
    """Return label, value, what stands below and what it means."""
    standing = seen.standing
    took = duration(standing.seconds) if math.isfinite(standing.seconds) else "–"
    if seen.status != "running":
        return "Time", took, "", "What all rounds took together."
    left = max(0, seen.run.rounds_planned - seen.run.rounds_done)
    begun = standing.begun
    elapsed = _seconds(seen.at, begun.started_at) if begun and seen.under_way else 0.0
    estimate, remark = time_words(standing.recent, left, elapsed)
    meaning = (
        "Reckoned with the median of the last rounds; it changes when clients become slower or faster. Past the usual: "
        "the round under way already takes longer than that."
    )
    return "Time left", estimate, remark or f"{took} so far", meaning


def _since_start(standing: Standing, best: float | None, number: int | None) -> str:
    if best is None or number is None:
        return ""
    first = standing.first_loss
    return f"round {number}" + (f", at first {first:.4f}" if first is not None and math.isfinite(first) else "")


def _bar(seen: Seen) -> None:
    """Show how far a run is: as a bar, and in words."""
    run, standing = seen.run, seen.standing
    planned = max(1, run.rounds_planned)
    words = f"{plain(seen.status, 40)} after {run.rounds_done:,} of {counted(max(0, run.rounds_planned), 'round')}"
    if seen.status == "running":
        number, quorum = standing.begun.round if standing.begun else None, quorum_of(seen)
        now = phase(number, standing.step, quorum.replied, quorum.asked)
        replies = f": {quorum.replied} of {quorum.asked} replied, {quorum.needed} needed"
        words = "" if number is None else f"Round {number:,} of {planned:,}: "
        words += now + (replies if seen.under_way and standing.step == "dispatched" else "")
    st.progress(min(1.0, max(0.0, run.rounds_done / planned)), words[:1].upper() + words[1:])


def _show(alarm: Alarm) -> None:
    boxes = {"error": st.error, "warning": st.warning, "note": st.info}
    icons = {"error": ":material/error:", "warning": ":material/warning:", "note": ":material/info:"}
    typing = f" {code(typed(source().home, *alarm.command))}" if alarm.command else ""
    words = f"{plain(alarm.sentence, 500)}  \n{plain(alarm.action, 500)}{typing}"
    boxes[alarm.severity](words, icon=icons[alarm.severity])
