"""Documents read from what a user has: files, folders, tables, a data set of the Hub, or the built-in corpus.

Tables are read with json, csv and pyarrow rather than with `datasets`, which copies all it reads into a cache
under the user's home and cannot say which row is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from common.errors import DataError
from common.text import Document
from common.text.stdlib import (
    OWNER_SUBSTITUTES,
    OWNERS,
    UNSEEN,
    UNSEEN_SUBSTITUTES,
    code_documents,
    installed,
)

BUILTIN_CODE = "builtin:code"
_HUB = "hub:"
_TEXT_FILES = (".txt", ".py", ".md")
_LONGEST_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is too small for documents

Row = Mapping[str, object]


def read_documents(source: str, *, text_column: str = "text", key_column: str | None = None) -> list[Document]:
    """Read all documents of a source; blank ones are left out.

    Parameters
    ----------
    source : str
        ``builtin:code`` (owners' and unseen packages of Python's library, the key being the package);
        a folder or file of ``.txt``, ``.py`` or ``.md`` (one document per file, the key being its folder);
        a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file (one document per row);
        or ``hub:NAME[:CONFIG[:SPLIT]]`` for `datasets.load_dataset`, split ``train`` unless said otherwise.
    text_column, key_column : str
        Columns of a table that hold the text and the key. Without a key column keys are empty.

    Returns
    -------
    list of Document
        At least one, in an order that follows from the source alone.

    Raises
    ------
    DataError
        If the source is missing, unreadable, empty, not UTF-8, or lacks a column.
    """
    try:
        documents = list(_documents(source, text_column, key_column))
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror}") from error
    if not documents:
        raise DataError(f"{source} holds no text; expected at least one document that is not blank")
    for document in documents:
        _require_whole_characters(source, document)
    return documents


def _documents(source: str, text_column: str, key_column: str | None) -> Iterable[Document]:
    if source == BUILTIN_CODE:
        packages = installed(OWNERS + OWNER_SUBSTITUTES + UNSEEN + UNSEEN_SUBSTITUTES)
        return (document for package in packages for document in code_documents(package))
    if source.startswith(_HUB):
        return _from_rows(source, _hub_rows(source), text_column, key_column)
    path = Path(os.path.expanduser(source))  # leaves a user it does not know as it stands
    if not os.path.exists(path):  # unlike Path.exists, never raises
        raise DataError(f"{source} does not exist; give a file, a folder, {BUILTIN_CODE} or {_HUB}NAME")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix in _TEXT_FILES:
        return _from_texts([path], path.parent)
    if path.suffix in _ROW_READERS:
        return _from_rows(str(path), _ROW_READERS[path.suffix](path), text_column, key_column)
    raise DataError(f"{source} has a form that cannot be read; expected {', '.join([*_TEXT_FILES, *_ROW_READERS])}")


def _from_folder(folder: Path) -> Iterator[Document]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _TEXT_FILES and path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise DataError(f"{folder} holds no {', '.join(_TEXT_FILES)} file; for tables name the file, or {_HUB}{folder}")
    return _from_texts(visible, folder)


def _from_texts(paths: Iterable[Path], root: Path) -> Iterator[Document]:
    for path in paths:
        text = _read(path)
        relative = path.relative_to(root)
        if text.strip():
            yield Document(relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else "", text)


def _from_rows(source: str, rows: Iterable[Row], text_column: str, key_column: str | None) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        for column in (text_column, key_column):
            if column is not None and column not in row:
                found = ", ".join(map(str, row)) or "none"
                raise DataError(f"{source} row {number} has no column {column!r}; its columns are: {found}")
        text = row[text_column]
        if not isinstance(text, str):
            raise DataError(
                f"{source} row {number}: column {text_column!r} holds {type(text).__name__}, expected text; "
                "name another text column or remove the row"
            )
        if text.strip():
            key = "" if key_column is None or row[key_column] is None else str(row[key_column])
            yield Document(f"{Path(source).name}:{number}", key, text)


def _require_whole_characters(source: str, document: Document) -> None:
    r"""Refuse lone surrogates, which JSON's ``\ud800`` and odd file names bring and no tokenizer takes."""
    try:
        f"{document.id}{document.key}{document.text}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: document {document.id!a} holds half a character; correct it") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield _json_object(path, f"line {number}", line)


def _json_object(path: Path, place: str, text: str) -> Row:
    value = _parsed(path, place, text)
    if not isinstance(value, dict):
        raise DataError(f"{path} {place} is no JSON object; expected one object per row")
    return value


def _parsed(path: Path, place: str, text: str) -> object:
    try:
        value: object = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} {place} is not JSON: {error}") from error
    return value


def _json_array(path: Path) -> Iterator[Row]:
    text = _read(path)
    if not text.strip():
        return
    value = _parsed(path, "as a whole", text)
    if not isinstance(value, list):
        raise DataError(f"{path} is no JSON array; expected an array of objects, or a .jsonl file")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number} is no JSON object; expected an array of objects")
        yield row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            surplus = row.pop(None, [])  # csv's key for what has no column
            if surplus:
                wide = len(row) + len(surplus)
                raise DataError(f"{path} row {number} has {wide} fields for {len(row)} columns; quote commas")
            yield row
    except csv.Error as error:
        raise DataError(f"{path} line {reader.reader.line_num} is not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _hub_rows(source: str) -> Iterable[Row]:
    """Load a data set of the Hub, or a local folder that `datasets` understands."""
    from datasets import load_dataset

    name, config, split = (*source.removeprefix(_HUB).split(":"), "", "")[:3]
    try:
        loaded: Iterable[Row] = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises every kind of error: network, scripts, formats
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{source} cannot be loaded: {reason[0]}") from error
    return loaded


_ROW_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
