"""Pace: what is left, in words."""

from __future__ import annotations

import pytest

from common.experiment import quorum
from dashboard.findings.pace import ago, phase, rough, time_left, time_words


@pytest.mark.parametrize(
    ("share", "asked", "needed"), [(0.5, 4, 2), (0.5, 5, 3), (0.3, 10, 3), (0.0, 4, 1), (1.0, 7, 7), (1e308, 4, 4)]
)
def test_replies_needed_are_those_of_the_server(share: float, asked: int, needed: int) -> None:
    assert quorum(share, asked) == needed


@pytest.mark.parametrize(
    ("recent", "rounds", "elapsed", "left"),
    [
        ((), 5, 0.0, None),
        ((10.0, 12.0, 60.0), 3, 4.0, 32.0),  # the median is 12: two whole rounds and 8 s of this one
        ((10.0,), 1, 25.0, 0.0),  # this one takes longer than usual; nobody knows how long
        ((10.0,), 0, 0.0, 0.0),
    ],
)
def test_time_left_takes_the_median_round(
    recent: tuple[float, ...], rounds: int, elapsed: float, left: float | None
) -> None:
    assert time_left(recent, rounds, elapsed) == left


@pytest.mark.parametrize(
    ("recent", "rounds", "elapsed", "words"),
    [
        ((), 5, 0.0, ("–", "")),
        ((10.0,), 4, 4.0, ("about 40 s", "")),
        ((10.0,), 1, 4.0, ("a few seconds", "")),
        ((10.0,), 4, 12.0, ("over 30 s", "past the usual 10.0 s")),
        ((10.0,), 1, 12.0, ("unknown", "past the usual 10.0 s")),
    ],
)
def test_time_left_in_words(recent: tuple[float, ...], rounds: int, elapsed: float, words: tuple[str, str]) -> None:
    assert time_words(recent, rounds, elapsed) == words


@pytest.mark.parametrize(
    ("number", "step", "replied", "words"),
    [
        (None, "", 0, "waiting for clients to join"),
        (0, "round_started", 0, "measuring the model before training"),
        (0, "committed", 0, "done; the next one begins"),
        (3, "round_started", 0, "orders go out to the clients"),
        (3, "dispatched", 3, "clients are training"),
        (3, "dispatched", 4, "all replies are there; they are being merged"),
        (3, "aggregated", 4, "updates are merged; the model is being evaluated"),
        (3, "anything", 0, "begins"),
    ],
)
def test_phases_in_words(number: int | None, step: str, replied: int, words: str) -> None:
    assert phase(number, step, replied, 4) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "just now"), (12.3, "12 s ago"), (60, "1 minute ago"), (7_300, "2 hours ago"), (200_000, "2 days ago")],
)
def test_how_long_ago(seconds: float, words: str) -> None:
    assert ago(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "a few seconds"), (47, "50 s"), (200, "3 min"), (9_000, "2.5 h"), (200_000, "2.3 days")]
)
def test_estimates_have_few_digits(seconds: float, words: str) -> None:
    assert rough(seconds) == words
