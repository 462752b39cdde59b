"""Whatever is written is read back: any float, any text, any JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.store import ClientRound, Event, Metric, Round, RunStore
from common.store.columns import NAME_LENGTH, SENTENCE_LENGTH, clean, clean_name, clean_sentence

START = datetime(2026, 1, 1, tzinfo=UTC)
RUN_NUMBERS = count()

# Any text at all, lone surrogates and NUL included.
texts = st.text(st.characters(), max_size=30)
# SQLite knows no negative zero, which adding zero removes.
floats = st.floats().map(lambda number: number + 0.0)
numbers = st.none() | floats
wholes = st.integers(-(2**63) + 1, 2**63 - 1)
# A clock that is set back gives some times twice, fold=1; UTC is never set back.
times = st.datetimes(timezones=st.just(UTC)).map(lambda time: time.replace(fold=0))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)

rounds = st.builds(
    Round,
    run=st.just("r"),
    round=st.integers(0, 2**31),
    started_at=times,
    status=st.sampled_from(["committed", "failed"]),
    reason=st.none() | texts,
    cohort=st.lists(texts, max_size=4).map(tuple),
    base_version=wholes,
    bytes_up=wholes,
    bytes_down=wholes,
    seconds=floats,
    phases=st.dictionaries(texts, floats, max_size=3),
    error=numbers,
    exact=st.booleans(),
    epsilon=numbers,
    committed_at=times,
)
client_rounds = st.builds(
    ClientRound,
    run=st.just("r"),
    round=st.just(1),
    client=texts,
    status=st.sampled_from(["received", "accepted", "rejected", "failed", "late", "offline"]),
    reason=st.none() | texts,
    rank=st.none() | wholes,
    num_examples=wholes,
    bytes_up=wholes,
    bytes_down=wholes,
    seconds=floats,
    metadata=json_objects,
)
metrics = st.builds(Metric, run=st.just("r"), round=st.just(1), name=texts, value=floats, client=texts, layer=texts)
events = st.builds(
    Event,
    run=st.just("r"),
    kind=texts,
    text=texts,
    at=times,
    round=st.none() | wholes,
    client=st.none() | texts,
    data=json_objects,
)


@pytest.fixture(scope="module")
def store() -> Iterator[RunStore]:
    with tempfile.TemporaryDirectory() as home, RunStore.open(Path(home)) as opened:
        yield opened


def new_run(store: RunStore) -> str:
    run_id = f"r{next(RUN_NUMBERS)}"
    store.create_run(run_id, name="n", task="t", strategy="s", seed=0, experiment="{}", rounds_planned=1)
    return run_id


def cleaned(value: Any) -> Any:
    """Clean the texts of an entity that are columns of their own; JSON keeps its texts as they are."""
    changes: dict[str, Any] = {}
    for name in ("client", "name", "layer", "kind", "reason", "text"):
        if isinstance(getattr(value, name, None), str):
            changes[name] = clean(getattr(value, name))
    if isinstance(value, Round):
        changes["cohort"] = tuple(clean(name) for name in value.cohort)
    return replace(value, **changes)


@given(round=rounds)
def test_a_round_is_read_back(store: RunStore, round: Round) -> None:
    round = replace(round, run=new_run(store))
    # repr, since NaN is not equal to itself, and 0.0 is to -0.0 where it should not be.
    assert repr(store.commit_round(round)) == repr(cleaned(round))
    assert repr(store.rounds(round.run)) == repr([cleaned(round)])


@given(client=client_rounds)
def test_what_a_client_did_is_read_back(store: RunStore, client: ClientRound) -> None:
    run_id = new_run(store)
    store.begin_round(run_id, 1, [])
    client = replace(client, run=run_id)
    store.record_client(client)
    assert repr(store.client_rounds(run_id)) == repr([cleaned(client)])


@given(written=st.lists(metrics, max_size=5, unique_by=lambda metric: (metric.name, metric.client, metric.layer)))
def test_metrics_are_read_back_in_order_and_by_any_name(store: RunStore, written: list[Metric]) -> None:
    run_id = new_run(store)
    written = [replace(metric, run=run_id) for metric in written]
    store.commit_round(Round(run_id, 1, START, "committed"), metrics=written)
    expected = sorted(map(cleaned, written), key=lambda metric: (metric.name, metric.client, metric.layer))
    assert repr(store.metrics(run_id)) == repr(expected)
    for metric in written:
        assert repr(cleaned(metric)) in repr(store.metrics(run_id, metric.name, 1, metric.client))


@given(written=st.lists(events, max_size=3))
def test_events_are_read_back_in_order(store: RunStore, written: list[Event]) -> None:
    run_id = new_run(store)
    written = [replace(event, run=run_id) for event in written]
    store.commit_round(Round(run_id, 1, START, "committed"), events=written)
    found = store.events(run_id)
    assert [event.id for event in found] == sorted({event.id for event in found})
    assert repr([replace(event, id=0) for event in found]) == repr([cleaned(event) for event in written])


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


@given(texts)
def test_any_text_becomes_what_every_database_holds(text: str) -> None:
    assert "\0" not in clean(text)
    assert clean(text).encode("utf-8").decode("utf-8") == clean(clean(text))


@given(st.text(min_size=1), st.integers(0, 20_000))
def test_cleaned_text_is_bounded(text: str, times: int) -> None:
    assert len(clean_name(text * times)) <= NAME_LENGTH
    assert len(clean_sentence(text * times)) <= SENTENCE_LENGTH
