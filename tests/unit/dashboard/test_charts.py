"""Charts: valid Vega-Lite without data, whose columns are those of the table beside it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import altair as alt
import pandas as pd
import pytest

from dashboard import charts, pieces
from dashboard.charts import ROUND, Axis, Spec
from tests.pages import APP

VALUE = Axis("value", "loss", ".3f")
WHO, WHERE = Axis("name", "who", kind="nominal"), Axis("place", "where", kind="nominal")
SHARE, EXTRA = Axis("share", "share", ".0%", zero=True), Axis("extra", "more")
COLOURS = (("late", "#E69F00"), ("accepted", "#009E73"))

EXAMPLES: dict[str, tuple[Spec, set[str]]] = {
    "lines": (charts.lines(ROUND, VALUE, ("a", "b")), {"series", "round", "value"}),
    "lines with all": (
        charts.lines(ROUND, VALUE, ("a", "b"), band="8 of 10", more=(EXTRA,), dashed=("b",), dots=False),
        {"series", "round", "value", "low", "high", "extra"},
    ),
    "lines over time": (
        charts.lines(Axis("at", "time", kind="temporal"), Axis("value", "error", log=True), ("a",)),
        {"series", "at", "value"},
    ),
    "bars": (charts.bars(ROUND, VALUE, ("a", "b"), ("#000000", "#FFFFFF")), {"series", "round", "value"}),
    "bars side by side": (charts.bars(WHO, VALUE, ("a", "b"), stacked=False), {"series", "name", "value"}),
    "ranking": (charts.ranking(WHO, VALUE), {"name", "value"}),
    "ranking with colours": (
        charts.ranking(WHO, VALUE, Axis("status", "status", kind="nominal"), COLOURS, more=(EXTRA,)),
        {"name", "value", "status", "extra"},
    ),
    "gantt": (charts.gantt((("train", "#000000"),), more=(EXTRA,)), {"name", "phase", "start", "end", "extra"}),
    "heat": (charts.heat(WHERE, WHO, SHARE, domain=(0.0, 1.0), more=(EXTRA,)), {"name", "place", "share", "extra"}),
    "heat of cosines": (charts.heat(WHERE, WHO, VALUE, diverging=True), {"name", "place", "value"}),
    "cells": (charts.cells(ROUND, WHO, SHARE, ("x", "y")), {"round", "name", "share"}),
    "cells of words": (
        charts.cells(ROUND, WHO, Axis("status", "status", kind="nominal"), ("x",), COLOURS),
        {"round", "name", "status"},
    ),
    "level": (charts.level(Axis("limit", "budget")), {"limit"}),
    "over": (
        charts.over(charts.lines(ROUND, VALUE, ("a",)), charts.level(Axis("limit", "budget"))),
        {"series", "round", "value", "limit"},
    ),
}
SPECS = pytest.mark.parametrize("name", EXAMPLES)


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object within a specification."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


def test_every_function_is_tried() -> None:
    public = {name for name, found in vars(charts).items() if hasattr(found, "cache_info")} | {"over"}
    assert public == {name.split()[0] for name in EXAMPLES}


@SPECS
def test_it_is_valid_with_a_table_beside_it(name: str) -> None:
    spec, columns = EXAMPLES[name]
    table = pd.DataFrame({column: [0.5] for column in columns})
    alt.Chart.from_dict({**spec, "data": {"values": table.to_dict("records")}}, validate=True)
    json.dumps(spec, allow_nan=False)


@SPECS
def test_it_holds_no_data_and_names_the_columns_it_says(name: str) -> None:
    spec, columns = EXAMPLES[name]
    found = list(parts(spec))
    assert not any({"data", "datasets", "config", "$schema"} & part.keys() for part in found)
    assert {part["field"] for part in found if "field" in part} == columns
    assert not any({"expr", "calculate", "test", "filter", "signal", "href", "url"} & part.keys() for part in found)


@SPECS
def test_every_mark_can_be_asked_what_it_is(name: str) -> None:
    spec, _ = EXAMPLES[name]
    layers = spec.get("layer", [spec])
    assert any("tooltip" in layer["encoding"] for layer in layers)


def test_they_are_built_once() -> None:
    assert charts.lines(ROUND, VALUE, ("a", "b")) is charts.lines(ROUND, VALUE, ("a", "b"))
    assert charts.mapped({"late": "#E69F00", "accepted": "#009E73"}) == COLOURS


def test_text_of_the_store_is_a_value_and_nothing_else() -> None:
    hostile = ("datum['x']", "<b>", "a.b[0]", "__proto__")
    spec = charts.lines(ROUND, VALUE, hostile, dashed=hostile[:1])
    scales = [part["scale"] for part in parts(spec) if "domain" in part.get("scale", {})]
    assert scales
    assert all(scale["domain"] == list(hostile) for scale in scales)
    spec_of_others = charts.lines(ROUND, VALUE, ("1", "2", "3", "4"), dashed=("1",))
    assert json.dumps(spec).replace(json.dumps(list(hostile)), "") == json.dumps(spec_of_others).replace(
        json.dumps(["1", "2", "3", "4"]), ""
    )


@pytest.mark.parametrize("spec", [charts.bars(WHO, VALUE, ("merge",)), charts.ranking(WHO, VALUE, SHARE, COLOURS)])
def test_names_are_never_stacked_by(spec: Spec) -> None:
    """Vega stacks by name in a plain object, where ``__proto__`` and ``constructor`` are something else."""
    value = next(part for part in parts(spec["encoding"]) if part.get("field") == "value" and "axis" in part)
    assert "stack" in value
    assert value["stack"] is None


@pytest.mark.parametrize(("rows", "overlap"), [(30, False), (31, True)])
def test_rows_have_their_names_while_there_is_room(rows: int, overlap: bool) -> None:
    grid = charts.cells(ROUND, WHO, SHARE, tuple(map(str, range(rows))))
    assert grid["encoding"]["y"]["axis"]["labelOverlap"] is overlap
    for spec in (charts.ranking(WHO, VALUE), charts.gantt(COLOURS)):
        assert spec["encoding"]["y"]["axis"]["labelOverlap"] is False


@pytest.mark.parametrize("every", [True, False])
def test_a_map_of_few_columns_writes_every_name(every: bool) -> None:
    spec = charts.heat(WHERE, WHO, SHARE, every_name=every)
    assert spec["encoding"]["x"]["axis"]["labelOverlap"] is not every


def test_a_scale_begins_at_zero_where_it_is_said_to() -> None:
    def scale(axis: Axis) -> Any:
        return charts.lines(ROUND, axis, ("a",))["layer"][0]["encoding"]["y"]["scale"]

    assert scale(Axis("value", "v", zero=True)) == {"zero": True}
    assert scale(Axis("value", "v")) == {"zero": False}
    assert scale(Axis("value", "v", log=True)) == {"type": "log"}


def test_the_last_text_of_an_axis_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit puts its own padding into a specification without, and it goes before the configuration's."""
    drawn: list[Spec] = []
    monkeypatch.setattr("streamlit.markdown", lambda text: None)
    monkeypatch.setattr("streamlit.vega_lite_chart", lambda table, spec, **more: drawn.append(spec))
    pieces.draw("Loss", pd.DataFrame({"value": [1.0]}), {}, "", key="k")
    assert drawn[0]["padding"]["right"] >= 18


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_has_nothing_in_common_is_grey_and_yet_no_empty_cell(scheme: str) -> None:
    """Vega goes from hue to hue: of colours in the middle it would make a third."""
    theme = tomllib.loads((APP.parent / ".streamlit" / "config.toml").read_text())["theme"][scheme]
    colours = theme["chartDivergingColors"]
    grey, again = colours[4:6]
    assert len(colours) == 10
    assert grey == again
    assert grey[1:3] == grey[3:5] == grey[5:7]
    assert abs(int(grey[1:3], 16) - int(theme["backgroundColor"][1:3], 16)) > 30
