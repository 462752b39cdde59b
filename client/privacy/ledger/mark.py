"""The high-water mark beside a ledger: how many entries there must be at least, and the hash of the last one."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.privacy.ledger.entry import FIRST
from common.errors import LedgerError
from common.store.artefacts import sync_folder


class Mark(BaseModel):
    """Where a ledger stood when it was last closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    entries: int = Field(0, ge=0)
    digest: str = Field(FIRST, pattern="^[0-9a-f]{64}$")


def mark_of(ledger: Path) -> Path:
    """Return where the mark of a ledger lies."""
    return ledger.with_suffix(".mark")


def read_mark(ledger: Path) -> Mark | None:
    """Return a ledger's mark; None if it has none.

    Raises
    ------
    LedgerError
        If it cannot be read.
    """
    path = mark_of(ledger)
    try:
        return Mark.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no mark"
        raise LedgerError(f"the mark {path} of a privacy ledger cannot be read ({reason}); restore it") from None


def write_mark(ledger: Path, mark: Mark) -> None:
    """Replace a ledger's mark: the new one is on the disk when this returns, or the old one still is."""
    path = mark_of(ledger)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(mark.model_dump_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
