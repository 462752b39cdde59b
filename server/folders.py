"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` to write into, and move it there at the end: nothing is left half done."""
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
