"""A client's secrets of one secure session, on its own disk and nobody else's to read.

There is one session at a time. A newer one replaces it; once its masks were lifted only the answer is left, since that
much the server knows.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from client.node import Node
from common.errors import ClientError
from common.messages import PublicKeys, SecureSession, UnmaskAnswer
from common.secure.keys import Session
from common.secure.sealed_shares import SecretShares
from common.secure.upload import threshold

FILE = "session.json"


class Vault(BaseModel):
    """Everything a client remembers of a session; secrets and shares in hexadecimal digits.

    Parameters
    ----------
    session : SecureSession
        The session.
    cipher, mask, seed : str
        Private keys for sealing shares and for pairwise masks, and the seed of the own mask.
    keys : dict
        Public keys of all clients, once they are known.
    sealed : dict
        The shares that were sent, by receiver.
    shares : dict
        Shares of mask keys and seeds that were received, by owner; the client's own from the beginning.
    trained : str
        Key of the training order whose result was masked.
    survivors : tuple of str
        Clients in the sum whose masks were lifted.
    answer : UnmaskAnswer, optional
        What was revealed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    session: SecureSession
    cipher: str = ""
    mask: str = ""
    seed: str = ""
    keys: dict[str, PublicKeys] = {}
    sealed: dict[str, str] = {}
    shares: dict[str, tuple[str, str]] = {}
    trained: str = ""
    survivors: tuple[str, ...] = ()
    answer: UnmaskAnswer | None = None

    def __repr__(self) -> str:
        return f"Vault(session={self.session.id})"

    __str__ = __repr__

    def emptied(self) -> Vault:
        """Keep what the server knows, drop every secret."""
        return Vault(session=self.session, trained=self.trained, survivors=self.survivors, answer=self.answer)


def bound(session: SecureSession) -> Session:
    """Return what keys are bound to."""
    return Session(session.run, session.round, session.id)


def read_vault(node: Node) -> Vault | None:
    """Return what is remembered of the last session, or None.

    Raises
    ------
    ClientError
        If the client has no folder, or the file is damaged.
    """
    path = _folder(node) / FILE
    if not path.exists():
        return None
    try:
        return Vault.model_validate_json(path.read_bytes())
    except (ValidationError, OSError):
        raise ClientError(f"the secrets of the secure session cannot be read; remove {path}") from None


def open_vault(node: Node, session: SecureSession) -> Vault:
    """Return the secrets of this very session.

    Raises
    ------
    ClientError
        If there are none: another session, an older one, or one that is over.
    """
    vault = read_vault(node)
    if vault is None or vault.session != session:
        raise ClientError(f"this client knows no secure session {session.id[:8]} of round {session.round}")
    return vault


def write_vault(node: Node, vault: Vault) -> None:
    """Replace what is remembered, atomically, readable by the owner only."""
    folder = _folder(node)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(vault.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)


def end_session(node: Node, number: int) -> None:
    """Drop the secrets of a session whose round is over: round ``number`` is being evaluated."""
    if node.folder is None or not node.experiment.secure_aggregation.enabled:
        return
    vault = read_vault(node)
    if vault is not None and vault.session.round <= number and vault.mask:
        write_vault(node, vault.emptied())


def needed(node: Node, vault: Vault) -> int:
    """Count the clients a sum of this session must hold before anything of it is revealed."""
    settings = node.experiment.secure_aggregation
    return threshold(settings.threshold, settings.min_cohort, len(vault.keys))


def digits(shares: SecretShares) -> tuple[str, str]:
    """Write shares as hexadecimal digits."""
    return f"{shares.mask_key:x}", f"{shares.seed:x}"


def _folder(node: Node) -> Path:
    if node.folder is None:
        raise ClientError("secure aggregation needs a client that remembers, but this one has no folder of its own")
    return node.folder / "secure"
