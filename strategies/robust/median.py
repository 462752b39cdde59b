"""Coordinate-wise median: every number of the adapter is the median of what the clients say.

Of an even number of clients it is the mean of the two middle values.

Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018,
arXiv 1803.01498, its option I, unweighted. Where a strategy averages numbers (linear ones, at equal ranks) it protects
each of them; on factors whose products are merged it would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from common.adapter import Adapter
from common.federation import ClientUpdate
from strategies.robust import Judgement, RobustRule
from strategies.trimming import trimmed_mean


class Median(RobustRule):
    """The median of every number; all clients count the same."""

    needs_linear: ClassVar[bool] = True

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Leave one or two values of each number."""
        return trimmed_mean(updates, (len(updates) - 1) // 2)
