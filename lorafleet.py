"""The command line: one verb per user action.

Only arguments are read here; what is heavy is imported inside the verbs, so that ``lorafleet --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
import typer.core

from common.errors import LoRAFleetError, UserError

if TYPE_CHECKING:
    from simulations.terminal.tables import Output

typer.core.HAS_RICH = False  # loading Rich for --help takes longer than everything else it does

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
runs = typer.Typer(no_args_is_help=True)
app.add_typer(runs, name="runs", help="List, show, move and delete runs.")
database = typer.Typer(no_args_is_help=True)
app.add_typer(database, name="database", help="Upgrade and back up the database of runs.")
privacy = typer.Typer(no_args_is_help=True)
app.add_typer(privacy, name="privacy", help="The ledger of what was spent, and an audit of the noise.")


PERSISTENT_LEDGER = "simulation.persistent_ledger=true"


class Driver(StrEnum):
    """Where simulated clients run."""

    INPROCESS = "inprocess"
    RAY = "ray"


class ExportFormat(StrEnum):
    """What an exported adapter can be."""

    PEFT = "peft"
    MERGED = "merged"
    LORAFLEET = "lorafleet"


def _use_plugins(folder: Path | None) -> None:
    """Make the user's own plug-ins known here and in worker processes."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--plugins {folder} is not a folder; it holds FAMILY/NAME.py, as CONTRIBUTING.md says")
    if folder is not None:
        from common.plugins import PLUGINS_VARIABLE

        os.environ[PLUGINS_VARIABLE] = str(folder.absolute())


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lorafleet {version('lorafleet')}")
        raise typer.Exit


# The verbs' own texts describe arguments: Click 8.5 loses the help that Typer hands on.
Source = Annotated[str, typer.Argument(hidden=True)]
Run = Annotated[str, typer.Argument(hidden=True)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as in federation.rounds=3; repeatable."),
]
Home = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Where runs are kept. [default: $LORAFLEET_HOME or ./lorafleet-home]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no plan and no progress.")]
Plugins = Annotated[
    Path | None,
    typer.Option("--plugins", metavar="DIR", callback=_use_plugins, help="Folder of your own plug-ins."),
]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]
WhichDriver = Annotated[Driver | None, typer.Option("--driver", help="Where clients run.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds in all, to extend a run.")]
FromRound = Annotated[int | None, typer.Option("--from-round", min=0, help="Go back to the state after this round.")]
Same = Annotated[
    str | None,
    typer.Option("--experiment", metavar="SOURCE", help="Refuse to go on if the run began with anything else."),
]
AnyCode = Annotated[bool, typer.Option("--any-code", help="Go on although LoRAFleet has changed since.")]
Vary = Annotated[
    list[str], typer.Option("--vary", metavar="KEY=V1,V2", help="Values to compare; repeatable. Seeds are averaged.")
]
Results = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where table, plots and data go.")]
CompareHome = Annotated[Path | None, typer.Option("--home", metavar="DIR", help="Where runs go. [default: OUT/home]")]
References = Annotated[bool, typer.Option(help="Also train on pooled data, and every owner alone.")]
ExportTo = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; missing or empty.")]
Form = Annotated[ExportFormat, typer.Option("--format", help="What to write.")]
ExportRound = Annotated[int | None, typer.Option("--round", min=0, help="Round to export. [default: the last]")]
OwnedBy = Annotated[
    str | None,
    typer.Option("--client", metavar="NAME", help="Whose model, if clients keep factors of their own (fedsa_lora)."),
]
Best = Annotated[bool, typer.Option("--best", help="Export the round of the lowest loss.")]
Adapters = Annotated[list[Path], typer.Argument(hidden=True)]
MergeBy = Annotated[
    str, typer.Option("--strategy", metavar="NAME", help="stack, svd, average, lora_lego, ties or dare.")
]
Weights = Annotated[
    list[float] | None,
    typer.Option("--weight", metavar="W", help="Weight of each adapter, in turn. [default: 1/number each]"),
]
MergedRank = Annotated[int | None, typer.Option("--rank", help="Rank of the result. [default: the largest]")]
Density = Annotated[float | None, typer.Option("--density", help="Share of entries kept, for ties and dare.")]
MergeSeed = Annotated[int, typer.Option("--seed", help="For merges that draw.")]
MergeOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any option of the merge, as in scale=paper; repeatable."),
]
NewFile = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a new file, not to stdout.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the newest.")]
ReplayStrategy = Annotated[str, typer.Option("--strategy", metavar="NAME", help="Strategy that merges.")]
Evaluate = Annotated[bool, typer.Option(help="Also measure the clients' held-out loss after every merge.")]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        metavar="URL",
        help="Database of the runs; LORAFLEET_DATABASE_URL does the same and keeps a password off the command line.",
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
Address = Annotated[str, typer.Option("--address", help="Address to listen at; beyond localhost readers must sign in.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the browser.")]
PackTo = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write; must not exist.")]
WithoutReplies = Annotated[
    bool, typer.Option("--without-replies", help="Leave out the clients' own replies, where the run has kept them.")
]
PackedFile = Annotated[Path, typer.Argument(hidden=True)]
NewId = Annotated[str | None, typer.Option("--as", metavar="ID", help="Id of the run here. [default: the one it had]")]
PersistentLedger = Annotated[
    bool,
    typer.Option(
        "--persistent-ledger", help="Count what clients spend of their privacy over all experiments of this home."
    ),
]
OnlyRun = Annotated[str | None, typer.Option("--run", metavar="RUN", help="Only this run.")]
OnlyClient = Annotated[str | None, typer.Option("--client", metavar="NAME", help="Only this client.")]
AuditedSource = Annotated[str | None, typer.Argument(hidden=True)]
AuditedNoise = Annotated[
    float | None, typer.Option("--noise-multiplier", metavar="X", help="Noise of the one setting to audit.")
]
AuditedRate = Annotated[float | None, typer.Option("--sample-rate", metavar="Q", help="Its sample rate.")]
AuditedSteps = Annotated[int | None, typer.Option("--steps", metavar="N", min=1, max=100_000, help="Its steps.")]
Canaries = Annotated[
    int | None,
    typer.Option("--canaries", metavar="M", min=200, max=20_000, help="Rows made up for the audit. [default: 2000]"),
]
Sure = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback()
def everywhere(_version: Version = False, _plugins: Plugins = None) -> None:
    """Federated LoRA fine-tuning: many owners of private data train one adapter together."""


@app.command()
def new(task: Source, out: NewFile = None, _plugins: Plugins = None) -> int:
    """Print a commented experiment file with all settings.

    TASK is one of those that `lorafleet plugins` lists, such as causal_lm.
    """
    from simulations.terminal import verbs

    return verbs.new(task, out)


@app.command()
def plan(
    source: Source, settings: Settings = None, home: Home = None, as_json: Json = False, _plugins: Plugins = None
) -> int:
    """Check an experiment; show its clients, ranks and bytes.

    SOURCE is the name of a preset or the path of an experiment file.
    """
    from simulations.terminal import verbs

    return verbs.plan(source, settings or [], _output(home, as_json))


@app.command()
def simulate(
    source: Source,
    settings: Settings = None,
    driver: WhichDriver = None,
    persistent_ledger: PersistentLedger = False,
    home: Home = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _plugins: Plugins = None,
) -> int:
    """Run a federation on this machine.

    SOURCE is the name of a preset or the path of an experiment file.
    """
    from simulations.terminal import verbs

    chosen = [f"simulation.driver={driver}"] if driver else []
    chosen += [PERSISTENT_LEDGER] if persistent_ledger else []
    return verbs.simulate(source, [*(settings or []), *chosen], _output(home, as_json, quiet))


@app.command()
def resume(
    run: Run,
    rounds: Rounds = None,
    from_round: FromRound = None,
    source: Same = None,
    settings: Settings = None,
    any_code: AnyCode = False,
    persistent_ledger: PersistentLedger = False,
    home: Home = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _plugins: Plugins = None,
) -> int:
    """Go on with a run, or extend a finished one.

    RUN is the id of a run, the beginning of an id, or `last`.
    """
    from simulations.terminal import verbs

    chosen = [PERSISTENT_LEDGER] if persistent_ledger and source else []
    changed, output = [*(settings or []), *chosen], _output(home, as_json, quiet)
    return verbs.resume(run, rounds, from_round, source, changed, any_code, persistent_ledger, output)


@app.command()
def compare(
    source: Source,
    vary: Vary,
    settings: Settings = None,
    out: Results = Path("results"),
    references: References = True,
    home: CompareHome = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _plugins: Plugins = None,
) -> int:
    """Run all combinations of settings into a table and a plot.

    SOURCE is the name of a preset or the path of an experiment file.
    """
    from simulations.terminal import verbs

    output = _output(home or out / "home", as_json, quiet)
    return verbs.compare(source, vary, settings or [], out, home, references, output)


@app.command()
def export(
    run: Run,
    out: ExportTo,
    form: Form = ExportFormat.PEFT,
    number: ExportRound = None,
    best: Best = False,
    client: OwnedBy = None,
    home: Home = None,
    as_json: Json = False,
    _plugins: Plugins = None,
) -> int:
    """Write a run's adapter, for PEFT or merged into its model.

    RUN is the id of a run, the beginning of an id, or `last`.
    """
    from simulations.terminal import verbs

    return verbs.export(run, out, form.value, number, best, client, _output(home, as_json))


@app.command()
def replay(
    run: Run,
    strategy: ReplayStrategy,
    settings: Settings = None,
    evaluate: Evaluate = True,
    home: Home = None,
    as_json: Json = False,
    _plugins: Plugins = None,
) -> int:
    """Merge a past run's kept replies with another strategy.

    RUN is the id of a run, the beginning of an id, or `last`; it must have kept its replies (federation.keep_replies).
    """
    from simulations.terminal.replaying import replay_run

    return replay_run(run, strategy, settings or [], evaluate, _output(home, as_json))


@app.command()
def merge(
    adapters: Adapters,
    out: ExportTo,
    strategy: MergeBy = "stack",
    weights: Weights = None,
    rank: MergedRank = None,
    density: Density = None,
    seed: MergeSeed = 0,
    settings: MergeOptions = None,
    as_json: Json = False,
    _plugins: Plugins = None,
) -> int:
    """Merge PEFT folders into one, and tell how near it is.

    ADAPTERS are PEFT folders of one base model, of any ranks and scalings; the table compares the result with the sum
    of their updates, each times its weight.
    """
    from simulations.terminal import verbs

    given = {"rank": rank, "density": density}
    options = {key: value for key, value in given.items() if value is not None}
    return verbs.merge(adapters, out, strategy, options, settings or [], weights or [], seed, _output(None, as_json))


@app.command()
def plugins(as_json: Json = False, _plugins: Plugins = None) -> int:
    """List strategies, adapter methods and tasks with options."""
    from simulations.terminal import verbs

    return verbs.plugins(_output(None, as_json))


@app.command()
def doctor(home: Home = None, as_json: Json = False) -> int:
    """Check that this machine has what LoRAFleet needs."""
    from simulations.terminal import verbs

    return verbs.doctor(_output(home, as_json))


@app.command()
def dashboard(
    home: Home = None,
    database_url: DatabaseUrl = None,
    port: Port = 8501,
    address: Address = "localhost",
    browser: Browser = True,
) -> None:
    """Show runs on pages in the browser, live ones too."""
    from common.home import default_home
    from dashboard.commands import PROGRAM_VARIABLE
    from dashboard.launch import serve
    from simulations.terminal.tables import program

    os.environ[PROGRAM_VARIABLE] = program()
    serve(home or default_home(), database_url, port, address, browser)


@runs.command("list")
def list_runs(limit: Limit = None, home: Home = None, as_json: Json = False) -> int:
    """List the runs, newest first."""
    from simulations.terminal import verbs

    return verbs.list_runs(limit, _output(home, as_json))


@runs.command("show")
def show_run(run: Run, home: Home = None, as_json: Json = False) -> int:
    """Show a run: rounds, clients, and why some were left out.

    RUN is the id of a run, the beginning of an id, or `last`.
    """
    from simulations.terminal import verbs

    return verbs.show_run(run, _output(home, as_json))


@runs.command("pack")
def pack_run(
    run: Run, out: PackTo, without_replies: WithoutReplies = False, home: Home = None, as_json: Json = False
) -> int:
    """Write a run, rows and artefacts, into one file.

    RUN is the id of a run, the beginning of an id, or `last`; one that goes on is packed as it stands.
    """
    from simulations.terminal import keeping

    return keeping.pack(run, out, not without_replies, _output(home, as_json))


@runs.command("add")
def add_run(packed: PackedFile, new_id: NewId = None, home: Home = None, as_json: Json = False) -> int:
    """Add a packed run to this home.

    PACKED is a file that `lorafleet runs pack` has written, here or on another machine.
    """
    from simulations.terminal import keeping

    return keeping.add(packed, new_id, _output(home, as_json))


@runs.command("delete")
def delete_run(run: Run, sure: Sure = False, home: Home = None, as_json: Json = False) -> int:
    """Delete a run with all its files.

    RUN is the id of a run, the beginning of an id, or `last`.
    """
    from simulations.terminal import verbs

    return verbs.delete_run(run, sure, _output(home, as_json))


@database.command("upgrade")
def upgrade_database(home: Home = None, database_url: DatabaseUrl = None, as_json: Json = False) -> int:
    """Bring an older database to this version.

    A SQLite database is copied first, to a file beside it.
    """
    from simulations.terminal import keeping

    return keeping.upgrade_database(database_url, _output(home, as_json))


@database.command("backup")
def back_up_database(out: PackTo, home: Home = None, database_url: DatabaseUrl = None, as_json: Json = False) -> int:
    """Copy the database into a SQLite file, also while runs go on.

    Artefacts are not in it: they are files in the home's folder runs.
    """
    from simulations.terminal import keeping

    return keeping.back_up_database(out, database_url, _output(home, as_json))


@privacy.command("ledger")
def show_ledgers(run: OnlyRun = None, client: OnlyClient = None, home: Home = None, as_json: Json = False) -> int:
    """List every data set, run and round with its privacy cost.

    A round is reserved before it is trained, and counts in full from then on. RUN is the id of a run, the beginning of
    an id, or `last`.
    """
    from simulations.terminal import ledger_tables

    return ledger_tables.show_ledgers(run, client, _output(home, as_json))


@privacy.command("audit")
def audit_privacy(
    source: AuditedSource = None,
    settings: Settings = None,
    noise: AuditedNoise = None,
    rate: AuditedRate = None,
    steps: AuditedSteps = None,
    canaries: Canaries = None,
    as_json: Json = False,
    _plugins: Plugins = None,
) -> int:
    """Check with canaries that the noise is really there.

    SOURCE is the name of a preset or the path of an experiment file, whose noise, clipping and engine are audited;
    without it two settings are that show most. The exit code is 3 if the audit is not passed.
    """
    from simulations.terminal.auditing import Asked, run_audit

    return run_audit(source, settings or [], Asked(noise, rate, steps), canaries, _output(None, as_json))


def main() -> None:
    """Run the command line and exit; a user's mistake ends in a line, not in a traceback."""
    from simulations.terminal.quiet import quiet_libraries

    quiet_libraries()
    try:
        code = app(prog_name="lorafleet", standalone_mode=False)
    except LoRAFleetError as error:
        from simulations.terminal.tables import print_error

        print_error(error)
        code = error.exit_code
    except click.ClickException as error:
        code = _show_usage(error)
    except click.Abort:
        code = UserError.exit_code
    sys.exit(code)


def _show_usage(error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
    else:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lorafleet"
        typer.echo(f"error: {error.format_message().rstrip('.')}; see {path} --help", err=True)
    return error.exit_code


def _output(home: Path | None, as_json: bool, quiet: bool = False) -> Output:
    from common.home import default_home
    from simulations.terminal.tables import Output

    return Output(home.absolute() if home else default_home(), str(home or ""), as_json, quiet)


if __name__ == "__main__":
    main()
