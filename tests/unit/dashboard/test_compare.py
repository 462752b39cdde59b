"""Comparisons: which runs are one line, what their curves and outcomes are, and what may be said of them."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Connection
from streamlit.testing.v1 import AppTest

from common.errors import DataError
from common.store import Client, ClientRound, Metric, Round, Run, RunStatus, RunStore
from dashboard.findings.compare_even import Even, even
from dashboard.findings.compare_file import LARGEST, comparison_beside
from dashboard.findings.compare_groups import differing, distinct, grouped, untold
from dashboard.findings.compare_lines import (
    Choice,
    Compared,
    Line,
    clients_of,
    lines_of_file,
    lines_of_groups,
    points,
    renewed,
)
from dashboard.findings.compare_outcomes import Answers, common_level, counting, outcomes
from dashboard.findings.compare_verdict import judges, verdict
from dashboard.queries import comparing
from dashboard.source import Source
from dashboard.views.cells import written
from dashboard.views.compare_files import _chart, _curves
from dashboard.views.compare_files import _table as _as_csv
from dashboard.views.compare_findings import find
from dashboard.views.compare_tables import WRITERS, difference_table, outcome_columns, outcome_table
from dashboard.words import plain
from tests.pages import Opener

START = datetime(2026, 11, 1, tzinfo=UTC)
LOSS = "held_out_loss"
HOSTILE = "<b>[x](javascript:1)</b> $1$ :red[x]"
FIRST = {"a0": ("flora", 0, (3.0, 2.0, 1.0)), "a1": ("flora", 1, (3.0, 2.5, 1.2)), "b0": ("fedavg", 0, (3.0, 2.8, 2.0))}
"""Runs by id: strategy, seed and losses of rounds 0, 1 and 2."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two seeds of flora and one run of fedavg that stopped early, beside a comparison of them."""
    home = tmp_path / "home"
    with RunStore.open(home, clock=lambda: START) as store:
        for run, (strategy, seed, losses) in FIRST.items():
            _create(store, run, strategy, seed)
            for number, loss in enumerate(losses):
                _commit(store, run, number, loss)
            store.set_status(run, "completed" if strategy == "flora" else "interrupted")
    return home


@pytest.fixture
def connection(home: Path) -> Iterator[Connection]:
    with RunStore.open(home, read_only=True) as store, store.reading() as connection:
        yield connection


def _experiment(strategy: str, seed: int = 0, **more: object) -> str:
    return json.dumps(
        {"name": "n", "seed": seed, "strategy": {"name": strategy}, "clients": {"ada": {}, "ben": {}}} | more
    )


def _create(store: RunStore, run: str, strategy: str, seed: int, name: str = "n") -> None:
    store.create_run(
        run,
        name=name,
        task="words",
        strategy=strategy,
        seed=seed,
        experiment=_experiment(strategy, seed),
        rounds_planned=2,
        fingerprint="f",
    )
    store.record_members([Client(run, "ada", START)])


def _commit(store: RunStore, run: str, number: int, loss: float) -> None:
    trained = number > 0
    row = Round(
        run,
        number,
        START,
        "committed",
        bytes_up=2_000_000 * number,
        bytes_down=1_000_000,
        seconds=10.0,
        error=0.25 * number if trained else None,
        exact=run == "b0" and trained,
        epsilon=1.0 * number if run == "b0" else None,
    )
    clients = [ClientRound(run, number, "ada", "accepted"), ClientRound(run, number, "ben", "late")] if trained else []
    metrics = [Metric(run, number, LOSS, loss), Metric(run, number, LOSS, 99.0, "ada")]
    metrics += [Metric(run, number, "train_loss", 5.0)] if run == "a0" else []
    store.commit_round(row, clients, metrics, rounds_done=number)


def _run(run: str, strategy: str = "flora", seed: int = 0, status: RunStatus = "completed", **more: object) -> Run:
    return Run(
        id=run,
        name="n",
        status=status,
        task="words",
        strategy=strategy,
        seed=seed,
        experiment=_experiment(strategy, seed, **more),
        fingerprint="f",
        rounds_planned=2,
        rounds_done=2,
        created_at=START,
        updated_at=START,
    )


# Queries


def test_curves_add_up_what_was_spent(connection: Connection) -> None:
    found = comparing.curves(connection, ("a0", "b0"), LOSS)
    assert found["value"].tolist() == [3.0, 2.0, 1.0, 3.0, 2.8, 2.0]
    assert found["nbytes"].tolist() == [1e6, 4e6, 9e6] * 2
    assert found["seconds"].tolist() == [10.0, 20.0, 30.0] * 2
    assert found["epsilon"].tolist()[3:] == [0.0, 1.0, 2.0]


def test_long_curves_keep_the_same_rounds_and_the_end(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        for run, last in (("a", 9), ("b", 7)):
            _create(store, run, "flora", 0)
            for number in range(last + 1):
                _commit(store, run, number, 1.0)
        with store.reading() as connection:
            found = comparing.curves(connection, ("a", "b"), LOSS, points=3)
    assert found[found["run"] == "a"]["round"].tolist() == [0, 4, 8, 9]
    assert found[found["run"] == "b"]["round"].tolist() == [0, 4, 7]


def test_ends_and_the_first_round_below_a_level(connection: Connection) -> None:
    found = comparing.ends(connection, ("a0", "a1", "b0"), LOSS).set_index("run")
    assert found.loc["a1"].tolist() == [3.0, 1.2, 2, 1.2, 2]
    assert comparing.reached(connection, ("a0", "b0"), LOSS, 2.0).set_index("run")["round"].to_dict() == {
        "a0": 1,
        "b0": 2,
    }
    assert comparing.ends(connection, ("a0",), "unheard_of").empty


def test_numbers_that_are_none_are_never_the_lowest(tmp_path: Path) -> None:
    with RunStore.open(tmp_path) as store:
        _create(store, "r", "flora", 0)
        for number, loss in enumerate((2.0, -math.inf, 1.5, math.nan)):
            _commit(store, "r", number, loss)
        with store.reading() as connection:
            first, last, last_round, best, best_round = comparing.ends(connection, ("r",), LOSS).iloc[0].tolist()[1:]
            assert comparing.reached(connection, ("r",), LOSS, 1.6)["round"].tolist() == [2]
    assert (first, last_round, best) == (2.0, 3, 1.5)
    assert math.isnan(last)
    assert best_round in (None, 2) or math.isnan(best_round)


def test_costs_and_what_was_left_out(connection: Connection) -> None:
    found = comparing.costs(connection, ("a0", "b0")).set_index("run")
    assert found.loc["a0", ["bytes_up", "bytes_down", "seconds", "error"]].tolist() == [6e6, 3e6, 30.0, 0.375]
    assert found.loc["b0", ["epsilon", "rounds", "exact"]].tolist() == [2.0, 2, 2]
    assert comparing.left_out(connection, ("a0",)) == {"a0": 2}
    assert comparing.members(connection, ("a0", "b0")) == {"a0": 1, "b0": 1}
    assert comparing.metric_names(connection, ("a0", "b0")) == {"a0": [LOSS, "train_loss"], "b0": [LOSS]}


# Groups


def test_seeds_of_one_configuration_are_one_group() -> None:
    groups = grouped([_run("a1", seed=1), _run("b", "fedavg"), _run("a0")])
    assert [(group.label, [run.id for run in group.runs]) for group in groups] == [
        ("flora", ["a0", "a1"]),
        ("fedavg", ["b"]),
    ]


def test_of_one_seed_the_run_that_got_furthest_counts() -> None:
    early = replace(_run("early", status="failed"), rounds_done=1)
    (group,) = grouped([_run("done"), early])
    assert [run.id for run in group.runs] == ["done"]
    assert [run.id for run in group.repeats] == ["early"]


def test_other_code_is_another_group() -> None:
    groups = grouped([_run("a"), replace(_run("b"), fingerprint="0123456789abcdef")])
    assert [group.label for group in groups] == ["code f", "code 0123456789ab"]


def test_groups_are_named_by_what_tells_them_apart() -> None:
    runs = [
        _run("a", adapter={"name": "lora", "rank": 4, "alpha": 8}),
        _run("b", adapter={"name": "lora", "rank": 8, "alpha": 8}),
        _run("c", "fedavg", adapter={"name": "lora", "rank": 8, "alpha": 8}),
    ]
    groups = grouped(runs)
    assert [group.label for group in groups] == ["flora · rank 4", "flora · rank 8", "fedavg · rank 8"]
    settings = [line.settings for line in lines_of_groups(groups)]
    assert differing(settings) == ["strategy.name", "adapter.rank"]
    assert untold(["flora", "fedavg"], settings) == ["adapter.rank"]
    assert untold([group.label for group in groups], settings) == []


def test_what_cannot_be_read_is_like_nothing_else() -> None:
    broken = [
        replace(_run(name), experiment=text) for name, text in (("a", "no JSON"), ("b", "[]"), ("c", "[" * 5_000))
    ]
    assert len({group.label for group in grouped(broken)}) == 3


def test_labels_are_harmless_and_distinct() -> None:
    assert distinct(["x\u202e", "x\u200b", "", "x\N{REPLACEMENT CHARACTER} (2)"]) == [
        "x\N{REPLACEMENT CHARACTER}",
        "x\N{REPLACEMENT CHARACTER} (2)",
        "(no name)",
        "x\N{REPLACEMENT CHARACTER} (2) (2)",
    ]


def test_a_name_that_says_the_strategy_again_is_said_once() -> None:
    named = {"ffa_lora": "ffa-lora", "fedavg": "n", "flora": "flora"}
    runs = [replace(_run(strategy), experiment=_experiment(strategy, name=name)) for strategy, name in named.items()]
    runs.append(replace(_run("other"), experiment=_experiment("flora", name="other")))
    assert [group.label for group in grouped(runs)] == ["ffa_lora", "fedavg · n", "flora", "flora · other"]


# Lines


def test_clients_share_the_bytes_as_the_configuration_says() -> None:
    assert clients_of(_run("a"), {}) == 2
    assert clients_of(_run("a", simulation={"clients": 50}), {}) == 50
    assert clients_of(_run("a", clients={}, simulation={"clients": -3}), {"a": 7}) == 7
    assert clients_of(replace(_run("a"), experiment="[]"), {"a": 7}) == 7
    assert clients_of(replace(_run("a"), experiment="[]"), {}) is None


def _drawn(connection: Connection, over: str) -> pd.DataFrame:
    lines = lines_of_groups(grouped([_run(run, strategy, seed) for run, (strategy, seed, _) in FIRST.items()]))
    curves = comparing.curves(connection, tuple(FIRST), LOSS)
    return points(lines, curves, LOSS, over, dict.fromkeys(FIRST, 2)).set_index(["series", "round"])


def test_points_are_means_and_spreads_over_seeds(connection: Connection) -> None:
    found = _drawn(connection, "round")
    assert found.loc[("flora", 2), ["x", "y", "n"]].tolist() == [2.0, 1.1, 2.0]
    spread = math.sqrt(0.1**2 + 0.1**2)
    assert found.loc[("flora", 2), ["low", "high"]].tolist() == pytest.approx([1.1 - spread, 1.1 + spread])
    assert found.loc[("fedavg", 1), "y"] == 2.8
    assert math.isnan(found.loc[("fedavg", 1), "low"])


def test_points_over_bytes_are_megabytes_per_client(connection: Connection) -> None:
    assert _drawn(connection, "bytes").loc["flora", "x"].tolist() == [0.5, 2.0, 4.5]


def test_points_over_privacy_are_of_those_that_have_it(connection: Connection) -> None:
    assert set(_drawn(connection, "epsilon").index.get_level_values(0)) == {"fedavg"}


def test_rounds_that_one_seed_lacks_are_means_of_the_others() -> None:
    rows = [("a", 0, 1.0), ("b", 0, 3.0), ("a", 1, 5.0), ("b", 1, math.nan), ("a", 2, math.inf)]
    curves = pd.DataFrame(rows, columns=["run", "round", "value"]).assign(nbytes=0.0, seconds=0.0, epsilon=None)
    line = Line("l", (_run("a"), _run("b", seed=1)))
    found = points([line], curves, LOSS, "round", {})
    assert found[["x", "y", "n"]].to_numpy().tolist() == [[0.0, 2.0, 2.0], [1.0, 5.0, 1.0]]
    assert points([line], curves, LOSS, "bytes", {"a": None, "b": 0}).empty
    assert points([line], curves[:0], LOSS, "round", {}).empty


# Outcomes


def _answers(connection: Connection, level: float) -> Answers:
    runs = tuple(FIRST)
    return Answers(
        comparing.ends(connection, runs, LOSS),
        comparing.costs(connection, runs),
        comparing.reached(connection, runs, LOSS, level),
        comparing.left_out(connection, runs),
        dict.fromkeys(runs, 2),
    )


def test_outcomes_are_means_over_the_runs_that_count(connection: Connection) -> None:
    runs = [
        _run(run, strategy, seed, "failed" if run == "b0" else "completed")
        for run, (strategy, seed, _) in FIRST.items()
    ]
    table = outcomes(lines_of_groups(grouped(runs)), _answers(connection, 2.0), LOSS).set_index("label")
    flora, fedavg = table.loc["flora"], table.loc["fedavg"]
    assert flora[["runs", "unfinished", "settled", "last", "best", "reached"]].tolist() == [2, 0, True, 1.1, 1.1, 1.5]
    assert flora[["up", "down", "seconds", "error", "left_out"]].tolist() == [3e6, 1.5e6, 30.0, 0.375, 2.0]
    assert flora["last_sd"] == pytest.approx(math.sqrt(0.02))
    assert fedavg[["runs", "unfinished", "settled", "exact", "epsilon"]].tolist() == [1, 1, False, True, 2.0]
    assert math.isnan(fedavg["last_sd"])


def test_unfinished_runs_do_not_count_beside_completed_ones() -> None:
    done, failed = _run("a"), _run("b", seed=1, status="failed")
    assert counting(Line("l", (done, failed))) == (done,)
    assert counting(Line("l", (failed,))) == (failed,)


def test_the_common_level_is_one_that_all_reached() -> None:
    ends = pd.DataFrame({"first": [3.0, 3.0], "best": [1.0, 2.0]})
    assert common_level(ends) == 2.0
    assert common_level(ends.assign(best=[1.0, 3.0])) is None
    assert common_level(ends.assign(best=[1.0, None])) is None
    assert common_level(ends[:0]) is None


def test_the_table_marks_the_lowest_and_hides_what_nobody_has(connection: Connection) -> None:
    runs = [_run(run, strategy, seed) for run, (strategy, seed, _) in FIRST.items() if run != "b0"] + [
        _run("b0", "fedavg")
    ]
    table = outcomes(lines_of_groups(grouped(runs)), _answers(connection, 2.0), LOSS)
    shown = outcome_table(table, LOSS, "flora")
    assert shown["mark"].tolist() == ["★", ""]
    assert shown["merge"].tolist() == ["0.38", "exact"]
    assert "epsilon" in shown
    assert set(shown) <= set(outcome_columns(2.0, LOSS))
    assert {"mark", "epsilon"}.isdisjoint(outcome_table(table.assign(epsilon=math.nan), "update_norm", ""))


def test_numbers_are_written_with_their_units_and_stay_numbers() -> None:
    table = pd.DataFrame({"up": [45_700_000.0, math.nan], "left_out": [0.0, 3.5], "seconds": [61.0, 1.0]})
    shown = written(table, WRITERS)
    assert shown.data["up"][0] == 45_700_000.0
    cells = shown.hide(axis="index").to_string(delimiter="|").splitlines()[1:]
    assert cells == ["45.7 MB|0|1 min 01 s", "–|3.5|1.0 s"]


def test_differences_have_a_column_per_line() -> None:
    lines = lines_of_groups(grouped([_run("a"), _run("b", "fedavg")]))
    rows, titles = difference_table(lines, ["strategy.name", "gone"])
    assert rows.to_numpy().tolist() == [["strategy.name", '"flora"', '"fedavg"'], ["gone", "–", "–"]]
    assert titles == {"setting": "Setting", "line0": "flora", "line1": "fedavg"}


# The verdict


Stand = tuple[str, float, float | None, int]
"""Label, mean, spread, seeds."""


def _even(rows: Sequence[Stand], *nbytes: float) -> Even:
    found = pd.DataFrame(rows, columns=["label", "value", "sd", "seeds"]).astype({"value": float, "sd": float})
    return Even("after round 9", found.assign(nbytes=list(nbytes) or math.nan))


def _ends(rows: Sequence[Stand], **more: object) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["label", "last", "last_sd", "runs"]).astype({"last_sd": float})
    return table.assign(**{"reference": False, "settled": True, **more})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", 1.0, 0.01, 3), ("b", 1.2, 0.05, 3)], "0.2 is 4.0 times the spread over 3 seeds (0.05): unlikely to be"),
        ([("b", 1.06, 0.05, 3), ("a", 1.0, 0.01, 4)], "is a little more than the spread over 3 seeds (0.05)"),
        (
            [("a", 1.0, 0.01, 3), ("b", 1.04, 0.05, 3)],
            "within the spread over 3 seeds (0.05): they are equally good. MORE",
        ),
        ([("a", 1.0, 0.0, 3), ("b", 1.5, 0.0, 3)], "is beyond the spread over 3 seeds (0)"),
        (
            [("a", 1.0, 0.0, 2), ("b", 1.5, 0.1, 3)],
            "more than the spread over 2 seeds (0.1), but so few seeds say little",
        ),
        ([("a", 1.0, 0.6, 2), ("b", 1.5, 0.1, 2)], "within the spread over 2 seeds (0.6), but so few seeds say little"),
        ([("a", 1.0, None, 1), ("b", 9.0, 0.05, 3)], "One of the two has a single seed, so this may be chance. MORE"),
        ([("a", 1.0, None, 1), ("b", 9.0, None, 1)], "There is a single seed each, so this may be chance. MORE"),
    ],
)
def test_the_verdict_weighs_the_difference_against_the_spread(rows: list[Stand], said: str) -> None:
    sentence = verdict(_ends(rows), _even(rows), LOSS, 1, "MORE")
    assert sentence.startswith("**a** has the lowest loss on held\\-out data after round 9: 1.0000")
    assert said in sentence


def test_the_verdict_names_what_both_cost() -> None:
    rows = [("a", 1.0, None, 1), ("b", 1.5, None, 1)]
    said = verdict(_ends(rows), _even(rows, 3e6, 4.5e5), LOSS, 1, "")
    assert "1.0000 for 3.0 MB per client, before b with 1.5000 for 450.0 kB per client." in said


def test_equal_numbers_are_no_difference() -> None:
    rows = [("a", 1.0, None, 1), ("b", 1.00001, None, 1), ("c", 2.0, None, 1)]
    assert _even(rows).best == ""
    assert _even(rows[1:]).best == "b"
    said = verdict(_ends(rows), _even(rows, 1e6, 2e6, 1e6), LOSS, 1, "")
    assert said == (
        "No difference: **a** for 1.0 MB per client and **b** for 2.0 MB per client both have the lowest"
        " loss on held\\-out data after round 9: 1.0000."
    )


def test_the_verdict_does_not_say_what_nobody_knows() -> None:
    two = [("a", 1.0, 0.1, 2), ("b", 2.0, 0.1, 2)]
    assert "2 different tasks" in verdict(_ends(two), _even(two), LOSS, 2, "")
    assert "takes two configurations" in verdict(_ends(two[:1]), _even(two[:1]), LOSS, 1, "")
    assert "have trained this far. Without this number: b." in verdict(_ends(two), _even(two[:1]), LOSS, 1, "")
    assert "Not done, or ended early: a." in verdict(_ends(two, settled=[False, True]), _even(two), LOSS, 1, "")
    with_reference = _ends([*two, ("c", 0.5, None, 1)], reference=[False, False, True])
    assert verdict(with_reference, _even(two), LOSS, 1, "").endswith("For reference, at their end: c 0.5000.")


def test_the_verdict_takes_names_letter_for_letter() -> None:
    rows = [(HOSTILE, 1.0, None, 1), ("b", 2.0, None, 1)]
    said = verdict(_ends(rows), _even(rows), LOSS, 1, "")
    assert said.startswith(f"**{plain(HOSTILE)}** has")
    assert HOSTILE not in said


# Like with like


def _curves_of(*rows: tuple[str, int, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["run", "round", "value", "nbytes"])


SHORT_AND_LONG = (("a", 0, 3.0, 0.0), ("a", 1, 2.0, 1e6), ("b", 0, 3.0, 0.0), ("b", 1, 2.5, 2e6), ("b", 2, 1.0, 4e6))
"""One that ended after a round, and one that went on and sends twice as much."""
TWO = [Line("a", (_run("a"),)), Line("b", (_run("b", "fedavg"),))]


def test_lines_are_compared_at_the_last_round_that_all_have() -> None:
    found = even(TWO, _curves_of(*SHORT_AND_LONG), "round", {"a": 2, "b": 2})
    assert found.effort == "after round 1, the last that all have"
    assert found.rows[["label", "value", "seeds", "nbytes"]].to_numpy().tolist() == [
        ["a", 2.0, 1, 5e5],
        ["b", 2.5, 1, 1e6],
    ]
    assert found.best == "a"


def test_over_bytes_lines_are_compared_at_the_same_bytes() -> None:
    rows = (*SHORT_AND_LONG[:1], ("a", 1, 2.0, 4.04e6), *SHORT_AND_LONG[2:])
    found = even(TWO, _curves_of(*rows), "bytes", {"a": 2, "b": 2})
    assert found.effort == "with at most about 2.0 MB per client"
    assert found.rows[["label", "value"]].to_numpy().tolist() == [["a", 2.0], ["b", 1.0]]
    found = even(TWO, _curves_of(*SHORT_AND_LONG), "bytes", {"a": 2, "b": 2})
    assert found.rows[["label", "value"]].to_numpy().tolist() == [["b", 3.0], ["a", 2.0]]
    assert even(TWO, _curves_of(*SHORT_AND_LONG), "bytes", {"a": None, "b": 2}).rows["label"].tolist() == ["b"]


def test_what_never_trained_or_diverged_is_not_compared() -> None:
    rows = (*SHORT_AND_LONG, ("c", 0, 0.1, 0.0), ("a", 2, math.inf, 2e6))
    found = even([*TWO, Line("c", (_run("c", "rolora"),))], _curves_of(*rows), "round", {})
    assert found.effort.startswith("after round 1,")
    assert found.rows["label"].tolist() == ["a", "b"]
    assert found.rows["nbytes"].isna().all()
    for over in ("round", "bytes"):
        assert even(TWO, _curves_of(), over, {}).rows.empty


@pytest.mark.parametrize(("metric", "judged"), [(LOSS, True), ("held_out_perplexity", True), ("update_norm", False)])
def test_only_losses_judge(metric: str, judged: bool) -> None:
    assert judges(metric) is judged


# A comparison's file


def _file(home: Path, **changes: Any) -> Path:
    def outcome(seed: int, runs: list[str], *losses: float) -> dict[str, Any]:
        curve = [{"round": n, "held_out": loss, "worst": None, "nbytes": None} for n, loss in enumerate(losses)]
        return {"seed": seed, "runs": runs, "curve": curve, "measures": {"seconds": 4.0, "held_out_loss": None}}

    def row(label: str, outcomes: list[dict[str, Any]], reference: bool = False, told: str = "") -> dict[str, Any]:
        troubles = [{"seed": 1, "status": "failed", "sentence": told}] if told else []
        return {"label": label, "settings": {}, "reference": reference, "outcomes": outcomes, "troubles": troubles}

    rows = [
        row("flora", [outcome(0, ["a0"], 9.0), outcome(1, ["a1"])]),
        row(HOSTILE, [outcome(0, ["b0"])], told=HOSTILE),
        row("gone", [outcome(0, ["nowhere"])]),
        row("local", [outcome(0, ["x", "y"], 3.0, 0.5), outcome(1, ["z"], 3.0, 0.7)], reference=True),
    ]
    file = home.parent / "comparison.json"
    file.write_text(json.dumps({"command": "lorafleet compare x", "rows": rows, "home": "/elsewhere", **changes}))
    return file


def test_a_file_gives_lines_of_this_store_and_references(home: Path) -> None:
    _file(home)
    file = comparison_beside(home)
    assert file is not None
    lines = lines_of_file(file, {run: _run(run) for run in FIRST})
    assert [line.label for line in lines] == ["flora", HOSTILE, "local"]
    assert [[run.id for run in line.runs] for line in lines] == [["a0", "a1"], ["b0"], []]
    assert lines[2].settings == {}
    assert lines[2].reference[0].losses(LOSS) == [(0, 3.0), (1, 0.5)]
    assert lines[2].reference[0].losses("train_loss") == []


def test_references_are_levels_where_nothing_is_spent(home: Path, connection: Connection) -> None:
    _file(home)
    file = comparison_beside(home)
    assert file is not None
    lines = lines_of_file(file, {run: _run(run) for run in FIRST})
    curves = comparing.curves(connection, tuple(FIRST), LOSS)
    shares = dict.fromkeys(FIRST, 2)
    over_bytes, over_rounds = (points(lines, curves, LOSS, over, shares) for over in ("bytes", "round"))
    level = over_bytes[over_bytes["series"] == "local"]
    assert level[["x", "y"]].to_numpy().tolist() == [[0.0, 0.6], [4.5, 0.6]]
    assert over_rounds[over_rounds["series"] == "local"]["y"].tolist() == [3.0, 0.6]
    table = outcomes(lines, _answers(connection, 1.0), LOSS).set_index("label")
    assert table.loc["local", ["reference", "runs", "last", "best", "seconds"]].tolist() == [True, 2, 0.6, 0.6, 4.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "is no comparison"),
        ('{"rows": 3}', "is no comparison"),
        ("[" * 100_000, "is no comparison"),
        (
            json.dumps({"command": "c", "rows": [{"label": "x" * 5_000, "reference": False, "outcomes": []}]}),
            "rows.0.label",
        ),
        (" " * (LARGEST + 1), "is larger than 16 MB"),
    ],
    ids=["text", "form", "depth", "length", "size"],
)
def test_a_file_that_is_none_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(DataError, match=said):
        comparison_beside(tmp_path / "home")


def test_no_file_and_a_link_are_nothing(tmp_path: Path) -> None:
    assert comparison_beside(tmp_path / "home") is None
    os.symlink("/etc/passwd", tmp_path / "comparison.json")
    assert comparison_beside(tmp_path / "home") is None


# Everything together


def _compared(home: Path) -> Compared:
    with RunStore.open(home, read_only=True) as store:
        runs = store.runs()
    groups = grouped(runs)
    return Compared(lines_of_groups(groups), tuple(run for group in groups for run in group.runs))


def test_findings_follow_the_runs(home: Path) -> None:
    old = replace(_compared(home).lines[0].runs[0], status="running")
    compared = renewed(Compared([Line("l", (old,))], (old,)), _compared(home).runs)
    assert compared.lines[0].runs[0].status != "running"
    found = find(Source(home, None), _compared(home), Choice(LOSS, "seconds"))
    assert found.title == "Loss on held-out data against time"
    assert found.level == 2.0
    drawn, spec = found.drawing()
    assert set(drawn) >= {"series", "x", "y", "low", "high", "n"}
    assert "(s)" in json.dumps(spec)
    found.curves["x"] *= 1_000
    longer, spec = found.drawing()
    assert longer["x"].max() == pytest.approx(30_000 / 3600)
    assert "(h)" in json.dumps(spec)


def test_files_are_what_they_say(home: Path) -> None:
    here, compared = Source(home, None), _compared(home)
    lines = csv.reader(_as_csv(here, compared, Choice(LOSS, "round")).decode().splitlines())
    assert {line[0] for line in lines} == {"label", "flora", "fedavg"}
    head = _as_csv(here, compared, Choice(LOSS, "round")).decode().splitlines()[0].split(",")
    assert {"last_held_out_loss", "rounds_to_2", "bytes_up_per_client", "bytes_up_per_client_sd"} <= set(head)
    curves = _curves(here, compared, Choice(LOSS, "bytes")).decode().splitlines()
    assert curves[0] == "line,round,megabytes_per_client,mean,runs,low,high"
    assert _curves(here, compared, Choice(LOSS, "round")).startswith(b"line,round,mean,runs")
    assert _chart(here, compared, Choice(LOSS, "round")).startswith(b"\x89PNG")


# The page


def _texts(page: AppTest) -> str:
    return "\n".join(text.value for text in (*page.markdown, *page.caption))


def test_the_page_answers_which_is_better(home: Path, open_page: Opener) -> None:
    page = open_page(home, "compare", runs="a0,a1,b0,gone", x="bytes")
    assert not page.exception
    assert "**flora** has the lowest loss" in _texts(page)
    assert "**Loss on held-out data against bytes per client**" in _texts(page)
    assert "3 runs chosen" in _texts(page)
    shown = next(frame.value for frame in page.dataframe if "mark" in frame.value)
    assert shown[["mark", "label", "of"]].to_numpy().tolist() == [
        ["★", "flora", "2"],
        ["", "fedavg", "1, 1 unfinished"],
    ]


def test_the_page_proposes_runs_of_one_task(home: Path, open_page: Opener) -> None:
    page = open_page(home, "compare")
    assert not page.exception
    assert "the newest 3 runs of one task" in _texts(page)
    assert "runs" not in page.query_params


def test_the_page_explains_what_it_lacks(home: Path, open_page: Opener) -> None:
    assert "Choose two runs or more" in _texts(open_page(home, "compare", runs=""))
    assert "takes two configurations" in _texts(open_page(home, "compare", runs="a0"))
    with RunStore.open(home) as store:
        _create(store, "bare", "flora", 5)
    page = open_page(home, "compare", runs="bare")
    assert not page.exception
    assert "measured anything yet" in _texts(page)


def test_the_page_shows_a_comparison_beside_the_home(home: Path, open_page: Opener) -> None:
    _file(home)
    page = open_page(home, "compare")
    assert not page.exception
    assert "For reference, at their end: local 0.6000 ± 0.14." in _texts(page)
    assert "Broken lines are references" in _texts(page)
    assert [block.value for block in page.code] == ["lorafleet compare x"]
    shown = next(frame.value for frame in page.dataframe if "mark" in frame.value)
    assert shown["label"].tolist() == ["flora", HOSTILE, "local"]
    assert "<b>" not in _texts(page)


def test_the_page_goes_on_without_a_broken_file(home: Path, open_page: Opener) -> None:
    (home.parent / "comparison.json").write_text("<b>")
    page = open_page(home, "compare", runs="a0,b0")
    assert not page.exception
    assert "is no comparison" in _texts(page)
    assert "**flora** has the lowest loss" in _texts(page)
