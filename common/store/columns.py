"""Column types: the one place where values from outside are made fit for every database.

A client may send NUL characters, which PostgreSQL refuses, lone surrogates, which UTF-8 cannot hold,
megabytes of text and numbers past 64 bits. None of it may stop a commit, so text is escaped and bounded
and whole numbers are clamped as they are bound, in queries as well as in writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Double, String, Text
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

NAME_LENGTH = 200
SENTENCE_LENGTH = 4_000
JSON_LENGTH = 1_000_000
LARGEST_WHOLE = 2**63 - 1


def clean(text: str) -> str:
    r"""Escape what a database cannot hold: NUL becomes ``\x00``, a lone surrogate ``\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def clean_name(text: str) -> str:
    """Escape a name and bound it to 200 characters, so that different long names stay different."""
    name = clean(text)
    if len(name) <= NAME_LENGTH:
        return name
    mark = "…" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return name[: NAME_LENGTH - len(mark)] + mark


def clean_sentence(text: str) -> str:
    """Escape a text for people and bound it to 4,000 characters; the end says how long it was."""
    sentence = clean(text)
    if len(sentence) <= SENTENCE_LENGTH:
        return sentence
    mark = f"… ({len(sentence):,} characters in all)"
    return sentence[: SENTENCE_LENGTH - len(mark)] + mark


def to_json(value: object) -> str:
    """Write JSON in plain ASCII, where NUL and surrogates are escapes; NaN and Infinity keep their names."""
    return json.dumps(value, separators=(",", ":"))


def bounded_json(value: object) -> str:
    """Write JSON, or where it is too long for the database a note in its place."""
    text = to_json(value)
    if len(text) <= JSON_LENGTH:
        return text
    return to_json({"left_out": f"{len(text):,} characters, at most {JSON_LENGTH:,} are kept"})


class Name(TypeDecorator[str]):
    """A short text to search by, which PostgreSQL too sorts by code point."""

    impl = String(NAME_LENGTH)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the column type."""
        collation = "C" if dialect.name == "postgresql" else None
        return dialect.type_descriptor(String(NAME_LENGTH, collation=collation))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape and bound."""
        return None if value is None else clean_name(value)


class Sentence(TypeDecorator[str]):
    """A text for people."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape and bound."""
        return None if value is None else clean_sentence(value)


class Document(TypeDecorator[str]):
    """A text of our own of any length."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape."""
        return None if value is None else clean(value)


class Json(TypeDecorator[Any]):
    """A JSON value as text: the databases' own JSON types refuse NaN and NUL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """Write and bound."""
        return bounded_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Parse."""
        return None if value is None else json.loads(value)


class Names(TypeDecorator[tuple[str, ...]]):
    """Names in order."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> str:
        """Clean each name and write the list."""
        return to_json([clean_name(name) for name in value or ()])

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[str, ...]:
        """Parse."""
        return tuple(json.loads(value or "[]"))


class Whole(TypeDecorator[int]):
    """A whole number, clamped to what 64 bits hold."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Clamp."""
        return None if value is None else max(-LARGEST_WHOLE, min(LARGEST_WHOLE, int(value)))


class _SqliteReal(UserDefinedType[Any]):
    """A SQLite column of real affinity without SQLAlchemy's conversion, so that it can hold a text."""

    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        """Name the type."""
        return "DOUBLE"


class Real(TypeDecorator[float]):
    """A 64-bit float that keeps NaN.

    SQLite turns NaN into NULL, which would be mistaken for "not measured". There it is stored as the
    text ``nan``, which SQLite sorts after every number, as PostgreSQL sorts its NaN.
    """

    impl = Double
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the column type."""
        return dialect.type_descriptor(_SqliteReal() if dialect.name == "sqlite" else Double())

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | str | None:
        """Convert any number to a float."""
        if value is None:
            return None
        number = float(value)
        return "nan" if dialect.name == "sqlite" and math.isnan(number) else number

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        """Convert back."""
        return None if value is None else float(value)


class Moment(TypeDecorator[datetime]):
    """A time, aware and in UTC; SQLite holds it without a zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; a time without a zone is a mistake of the caller."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the time {value} has no zone; pass datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
