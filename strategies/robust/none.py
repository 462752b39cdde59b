"""No rule: every update that passed the server's checks is merged with its own weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from common.adapter import Adapter
from common.federation import ClientUpdate
from strategies.robust import Judgement, RobustRule


class NoRule(RobustRule):
    """Merge what passed the checks."""

    passes_all: ClassVar[bool] = True

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Leave the updates as they are."""
        return Judgement(updates)
