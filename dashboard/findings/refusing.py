"""Why a client's reply was left out, in plain words, and what can be done about it: rules over status and reason."""

from __future__ import annotations

import re
from typing import NamedTuple


class Cause(NamedTuple):
    """What happened, and what to do."""

    what: str
    hint: str


_CHANCE = Cause("Away by the simulation's dice", "Wanted: simulation.dropout and simulation.offline say how often.")
_VERSIONS = "Server and client disagree on the model: give both the same version of LoRAFleet and of the run's files."

_LATE = Cause(
    "No answer within the deadline",
    "Give it more time (federation.deadline_s) or less work (training.steps, a lower rank for this client).",
)
_OFFLINE = Cause(
    "Its node was not connected", "Start the client again and look at its network; it joins the next round."
)
_MEMORY = Cause(
    "It ran out of memory",
    "A lower rank for this client, a smaller training.batch_size, or training.gradient_checkpointing = true.",
)
_SPENT = Cause(
    "Its privacy budget is spent",
    "Wanted: another round would break the promise to its owner. Train without it, or start from this adapter on data "
    "that still has a budget.",
)
_NOT_PRIVATE = Cause(
    "Training would not have kept its privacy promise",
    "The last reason names what stands in the way; nothing was drawn or sent.",
)
_FAILED = Cause("Its program ended with an error", "The last reason names it; the client's own log has the rest.")
_CHECK = Cause("Its answer failed a check", "The last reason says what was expected.")
_NORM = Cause(
    "Its update was larger than allowed",
    "Where the client is honest: raise federation.max_update_norm, or lower training.learning_rate.",
)
_NUMBERS = Cause(
    "Its update holds NaN or infinity",
    'Its training diverged: lower training.learning_rate, or set training.precision = "fp32".',
)
_EXAMPLES = Cause(
    "It claims a number of examples that cannot be",
    "See what the client counts; federation.max_num_examples is the most that is believed.",
)
_STALE = Cause("It trained on an older adapter", "A reply to an earlier round; if it goes on, restart the client.")
_FROZEN = Cause("It changed what was to stay frozen", _VERSIONS)
_SHAPE = Cause("Its update does not fit the model: rank, shape or layers", _VERSIONS)
_ORDER = Cause(
    "It answered another order", "A late answer, or two clients under one name: give each a name of its own."
)
_SECURE = Cause(
    "Its part of the secure sum could not be used", "A late or repeated answer; if it goes on, restart the client."
)
_LOSS = Cause("It did not evaluate", "Its loss is missing from the round's mean; the last reason says why.")
_KEPT = Cause("A reply kept from before an interruption was not used", "Nothing: the client was asked again.")

_RULES: tuple[tuple[str, str, Cause], ...] = (
    ("", r"\(simulation\.(dropout|offline)\)", _CHANCE),
    ("late", "", _LATE),
    ("offline", "", _OFFLINE),
    ("failed", r"privacy budget", _SPENT),
    ("failed", r"NotPrivate|under privacy|privacy protects", _NOT_PRIVATE),
    ("failed", r"out ?of ?memory|MemoryError", _MEMORY),
    ("failed", "", _FAILED),
    ("notice", "did not evaluate", _LOSS),
    ("notice", "kept reply", _KEPT),
    ("rejected", r"NaN|infinit|finite|float32", _NUMBERS),
    ("rejected", r"\bnorm\b", _NORM),
    ("rejected", r"secure|masked|unmasked|\bshares\b", _SECURE),
    ("rejected", r"\bexamples\b|weighs", _EXAMPLES),
    ("rejected", r"base version", _STALE),
    ("rejected", r"frozen", _FROZEN),
    ("rejected", r"is signed|is for round|another order|nobody asked", _ORDER),
    ("rejected", r"\b(layers?|rank|shape|heads?|method|factors?|core|part|adapter|Arra[a-z]*)\b", _SHAPE),
    ("rejected", "", _CHECK),
)
_PATTERNS = tuple((status, re.compile(pattern, re.IGNORECASE), cause) for status, pattern, cause in _RULES)


def cause(status: str, reason: str | None) -> Cause:
    """Say what a status and a reason mean."""
    text = (reason or "")[:500]
    fitting = (cause for known, pattern, cause in _PATTERNS if known in ("", status) and pattern.search(text))
    return next(fitting, _CHECK)
