"""The hashes that tie a ledger to the data it is about, whatever these are called and however they are cut into rows.

Of the hashes of all records the smallest are kept (Broder, On the resemblance and containment of documents, 1997): data
sets that share a tenth of their records have one of the smallest in common but once in a thousand cases.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from common.tasks import Rows

CHUNK = 1024
"""Rows taken at once."""

DIGITS = 16
"""Of each record's hash."""

SMALLEST = 64
"""Hashes that are kept."""

KEPT = 64
_known: OrderedDict[int, tuple[ReferenceType[Rows], str]] = OrderedDict()


def fingerprint_of(rows: Rows) -> str:
    """Return the smallest of the records' hashes, sorted; kept for as long as the rows are in memory.

    Records are what the rows say they were cut from (``records``), of all the client's data and not only of those it
    trains on, so that neither order nor split matter; otherwise each row is one.
    """
    known = _known.get(id(rows))
    if known is not None and known[0]() is rows:
        return known[1]
    found = " ".join(sorted(set(_hashes(rows)))[:SMALLEST])
    _known[id(rows)] = ref(rows), found
    while len(_known) > KEPT:
        _known.popitem(last=False)
    return found


def _hashes(rows: Rows) -> Iterator[str]:
    records: Iterable[bytes] | None = getattr(rows, "records", None)
    for record in _of_rows(rows) if records is None else records:
        yield hashlib.sha256(record).hexdigest()[:DIGITS]


def _of_rows(rows: Rows) -> Iterator[bytes]:
    for numbers in torch.arange(len(rows)).split(CHUNK):
        batch = sorted(rows.take(numbers).items())
        for row in range(len(numbers)):
            yield b"".join(name.encode() + _bytes(values[row]) for name, values in batch)


def _bytes(values: Tensor) -> bytes:
    return (
        f" {values.dtype} {tuple(values.shape)} ".encode()
        + values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    )
