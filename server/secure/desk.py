"""What a secure sum has received so far, on disk, so that a run that was killed goes on with the same session.

Every answer is one file, written as soon as it was checked. When a step is over, its outcome is written down once, and
nobody can join it any more: clients refuse a second outcome, since two sums tell the difference between them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from common.errors import ClientError, CorruptArtefact, SumFailed
from common.messages import H, Header, SecureSession, TrainAnswer, read_header
from common.parcel_file import parcel_bytes, read_parcel
from common.store import write_artefact
from common.wire import Parcel

Step = Literal["keys", "shares", "uploads", "unmask"]


class Outcome(NamedTuple):
    """How a step ended: who has answered, sorted, and what became of the others (status and reason)."""

    answered: Sequence[str]
    lost: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Desk:
    """The files of one round's secure sum.

    Parameters
    ----------
    run : Path
        The run's folder.
    place : str
        The sum's folder in it.
    """

    run: Path
    place: str

    def session(self) -> SecureSession | None:
        """Return the session that goes on here, or None."""
        path = self._folder / "session.json"
        return _read(path, SecureSession) if path.exists() else None

    def begin(self, session: SecureSession) -> None:
        """Write down that a session has begun."""
        self._write("session.json", session.model_dump_json())

    def keep(self, step: Step, client: str, answer: Header) -> None:
        """Keep an answer."""
        self._write(f"{step}/{client}.json", answer.model_dump_json())

    def keep_upload(self, client: str, answer: TrainAnswer, parcel: Parcel) -> None:
        """Keep a masked upload."""
        content = parcel_bytes(parcel, answer.model_dump_json())
        write_artefact(self.run, f"{self.place}/uploads/{client}.safetensors", content)

    def clients(self, step: Step) -> list[str]:
        """Return whose answers to a step are here, sorted."""
        return sorted(path.stem for path in (self._folder / step).glob("*") if not path.name.startswith("."))

    def answer(self, step: Step, client: str, kind: type[H]) -> H:
        """Read an answer again.

        Raises
        ------
        SumFailed
            If it is gone or damaged: without it the sum cannot go on.
        """
        return _read(self._folder / step / f"{client}.json", kind)

    def nbytes(self, step: Step, client: str) -> int:
        """Count the bytes of an answer, as it travelled."""
        return (self._folder / step / f"{client}.json").stat().st_size

    def upload(self, client: str) -> tuple[TrainAnswer, Parcel]:
        """Read a masked upload again, checked as `answer` does."""
        try:
            parcel, header, _ = read_parcel(self._folder / "uploads" / f"{client}.safetensors")
            return read_header(TrainAnswer, header), parcel
        except (CorruptArtefact, ClientError) as error:
            raise SumFailed(f"an upload of the secure sum was lost on the server's disk ({error})") from None

    def close(self, step: Step, outcome: Outcome) -> None:
        """Write down, once, how a step ended."""
        self._write(f"{step}.json", json.dumps(outcome._asdict()))

    def closed(self, step: Step) -> Outcome | None:
        """Return how a step ended, or None while it goes on."""
        path = self._folder / f"{step}.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_bytes())
            return Outcome(list(raw["answered"]), {name: (status, why) for name, (status, why) in raw["lost"].items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _lost(path, error) from None

    def discard(self) -> None:
        """Remove everything: the round is over, or its sum has failed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.run / self.place

    def _write(self, name: str, text: str) -> None:
        write_artefact(self.run, f"{self.place}/{name}", text.encode())


def _read(path: Path, kind: type[H]) -> H:
    try:
        return read_header(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ClientError) as error:
        raise _lost(path, error) from None


def _lost(path: Path, error: Exception) -> SumFailed:
    return SumFailed(f"the secure sum cannot go on: {path.name} was lost on the server's disk ({error})")
