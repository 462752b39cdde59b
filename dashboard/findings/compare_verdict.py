"""Which line of a comparison is better, in a sentence that says how far it can be trusted."""

from __future__ import annotations

import math

import pandas as pd

from common.wording import size
from dashboard.findings.compare_even import Even, digits
from dashboard.metric_words import metric_words
from dashboard.words import listed, plain

CLEAR, LIKELY = 2.0, 1.0
"""Differences in spreads over seeds from which on one line is clearly, or probably, better."""
FEW_SEEDS = 3
"""With fewer the spread itself is hardly known."""


def verdict(table: pd.DataFrame, even: Even, metric: str, tasks: int, more_seeds: str) -> str:
    """Say which line is best after the same effort.

    Parameters
    ----------
    table : DataFrame
        Of :func:`dashboard.findings.compare_outcomes.outcomes`.
    even : Even
        Where the lines stand; less is better.
    metric : str
        What they stand at.
    tasks : int
        Among which different tasks the runs are.
    more_seeds : str
        How to get more seeds, in Markdown.

    Returns
    -------
    str
        Markdown.
    """
    if tasks > 1:
        return f"These runs are of {tasks} different tasks: their losses say nothing about one another."
    if len(table[~table["reference"]]) < 2:
        return "There is nothing to compare yet: it takes two configurations with this number."
    ranked = even.ranked
    if len(ranked) < 2:
        return f"There is nothing to compare yet: no two configurations have trained this far.{_aside(table, ranked)}"
    return f"{_best(even, metric, more_seeds)}{_aside(table, ranked)}"


def judges(metric: str) -> bool:
    """Tell whether lower values of a metric are known to be better."""
    return any(part in metric for part in ("loss", "perplexity")) and not metric_words(metric).more_is_better


def _best(even: Even, metric: str, more_seeds: str) -> str:
    best, second = even.ranked.iloc[0], even.ranked.iloc[1]
    title = plain(metric_words(metric).title)
    if not even.best:
        both = " and ".join(f"**{plain(row['label'])}**{_cost(row)}" for row in (best, second))
        return f"No difference: {both} both have the lowest {title} {even.effort}: {digits(best['value'])}."
    return (
        f"**{plain(best['label'])}** has the lowest {title} {even.effort}: {_standing(best)}, before "
        f"{plain(second['label'])} with {_standing(second)}. {_trust(best, second, more_seeds)}"
    )


def _trust(best: pd.Series, second: pd.Series, more_seeds: str) -> str:
    difference = float(second["value"] - best["value"])
    fewest, most = sorted((int(best["seeds"]), int(second["seeds"])))
    if fewest < 2:
        whose = "There is a single seed each" if most < 2 else "One of the two has a single seed"
        return f"{whose}, so this may be chance. {more_seeds}"
    spread = max(float(best["sd"]), float(second["sd"]))
    over = f"the spread over {fewest} seeds ({spread:.2g})"
    if fewest < FEW_SEEDS:
        side = "more than" if difference > spread else "within"
        return f"The difference of {difference:.2g} is {side} {over}, but so few seeds say little. {more_seeds}"
    if difference > CLEAR * spread:
        times = f"{difference / spread:.1f} times" if spread else "beyond"
        return f"The difference of {difference:.2g} is {times} {over}: unlikely to be chance."
    if difference > LIKELY * spread:
        return f"The difference of {difference:.2g} is a little more than {over}: probably no chance."
    return f"But the difference of {difference:.2g} is within {over}: they are equally good. {more_seeds}"


def _aside(table: pd.DataFrame, ranked: pd.DataFrame) -> str:
    """Say whose numbers are not final or not there, and what the references have."""
    measured = table[table["last"].notna()]
    references = measured["reference"]
    open_ones = list(measured.loc[~references & ~measured["settled"], "label"])
    absent = [label for label in table.loc[~table["reference"], "label"] if label not in set(ranked["label"])]
    known = [
        f"{plain(row['label'])} {_spread(row['last'], row['last_sd'])}" for _, row in measured[references].iterrows()
    ]
    said = [
        f"Not done, or ended early: {plain(listed(open_ones, 4), 400)}." if open_ones else "",
        f"Without this number: {plain(listed(absent, 4), 400)}." if absent else "",
        f"For reference, at their end: {', '.join(known)}." if known else "",
    ]
    return "".join(f" {sentence}" for sentence in said if sentence)


def _standing(row: pd.Series) -> str:
    return f"{_spread(row['value'], row['sd'])}{_cost(row)}"


def _cost(row: pd.Series) -> str:
    return "" if math.isnan(row["nbytes"]) else f" for {size(row['nbytes'])} per client"


def _spread(value: float, spread: float) -> str:
    return digits(value) if math.isnan(spread) else f"{digits(value)} ± {spread:.2g}"
