"""What a comparison makes of its runs: measures, mean and spread, files and plot."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.store import ClientRound, Metric, Round
from dashboard.palette import SERIES
from simulations.comparison.plot import draw, plot, row_colours
from simulations.comparison.report import COLUMNS, Comparison, Machine, write_report
from simulations.comparison.rows import (
    MEASURES,
    TASK_MEASURES,
    Estimate,
    Outcome,
    Point,
    Row,
    Trouble,
    alone,
    estimate,
    measures_of,
    outcome_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


# Numbers of one run


def _round(number: int, **values: Any) -> Round:
    return Round("r", number, NOW, status="committed", **values)


def test_outcome_of_a_run_by_hand() -> None:
    rounds = [
        _round(0, bytes_up=10, bytes_down=30, seconds=1.5),
        _round(1, bytes_up=100, bytes_down=300, seconds=2.0, error=0.5, epsilon=1.5),
        _round(2, bytes_up=200, bytes_down=400, seconds=3.0, error=0.25, epsilon=2.5),
    ]
    losses = [(0, 3.0, 4.0), (1, 1.0, 1.5), (2, 2.0, 2.5)]
    metrics = [Metric("r", number, "held_out_loss", loss) for number, loss, _ in losses]
    metrics += [Metric("r", number, "worst_client_loss", loss) for number, _, loss in losses]
    metrics += [Metric("r", 1, "held_out_perplexity", 9.0), Metric("r", 2, "held_out_perplexity", 7.0)]
    metrics += [Metric("r", 2, "held_out_excess_loss", 0.5), Metric("r", 2, "held_out_perplexity", 8.0, client="a")]
    metrics += [Metric("r", 2, "unseen_loss", 5.0), Metric("r", 2, "held_out_loss", 99.0, client="a")]
    statuses = ("accepted", "received", "rejected", "failed", "late", "offline")
    clients = [ClientRound("r", 1, f"c{number}", status) for number, status in enumerate(statuses)]  # type: ignore[arg-type]
    made = outcome_of(7, "r", rounds, metrics, clients, sharing=4)
    assert made.curve == (
        Point(0, 3.0, 4.0, None, 10.0),
        Point(1, 1.0, 1.5, None, 110.0),
        Point(2, 2.0, 2.5, 5.0, 260.0),
    )
    assert made.measures == {
        "held_out_loss": 2.0,
        "best_loss": 1.0,
        "change": -1.0,
        "perplexity": 7.0,
        "excess_loss": 0.5,
        "worst_client_loss": 2.5,
        "unseen_loss": 5.0,
        "seconds": 6.5,
        "left_out": 4,
        "bytes_up": 310,
        "bytes_down": 730,
        "bytes_up_per_client": 77.5,
        "bytes_down_per_client": 182.5,
        "error": 0.375,
        "epsilon": 2.5,
    }
    assert set(made.measures) == set(MEASURES)


def test_a_reference_has_no_bytes_and_no_error() -> None:
    made = outcome_of(0, "r", [_round(0, bytes_up=1), _round(1, bytes_up=9, error=0.5)], [], [], sharing=None)
    assert [point.nbytes for point in made.curve] == [None, None]
    assert made.measures == {"seconds": 0.0, "left_out": 0}


def test_rounds_that_were_not_evaluated_are_passed_over() -> None:
    made = measures_of([Point(0, 3.0), Point(1), Point(2, 2.5), Point(3)])
    assert made == {"held_out_loss": 2.5, "best_loss": 2.5, "change": -0.5}


def test_owners_alone_are_put_together_by_their_examples() -> None:
    one = Outcome(3, ("x",), (Point(0, 4.0, 4.0, 1.0), Point(1, 2.0, 2.0, 3.0)), {"seconds": 1.0, "left_out": 1})
    two = Outcome(3, ("y",), (Point(0, 8.0, 8.0, 2.0), Point(1, 6.0, 6.0, 5.0)), {"seconds": 2.0, "left_out": 0})
    unjudged = Outcome(3, ("z",), (Point(0, None, None, 3.0), Point(1, None, None, 7.0)), {"seconds": 4, "left_out": 0})
    made = alone([(one, 3), (two, 1), (unjudged, 100)])
    assert made.curve == (Point(0, 5.0, 8.0, 2.0), Point(1, 3.0, 6.0, 5.0))
    assert made.runs == ("x", "y", "z")
    assert made.seed == 3
    assert made.measures["change"] == -2.0
    assert (made.measures["seconds"], made.measures["left_out"]) == (7.0, 1)


# Mean and spread over seeds


def test_estimates_by_hand() -> None:
    assert estimate([1.0, 2.0, 6.0]) == Estimate(3.0, math.sqrt(7.0), 3)
    assert estimate([2.5]) == Estimate(2.5, None, 1)
    broken = estimate([1.0, math.inf])
    assert math.isnan(broken.mean)
    assert (broken.sd, broken.n) == (None, 2)


def _outcome(seed: int, losses: list[float], sent: float | None = 1e6, **measures: float) -> Outcome:
    curve = [Point(i, loss, loss + 1, loss + 2, None if sent is None else sent * i) for i, loss in enumerate(losses)]
    numbers = measures_of(curve) | {"seconds": 1800.0, "left_out": 0} | measures
    return Outcome(seed, (f"run-{seed}",), tuple(curve), numbers)


def test_rows_average_what_all_seeds_have() -> None:
    row = Row("flora", {}, False, (_outcome(0, [4, 1], error=1.0), _outcome(1, [4, 3])))
    assert row.measures["held_out_loss"] == Estimate(2.0, math.sqrt(2.0), 2)
    assert "error" not in row.measures
    curve = row.curve(lambda point: point.held_out)
    assert [(point.round, point.loss, point.nbytes) for point in curve] == [
        (0, Estimate(4.0, 0.0, 2), 0.0),
        (1, Estimate(2.0, math.sqrt(2.0), 2), 1e6),
    ]


def test_a_curve_ends_with_its_shortest_run_and_skips_rounds_not_evaluated() -> None:
    gap = Outcome(0, ("r",), (Point(0, 3.0), Point(1), Point(2, 1.0)), {})
    row = Row("flora", {}, False, (gap, replace(gap, curve=gap.curve[:2])))
    assert [point.round for point in row.curve(lambda point: point.held_out)] == [0]
    assert [point.round for point in Row("flora", {}, False, (gap,)).curve(lambda point: point.held_out)] == [0, 2]


def test_status_and_sentences_of_rows() -> None:
    refused, failed = Trouble(1, "refused", "no"), Trouble(0, "failed", "broke")
    assert Row("x", {}, False, (_outcome(0, [1]),)).status == "completed"
    assert Row("x", {}, False, (_outcome(0, [1]),), (refused,)).status == "partial"
    row = Row("x", {}, False, (), (failed, refused, replace(refused, seed=2)))
    assert (row.status, row.sentences) == ("failed", ("broke", "no"))
    assert row.measures == {}


# What is written


def _comparison() -> Comparison:
    rows = (
        Row("flora", {"strategy.name": "flora"}, False, (_outcome(0, [3, 1]), _outcome(1, [3, 2])), ()),
        Row("fedavg", {"strategy.name": "fedavg"}, False, (), (Trouble(0, "refused", "ranks | differ"),)),
        Row("ffa_lora", {"strategy.name": "ffa_lora"}, False, (_outcome(0, [3, 2]),), (Trouble(1, "failed", "lost"),)),
        Row("local", {}, True, (_outcome(0, [3, math.inf], None), _outcome(1, [3, 2], None))),
    )
    machine = Machine("a processor", 2, None, "2.13")
    return Comparison("lorafleet compare x", (0, 1), "abc", machine, Path("/home/of/runs"), rows)


def test_json_holds_everything_and_no_infinity(tmp_path: Path) -> None:
    write_report(_comparison(), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    made = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert made == _comparison().as_dict()
    assert (made["command"], made["seeds"], made["fingerprint"]) == ("lorafleet compare x", [0, 1], "abc")
    assert made["hours"] == 2.5
    assert [row["status"] for row in made["rows"]] == ["completed", "refused", "partial", "completed"]
    assert made["rows"][0]["measures"]["held_out_loss"] == {"mean": 1.5, "sd": math.sqrt(0.5), "n": 2}
    assert made["rows"][0]["outcomes"][1]["curve"][1]["held_out"] == 2.0
    assert made["rows"][1]["troubles"] == [{"seed": 0, "status": "refused", "sentence": "ranks | differ"}]
    assert made["rows"][3]["measures"]["held_out_loss"] == {"mean": None, "sd": None, "n": 2}


def test_csv_has_one_line_per_row(tmp_path: Path) -> None:
    write_report(_comparison(), tmp_path)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [line["row"] for line in lines] == ["flora", "fedavg", "ffa_lora", "local"]
    assert (lines[0]["held_out_loss_mean"], lines[0]["held_out_loss_sd"]) == ("1.5", str(math.sqrt(0.5)))
    assert (lines[0]["strategy.name"], lines[0]["reference"], lines[0]["seeds"]) == ("flora", "false", "2")
    assert (lines[1]["held_out_loss_mean"], lines[1]["sentence"]) == ("", "ranks | differ")
    assert (lines[2]["held_out_loss_mean"], lines[2]["held_out_loss_sd"], lines[2]["seeds"]) == ("2.0", "", "1")
    assert (lines[3]["reference"], lines[3]["held_out_loss_mean"]) == ("true", "")


def test_markdown_is_a_table_with_what_repeats_it(tmp_path: Path) -> None:
    write_report(_comparison(), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    table = [line.replace("\\|", "!").split("|") for line in text.splitlines() if line.startswith("|")]
    shown = len(set(COLUMNS) - set(TASK_MEASURES))  # this task measured nothing beside the loss
    assert {len(cells) for cells in table} == {shown + 4}  # a label, a note, and nothing at both ends
    assert "| flora | 1.5000 ± 0.7071 |" in text
    assert table[3][-2].strip() == "refused: ranks ! differ"
    assert table[4][-2].strip() == "partial (1 of 2 seeds done): lost"
    for line in ("    lorafleet compare x", "- seeds: 0, 1 ", "- code: abc", "a processor, 2 cores, torch 2.13", "2.5"):
        assert line in text


def test_the_terminals_table_fits_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_comparison().table())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    first = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert first["flora"][1:4] == ["1.5000", "±", "0.7071"]
    assert first["fedavg"][1] == "refused"
    assert "fedavg: ranks | differ" in [line.strip() for line in lines]
    assert "ffa_lora: lost" in [line.strip() for line in lines]


def test_a_spread_that_does_not_show_is_left_out() -> None:
    assert COLUMNS["bytes_up"].show(Estimate(2.5e6, 1.4, 2)) == "2.50"
    assert COLUMNS["bytes_up"].show(Estimate(2.5e6, 1.4e5, 2)) == "2.50 ± 0.14"
    assert COLUMNS["change"].show(Estimate(0.5, 0.25, 2)) == "+0.5000 ± 0.2500"
    assert COLUMNS["error"].show(Estimate(0.0, 0.0, 2)) == "0"
    assert COLUMNS["error"].show(None) == "–"


# The plot


@pytest.mark.parametrize("count", [1, len(SERIES), len(SERIES) + 1, 60])
def test_every_row_has_a_colour_of_its_own(count: int) -> None:
    rows = [Row(f"row {number}", {}, False, ()) for number in range(count)]
    rows += [Row("centralised", {}, True, ()), Row("local", {}, True, ())]
    colours = row_colours(rows)
    assert list(colours) == [row.label for row in rows]
    assert len(set(colours.values())) == count + 2


def _values(spec: dict[str, Any], layer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["datasets"][layer["data"]["name"]]
    return found


def test_the_plot_shows_means_bands_and_dashed_references() -> None:
    spec = plot((*_comparison().rows[:3], Row("local", {}, True, (_outcome(0, [3, 2.5], None),)))).to_dict()
    rounds, sent = spec["hconcat"]
    band, line = rounds["layer"]
    scale = line["encoding"]["color"]["scale"]
    assert scale["domain"] == ["flora", "ffa_lora", "local"]
    assert len(set(scale["range"])) == 3
    assert line["encoding"]["strokeDash"]["scale"]["range"] == [[1, 0], [1, 0], [6, 4]]
    assert [(v["row"], v["x"], v["loss"]) for v in _values(spec, line)] == [
        ("flora", 0, 3.0),
        ("flora", 1, 1.5),
        ("ffa_lora", 0, 3.0),
        ("ffa_lora", 1, 2.0),
        ("local", 0, 3.0),
        ("local", 1, 2.5),
    ]
    assert [(v["row"], v["x"], v["low"], v["high"]) for v in _values(spec, band)] == [
        ("flora", 0, 3.0, 3.0),
        ("flora", 1, 1.5 - math.sqrt(0.5), 1.5 + math.sqrt(0.5)),
    ]
    assert [(v["row"], v["x"], v["loss"]) for v in _values(spec, sent["layer"][1])] == [
        ("flora", 0.0, 3.0),
        ("flora", 1.0, 1.5),
        ("ffa_lora", 0.0, 3.0),
        ("ffa_lora", 1.0, 2.0),
        ("local", 0.0, 2.5),
        ("local", 1.0, 2.5),
    ]


def test_without_held_out_losses_the_servers_are_drawn() -> None:
    outcome = Outcome(0, ("r",), (Point(0, unseen=2.0, nbytes=0), Point(1, unseen=1.0, nbytes=5)), {"unseen_loss": 1.0})
    spec = plot([Row("flora", {}, False, (outcome,))]).to_dict()
    line = spec["hconcat"][0]["layer"][1]
    assert line["encoding"]["y"]["title"] == "unseen loss"
    assert [value["loss"] for value in _values(spec, line)] == [2.0, 1.0]


def test_where_nothing_was_measured_there_is_no_plot(tmp_path: Path) -> None:
    draw(_comparison().rows, tmp_path)
    assert (tmp_path / "comparison.svg").read_text().startswith("<svg")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    draw([Row("flora", {}, False, (), (Trouble(0, "failed", "broke"),))], tmp_path)
    assert list(tmp_path.iterdir()) == []
