"""Text of the store, made harmless for a page, and sentences built from it.

Names, reasons and messages come from experiments and clients: they may hold markup, control characters or text that
runs from right to left. Streamlit reads most labels as Markdown, so whatever is put into one goes through
:func:`plain`; tables, selections and charts show text as it is and take :func:`visible`.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 300
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def visible(text: object, longest: int = LONGEST) -> str:
    """Return a text on one line, without characters that cannot be seen or that turn the direction of reading."""
    kept = "".join(" " if letter.isspace() else _shown(letter) for letter in str(text)[: 4 * longest])
    line = " ".join(kept.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def plain(text: object, longest: int = LONGEST) -> str:
    """Return a text that Markdown shows letter for letter: no markup, link, formula, icon or HTML."""
    return _PUNCTUATION.sub(r"\\\1", visible(text, longest))


def code(text: str) -> str:
    """Return a text as inline code, for a command or a path of our own."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {visible(text, 1_000)} {fence}"


def listed(names: list[str], most: int = 6) -> str:
    """Write names as a list in a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(visible(name, 60) for name in names[:most]) + more


def _shown(letter: str) -> str:
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in _HIDDEN else letter
