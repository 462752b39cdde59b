"""What ``lorafleet compare`` wrote beside its home: rows with labels, and references that are no runs of this store.

The file may come from anywhere: it is bounded, checked against the form below, and nothing of it is trusted.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from common.errors import DataError

FILE = "comparison.json"
LARGEST = 16_000_000
"""Bytes that are read."""
LOSSES = {"held_out_loss": "held_out", "worst_client_loss": "worst", "unseen_loss": "unseen"}
"""What the curves of the file hold, by the names of the store."""

Id = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=4_000)]


class Point(BaseModel):
    """Losses after one round; see ``simulations/comparison/rows.py``, as for the other classes here."""

    round: int = Field(ge=0, lt=2**31)
    held_out: float | None = None
    worst: float | None = None
    unseen: float | None = None


class Outcome(BaseModel):
    """What came of one row under one seed."""

    seed: int
    runs: list[Id] = Field(max_length=10_000)
    curve: list[Point] = Field(max_length=100_000)
    measures: dict[Id, float | None] = Field(default_factory=dict, max_length=100)

    def losses(self, metric: str) -> list[tuple[int, float]]:
        """Return a loss by round, where it was measured and is a number."""
        name = LOSSES.get(metric)
        found = [(point.round, getattr(point, name)) for point in self.curve] if name else []
        return [(number, loss) for number, loss in found if loss is not None and math.isfinite(loss)]


class Trouble(BaseModel):
    """Why there are no numbers for a seed."""

    status: Text
    sentence: Text


class Row(BaseModel):
    """One line of the comparison."""

    label: Text
    reference: bool
    outcomes: list[Outcome] = Field(max_length=1_000)
    troubles: list[Trouble] = Field(default_factory=list, max_length=1_000)


class ComparisonFile(BaseModel):
    """A whole comparison."""

    command: Text
    rows: list[Row] = Field(max_length=500)

    @property
    def runs(self) -> set[str]:
        """Ids of the runs it is about."""
        return {run for row in self.rows for outcome in row.outcomes for run in outcome.runs}


def comparison_beside(home: Path) -> ComparisonFile | None:
    """Return the comparison whose runs are in a home, from the folder above it; None where there is none.

    Raises
    ------
    DataError
        If there is a file that is none.
    """
    file = home.absolute().parent / FILE
    if file.is_symlink() or not file.is_file():
        return None
    known = file.stat()
    return _read(file, known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> ComparisonFile:  # noqa: ARG001
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check its rights") from None
    if len(text) > LARGEST:
        raise DataError(f"{file} is larger than {LARGEST // 1_000_000} MB and is not shown; choose its runs by hand")
    try:
        return ComparisonFile.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{file} is no comparison ({place or 'JSON'}: {fault['msg']}); compare again") from None
