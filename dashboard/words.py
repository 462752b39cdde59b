"""Text of the store, made harmless for a page, and sentences built from it.

Names, reasons and messages come from experiments and clients: they may hold markup, control characters or text that
runs from right to left. Streamlit reads most labels as Markdown, so whatever is put into one goes through
:func:`plain`; tables, selections and charts show text as it is and take :func:`visible`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

LONGEST = 300
NO_KEY = "__proto__"
"""The one name that Vega cannot hold: no key of a plain object in JavaScript."""
JOINER = "\N{WORD JOINER}"
_REWRITTEN = re.compile(r"(?<=:)(?=[/\w])|(?<=@)(?=\S)|(?<=[Ww]{3})(?=\.)|(?<=[-<>=~])(?!-\w)(?=[-<>=~])")
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


def visible(text: object, longest: int = LONGEST) -> str:
    """Return a text on one line, without characters that cannot be seen or that turn the direction of reading."""
    kept = str(text)[: 4 * longest]
    if not (kept.isascii() and kept.isprintable()):
        kept = "".join(" " if letter.isspace() else _shown(letter) for letter in kept)
    line = " ".join(kept.split())
    if line == NO_KEY:
        line = f"“{line}”"
    return line if len(line) <= longest else line[: longest - 1] + "…"


def block(text: object, longest: int = 4_000) -> str:
    """Return a text of several lines as it was written, without what cannot be seen or turns the direction."""
    kept = str(text)[:longest].replace("\r\n", "\n").expandtabs(4)
    return "".join(letter if letter == "\n" else _shown(letter) for letter in kept)


def plain(text: object, longest: int = LONGEST) -> str:
    """Return a text that Markdown shows letter for letter: no markup, link, formula, icon or HTML.

    Streamlit makes links, its logo and arrows from text whose marks were escaped; there letters are held apart by a
    joiner, which has no width.
    """
    return _PUNCTUATION.sub(r"\\\1", _REWRITTEN.sub(JOINER, visible(text, longest)))


def code(text: str) -> str:
    """Return a text as inline code, for a command or a path of our own."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {visible(text, 1_000)} {fence}"


def listed(names: list[str], most: int = 6) -> str:
    """Write names as a list in a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(visible(name, 60) for name in names[:most]) + more


def labels(names: Iterable[str], longest: int = 40) -> dict[str, str]:
    """Give each name a label to be told by in charts and selections: visible, not empty, and different from all others.

    Names that look alike once they are shortened and cleaned are numbered.
    """
    shown = {name: visible(name, longest) or "(no name)" for name in names}
    seen: Counter[str] = Counter()
    taken = set(shown.values())
    found = {}
    for name, label in shown.items():
        again = seen[label]
        while again and f"{label} ({again + 1})" in taken:
            again += 1
        found[name] = f"{label} ({again + 1})" if again else label
        taken.add(found[name])
        seen[label] = again + 1
    return found


def _shown(letter: str) -> str:
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in _HIDDEN else letter
