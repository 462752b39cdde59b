"""What a server optimizer makes of a round's change, number by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

PREFIX = "optimizer."
MOMENTUM, SQUARE = f"{PREFIX}momentum", f"{PREFIX}square"
"""Names of m and v among a state's extras; of a layer's own, the layer follows."""


@dataclass(frozen=True)
class Rule:
    """``m ← β m + g Δ``, ``v ← second(v, Δ²)``, ``step = η m / (√v + τ)``; ``η m`` where no v is kept.

    Parameters
    ----------
    learning_rate : float
        η.
    decay, gain : float
        β and g: what is left of the momentum, and how much of the change joins it.
    tau : float
        τ; the first v is its square.
    second : callable, optional
        New v from the held one and Δ².
    """

    learning_rate: float
    decay: float
    gain: float = 1.0
    tau: float = 0.0
    second: Callable[[Tensor, Tensor], Tensor] | None = None

    def scale(self, v: Tensor) -> Tensor | float:
        """Return what the momentum is multiplied by."""
        return self.learning_rate if self.second is None else self.learning_rate / (v.sqrt() + self.tau)
