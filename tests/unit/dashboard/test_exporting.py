"""Files to keep: spreadsheets run nothing of them, and the picture is one."""

from __future__ import annotations

import csv
import math
import struct

import pandas as pd
import pytest

from dashboard.charts import ROUND, Axis, lines
from dashboard.exporting import HEIGHT, SCALE, WIDTH, csv_of, defused, png_of
from dashboard.palette import SERIES


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "－1"])
def test_a_formula_becomes_a_text(text: str) -> None:
    assert defused(text) == "'" + text


@pytest.mark.parametrize("value", ["flora", "a=b", "", " -1", -1.5, None])
def test_anything_else_stays_as_it_is(value: object) -> None:
    assert defused(value) == value


def test_a_table_comes_back_from_its_file() -> None:
    table = pd.DataFrame(
        {"label": ["=cmd|x", 'a "b", c\nd', "\u202e→"], "loss": [-0.5, math.nan, 1e-300], "=n": [1, -2, 3]}
    )
    rows = list(csv.reader(csv_of(table).decode().split("\r\n")))
    assert rows[0] == ["label", "loss", "'=n"]
    assert rows[1] == ["'=cmd|x", "-0.5", "1"]
    assert rows[2] == ['a "b", c\nd', "", "-2"]
    assert rows[3] == ["\u202e→", "1e-300", "3"]


def test_a_chart_becomes_a_picture_in_the_colours_of_the_palette() -> None:
    rows = [("<b>a</b>", 0, 1.0), ("<b>a</b>", 1, 2.0), ("datum['x']", 0, math.nan), ("datum['x']", 1, 0.5)]
    table = pd.DataFrame(rows, columns=["series", "round", "y"])
    picture = png_of("loss", "note", table, lines(ROUND, Axis("y", "loss"), ("<b>a</b>", "datum['x']")))
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > WIDTH * SCALE
    assert height > HEIGHT * SCALE
    assert len(SERIES) == len(set(SERIES)) == 12
