"""How a run stands: the round under way, what rounds took lately, who was left out, what it cost so far."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Double, cast, func, select

from common.store import Round
from common.store.models import ClientRoundRow, EventRow, RoundRow
from common.store.reading import read_rounds
from dashboard.findings.timelines import LONGEST_S
from dashboard.queries.clients import work
from dashboard.queries.rounds import federation_metric
from dashboard.queries.runs import LOSSES
from dashboard.queries.tables import finite

RECENT = 10
"""Rounds that tell how long a round takes."""
WATCHED = 5
"""Rounds in which clients are watched for being late or left out."""
EVALUATIONS = 4
"""Evaluations that tell where the loss is going."""
STEPS = ("round_started", "dispatched", "aggregated", "committed", "failed")
MISSING = ("rejected", "failed", "late", "offline")


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes
    ----------
    begun : Round or None
        The newest round.
    step : str
        Kind of the newest event that says how far that round is; empty if there is none.
    replied : int
        Clients whose replies it has so far.
    taken, asked, needed : int
        Replies of the last training round that ended, clients it asked, replies it needed (0: not told).
    recent : tuple of float, seconds
        What the last training rounds took, newest last.
    failed : int
        Rounds that failed.
    last_failed : Round or None
        The newest of them.
    bytes_up, bytes_down, seconds : float
        Of all rounds together.
    epsilon : float or None
        Largest privacy spending so far.
    loss_name : str
        What the run is judged by; empty if it was never evaluated.
    first_loss : float or None
        Of the first evaluation.
    losses : tuple of (int, float)
        Round and loss of the last evaluations; may hold numbers that are not finite.
    merged : Round or None
        The newest round that was committed after training.
    newest_event : int
        Id of the newest event; another one whenever something happened.
    """

    begun: Round | None
    step: str
    replied: int
    taken: int
    asked: int
    needed: int
    recent: tuple[float, ...]
    failed: int
    last_failed: Round | None
    bytes_up: float
    bytes_down: float
    seconds: float
    epsilon: float | None
    loss_name: str
    first_loss: float | None
    losses: tuple[tuple[int, float], ...]
    merged: Round | None
    newest_event: int


@dataclass(frozen=True)
class Clients:
    """What clients did in the last training rounds that ended.

    Attributes
    ----------
    rounds : int
        How many rounds were looked at.
    missing : tuple of (str, int, str, str)
        Client, number of rounds it was left out of, what it was the last time, and why; most often first.
    seconds : tuple of (str, float)
        Client and what it usually needs for a round, slowest first; over more rounds than these, as on all pages.
    slowest : (str, float) or None
        Client and seconds of the longest work of the very last round.
    """

    rounds: int
    missing: tuple[tuple[str, int, str, str], ...]
    seconds: tuple[tuple[str, float], ...]
    slowest: tuple[str, float] | None


def standing(connection: Connection, run: str) -> Standing:
    """Return how a run stands."""
    begun = _newest(connection, run)
    taken, asked, needed = _last_quorum(connection, run)
    up, down, seconds, epsilon = _sums(connection, run)
    name, first, losses = _losses(connection, run)
    return Standing(
        begun=begun,
        step=_step(connection, run, begun.round) if begun else "",
        replied=_replied(connection, run, begun.round) if begun else 0,
        taken=taken,
        asked=asked,
        needed=needed,
        recent=_recent(connection, run),
        failed=_failed(connection, run),
        last_failed=_newest(connection, run, "failed", 0),
        bytes_up=up,
        bytes_down=down,
        seconds=seconds,
        epsilon=epsilon,
        loss_name=name,
        first_loss=first,
        losses=losses,
        merged=_newest(connection, run, "committed"),
        newest_event=connection.execute(select(func.max(EventRow.id)).where(EventRow.run == run)).scalar() or 0,
    )


def watched_clients(connection: Connection, run: str) -> Clients:
    """Return what clients did in the last training rounds that ended."""
    ended = select(RoundRow.round).where(RoundRow.run == run, RoundRow.round > 0, RoundRow.status != "running")
    rounds = list(connection.execute(ended.order_by(RoundRow.round.desc()).limit(WATCHED)).scalars())
    row = ClientRoundRow
    columns = (row.round, row.client, row.status, row.reason, row.seconds)
    wanted = (row.run == run, row.round.in_(rounds))
    missing: dict[str, list[tuple[str, str]]] = {}
    last: list[tuple[float, str]] = []
    for number, client, status, reason, took in connection.execute(
        select(*columns).where(*wanted).order_by(row.round.desc(), row.client)
    ):
        if status in MISSING:
            missing.setdefault(client, []).append((status, reason or ""))
        elif 0 < took < LONGEST_S:
            last += [(took, client)] if number == rounds[0] else []
    out = [(client, len(told), *told[0]) for client, told in missing.items()]
    often = sorted(out, key=lambda row: (-row[1], row[0]))
    needs = ((client, known.seconds) for client, known in work(connection, run).items())
    slow = sorted(needs, key=lambda row: (-row[1], row[0]))
    slowest = max(last, default=None)
    return Clients(len(rounds), tuple(often), tuple(slow), (slowest[1], slowest[0]) if slowest else None)


def _newest(connection: Connection, run: str, status: str = "", first: int = 1) -> Round | None:
    wanted = [RoundRow.run == run, *([RoundRow.status == status, RoundRow.round >= first] if status else [])]
    number = connection.execute(select(func.max(RoundRow.round)).where(*wanted)).scalar()
    return None if number is None else read_rounds(connection, run, number)[0]


def _step(connection: Connection, run: str, number: int) -> str:
    wanted = (EventRow.run == run, EventRow.kind.in_(STEPS), EventRow.round == number)
    newest = select(EventRow.kind).where(*wanted).order_by(EventRow.id.desc()).limit(1)
    return connection.execute(newest).scalar() or ""


def _replied(connection: Connection, run: str, number: int) -> int:
    row = ClientRoundRow
    wanted = (row.run == run, row.round == number, row.status.in_(("received", "accepted")))
    return connection.execute(select(func.count()).select_from(row).where(*wanted)).scalar_one()


def _last_quorum(connection: Connection, run: str) -> tuple[int, int, int]:
    """Return replies taken, clients asked and replies needed of the last training round that ended."""
    ended = (RoundRow.run == run, RoundRow.status != "running", RoundRow.round > 0)
    number = connection.execute(select(func.max(RoundRow.round)).where(*ended)).scalar()
    if number is None:
        return 0, 0, 0
    asked = len(read_rounds(connection, run, number)[0].cohort)
    wanted = (EventRow.run == run, EventRow.kind == "aggregated", EventRow.round == number)
    told = connection.execute(select(EventRow.data).where(*wanted).order_by(EventRow.id.desc()).limit(1)).scalar()
    needed = told.get("needed") if isinstance(told, dict) else None
    whole = needed if isinstance(needed, int) and not isinstance(needed, bool) else 0
    return _replied(connection, run, number), asked, whole


def _failed(connection: Connection, run: str) -> int:
    wanted = (RoundRow.run == run, RoundRow.status == "failed")
    return int(connection.execute(select(func.count()).select_from(RoundRow).where(*wanted)).scalar_one())


def _recent(connection: Connection, run: str) -> tuple[float, ...]:
    wanted = (RoundRow.run == run, RoundRow.round > 0, RoundRow.status != "running")
    newest = select(RoundRow.seconds).where(*wanted).order_by(RoundRow.round.desc()).limit(RECENT)
    found = list(connection.execute(newest).scalars())
    return tuple(seconds for seconds in reversed(found) if 0 <= seconds < LONGEST_S)


def _sums(connection: Connection, run: str) -> tuple[float, float, float, float | None]:
    """Add up as fractions: sums of lying whole numbers pass what 64 bits hold."""
    row = RoundRow
    seconds = func.sum(row.seconds).filter(finite(row.seconds))
    epsilon = func.max(row.epsilon).filter(finite(row.epsilon))
    columns = (func.sum(cast(row.bytes_up, Double)), func.sum(cast(row.bytes_down, Double)), seconds, epsilon)
    up, down, took, spent = connection.execute(select(*columns).where(row.run == run)).one()
    return up or 0.0, down or 0.0, took or 0.0, spent


def _losses(connection: Connection, run: str) -> tuple[str, float | None, tuple[tuple[int, float], ...]]:
    for name in LOSSES:
        found = federation_metric(connection, run, name)
        if len(found):
            last = found.tail(EVALUATIONS)
            pairs = zip(last["round"].tolist(), last["value"].tolist(), strict=True)
            return name, float(found["value"].iloc[0]), tuple(pairs)
    return "", None, ()
