"""Rows as lines of JSON, and lines that anybody may have written as rows again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import Boolean, Column, String, Table

from common.store.columns import LARGEST_WHOLE, Document, Json, Moment, Name, Names, Real, Sentence, Whole
from common.store.models import ClientRoundRow, EventRow, RoundRow
from common.store.packed_file import Unfit
from common.store.rows import Values

LINE_BYTES = 16 << 20
DEEPEST = 100
"""Levels a JSON value may nest; what is deeper is left out, since readers recurse."""

_MADE_ANEW = {(EventRow.__tablename__, "id")}


@cache
def packed_columns(table: Table) -> dict[str, Column[Any]]:
    """Return the columns that are packed by name: all but ids that the store gives."""
    return {column.name: column for column in table.columns if (table.name, column.name) not in _MADE_ANEW}


def encode(table: Table, row: Values) -> bytes:
    """Write a row as a line.

    Raises
    ------
    Unfit
        When it is longer than lines may be.
    """
    values = {name: _plain(row[name]) for name in packed_columns(table)}
    line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES:
        raise Unfit(f"a row of {table.name} takes {len(line):,} bytes, more than the {LINE_BYTES:,} a line may have")
    return line


def decode(table: Table, line: bytes) -> Values:
    """Read a line; a column that it lacks is empty, as if an older version had written it.

    Raises
    ------
    Unfit
        When it is not a row of that table.
    """
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"a line of {table.name} is not JSON") from error
    columns = packed_columns(table)
    if not isinstance(given, dict) or given.keys() - columns.keys():
        raise Unfit(f"a line of {table.name} is not a row of it")
    return {name: _checked(table, column, given.get(name)) for name, column in columns.items()}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _checked(table: Table, column: Column[Any], value: Any) -> Any:
    if value is None and column.nullable:
        return None
    try:
        if type(column.type) is String:
            _expect(len(value) <= (column.type.length or 0))
        return _OBJECTS.get((table.name, column.name), _READERS[type(column.type)])(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise Unfit(f"a row of {table.name} has no usable {column.name}") from error


def _expect(fit: bool) -> None:
    if not fit:
        raise ValueError


def _text(value: Any) -> str:
    _expect(isinstance(value, str))
    return str(value)


def _short(value: Any) -> str:
    text = _text(value)
    _expect(text.isascii() and text.isprintable())
    return text


def _flag(value: Any) -> bool:
    _expect(isinstance(value, bool))
    return bool(value)


def _whole(value: Any) -> int:
    _expect(type(value) is int and -LARGEST_WHOLE <= value <= LARGEST_WHOLE)
    return int(value)


def _real(value: Any) -> float:
    _expect(type(value) in (int, float))
    return float(value)


def _moment(value: Any) -> datetime:
    moment = datetime.fromisoformat(_text(value))
    _expect(moment.tzinfo is not None)
    return moment.astimezone(UTC)


def _names(value: Any) -> tuple[str, ...]:
    _expect(isinstance(value, list) and all(isinstance(name, str) for name in value))
    return tuple(value)


def _json(value: Any) -> Any:
    return {"left_out": f"nested more than {DEEPEST} deep"} if _is_deep(value) else value


def _object(value: Any) -> Any:
    _expect(isinstance(value, dict))
    return _json(value)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for item in level
            if isinstance(item, dict | list)
            for part in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


_READERS: dict[type, Callable[[Any], Any]] = {
    Name: _text,
    Sentence: _text,
    Document: _text,
    String: _short,
    Boolean: _flag,
    Whole: _whole,
    Real: _real,
    Moment: _moment,
    Names: _names,
    Json: _json,
}

_OBJECTS: dict[tuple[str, str], Callable[[Any], Any]] = {
    (RoundRow.__tablename__, "phases"): _object,
    (ClientRoundRow.__tablename__, "metadata"): _object,
    (EventRow.__tablename__, "data"): _object,
}
"""JSON columns that readers take for a mapping."""
