"""Clients on their page: who is slow, who took part, what each told, why replies were left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy import Connection

from common.store import Client, ClientRound, ClientStatus, Event, Metric, Round, RunStore, Statistic
from dashboard.findings.refusing import cause
from dashboard.findings.roster import natural, roster, worst_first
from dashboard.findings.slowness import Pace, Slow, Work, named, parts, slow, slowest, took, work_of
from dashboard.findings.timelines import client_spans, trained
from dashboard.metric_words import metric_titles, metric_words
from dashboard.queries import client_metrics, clients, refusals
from dashboard.queries.standing import watched_clients
from dashboard.views.clients_charts import extremes
from dashboard.views.clients_tables import left_out_words, reason_table
from dashboard.words import labels, plain
from tests.pages import Opener

START = datetime(2026, 11, 1, tzinfo=UTC)
LATE = "no answer within the deadline of 60 s"
HOSTILE = "<b>[x](javascript:1)</b> $1$"
RUN = "run-1"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three rounds of ada, who is slow, ben, who is left out, and eve, who only evaluates."""
    with RunStore.open(tmp_path, clock=lambda: START) as store:
        _create(store)
        store.record_members(
            [
                Client(RUN, "ada", START, 8, "set in the experiment", "CPU", 2 * 10**9, 16),
                Client(RUN, "ben-10", START, 4, "the adapter's rank"),
                Client(RUN, "eve", START, None, "it only evaluates"),
            ]
        )
        for number in range(4):
            _commit(store, number)
    return tmp_path


@pytest.fixture
def connection(home: Path) -> Iterator[Connection]:
    """Read that store."""
    with RunStore.open(home, read_only=True) as store, store.reading() as connection:
        yield connection


def _create(store: RunStore, experiment: object = None) -> None:
    text = json.dumps(experiment or {"federation": {"weighting": "examples"}})
    store.create_run(
        RUN, name="n", task="t", strategy="flora", seed=0, experiment=text, rounds_planned=3, fingerprint="f"
    )


def _commit(store: RunStore, number: int) -> None:
    """In round 2 ben is late, in round 3 his update is too large; ada needs 6, 7 and 8 seconds, ben 2."""
    statuses: dict[int, ClientStatus] = {1: "accepted", 2: "late", 3: "rejected"}
    reasons = {2: LATE, 3: "the update's norm 41.7 exceeds federation.max_update_norm 10.0"}
    status, reason = statuses.get(number, "accepted"), reasons.get(number)
    ada = ClientRound(RUN, number, "ada", "accepted", None, 8, 300, 10, 20, 5.0 + number)
    ben = ClientRound(RUN, number, "ben-10", status, reason, 4, 100, seconds=2.0)
    losses = {"ada": 2.0 - number / 10, "eve": math.nan if number == 3 else 1.0, "": 1.5}
    metrics = [Metric(RUN, number, "held_out_loss", value, client) for client, value in losses.items()]
    spans = {"ada": [["wait", 0, 1], ["download", 1, 2], ["train", 2, 8], ["upload", 8, 10], ["wait", 10, 50]]}
    store.commit_round(
        Round(RUN, number, START, "committed", cohort=("ada", "ben-10"), committed_at=START),
        [ada, ben] if number else [],
        metrics,
        (),
        [Event(RUN, "notice", "eve did not evaluate: gone", START, number, "eve")] if number == 2 else [],
        [Statistic(RUN, number, "timeline", {"clients": spans, "server": []})] if number else [],
        rounds_done=number,
    )


def test_totals_count_what_became_of_each_client(connection: Connection) -> None:
    found = clients.totals(connection, RUN).set_index("client")
    assert found.loc["ada", ["asked", "accepted", "late", "offline"]].tolist() == [3, 3, 0, 0]
    assert found.loc["ben-10", ["asked", "accepted", "late", "rejected"]].tolist() == [3, 1, 1, 1]


def test_work_is_of_accepted_replies_and_without_waiting(connection: Connection) -> None:
    phases = {"download": 1.0, "train": 6.0, "upload": 2.0}
    assert clients.work(connection, RUN) == {"ada": Work(9.0, 3, 3, phases), "ben-10": Work(2.0, 1, 0, {})}
    assert list(clients.work(connection, RUN, 1)) == ["ada"]


def test_work_is_that_of_the_median_round() -> None:
    rounds = [{"a": (seconds, {"train": seconds}), "b": (4.0, {})} for seconds in (9.0, 1.0, 5.0, 3.0)]
    assert work_of(rounds) == {"a": Work(3.0, 4, 2, {"train": 3.0}), "b": Work(4.0, 4, 2, {})}
    assert work_of([{}]) == {}


def test_rounds_with_a_timeline_tell_more_than_those_without() -> None:
    told = {"train": 2.0, "upload": 5.0}
    assert work_of([{"a": (2.0, {})}, {"a": (7.0, told)}, {"a": (2.5, {})}]) == {"a": Work(7.0, 3, 3, told)}


@pytest.mark.parametrize(
    ("seconds", "clients", "others"),
    [
        ({}, (), 0.0),
        ({"a": 9.0}, (), 9.0),
        ({"a": 9.0, "b": 2.0}, (("a", 9.0),), 2.0),
        ({"a": 8.0, "b": 4.0, "c": 4.0}, (), 4.0),
        ({"a": 0.52, "b": 0.04, "c": 0.04}, (), 0.04),  # nobody waits for half a second
        ({"a": 8.0, "b": 1.0, "c": 9.0, "d": 2.0}, (("c", 9.0), ("a", 8.0)), 1.5),
    ],
)
def test_who_is_slow(seconds: dict[str, float], clients: tuple[tuple[str, float], ...], others: float) -> None:
    assert slow(seconds) == Slow(clients, others)


def test_slow_clients_are_named_the_first_few() -> None:
    four = tuple((f"c-{i}", 9.0 - i) for i in range(4))
    assert named(Slow(four, 1.0)) == "c-0 (9.0 s), c-1 (8.0 s), c-2 (7.0 s) and 1 more"
    assert named(Slow(four[:2], 1.0)) == "c-0 (9.0 s) and c-1 (8.0 s)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "< 0.1 ms"), (0.0314, "31.4 ms"), (0.9994, "999 ms"), (0.9999, "1.0 s"), (61, "1 min 01 s")],
)
def test_short_times_are_milliseconds(seconds: float, text: str) -> None:
    assert took(seconds) == text


def test_what_was_declared_last(connection: Connection) -> None:
    found = clients.declared(connection, RUN).set_index("client")
    assert found.loc["ada"].tolist() == [3, 8, 300]
    assert found.loc["ben-10"].tolist() == [1, 4, 100]


def test_participation_puts_rounds_together(connection: Connection) -> None:
    found = clients.participation(connection, RUN, ("ada", "ben-10"), 2)
    ben = found[found["client"] == "ben-10"]
    assert ben["place"].tolist() == [0, 1]
    assert ben["accepted"].tolist() == [1, 0]
    assert ben["asked"].tolist() == [2, 1]
    assert clients.spans_of_columns(connection, RUN, 2).to_numpy().tolist() == [[0, 1, 2], [1, 3, 3]]
    assert clients.fates(connection, RUN, ("ben-10",))["status"].tolist() == ["accepted", "late", "rejected"]


def test_latest_numbers_and_curves(connection: Connection) -> None:
    assert client_metrics.client_metric_names(connection, RUN) == ["held_out_loss"]
    latest = client_metrics.latest(connection, RUN, "held_out_loss").set_index("client")["value"]
    assert latest["ada"] == 1.7
    assert math.isnan(latest["eve"])
    curve = client_metrics.client_curves(connection, RUN, "held_out_loss", ("", "eve"))
    assert curve[curve["client"] == "eve"]["round"].tolist() == [0, 1, 2]  # NaN is left out
    thinned = client_metrics.client_curves(connection, RUN, "held_out_loss", ("",), points=2)
    assert thinned["round"].tolist() == [1, 3]  # the last of every two


def test_one_client_newest_first(connection: Connection) -> None:
    found = clients.one_client(connection, RUN, "ben-10", 2)
    assert found["round"].tolist() == [3, 2]
    assert found["reason"].tolist()[1] == LATE


def test_refusals_are_put_together_by_cause(connection: Connection) -> None:
    found = pd.concat([refusals.left_out(connection, RUN), refusals.not_evaluated(connection, RUN)])
    table = reason_table(found, {"ben-10": "ben-10", "eve": "eve"})
    assert table["what"].tolist() == [
        "Its update was larger than allowed",
        "No answer within the deadline",
        "It did not evaluate",
    ]
    assert table["who"].tolist() == ["ben-10", "ben-10", "eve"]
    assert table["rounds"].tolist() == ["3", "2", "2"]
    assert refusals.left_out(connection, RUN, "ada").empty


def test_reasons_that_differ_in_a_number_are_one_row() -> None:
    text = "the update's norm {} exceeds federation.max_update_norm 10.0"
    rows = [("rejected", text.format(30 + i), f"c-{i}", 2, i, i + 1) for i in range(5)]
    table = reason_table(pd.DataFrame(rows, columns=["status", "reason", "client", "count", "first", "last"]), {})
    assert table[["count", "rounds", "who"]].to_numpy().tolist() == [[10, "0 to 5", "5 clients: c-4, c-3 and 3 more"]]
    assert table["reason"].tolist() == [text.format(34)]


@pytest.mark.parametrize(
    ("status", "reason", "what"),
    [
        ("late", LATE, "No answer within the deadline"),
        ("offline", "its node is not connected", "Its node was not connected"),
        ("offline", "offline in this round (simulation.offline)", "Away by the simulation's dice"),
        ("failed", "ClientError: dropped out (simulation.dropout)", "Away by the simulation's dice"),
        ("failed", "OutOfMemoryError: CUDA out of memory", "It ran out of memory"),
        ("failed", "ValueError: x", "Its program ended with an error"),
        ("rejected", "client a, layer q: NaN or infinity; it cannot be averaged", "Its update holds NaN or infinity"),
        ("rejected", "layer q is (out, in, rank) (8, 8, 4), expected (8, 8, 2)", "does not fit the model"),
        ("rejected", "it claims 12 examples, expected 1 to 10", "It claims a number of examples that cannot be"),
        ("rejected", "frozen factor differs: it was not trained on the factor it was given", "stay frozen"),
        ("rejected", "the answer is for round 3, this is round 4", "It answered another order"),
        ("rejected", "the masked update is of another client, round or secure session", "secure sum"),
        ("rejected", None, "Its answer failed a check"),
        ("unheard of", "x", "Its answer failed a check"),
    ],
)
def test_causes(status: str, reason: str | None, what: str) -> None:
    assert what in cause(status, reason).what
    assert cause(status, reason).hint


def test_the_slowest_is_named_with_its_reason() -> None:
    others = [Pace(f"c-{i}", 2.0, 10, 0, 10, 0) for i in range(3)]
    phases = {"download": 0.5, "train": 9.0, "upload": 0.5}
    said = slowest([*others, Pace("c_9", 10.0, 9, 9, 10, 1, phases)])
    assert said.startswith("**c\\_9 is slow:** 10.0 s a round, 5.0 times what the others need (2.0 s).")
    assert "9 of the 9 rounds c\\_9 took part in lately waited for it alone." in said
    assert "The time of c\\_9: 90% training, 10% transfer and loading." in said
    assert "training.steps" in said
    assert "c\\_9 missed the deadline in 1 of 10 rounds." in said


@pytest.mark.parametrize(
    ("paces", "said"),
    [
        ([], "No client has finished a training round yet."),
        ([Pace("a", None, asked=4, late=4)], "a missed the deadline in 4 of 4 rounds."),
        ([Pace("a", 0.0314, 1)], "**a** alone has trained so far: 31.4 ms a round."),
        ([Pace("a", 3.0, 1)], "**a** alone has trained so far: 3.0 s a round."),
        (
            [Pace("a", 3.0), Pace("b", 2.5)],
            "**No client is slow:** a round takes each between 2.5 s (b) and 3.0 s (a).",
        ),
    ],
)
def test_calm_answers(paces: list[Pace], said: str) -> None:
    assert slowest(paces) == said


def test_a_slow_line_is_told_from_slow_work() -> None:
    phases = {"download": 0.1, "train": 1.9, "upload": 12.0}
    said = slowest([Pace("a", 14.0, phases=phases), Pace("b", 2.0), Pace("c", 2.1)])
    assert said.startswith("**a is slow:** 14.0 s a round")
    assert "federation.wire" in said


def test_timelines_are_read_without_trust() -> None:
    spans = [["train", 0, 2], ["train", 3, 1], ["train", 0, math.inf], ["train", True, 2], "train", [1, 2, 3], ["x"]]
    assert client_spans({"clients": {"a": spans, "b": 4}}) == {"a": [("train", 0.0, 2.0)]}
    assert client_spans([1]) == client_spans({"left_out": "too long"}) == client_spans({"clients": []}) == {}


def test_phases_of_training_leave_evaluation_and_lost_rounds_out() -> None:
    rounds = [
        {
            "a": [
                ("wait", 0.0, 1.0),
                ("train", 1.0, 3.0),
                ("upload", 3.0, 4.0),
                ("wait", 4.0, 9.0),
                ("evaluate", 9.0, 10.0),
            ]
        },
        {"a": [("train", 0.0, 4.0)], "b": [("lost", 0.0, 60.0)]},
    ]
    assert [trained(spans) for spans in rounds] == [
        {"a": {"download": 0.0, "train": 2.0, "upload": 1.0}},
        {"a": {"download": 0.0, "train": 4.0, "upload": 0.0}},
    ]
    assert parts({"train": 0.0}) == ""


def test_names_sort_as_people_count() -> None:
    assert sorted(["c-10", "c-9", "1", "", "b"], key=natural) == ["", "1", "b", "c-9", "c-10"]


def test_worst_first_and_extremes() -> None:
    totals = pd.DataFrame({"accepted": [9, 1], "asked": [10, 10], "offline": [0, 0]}, index=["a", "b"])
    assert worst_first(["a", "b", "c"], totals) == ["b", "a", "c"]
    latest = pd.DataFrame({"client": list("abcd"), "value": [1.0, math.nan, 3.0, 2.0]})
    assert extremes(latest, more_is_better=False, worst=2) == ["b", "c", "a"]
    assert extremes(latest, more_is_better=True, worst=2) == ["b", "a", "c"]
    assert extremes(latest, more_is_better=False) == ["b", "c", "d", "a"]


def test_labels_tell_all_names_apart() -> None:
    found = labels(["", " ", "a" * 50, "a" * 49, "b", "b\u202e", "b\ufffd", "__proto__"])
    assert len(set(found.values())) == len(found) == 8
    assert found["b"] == "b"
    assert found[""] == "(no name)"
    assert "__proto__" not in found.values()  # charts sort by name into plain objects, where that one is lost
    assert labels(["x (2)", "x", " x"]) == {"x (2)": "x (2)", "x": "x", " x": "x (3)"}


def test_words_for_numbers() -> None:
    assert left_out_words({"rejected": 0, "failed": 2, "late": 1, "offline": 0}) == "2 failed, 1 late"
    assert metric_words("held_out_accuracy").more_is_better
    assert metric_words(HOSTILE).axis == "value"  # a name from the store is no part of a chart
    assert metric_titles(["train_loss", "x"]) == {"train_loss": "loss in training", "x": "x"}


def test_the_page_answers_which_client_is_slow(home: Path, open_page: Opener) -> None:
    page = open_page(home, "clients", run=RUN)
    assert not page.exception
    assert page.markdown[0].value.startswith("**ada is slow:** 9.0 s a round, 4.5 times")
    assert [metric.label for metric in page.metric][:3] == ["Clients", "Only evaluate", "Replies used"]
    assert [metric.value for metric in page.metric][:3] == ["2", "1", "66.7%"]
    members = page.dataframe[0].value
    assert members["client"].tolist() == ["ada", "ben-10", "eve"]
    assert members["share"].tolist()[:2] == [75.0, 25.0]
    assert members["left_out"].tolist()[1] == "1 rejected, 1 late"
    assert "late" not in members.columns


def test_a_client_of_the_address_opens_its_details(home: Path, open_page: Opener) -> None:
    page = open_page(home, "clients", run=RUN, client="ben-10")
    assert [title.value for title in page.subheader] == ["ben\\-10"]
    assert page.dataframe[1].value["round"].tolist() == [3, 2, 1]
    page = page.selectbox(key="client").set_value("eve").run()
    assert not page.exception
    assert "It trains nothing: it only evaluates." in " ".join(text.value for text in page.markdown)


def test_the_mark_in_the_table_stays_with_its_client(home: Path, open_page: Opener) -> None:
    page = open_page(home, "clients", run=RUN, client="ben-10")
    assert page.dataframe[0].value["client"].tolist() == ["ada", "ben-10", "eve"]
    with RunStore.open(home) as store:
        for number in (4, 5):
            reply = ClientRound(RUN, number, "ben-10", "accepted", seconds=99.0)
            store.commit_round(Round(RUN, number, START, "committed", committed_at=START), [reply], ())
    page.run()
    assert page.dataframe[0].value["client"].tolist() == ["ben-10", "ada", "eve"]
    assert page.session_state["members"]["selection"]["rows"] == [0]


def test_both_pages_compare_the_same_seconds(connection: Connection) -> None:
    assert dict(watched_clients(connection, RUN).seconds) == {"ada": 9.0, "ben-10": 2.0}
    assert roster(connection, RUN).slowest_first == ["ada", "ben-10", "eve"]


def test_a_run_that_has_no_clients_says_so(tmp_path: Path, open_page: Opener) -> None:
    with RunStore.open(tmp_path) as store:
        _create(store)
    page = open_page(tmp_path, "clients", run=RUN)
    assert not page.exception
    assert "No client has joined" in page.info[0].value


def test_hostile_names_are_shown_letter_for_letter(tmp_path: Path, open_page: Opener) -> None:
    with RunStore.open(tmp_path) as store:
        _create(store, ["no", "settings"])
        late = [ClientRound(RUN, 1, name, "late", HOSTILE) for name in (HOSTILE, "\u202eabc\0", "a" * 300, "a" * 299)]
        metrics = [Metric(RUN, 1, HOSTILE, value, HOSTILE) for value in (math.inf,)]
        store.commit_round(Round(RUN, 1, START, "committed", cohort=(HOSTILE,)), late, metrics)
    page = open_page(tmp_path, "clients", run=RUN, client=HOSTILE)
    assert not page.exception
    assert page.subheader[0].value == plain(HOSTILE, 60) != HOSTILE
    names = page.dataframe[0].value["client"].tolist()
    assert len(set(names)) == 4
    assert HOSTILE in names
