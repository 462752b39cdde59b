"""Tables and charts as files to keep: CSV that no spreadsheet runs, PNG on white ground."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from dashboard.charts import Spec
from dashboard.palette import SERIES

STARTS = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet takes what begins so for a formula
WIDTH, HEIGHT, SCALE = 900, 440, 2
INK, GRID = "#1B2330", "#E3E8EE"


def csv_of(table: pd.DataFrame) -> bytes:
    """Write a table as CSV in UTF-8; a text that a spreadsheet would run begins with an apostrophe."""
    texts = table.select_dtypes(exclude="number").columns
    safe = table.assign(**{name: table[name].map(defused) for name in texts}).rename(columns=defused)
    text: str = safe.to_csv(index=False, lineterminator="\r\n")
    return text.encode()


def defused(value: Any) -> Any:
    """Return a text so that a spreadsheet shows it; anything else as it is."""
    return f"'{value}" if isinstance(value, str) and value.startswith(STARTS) else value


def png_of(title: str, note: str, table: pd.DataFrame, spec: Spec) -> bytes:
    """Draw a chart of :mod:`dashboard.charts` as a picture.

    Parameters
    ----------
    title, note : str
        What stands above it, large and small.
    table : DataFrame
        What the specification draws; numbers that are not finite are left out.
    spec : dict
        The specification.
    """
    import vl_convert  # large, and wanted by few readers

    chart = {
        **spec,
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": json.loads(table.to_json(orient="records"))},
        "title": {"text": title, "subtitle": note, "anchor": "start", "offset": 14},
        "width": WIDTH,
        "height": HEIGHT,
        "background": "#FFFFFF",
        "padding": 18,
        "config": _look(),
    }
    picture: bytes = vl_convert.vegalite_to_png(chart, scale=SCALE, allowed_base_urls=[])
    return picture


def _look() -> dict[str, Any]:
    words = {"labelColor": INK, "titleColor": INK, "labelFontSize": 13, "titleFontSize": 13}
    return {
        "range": {"category": list(SERIES)},
        "view": {"stroke": None},
        "axis": {**words, "gridColor": GRID, "domainColor": GRID, "tickColor": GRID},
        "legend": words,
        "title": {"color": INK, "fontSize": 18, "subtitleColor": INK, "subtitleFontSize": 13},
    }
