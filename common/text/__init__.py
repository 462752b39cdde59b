"""Text: the documents clients own, how they are read, shared out, split and cut into rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text as an owner keeps it: a file, or a row of a table.

    Attributes
    ----------
    id : str
        Where it comes from, such as ``asyncio/base_events.py`` or ``mails.jsonl:12``.
    key : str
        What it naturally belongs to, such as ``asyncio``; empty if nothing.
    text : str
    """

    id: str
    key: str
    text: str
