"""What a client keeps to itself from round to round: its own factors, what compression lost.

One file per kind and round; the newest two stay. A round that is trained again after a kill starts from what was kept
before it, so the answer is the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

log = logging.getLogger(__name__)
KEPT = 2


def remember(folder: Path, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors of round ``number``, atomically, and those of the round before; later ones were taken back."""
    place = folder / "memory"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    path = place / _name(kind, number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    temporary.replace(path)
    files = sorted(place.glob(f"{kind}-*.safetensors"))
    newest = files.index(path) + 1
    for other in files[: max(0, newest - KEPT)] + files[newest:]:
        other.unlink(missing_ok=True)


def recall(folder: Path | None, kind: str, before: int) -> dict[str, Tensor] | None:
    """Return what was kept in the newest round before ``before``, or None; a damaged file counts as none."""
    if folder is None:
        return None
    names = sorted(path.name for path in (folder / "memory").glob(f"{kind}-*.safetensors"))
    earlier = [name for name in names if name < _name(kind, before)]
    for name in reversed(earlier):
        try:
            return load_file(folder / "memory" / name)
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s) and is not used", name, error)
    return None


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:08d}.safetensors"
