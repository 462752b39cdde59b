"""What goes with what: one row per aggregation strategy, worked out from what the plug-ins say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from common.federation import Part
from strategies.aggregation import AGGREGATION, AggregationStrategy
from strategies.merging import robust_refusals
from strategies.robust import ROBUST

LOOKED_AT = 6
"""Rounds after which a strategy's uploads repeat themselves."""

SIZES: dict[Part, str] = {
    "ab": "r (out + in)",
    "b": "r · out",
    "a": "r · in",
    "inner": "r · in",
    "core": "r²",
    "sparse": "density · out · in",
}
"""Numbers that travel per layer."""


@dataclass(frozen=True)
class MatrixRow:
    """One strategy's row.

    Parameters
    ----------
    name : str
        Of the strategy.
    exact : bool
        At its default options.
    mixed_ranks, secure_aggregation, error_feedback, client_memory : bool
        What it allows, or needs.
    uploads : str
        Numbers a client sends per layer.
    robust : tuple of str
        Robust rules that fit, at equal ranks.
    """

    name: str
    exact: bool
    mixed_ranks: bool
    uploads: str
    secure_aggregation: bool
    error_feedback: bool
    client_memory: bool
    robust: tuple[str, ...]

    @property
    def rules(self) -> str:
        """Name the robust rules that fit, or those that do not, whichever is shorter."""
        known = [name for name in ROBUST.names() if not ROBUST.plugin(name).passes_all]
        if missing := [name for name in known if name not in self.robust]:
            return min(", ".join(self.robust) or "none", f"all but {', '.join(missing)}", key=len)
        return "all"


def capability_matrix() -> list[MatrixRow]:
    """Return the rows of all strategies, by name."""
    return [_row(name) for name in AGGREGATION.names()]


def _row(name: str) -> MatrixRow:
    strategy = AGGREGATION.create(name)
    able = strategy.capabilities
    ranks = {f"client-{i}": 4 for i in range(32)}
    rules = [ROBUST.create(rule) for rule in ROBUST.names()]
    fitting = tuple(
        rule.plugin_name
        for rule in rules
        if not rule.passes_all and not robust_refusals(rule, strategy, ranks, len(ranks))
    )
    return MatrixRow(
        name,
        able.exact,
        able.mixed_ranks,
        uploads(strategy),
        able.linear_uplink,
        able.same_coordinates,
        able.client_memory,
        fitting,
    )


def uploads(strategy: AggregationStrategy) -> str:
    """Describe what a client sends per layer, as it changes over the rounds."""
    parts = [strategy.travels(number).up for number in range(1, LOOKED_AT + 1)]
    sizes = [SIZES[part] for part, _ in groupby(parts)]
    if len(sizes) > len(set(sizes)):
        return " or ".join(dict.fromkeys(sizes)) + " in turn"
    return ", then ".join(sizes)
