"""Numbers written for people, the same in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: float) -> str:
    """Write a number of bytes for people."""
    if nbytes >= 1e18:
        return "over 1000 PB"
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Write a duration for people."""
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number that may be missing."""
    return "–" if value is None else f"{value:.{digits}f}"


def named(names: Sequence[str], most: int = 5) -> str:
    """Write names as a list in a sentence: the first ones, and how many there are beside them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(count: int, noun: str) -> str:
    """Write ``1 round``, ``2 rounds``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
