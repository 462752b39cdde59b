"""The spans of a round: what a client tells is laid between what the server saw, and never beyond it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ClientError
from common.messages import EvaluateAnswer, TrainAnswer, read_header
from server.timeline import Span, Timeline, Told, spans

TELLS = st.floats(0, 1e9)


def laid(began: float, seconds: float = 4.0, ready: float = 1.0, phase: str = "train") -> list[Span]:
    """Lay out work for an order that was sent at 2 and answered at 12."""
    return spans(phase, 2.0, 12.0, began, Told(0.0, seconds, ready))


def test_a_clock_that_fits_is_believed() -> None:
    assert laid(5.0) == [("wait", 2.0, 5.0), ("download", 5.0, 6.0), ("train", 6.0, 9.0), ("upload", 9.0, 12.0)]


@pytest.mark.parametrize(
    ("began", "begins"),
    [(2.0, 2.0), (1.96, 2.0), (8.0, 8.0), (8.04, 8.0), (1.94, 8.0), (8.06, 8.0), (-1.7e9, 8.0), (9e10, 8.0)],
)
def test_a_clock_counts_within_a_twentieth_of_a_second_and_else_the_work_ends_with_the_answer(
    began: float, begins: float
) -> None:
    found = {name: (start, end) for name, start, end in laid(began)}
    assert found["download"][0] == begins
    assert found["train"][1] == begins + 4
    assert ("upload" in found) == (begins == 2.0)


def test_a_stored_answer_tells_of_more_work_than_there_was_time() -> None:
    assert laid(-100.0, seconds=40.0, ready=10.0) == [("download", 2.0, 4.5), ("train", 4.5, 12.0)]


def test_what_lasts_no_time_is_left_out_but_the_work_itself() -> None:
    assert laid(2.0, seconds=0.0, ready=0.0) == [("train", 2.0, 2.0), ("upload", 2.0, 12.0)]
    assert laid(2.0, seconds=10.0, ready=20.0) == [("download", 2.0, 12.0), ("train", 12.0, 12.0)]


@given(st.floats(-1e12, 1e12), TELLS, TELLS)
def test_whatever_is_told_the_spans_fill_the_servers_frame_and_no_more(
    began: float, seconds: float, ready: float
) -> None:
    found = laid(began, seconds, ready)
    edges = [edge for _, start, end in found for edge in (start, end)]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (2.0, 12.0)
    assert edges[1:-1:2] == edges[2::2]


@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", "1e300"])
@pytest.mark.parametrize("name", ["began", "ready", "seconds"])
def test_times_that_cannot_be_are_refused(name: str, value: str) -> None:
    header = {"client": "ada", "round": 1, "base_version": 0, "num_examples": 1, "seconds": 1}
    text = json.dumps(header | {name: 0}).replace(f'"{name}": 0', f'"{name}": {value}')
    with pytest.raises(ClientError, match=name):
        read_header(TrainAnswer, text)


def test_a_client_that_does_not_tell_stays_valid() -> None:
    plain: dict[str, Any] = {"client": "ada", "round": 1, "num_examples": 1, "seconds": 1}
    assert read_header(EvaluateAnswer, json.dumps(plain)).began == 0
    answer = read_header(TrainAnswer, json.dumps(plain | {"base_version": 0}))
    assert (answer.began, answer.ready) == (0, 0)


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    """Begin a round at 1.7 billion seconds since the epoch, which clients' clocks count from too."""
    return Timeline(1.7e9, clock)


def test_a_round_of_training_and_evaluation(timeline: Timeline, clock: Clock) -> None:
    begun = timeline.now()
    clock.time += 1
    timeline.ask(["ada", "ben"])
    clock.time += 5
    timeline.answered("ada", "train", Told(1.7e9 + 2, 3.0, 1.0), timeline.now())
    clock.time += 1
    timeline.lose("ben")
    assert timeline.serve("train", begun) == 7
    timeline.ask(["ada"])
    clock.time += 4
    timeline.answered("ada", "evaluate", Told(1.7e9 + 8, 2.0), timeline.now())
    assert timeline.data() == {
        "clients": {
            "ada": [
                ("wait", 1.0, 2.0),
                ("download", 2.0, 3.0),
                ("train", 3.0, 5.0),
                ("upload", 5.0, 6.0),
                ("wait", 7.0, 8.0),
                ("evaluate", 8.0, 10.0),
            ],
            "ben": [("lost", 1.0, 7.0)],
        },
        "server": [("train", 0.0, 7.0)],
    }


def test_an_answer_that_turns_out_to_be_useless_is_lost_but_what_was_before_stays(
    timeline: Timeline, clock: Clock
) -> None:
    timeline.ask(["ada"])
    clock.time += 2
    timeline.answered("ada", "train", Told(0.0, 2.0), 2.0)
    timeline.ask(["ada"])
    clock.time += 1
    timeline.answered("ada", "evaluate", Told(0.0, 1.0), 3.0)
    clock.time += 1
    timeline.lose("ada")
    assert timeline.clients["ada"] == [("train", 0.0, 2.0), ("lost", 2.0, 4.0)]


def test_who_was_not_asked_has_no_spans(timeline: Timeline) -> None:
    timeline.lose("ada")
    assert timeline.data() == {"clients": {}, "server": []}
