"""The errors of LoRAFleet, sorted by who must act.

::

    LoRAFleetError
    ├── UserError               exit 2   the person at the keyboard
    │   ├── ConfigurationError           an experiment, option or flag is wrong
    │   ├── UnknownNameError             a plug-in, preset, run or client that is not there
    │   ├── DataError                    a file or data set that cannot be used
    │   └── StoreError                   home, database or artefact cannot be used
    │       ├── CorruptArtefact          a stored file is not what was committed
    │       ├── OutdatedStore            the database is of an older version
    │       └── LedgerError              a privacy ledger is damaged, or in use
    ├── ClientError             reply    one client's answer is left out of the round
    │   ├── TrainingError                local training gave nothing usable
    │   ├── RejectedUpdate               the server's screening refused the answer
    │   ├── BudgetExhausted              the privacy budget does not allow another round
    │   └── NotPrivate                   training would not keep its privacy promise
    ├── SumFailed               round    a secure sum lacks clients; its round fails, nothing is revealed
    └── RunError                exit 3   the operator: the run cannot go on

Every message is one line: what was wrong, what was expected, what to do.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable


class LoRAFleetError(Exception):
    """Root of every deliberate error; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UserError(LoRAFleetError):
    """The user's input cannot be used as it is."""

    exit_code = 2


class ConfigurationError(UserError):
    """An experiment or option is wrong; all faults found are in ``problems``."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class UnknownNameError(UserError):
    """A name that is not among the known ones, which the message lists."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        listed = ", ".join(known) or "none"
        super().__init__(f"no {kind} named {name!r}; there is: {listed}{'; ' + hint if hint else ''}")


class DataError(UserError):
    """Data that is missing, empty or unreadable."""


class StoreError(UserError):
    """The home folder, the database or a file in it cannot be used."""


class CorruptArtefact(StoreError):
    """A stored file differs from the hash it was committed with."""


class OutdatedStore(StoreError):
    """The database is of an older version than this code; `lorafleet database upgrade` brings it here."""


class LedgerError(StoreError):
    """A privacy ledger that is damaged, truncated or in use by another process; nothing is trained on its data."""


class ClientError(LoRAFleetError):
    """One client's answer cannot be used; the round goes on without it."""


class TrainingError(ClientError):
    """Local training ended without a usable update."""


class RejectedUpdate(ClientError):
    """The server's screening refused an update."""


class BudgetExhausted(ClientError):
    """What is left of a privacy budget does not allow what was asked for; nothing was drawn."""


class NotPrivate(ClientError):
    """A model, loss or setting with which training would not keep its privacy promise."""


class SumFailed(LoRAFleetError):
    """A secure sum cannot be had: its round has failed, and nothing of it was revealed."""


class RunError(LoRAFleetError):
    """The run cannot go on; the operator must act."""

    exit_code = 3


def shortened(value: object) -> str:
    """Show a value that a stranger wrote: on one line, however long or deep it is."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 200
    return shown.repr(value)
