"""Coordinate-wise trimmed mean: every number is the mean of what the clients say, without the ends.

Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018,
arXiv 1803.01498, its option II, unweighted. Stands as many liars as are trimmed at each end: of few clients that may be
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from common.adapter import Adapter
from common.federation import ClientUpdate
from strategies.robust import Judgement, RobustRule
from strategies.trimming import trimmed_mean


class TrimmedMean(RobustRule):
    """The mean of every number's middle values; all clients count the same."""

    needs_linear: ClassVar[bool] = True

    share: float = Field(0.25, ge=0, lt=0.5, description="Share of the clients left out at each end, rounded down.")

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Leave out the ends of each number."""
        return trimmed_mean(updates, int(self.share * len(updates) + 1e-9))  # 0.29 · 100 is a little below 29
