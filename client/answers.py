"""A client's last answer, kept on its disk: asked again for a round it has done, it does not train again."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path

from flwr.app import RecordDict

from common.errors import ClientError, CorruptArtefact
from common.messages import TrainAnswer, TrainOrder, read_header
from common.parcel_file import parcel_bytes, read_parcel
from common.wire import Parcel, write_message

FILE = "answer.safetensors"
log = logging.getLogger(__name__)


def order_key(order: TrainOrder, start: Parcel) -> str:
    """Identify an order, whichever attempt it is: equal keys deserve equal answers."""
    text = order.model_dump_json(exclude={"attempt"})
    return hashlib.sha256(f"{text}\n{start.digest}".encode()).hexdigest()


def keep_answer(folder: Path, key: str, answer: TrainAnswer, update: Parcel) -> None:
    """Replace the stored answer, atomically."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what a client learned is its own
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"  # hidden: what a kill leaves is removed with the run's lock
    hashed = replace(update, sha256=update.digest)  # damage on this disk must be found here
    temporary.write_bytes(parcel_bytes(hashed, answer.model_dump_json(), key))
    temporary.replace(folder / FILE)


def stored_answer(folder: Path, key: str) -> RecordDict | None:
    """Return the answer to this very order if it was kept, else None."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        parcel, header, stored_key = read_parcel(path)
        answer = read_header(TrainAnswer, header)
    except (CorruptArtefact, ClientError) as error:
        log.warning("%s; the round is trained again", error)
        return None
    if stored_key != key:
        return None
    return write_message(answer, {"update": parcel})
