"""Where the lines of a comparison stand after the same effort: the same rounds, or the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from common.wording import size
from dashboard.findings.compare_lines import Line
from dashboard.findings.compare_outcomes import counting

ALIKE = 1.02
"""Factor within which bytes count as the same: a few in every message are not of the adapter."""
COLUMNS = ("label", "value", "sd", "seeds", "nbytes")


@dataclass(frozen=True)
class Even:
    """What the lines came to when all had made the same effort.

    Parameters
    ----------
    effort : str
        A phrase, as in ``after round 20``.
    rows : DataFrame
        Columns label, value and sd (mean and standard deviation over the runs that count), seeds, and nbytes: what
        was sent per client until then, up and down; missing where the clients are unknown.
    """

    effort: str
    rows: pd.DataFrame

    @property
    def ranked(self) -> pd.DataFrame:
        """The rows, lowest first."""
        return self.rows.sort_values("value", kind="stable")

    @property
    def best(self) -> str:
        """The label of the lowest; empty where there are not two, or where the two lowest read the same."""
        lowest = self.ranked[:2]
        return str(lowest["label"].iloc[0]) if lowest["value"].map(digits).nunique() == 2 else ""


def digits(value: float) -> str:
    """Write a loss."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def even(lines: Sequence[Line], curves: pd.DataFrame, over: str, shares: Mapping[str, int | None]) -> Even:
    """Compare like with like.

    Parameters
    ----------
    lines : sequence of Line
        References among them are left out: they send nothing and know no rounds of the others.
    curves : DataFrame
        Of :func:`dashboard.queries.comparing.curves`.
    over : str
        A key of ``SPENT``: over ``bytes`` the bytes are the same, otherwise the rounds.
    shares : mapping of str to int
        Clients of each run, among whom bytes are shared.
    """
    run = _trained(lines, curves, shares)
    if over == "bytes":
        known = run[run["nbytes"].notna()]
        least = known.groupby("run")["nbytes"].max().min()
        at = known[known["nbytes"] <= ALIKE * least].sort_values("round").groupby("run").tail(1)
        return Even(f"with at most about {size(least)} per client" if len(at) else "", _means(at))
    last = _last_common(run)
    return Even(f"after round {last}, the last that all have" if last else "", _means(run[run["round"] == last]))


def _trained(lines: Sequence[Line], curves: pd.DataFrame, shares: Mapping[str, int | None]) -> pd.DataFrame:
    """Return the finite points of the runs that count and have trained, with bytes per client."""
    series = {run.id: line.label for line in lines for run in counting(line)}
    clients = {name: float(count) if count else float("nan") for name, count in shares.items()}
    per_client = curves["nbytes"].astype(float) / curves["run"].map(clients).astype(float)
    finite = curves["value"].astype(float).abs() < float("inf")
    found = curves.assign(label=curves["run"].map(series), nbytes=per_client)[finite]
    found = found[found["label"].notna()]
    return found[found.groupby("run")["round"].transform("max") > 0]


def _last_common(run: pd.DataFrame) -> int:
    seen = run.groupby("round")["run"].nunique()
    common = seen[seen == run["run"].nunique()]
    return int(common.index.max()) if len(common) else 0


def _means(run: pd.DataFrame) -> pd.DataFrame:
    grouped = run.groupby("label", sort=False)
    found = grouped.agg(
        value=("value", "mean"), sd=("value", "std"), seeds=("run", "nunique"), nbytes=("nbytes", "mean")
    )
    return found.reset_index().reindex(columns=list(COLUMNS))
