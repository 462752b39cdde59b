"""Which documents each client holds: read once per process, partitioned, split into train and held-out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from common.errors import DataError
from common.experiment import ClientSettings
from common.text import Document
from common.text.documents import BUILTIN_CODE, read_documents
from common.text.partition import Partition, partition, split
from common.text.stdlib import resolve_owners


@dataclass(frozen=True)
class TextSource:
    """Where a federation's documents come from and how they are shared out.

    Parameters
    ----------
    source : str or None
        One source for all clients; None: each client's ``data`` is a source of its own.
    partition : Partition
        How one source is shared out.
    text_column, key_column : str
        Columns of tables.
    held_out : float in (0, 1)
        Share of each client's documents it is judged by.
    piece : int or None
        Documents are cut into pieces of so many characters before they are shared out.
    """

    source: str | None
    partition: Partition
    text_column: str
    key_column: str | None
    held_out: float
    piece: int | None = None


@dataclass(frozen=True)
class Share:
    """One client's documents."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


Clients = tuple[tuple[str, ClientSettings], ...]
_lock = threading.Lock()


def client_share(source: TextSource, client: str, clients: Clients, seed: int) -> Share:
    """Return the documents of one client.

    Raises
    ------
    DataError
        If its documents are missing or unreadable.
    """
    settings = dict(clients)
    if settings[client].pool:
        members = [client_share(source, member, clients, seed) for member in settings[client].pool]
        return Share(
            tuple(document for member in members for document in member.train),
            tuple(document for member in members for document in member.held_out),
        )
    if source.source is None:
        return _split(client, _own_documents(source, client, settings[client]), source, seed)
    with _lock:
        shares = _partitioned(source, clients, seed)
    return shares[client]


def notices(source: TextSource, clients: Clients) -> list[str]:
    """Say what takes the place of packages this machine lacks."""
    if source.source != BUILTIN_CODE or source.partition.kind != "natural":
        return []
    return resolve_owners(list(_keys(clients).values()))[1]


@lru_cache(maxsize=1)
def _partitioned(source: TextSource, clients: Clients, seed: int) -> Mapping[str, Share]:
    assert source.source is not None
    documents = read_documents(source.source, text_column=source.text_column, key_column=source.key_column)
    if source.piece is not None:
        documents = [piece for document in documents for piece in pieces(document, source.piece)]
    keys = _keys(clients)
    if source.partition.kind == "natural":
        if source.source == BUILTIN_CODE:
            actual, _ = resolve_owners(list(keys.values()))
            keys = {client: actual[key] for client, key in keys.items()}
        parts = partition(documents, source.partition, list(keys.values()), seed)
    else:
        parts = partition(documents, source.partition, list(keys), seed)
    return {client: _split(client, part, source, seed) for client, part in zip(keys, parts, strict=True)}


def pieces(document: Document, length: int) -> list[Document]:
    """Cut a document into pieces of ``length`` characters, the last one shorter; blank ones are left out."""
    starts = range(0, len(document.text), length)
    cut = [Document(f"{document.id}:{at}", document.key, document.text[at : at + length]) for at in starts]
    return [piece for piece in cut if piece.text.strip()]


def _keys(clients: Clients) -> dict[str, str]:
    return {name: settings.data or name for name, settings in clients if not settings.pool}


def _own_documents(source: TextSource, client: str, settings: ClientSettings) -> list[Document]:
    if settings.data is None:
        raise DataError(
            f"client {client} has no data; set clients.{client}.data to a path, or task.options.source for all"
        )
    try:
        return read_documents(settings.data, text_column=source.text_column, key_column=source.key_column)
    except DataError as error:
        raise DataError(f"client {client}: {error}") from None


def _split(client: str, documents: list[Document], source: TextSource, seed: int) -> Share:
    try:
        train, held_out = split(documents, source.held_out, seed)
    except DataError as error:
        raise DataError(f"client {client}: {error}") from None
    return Share(tuple(train), tuple(held_out))
