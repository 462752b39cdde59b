"""What a client's data have been used for: an append-only file on the client's own disk that limits further use.

::

    ledger.db      entries, each bound to the one before by its hash: what was planned, reserved and done
    ledger.mark    how many entries there are, and the last one's hash: tells when some are missing
    ledger.lock    held by the process that writes

An entry is committed before the training it pays for begins, and is never changed or removed. Whoever can write all
three files could forge them: the ledger guards an owner against accidents, old copies and other programs, not against
the owner.
"""

from client.privacy.ledger.book import Book
from client.privacy.ledger.entry import Entry
from client.privacy.ledger.file import Ledger, open_ledger, read_ledger

__all__ = ["Book", "Entry", "Ledger", "open_ledger", "read_ledger"]
