"""A client's own part of a run's model, where its folder lies on this machine."""

from __future__ import annotations

from pathlib import Path

from client.memory import recall
from client.own import OWN, with_own
from common.adapter import Adapter
from common.errors import UserError


def with_kept(client: str, folder: Path, number: int, start: Adapter) -> Adapter:
    """Put what a client had kept after a round into that round's start adapter.

    Parameters
    ----------
    client : str
        Its name.
    folder : Path
        Of the run.
    number : int
        Round.
    start : Adapter
        What all clients share.

    Raises
    ------
    UserError
        If the client has no folder here, or kept nothing of that round or before.
    """
    known = sorted(place.name for place in (folder / "clients").glob("*") if (place / "memory").is_dir())
    if client not in known:
        raise UserError(
            f"client {client!r} keeps nothing on this machine; there is: {', '.join(known) or 'nobody'}. What a client "
            "of another machine keeps, only its owner can export"
        )
    own = recall(folder / "clients" / client, OWN, number + 1)
    if own is None or own["b"].shape != (start.layout.outer_numel,):
        raise UserError(f"client {client} keeps nothing of round {number} or before; it forgets all but its newest two")
    return with_own(start, own)
