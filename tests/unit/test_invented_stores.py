"""The stores that pages are tried on: whole, the same each time, and as odd as they claim."""

from __future__ import annotations

import math
from pathlib import Path

from common.experiment import Experiment
from common.store import RunStore
from tests.benchmarks.fill_store import fill
from tests.hostile_store import TEXTS, hostile_store

SMALL = {"runs": 3, "clients": 5, "rounds": 6, "layers": 2, "statistics_every": 2}


def test_a_filled_store_holds_what_a_server_records_and_is_completed_when_filled_again(tmp_path: Path) -> None:
    flora, _, private = fill(tmp_path, **SMALL)
    with RunStore.open(tmp_path) as store:
        run = store.get_run(flora)
        assert (run.status, run.rounds_done) == ("completed", 6)
        assert len(Experiment.from_json(run.experiment).simulated_clients()) == 5
        assert [row.round for row in store.rounds(flora)] == list(range(7))
        assert len(store.client_rounds(flora)) == 6 * 5
        losses = [metric.value for metric in store.metrics(flora, "held_out_loss", client="")]
        assert losses[0] > losses[-1] + 0.5
        assert {(row.round, row.kind) for row in store.statistics(flora) if row.round == 6} == {
            (6, kind) for kind in ("timeline", "similarity", "layers")
        }
        spent = [row.epsilon for row in store.rounds(private)]
        assert spent == sorted(spent, key=float)
        assert store.metrics(private, "held_out_loss") == []
        store.rewind(flora, 3)
        kept = repr(store.rounds(private))
    assert fill(tmp_path, **SMALL)[0] == flora
    with RunStore.open(tmp_path) as store:
        assert store.get_run(flora).rounds_done == 6
        assert [metric.value for metric in store.metrics(flora, "held_out_loss", client="")] == losses
        assert repr(store.rounds(private)) == kept


def test_a_hostile_store_is_accepted_by_the_store_as_it_is(tmp_path: Path) -> None:
    names = hostile_store(tmp_path)
    with RunStore.open(tmp_path, read_only=True) as store:
        assert {run.id for run in store.runs()} == set(names)
        told = next(name for name in names if "texts" in name)
        assert len(store.members(told)) == len(set(TEXTS))
        numbers = next(name for name in names if "numbers" in name)
        values = [metric.value for metric in store.metrics(numbers, "held_out_loss", client="")]
        assert math.isnan(values[0])
        assert values[1:3] == [math.inf, -math.inf]
