"""A run's configuration as its row holds it: plain JSON of any version, read without trusting it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from common.store import Run
from dashboard.words import visible

DEEPEST = 6
ABSENT = "–"


def settings(run: Run) -> dict[str, Any]:
    """Return a run's configuration; empty where it cannot be read."""
    try:
        found = json.loads(run.experiment)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def setting(run: Run, path: str, default: Any = None) -> Any:
    """Return one setting by its path, as in ``federation.rounds``."""
    found: Any = settings(run)
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            return default
        found = found[key]
    return found


def amount(run: Run, path: str, default: float) -> float:
    """Return a setting that is a number; the default where it is none."""
    found = number(setting(run, path))
    return default if found is None else found


def number(value: Any) -> float | None:
    """Return a value of plain JSON as a number; None where it is none, not finite, or larger than numbers can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def positive(value: Any) -> float | None:
    """Return a value of plain JSON as a positive number, None where it is none."""
    found = number(value)
    return found if found is not None and found > 0 else None


def flat(run: Run) -> dict[str, str]:
    """Return every setting as text by its path."""
    return {visible(path, 120): visible(value, 200) for path, value in _leaves("", settings(run), 0)}


def differences(one: Run, other: Run) -> list[tuple[str, str, str]]:
    """Return the settings in which two runs differ: path, value of the one, value of the other."""
    first, second = flat(one), flat(other)
    paths = sorted(first.keys() | second.keys())
    values = [(path, first.get(path, ABSENT), second.get(path, ABSENT)) for path in paths]
    return [(path, here, there) for path, here, there in values if here != there]


def _leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth < DEEPEST:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner, depth + 1)
    else:
        yield path, json.dumps(value, ensure_ascii=False)
