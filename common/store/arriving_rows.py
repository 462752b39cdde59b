"""The rows of a packed run on their way into a store: checked against each other, under the id they get here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlalchemy import Table

from common.errors import StoreError
from common.store.artefacts import RUNS, checked_path
from common.store.models import ArtefactRow, ClientRoundRow, RoundRow, RunRow
from common.store.packed_file import Packed, Unfit, rows_name
from common.store.packed_rows import LINE_BYTES, decode
from common.store.rows import Values, run_column


@dataclass
class ArrivingRows:
    """Rows of one packed run, table by table in the order of :data:`~common.store.rows.TABLES`.

    Parameters
    ----------
    packed : Packed
        Where they are.
    run_id : str
        Id of the run here; paths follow it.

    Attributes
    ----------
    status : str
        Of the run when it was packed. ``running`` arrives as ``interrupted``, since nobody writes the run here.
    named : set of str
        Packed files that rows have named so far.
    left_out : set of str
        Clients' replies that rows name and that are not in the file; the rows arrive without them.
    """

    packed: Packed
    run_id: str
    status: str = ""
    named: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)

    def of(self, table: Table) -> Iterator[Values]:
        """Read one table's rows as they are to be inserted.

        Raises
        ------
        Unfit
            When they are not what was declared, or do not belong to the run and its files.
        """
        declared = self.packed.manifest.tables.get(table.name)
        if declared is None:
            return
        count, digest = 0, hashlib.sha256()
        for line in self._lines(table.name):
            digest.update(line + b"\n")
            count += 1
            values = self._arrived(table, decode(table, line))
            if values is not None:
                yield values
        if (count, digest.hexdigest()) != (declared.rows, declared.sha256):
            raise Unfit(f"its rows of {table.name} are not those that were packed")

    def _lines(self, table: str) -> Iterator[bytes]:
        rest = b""
        for chunk in self.packed.chunks(rows_name(table)):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > LINE_BYTES:
                raise Unfit(f"a line of {table} is longer than {LINE_BYTES:,} bytes")
        if rest:
            raise Unfit(f"the last line of {table} has no end")

    def _arrived(self, table: Table, values: Values) -> Values | None:
        """Return a row under the run's new id, or None for a reply's that is not in the file."""
        owner = run_column(table).name
        if values[owner] != self.packed.manifest.run:
            raise Unfit(f"a row of {table.name} is of another run")
        values[owner] = self.run_id
        if table.name == RunRow.__tablename__:
            self._place(values, "adapter_")
            self._settle(values)
        elif table.name == RoundRow.__tablename__:
            self._place(values, "state_")
        elif table.name == ClientRoundRow.__tablename__:
            self._place(values, "artefact_", spare=True)
        elif table.name == ArtefactRow.__tablename__:
            if self._inside(values["path"]) in self.left_out:
                return None
            self._place(values, "")
            file = self.packed.manifest.files[self._inside(values["path"], self.run_id)]
            if values["nbytes"] != file.nbytes:
                raise Unfit("an artefact's row and its file differ in size")
        return values

    def _place(self, values: Values, prefix: str, spare: bool = False) -> None:
        """Point a row's path to where its file comes to lie here."""
        path = values[f"{prefix}path"]
        if path is None:
            return
        inside = self._inside(path)
        file = self.packed.manifest.files.get(inside)
        if file is None and spare:
            self.left_out.add(inside)
            values[f"{prefix}path"] = values[f"{prefix}sha256"] = None
            return
        if file is None or values[f"{prefix}sha256"] not in (None, file.sha256):
            raise Unfit(f"its rows name {inside[:100]!r}, which is not in it as they have it")
        self.named.add(inside)
        values[f"{prefix}path"] = f"{RUNS}/{self.run_id}/{inside}"

    def _inside(self, path: str, run: str = "") -> str:
        run = run or self.packed.manifest.run
        try:
            return checked_path(run, path).removeprefix(f"{RUNS}/{run}/")
        except StoreError as error:
            raise Unfit("its rows name files outside of the run's folder") from error

    def _settle(self, values: Values) -> None:
        self.status = values["status"]
        if self.status == "running":
            values["status"] = "interrupted"
            values["reason"] = (
                f"it was running, or had been killed, when it was packed; go on with: lorafleet resume {self.run_id}"
            )
            values["finished_at"] = values["updated_at"]
