"""The plot of a comparison: loss against rounds, and against what every client sends and receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from dashboard.palette import SERIES
from simulations.comparison.rows import CurvePoint, Point, Row, has_losses

REFERENCE_COLOURS = ("#000000", "#7F7F7F")
"""Black and grey, beside the colours of the rows that are compared."""
RAMP = ((0, 32, 76), (229, 211, 75))
"""From dark blue to yellow, growing lighter, for more rows than the palette has colours."""

WIDTH, HEIGHT, TICKS = 360, 300, 10


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write ``comparison.svg`` and ``comparison.png``; where no loss was measured there are none."""
    files = [folder / "comparison.svg", folder / "comparison.png"]
    if not has_losses(rows):
        for file in files:
            file.unlink(missing_ok=True)
        return
    chart = plot(rows)
    for file in files:
        chart.save(str(file), scale_factor=2)


def plot(rows: Sequence[Row]) -> alt.HConcatChart:
    """Draw means over seeds as lines and standard deviations as bands; references are dashed, without a band."""
    rows = [row for row in rows if row.outcomes]
    held_out = any("held_out_loss" in row.measures for row in rows)
    loss: Callable[[Point], float | None] = (lambda p: p.held_out) if held_out else (lambda p: p.unseen)
    title = "held-out loss" if held_out else "unseen loss"
    colours = row_colours(rows)
    legend = alt.Legend(orient="bottom", columns=4, labelLimit=0, symbolType="stroke", symbolSize=600)
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    dashes = alt.Scale(domain=list(colours), range=[[6, 4] if row.reference else [1, 0] for row in rows])
    look = {
        "color": alt.Color("row:N", scale=scale, title=None, legend=legend),
        "strokeDash": alt.StrokeDash("row:N", scale=dashes, title=None, legend=legend),
    }
    y = alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False))
    curves = {row.label: row.curve(loss) for row in rows}
    last = max((point.round for curve in curves.values() for point in curve), default=0)
    whole = alt.Axis(values=list(range(0, last + 1, max(1, math.ceil(last / TICKS)))), format="d")
    rounds = _panel(list(_over_rounds(rows, curves)), alt.X("x:Q", title="round", axis=whole), y, look)
    sent = _panel(list(_over_bytes(rows, curves)), alt.X("x:Q", title="megabytes per client, up and down"), y, look)
    chart: alt.HConcatChart = alt.hconcat(rounds, sent).configure_view(stroke=None).configure_axis(gridOpacity=0.5)
    return chart


def row_colours(rows: Sequence[Row]) -> dict[str, str]:
    """Give each row a colour of its own, by label."""
    compared = [row.label for row in rows if not row.reference]
    few = len(compared) <= len(SERIES)
    colours = SERIES if few else [_ramp(number / (len(compared) - 1)) for number in range(len(compared))]
    references = [row.label for row in rows if row.reference]
    return dict(zip(compared, colours, strict=False)) | dict(zip(references, REFERENCE_COLOURS, strict=False))


def _ramp(share: float) -> str:
    return "#" + "".join(f"{round(low + share * (high - low)):02X}" for low, high in zip(*RAMP, strict=True))


def _over_rounds(rows: Sequence[Row], curves: dict[str, list[CurvePoint]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for point in curves[row.label]:
            yield _values(row, point.round, point)


def _over_bytes(rows: Sequence[Row], curves: dict[str, list[CurvePoint]]) -> Iterator[dict[str, Any]]:
    """Place points by megabytes; references send nothing and become a level at their last loss."""
    furthest = max((point.nbytes or 0.0 for curve in curves.values() for point in curve), default=0.0)
    for row in rows:
        curve = curves[row.label]
        if row.reference and curve:
            yield _values(row, 0.0, curve[-1])
            yield _values(row, furthest / 1e6, curve[-1])
        else:
            yield from (_values(row, (point.nbytes or 0.0) / 1e6, point) for point in curve)


def _values(row: Row, x: float, point: CurvePoint) -> dict[str, Any]:
    mean, sd = point.loss.mean, point.loss.sd
    ends = {} if row.reference or sd is None else {"low": mean - sd, "high": mean + sd}
    return {"row": row.label, "x": x, "loss": mean, **ends}


def _panel(values: list[dict[str, Any]], x: alt.X, y: alt.Y, look: dict[str, Any]) -> alt.LayerChart | alt.FacetChart:
    line = alt.Chart(alt.InlineData(values=values)).mark_line(point=alt.OverlayMarkDef(size=20)).encode(x, y, **look)
    spread = [value for value in values if "low" in value]
    band = alt.Chart(alt.InlineData(values=spread)).mark_area(fillOpacity=0.12)
    band = band.encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), color=look["color"])
    return alt.layer(band, line).properties(width=WIDTH, height=HEIGHT)
