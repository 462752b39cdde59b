"""Which line of a comparison is better, in a sentence that says how far it can be trusted."""

from __future__ import annotations

import math

import pandas as pd

from dashboard.metric_words import metric_words
from dashboard.words import listed, plain

CLEAR, LIKELY = 2.0, 1.0
"""Differences in spreads over seeds from which on one line is clearly, or probably, better."""


def verdict(table: pd.DataFrame, metric: str, tasks: int, more_seeds: str) -> str:
    """Say which line ended best.

    Parameters
    ----------
    table : DataFrame
        Of :func:`dashboard.findings.compare_outcomes.outcomes`.
    metric : str
        What ``last`` holds: less of it is better.
    tasks : int
        Among which different tasks the runs are.
    more_seeds : str
        How to get more seeds, in Markdown.

    Returns
    -------
    str
        Markdown.
    """
    ranked = table[~table["reference"] & table["last"].notna()].sort_values("last", kind="stable")
    if tasks > 1:
        return f"These runs are of {tasks} different tasks: their losses say nothing about one another."
    if len(ranked) < 2:
        return "There is nothing to compare yet: it takes two configurations with this number."
    best, second = ranked.iloc[0], ranked.iloc[1]
    title = plain(metric_words(metric).title)
    ahead = f"**{plain(best['label'])}** ends with the lowest {title}: {_number(best)}, before {_named(second)}."
    return f"{ahead} {_trust(best, second, more_seeds)}{_unfinished(ranked)}{_references(table)}"


def judges(metric: str) -> bool:
    """Tell whether lower values of a metric are known to be better."""
    return any(part in metric for part in ("loss", "perplexity")) and not metric_words(metric).more_is_better


def _trust(best: pd.Series, second: pd.Series, more_seeds: str) -> str:
    difference = float(second["last"] - best["last"])
    seeds = int(min(best["runs"], second["runs"]))
    spreads = [float(value) for value in (best["last_sd"], second["last_sd"]) if not math.isnan(value)]
    if seeds < 2 or not spreads:
        return f"One of the two has a single seed, so this may be chance. {more_seeds}"
    spread = max(spreads)
    over = f"over {seeds} seeds ({spread:.2g})"
    if difference > CLEAR * spread:
        times = f"{difference / spread:.1f} times" if spread else "beyond"
        return f"The difference of {difference:.2g} is {times} the spread {over}: unlikely to be chance."
    if difference > LIKELY * spread:
        return f"The difference of {difference:.2g} is a little more than the spread {over}: probably no chance."
    return f"But the difference of {difference:.2g} is within the spread {over}: they are equally good. {more_seeds}"


def _unfinished(ranked: pd.DataFrame) -> str:
    names = list(ranked.loc[~ranked["settled"], "label"])
    return f" Not done, or ended early: {plain(listed(names, 4), 400)}." if names else ""


def _references(table: pd.DataFrame) -> str:
    found = table[table["reference"] & table["last"].notna()]
    said = ", ".join(f"{plain(row['label'])} {_number(row)}" for _, row in found.iterrows())
    return f" For reference: {said}." if said else ""


def _named(row: pd.Series) -> str:
    return f"{plain(row['label'])} with {_number(row)}"


def _number(row: pd.Series) -> str:
    spread = "" if math.isnan(row["last_sd"]) else f" ± {row['last_sd']:.2g}"
    return f"{row['last']:.4f}{spread}"
