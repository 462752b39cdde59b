"""Turns what a query finds into a table that charts and pages take."""

from __future__ import annotations

import pandas as pd
from sqlalchemy import Connection, Executable


def table_of(connection: Connection, statement: Executable) -> pd.DataFrame:
    """Return what a query finds: a column per name it selects, NaN and infinities as they are."""
    found = connection.execute(statement)
    return pd.DataFrame(found.fetchall(), columns=list(found.keys()))
