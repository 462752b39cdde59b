"""Caps on the clients' weights: what a client says it trained on is a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping


def capped_weights(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Bound every weight to a share of their sum; what is cut is shared out in proportion, the sum stays.

    Parameters
    ----------
    weights : mapping of str to float
        Positive weights, by client.
    share : float in (0, 1]
        The largest share. With no more than ``1 / share`` clients all are equal: that is as low as the largest can be.
    """
    total = math.fsum(weights.values())
    if len(weights) * share <= 1:
        return dict.fromkeys(weights, total / len(weights))
    cap, free, scale = share * total, set(weights), 1.0
    while over := {name for name in free if weights[name] * scale > cap}:
        free -= over
        room = total - cap * (len(weights) - len(free))
        scale = room / math.fsum(weights[name] for name in free) if free else 0.0
    return {name: weight * scale if name in free else cap for name, weight in weights.items()}
