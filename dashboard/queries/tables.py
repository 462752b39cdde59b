"""Turns what a query finds into a table that charts and pages take."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import ColumnElement, Connection, Executable
from sqlalchemy.orm import InstrumentedAttribute

LARGEST = 1.7976931348623157e308
LARGEST_SUMMABLE = 1e100


def table_of(connection: Connection, statement: Executable) -> pd.DataFrame:
    """Return what a query finds: a column per name it selects, NaN and infinities as they are."""
    found = connection.execute(statement)
    return pd.DataFrame(found.fetchall(), columns=list(found.keys()))


def finite(
    column: InstrumentedAttribute[float] | InstrumentedAttribute[float | None] | ColumnElement[float],
) -> ColumnElement[bool]:
    """Tell in SQL whether a number is neither NaN nor infinite: both databases sort NaN after every number."""
    return column.between(-LARGEST, LARGEST)


def summable(
    column: InstrumentedAttribute[float] | InstrumentedAttribute[float | None] | ColumnElement[float],
) -> ColumnElement[bool]:
    """Tell in SQL whether a number may be added up: PostgreSQL refuses sums and means that grow past its range."""
    return column.between(-LARGEST_SUMMABLE, LARGEST_SUMMABLE)
