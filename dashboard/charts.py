"""How things are drawn: pure functions from titles and names to Vega-Lite specifications, without the data.

A specification names columns; the table is handed to Streamlit beside it. So a live chart whose table has grown is
not built anew, and colours, fonts and grounds follow the reader's theme. Every function is cached by its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import altair as alt

Spec = dict[str, Any]
Mapped = tuple[tuple[str, str], ...]
"""Colours by name, in a form that can be cached by; see :func:`mapped`."""


@dataclass(frozen=True)
class Axis:
    """A column as an axis, a colour or a tooltip.

    Parameters
    ----------
    column : str
        Of the table.
    title : str
        With the unit, as in ``time (s)``.
    form : str
        d3's number format: ``d`` for whole numbers, ``.3f``, ``.3~s`` for bytes.
    kind : {"quantitative", "ordinal", "nominal", "temporal"}
        Vega-Lite's type of data.
    zero : bool
        Whether the scale begins at zero.
    log : bool
        Whether the scale is logarithmic.
    """

    column: str
    title: str
    form: str = ".4~g"
    kind: Literal["quantitative", "ordinal", "nominal", "temporal"] = "quantitative"
    zero: bool = False
    log: bool = False

    @property
    def tooltip(self) -> alt.Tooltip:
        """What is shown on hovering."""
        form = self.form if self.kind == "quantitative" else alt.Undefined
        return alt.Tooltip(field=self.column, type=self.kind, title=self.title, format=form)


LIMIT = "#D55E00"
NAMED_ROWS = 30
"""Rows that each have their name beside them; every chart of so few gives each row room for it."""
NAMED_COLUMNS = 12
"""Columns of a map in half a page that each have room for a slanting name."""
ROUND = Axis("round", "round", "d")
NAME = Axis("series", "", kind="nominal")


@lru_cache(maxsize=256)
def lines(
    x: Axis,
    y: Axis,
    series: tuple[str, ...],
    band: str = "",
    more: tuple[Axis, ...] = (),
    dashed: tuple[str, ...] = (),
    dots: bool = True,
) -> Spec:
    """Draw one line per series.

    Parameters
    ----------
    x, y : Axis
        Columns of numbers.
    series : tuple of str
        Values of the column ``series`` in the order of their colours.
    band : str
        What the area from column ``low`` to ``high`` is; empty for none.
    more : tuple of Axis
        Further columns shown on hovering.
    dashed : tuple of str
        Series drawn with a broken line.
    dots : bool
        Show a dot at every value; without, long noisy lines stay thin, and hovering still finds each.
    """
    colour = alt.Color("series:N", title=None, scale=alt.Scale(domain=list(series)), legend=_legend(series, "stroke"))
    base = alt.Chart().encode(x=_x(x), color=colour)
    parts: list[alt.Chart] = []
    if band:
        area = base.mark_area(opacity=0.16, clip=True)
        parts.append(area.encode(y=alt.Y("low:Q", title=y.title), y2=alt.Y2("high:Q")))
    dashes = [[4, 4] if name in dashed else [1, 0] for name in series]
    dash = alt.StrokeDash(
        "series:N", scale=alt.Scale(domain=list(series), range=dashes), legend=_legend(series, "stroke")
    )
    line = base.mark_line(strokeWidth=2, clip=True).encode(y=_y(y))
    parts.append(line.encode(strokeDash=dash) if dashed else line)
    spread = [Axis("low", f"{band}, from", y.form), Axis("high", f"{band}, to", y.form)] if band else []
    tooltip = [NAME.tooltip, x.tooltip, y.tooltip, *(axis.tooltip for axis in (*spread, *more))]
    point = base.mark_point(filled=True, size=28 if dots else 60, opacity=0.9 if dots else 0).encode(
        y=_y(y), tooltip=tooltip
    )
    return _spec(alt.layer(*parts, point))


@lru_cache(maxsize=256)
def bars(x: Axis, y: Axis, series: tuple[str, ...], colours: tuple[str, ...] = (), stacked: bool = True) -> Spec:
    """Draw bars over ``x``, one colour per value of the column ``series``."""
    scale = alt.Scale(domain=list(series), range=list(colours)) if colours else alt.Scale(domain=list(series))
    colour = alt.Color("series:N", title=None, scale=scale, legend=_legend(series))
    place = alt.X(field=x.column, type="ordinal", title=x.title, axis=alt.Axis(labelOverlap=True, labelAngle=0))
    height = alt.Y(field=y.column, type="quantitative", title=y.title, axis=alt.Axis(format=y.form))
    # Vega stacks by name in a plain object, where a name like __proto__ is none.
    if not stacked or len(series) == 1:
        height = height.stack(None)
    tooltip = [NAME.tooltip, x.tooltip, y.tooltip]
    return _spec(alt.Chart().mark_bar().encode(x=place, y=height, color=colour, tooltip=tooltip))


@lru_cache(maxsize=256)
def ranking(
    name: Axis, value: Axis, colour: Axis | None = None, colours: Mapped = (), more: tuple[Axis, ...] = ()
) -> Spec:
    """Draw a lying bar per row, in the order of the rows."""
    chart = (
        alt.Chart()
        .mark_bar()
        .encode(
            y=alt.Y(field=name.column, type="nominal", title=None, sort=None, axis=_names()),
            x=alt.X(
                field=value.column, type="quantitative", title=value.title, stack=None, axis=alt.Axis(format=value.form)
            ),
            tooltip=[axis.tooltip for axis in (name, value, *([colour] if colour else []), *more)],
        )
    )
    return _spec(chart.encode(color=_named(colour, colours)) if colour else chart)


@lru_cache(maxsize=64)
def gantt(colours: Mapped, more: tuple[Axis, ...] = (), title: str = "seconds since the round began") -> Spec:
    """Draw who was busy with what: columns ``name``, ``phase``, and ``start`` and ``end`` in seconds of the round."""
    phase = Axis("phase", "phase", kind="nominal")
    columns = [Axis("name", "who", kind="nominal"), phase, Axis("start", "from (s)"), Axis("end", "to (s)"), *more]
    chart = (
        alt.Chart()
        .mark_bar(height={"band": 0.7})
        .encode(
            y=alt.Y("name:N", title=None, sort=None, axis=_names()),
            x=alt.X("start:Q", title=title, axis=alt.Axis(format=".3~g")),
            x2=alt.X2("end:Q"),
            color=_named(phase, colours),
            tooltip=[axis.tooltip for axis in columns],
        )
    )
    return _spec(chart)


@lru_cache(maxsize=64)
def heat(
    x: Axis,
    y: Axis,
    value: Axis,
    domain: tuple[float, ...] = (),
    diverging: bool = False,
    more: tuple[Axis, ...] = (),
    every_name: bool = False,
) -> Spec:
    """Draw a cell per row of the table, coloured by the number its title names; without a row the ground shows.

    ``every_name`` writes each name below the map, for at most ``NAMED_COLUMNS``; else those that have room.
    """
    scale = alt.Scale(domain=list(domain)) if domain else alt.Scale(zero=value.zero)
    if diverging:
        scale = alt.Scale(domain=[-1, 1], domainMid=0, range="diverging")
    chart = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X(
                field=x.column,
                type="ordinal",
                title=_unless_names(x),
                sort=None,
                axis=_labels(0 if x.kind != "nominal" else -40, every_name),
            ),
            y=alt.Y(field=y.column, type="ordinal", title=_unless_names(y), sort=None, axis=_labels(0)),
            color=alt.Color(
                field=value.column,
                type="quantitative",
                title=None,
                scale=scale,
                legend=alt.Legend(orient="right", gradientLength=130, gradientThickness=12, format=value.form),
            ),
            tooltip=[axis.tooltip for axis in (y, x, value, *more)],
        )
    )
    return _spec(chart)


@lru_cache(maxsize=64)
def cells(
    x: Axis, y: Axis, value: Axis, rows: tuple[str, ...], colours: Mapped = (), more: tuple[Axis, ...] = ()
) -> Spec:
    """Draw a cell per row of the table on a grid of named rows: what became of somebody when.

    Parameters
    ----------
    x, y, value : Axis
        Columns; ``x`` is sorted by itself, so numbers or texts of equal length.
    rows : tuple of str
        Values of ``y`` from top to bottom, those without a cell too.
    colours : tuple of pairs
        Colours by ``value``; where there are none it is a share from 0 (orange) to 1 (blue).
    more : tuple of Axis
        Further columns shown on hovering.
    """
    shares = alt.Scale(domain=[0, 1], domainMid=0.5, range="diverging")
    legend = alt.Legend(orient="bottom", gradientLength=180, format=value.form)
    share = alt.Color(field=value.column, type="quantitative", title=value.title, scale=shares, legend=legend)
    names = alt.Scale(domain=list(rows))
    chart = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X(field=x.column, type="ordinal", title=x.title, axis=_labels(0)),
            y=alt.Y(field=y.column, type="ordinal", title=None, scale=names, axis=_names(len(rows))),
            color=_named(value, colours) if colours else share,
            tooltip=[axis.tooltip for axis in (y, x, value, *more)],
        )
    )
    return _spec(chart)


@lru_cache(maxsize=64)
def level(value: Axis) -> Spec:
    """Draw a broken level line, for :func:`over`: a limit that others must stay below."""
    line = alt.Chart().mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=LIMIT)
    return _spec(line.encode(y=alt.Y(field=value.column, type="quantitative"), tooltip=[value.tooltip]))


def over(*specs: Spec) -> Spec:
    """Lay specifications over one another; all are of one table."""
    layers = [layer for spec in specs for layer in spec.get("layer", [spec])]
    return {"layer": layers}


def mapped(colours: Mapping[str, str]) -> Mapped:
    """Make colours by name an argument that can be cached by."""
    return tuple(colours.items())


def _x(axis: Axis) -> alt.X:
    if axis.kind == "temporal":
        return alt.X(field=axis.column, type="temporal", title=axis.title)
    scale = alt.Scale(zero=axis.zero, nice=axis.form != "d")
    tick = alt.Axis(format=axis.form, tickMinStep=1) if axis.form == "d" else alt.Axis(format=axis.form)
    return alt.X(field=axis.column, type="quantitative", title=axis.title, scale=scale, axis=tick)


def _y(axis: Axis) -> alt.Y:
    scale = alt.Scale(type="log") if axis.log else alt.Scale(zero=axis.zero)
    tick = alt.Axis(format=axis.form)
    return alt.Y(field=axis.column, type="quantitative", title=axis.title, scale=scale, axis=tick)


def _unless_names(axis: Axis) -> str | None:
    """Return an axis' title; names say themselves what they are."""
    return None if axis.kind == "nominal" else axis.title


def _names(rows: int = 0) -> alt.Axis:
    """Write every name beside its row, unless there are too many to be read."""
    return alt.Axis(labelOverlap=rows > NAMED_ROWS, labelLimit=160)


def _labels(angle: float, every: bool = False) -> alt.Axis:
    return alt.Axis(labelOverlap=not every, labelAngle=angle, labelLimit=140)


def _legend(series: tuple[str, ...], drawn: Literal["square", "stroke"] = "square") -> alt.Legend | None:
    # The symbol would else be as pale as a band; a stroke is long enough for whole dashes.
    symbol: dict[str, Any] = (
        {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 2} if drawn == "stroke" else {}
    )
    legend = alt.Legend(orient="bottom", columns=2, labelLimit=220, symbolLimit=30, symbolOpacity=1, **symbol)
    return legend if len(series) > 1 else None


def _named(axis: Axis, colours: Mapped) -> alt.Color:
    scale = alt.Scale(domain=[name for name, _ in colours], range=[colour for _, colour in colours])
    legend = alt.Legend(orient="bottom", columns=4)
    return alt.Color(field=axis.column, type="nominal", title=None, scale=scale, legend=legend)


def _spec(chart: alt.Chart | alt.LayerChart | alt.FacetChart) -> Spec:
    found = chart.to_dict()
    for key in ("$schema", "config", "data", "datasets"):
        found.pop(key, None)
    for layer in found.get("layer", []):
        layer.pop("data", None)
    return found
