"""Norm bounding: shorten every client's change to a bound, so that no client moves the merge further than others.

Update ``x`` of start ``x₀`` becomes ``x₀ + c (x − x₀)``, in all its numbers, with a ``c ≤ 1`` at which the change of
the product, ``‖b a − b₀ a₀‖`` over all layers and heads, keeps the bound. Along that path it is ``c L + c² Q`` with
``L = Δb a₀ + b₀ Δa`` and ``Q = Δb Δa``: how the factors are split does not let a change slip through. A frozen factor
keeps its bits, ranks may differ, and every strategy may merge the result.

Sun, Kairouz, Suresh, McMahan: Can You Really Backdoor Federated Learning?, 2019, arXiv 1911.07963. Departures: the
bound's default is the median of the round's norms, and the path is the client's own instead of that of the product,
which has no factors of its rank. What only rewrites factors changes no product and is not shortened; where factors are
averaged (fedavg) set ``federation.max_update_norm`` too. What cancels to less than its rounding counts as long as that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pydantic import Field

from common.adapter import Adapter
from common.errors import RejectedUpdate
from common.federation import ClientUpdate
from common.lowrank import Dense, LowRank, Update, inner
from strategies.gram import NOISE, difference
from strategies.robust import Judgement, RobustRule

HALVINGS = 60
"""Halvings of the interval of ``c``: to float64's resolution."""


class NormBounding(RobustRule):
    """All updates, the long ones shortened."""

    bound: float | None = Field(
        None, gt=0, description="Largest norm of a client's change; none: the median of the round's."
    )

    def judge(self, updates: Sequence[ClientUpdate], starts: Mapping[str, Adapter]) -> Judgement:
        """Shorten what is longer than the bound."""
        paths = {update.client: path_of(update, starts[update.client]) for update in updates}
        norms = sorted(path.norm(1.0) for path in paths.values())
        bound = norms[(len(norms) - 1) // 2] if self.bound is None else self.bound
        shares = {client: path.share_within(bound) for client, path in paths.items()}
        return Judgement(
            [_shortened(update, starts[update.client], shares[update.client]) for update in updates], shares
        )


class Path(NamedTuple):
    """The change ``c L + c² Q`` by its inner products: ``‖L‖²``, ``⟨L, Q⟩``, ``‖Q‖²``; and their slots' lengths."""

    linear: float
    mixed: float
    quadratic: float
    linear_slots: float
    quadratic_slots: float

    def norm(self, share: float) -> float:
        """Return the norm of the change at a share ``c`` of the way."""
        square = self.linear + share * (2 * self.mixed + share * self.quadratic)
        rounding = NOISE * (self.linear_slots + share * self.quadratic_slots) ** 2
        return share * math.sqrt(max(square, rounding))

    def share_within(self, bound: float) -> float:
        """Return a share of the way at which the norm keeps a bound: all of it, or where it crosses the bound."""
        if self.norm(1.0) <= bound:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.norm(middle) <= bound else (low, middle)
        return low


def path_of(update: ClientUpdate, start: Adapter) -> Path:
    """Measure the way from a client's start to its update.

    Raises
    ------
    RejectedUpdate
        If the two have other layers, ranks or heads.
    """
    if update.adapter.layout != start.layout:
        raise RejectedUpdate(
            f"client {update.client} sent other layers, ranks or heads than it started from; its change has no length"
        )
    parts = [_layer_path(now, start.layers[layer]) for layer, now in update.adapter.layers.items()]
    heads = [
        float((value.double() - start.extras[head].double()).square().sum())
        for head, value in update.adapter.extras.items()
    ]
    linear, *rest = (math.fsum(numbers) for numbers in zip(*parts, strict=True))
    return Path(linear + math.fsum(heads), *rest)


def _layer_path(now: Update, start: Update) -> Path:
    if isinstance(now, Dense) or isinstance(start, Dense):
        change = difference(now, start)
        return Path(inner(change, change), 0.0, 0.0, 0.0, 0.0)
    b, a, b0, a0 = (factor.double() for factor in (now.b, now.a, start.b, start.a))
    first, second, quadratic = LowRank(b - b0, a0), LowRank(b0, a - a0), LowRank(b - b0, a - a0)
    return Path(
        inner(first, first) + 2 * inner(first, second) + inner(second, second),
        inner(first, quadratic) + inner(second, quadratic),
        inner(quadratic, quadratic),
        _slots(first) + _slots(second),
        _slots(quadratic),
    )


def _slots(part: LowRank) -> float:
    """Return the sum of the slots' lengths."""
    return float(part.b.norm(dim=0) @ part.a.norm(dim=1))


def _shortened(update: ClientUpdate, start: Adapter, share: float) -> ClientUpdate:
    if share == 1:
        return update
    flat = start.flat + share * (update.adapter.flat - start.flat)
    return replace(update, adapter=update.adapter.with_flat(flat))
