"""Federations on one machine: drivers, presets, the demo's corpus and base model.

>>> from simulations import simulate
>>> run = simulate(Experiment(...))
>>> run.metrics["held_out_loss"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulations.run import FinishedRun, resume, simulate

__all__ = ["FinishedRun", "resume", "simulate"]


def __getattr__(name: str) -> Any:
    """Import the drivers when they are first asked for: they bring torch and Flower along."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from simulations import run

    return getattr(run, name)
