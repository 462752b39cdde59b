"""What the verbs that move runs and keep databases do: pack, add, upgrade, back up; each returns its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from common.store import Run, RunStatus, RunStore, shown_status
from common.wording import counted, size
from simulations.terminal.summary import run_summary
from simulations.terminal.tables import Output, print_next

if TYPE_CHECKING:
    from common.store.packing import Steps

REPLIES = "it holds {files} of clients' own replies, each what one client learned; --without-replies leaves them out"
PRIVATE = (
    "what clients keep to themselves is not in it; a run that needs it goes on elsewhere as if they had just joined"
)
GOING_ON = "the run goes on: this is how it stood after round {done} of {planned}"
ARTEFACTS = "artefacts are not in it: copy {runs} after it, not before, so that no file is lacking"
POSTGRESQL = "no copy was made of a PostgreSQL database; pg_dump makes one"


def pack(run: str, out: Path, replies: bool, output: Output) -> int:
    """Write a run into one file."""
    from common.store.packing import pack_run

    with _progress(output, "packing") as steps:
        made = pack_run(output.home, run, out, replies=replies, steps=steps)
    with RunStore.open(output.home, read_only=True) as store:
        status = shown_status(store, made.run)
    notes = [REPLIES.format(files=counted(made.replies, "file"))] if made.replies else []
    notes += [f"{counted(len(made.left_out), 'file')} of clients' replies left out"] if made.left_out else []
    notes += [PRIVATE] if made.private else []
    going = GOING_ON.format(done=made.run.rounds_done, planned=made.run.rounds_planned)
    notes += [going] if status == "running" else []
    values = {
        **_facts(made.run, status, notes),
        "path": str(out.absolute()),
        "rows": dict(made.rows),
        "files": made.files,
        "nbytes": made.nbytes,
        "left_out": list(made.left_out),
    }
    rows = sum(made.rows.values())
    told = f"packed: {escape(str(out))}: {made.run.id} with {rows:,} rows and {counted(made.files, 'file')}"
    output.show(values, f"{told}, {size(made.nbytes)}", *_notes(notes))
    return 0


def add(file: Path, new_id: str | None, output: Output) -> int:
    """Add a packed run to a home."""
    from common.store.unpacking import add_run

    with _progress(output, "adding") as steps:
        added = add_run(output.home, file, new_id=new_id, steps=steps)
    lacking = f"clients' replies that its rows name and that were not packed: {len(added.left_out)}"
    notes = [lacking] if added.left_out else []
    values = {
        **_facts(added.run, added.run.status, notes),
        "home": str(output.home),
        "was": added.was,
        "files": added.files,
        "nbytes": added.nbytes,
        "left_out": list(added.left_out),
    }
    told = f"added: {added.run.id}, {added.run.status}, {counted(added.files, 'file')}, {size(added.nbytes)}"
    output.show(values, told, *_notes(notes))
    if not output.as_json:
        with RunStore.open(output.home, read_only=True) as store:
            print_next(output.console, run_summary(store, added.run.id), output.named_home)
    return 0


def upgrade_database(url: str | None, output: Output) -> int:
    """Bring an older database to this version."""
    from common.store.upgrade import upgrade

    with _progress(output, "copying the database first") as steps:
        done = upgrade(output.home, url, steps)
    changed = done.before != done.after
    notes = [POSTGRESQL] if changed and done.backup is None else []
    values = {"database": done.place, "from": done.before, "to": done.after, "changed": changed}
    values |= {"backup": str(done.backup) if done.backup else None, "notices": notes}
    told = f"upgraded: {done.place} from version {done.before} to {done.after}"
    kept = [f"as it was: {done.backup}; delete it when all is well"] if done.backup else []
    nothing = f"nothing to do: {done.place} is of this version, {done.after}"
    output.show(values, *map(escape, [told, *kept] if changed else [nothing]), *_notes(notes))
    return 0


def back_up_database(out: Path, url: str | None, output: Output) -> int:
    """Copy the database while others use it."""
    from common.store.backup import back_up

    with _progress(output, "copying the database") as steps:
        made = back_up(output.home, out, url, steps)
    note = ARTEFACTS.format(runs=output.home / "runs")
    values = {"path": str(out.absolute()), "database": made.place, "version": made.version, "runs": made.runs}
    told = f"written: {out}: {made.place} with {counted(made.runs, 'run')}, {size(made.nbytes)}"
    output.show(values | {"nbytes": made.nbytes, "notices": [note]}, escape(told), *_notes([note]))
    return 0


def _facts(run: Run, status: RunStatus, notes: list[str]) -> dict[str, object]:
    return {
        "id": run.id,
        "status": status,
        "rounds_done": run.rounds_done,
        "rounds_planned": run.rounds_planned,
        "notices": notes,
    }


def _notes(notes: list[str]) -> list[str]:
    return [f"[yellow]note:[/] {escape(note)}" for note in notes]


@contextmanager
def _progress(output: Output, what: str) -> Iterator[Steps]:
    """Draw a bar on a terminal while something is copied, and wipe it at the end."""
    console = output.console if output.console.is_terminal else Console(stderr=True, highlight=False)
    shown = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    drawn = console.is_terminal and not (output.as_json or output.quiet or console.is_dumb_terminal)
    with Progress(*shown, console=console, transient=True, disable=not drawn) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
