"""Numbers in tables with their units, written as everywhere else, that are still sorted as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
from pandas.io.formats.style import Styler

Writer = Callable[[float], str]


def written(table: pd.DataFrame, writers: Mapping[str, Writer]) -> Styler:
    """Return a table whose columns are shown as writers say; a column with a format of its own must not be among them.

    Parameters
    ----------
    table : DataFrame
        What is shown.
    writers : mapping of str to function
        How to write a number, by column; columns the table lacks are passed over.
    """
    return table.style.format({name: writer for name, writer in writers.items() if name in table}, na_rep="–")


def few_digits(value: float) -> str:
    """Write a mean of counts: ``3``, ``3.5``."""
    return f"{value:.1f}".removesuffix(".0")
