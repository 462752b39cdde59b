"""The command line: one verb per user action.

What is heavy is imported inside the verbs, so that ``lorafleet --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from common.errors import LoRAFleetError, UserError

if TYPE_CHECKING:
    from simulations.session import Output

app = typer.Typer(
    name="lorafleet",
    help="Federated LoRA fine-tuning: many owners of private data train one adapter together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
runs = typer.Typer(help="List, show and delete runs.", no_args_is_help=True)
app.add_typer(runs, name="runs")


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
    if folder is not None:
        from common.plugins import PLUGINS_VARIABLE

        os.environ[PLUGINS_VARIABLE] = str(folder.absolute())


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lorafleet {version('lorafleet')}")
        raise typer.Exit


RUN_HELP = "Id of a run, the beginning of it, or 'last'."
SourceArgument = Annotated[str, typer.Argument(help="Name of a preset, or path of an experiment file.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as in federation.rounds=3; repeatable."),
]
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Where runs are kept. [default: $LORAFLEET_HOME or ./lorafleet-home]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no plan and no progress.")]
PluginsOption = Annotated[
    Path | None,
    typer.Option("--plugins", metavar="DIR", callback=_use_plugins, help="Folder of your own plug-ins."),
]


@app.callback()
def everywhere(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    _plugins: PluginsOption = None,
) -> None:
    """Federated LoRA fine-tuning: many owners of private data train one adapter together."""


@app.command()
def new(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task to train; `lorafleet plugins` lists them.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to a file, not to stdout.")] = None,
    _plugins: PluginsOption = None,
) -> None:
    """Print a commented experiment file with every setting there is."""
    from simulations.experiment_template import experiment_template

    text = experiment_template(task)
    if out is None:
        sys.stdout.write(text)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another --out") from None


@app.command()
def plan(
    source: SourceArgument,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    _plugins: PluginsOption = None,
) -> None:
    """Check an experiment and show its clients, ranks and bytes, without running it."""
    from dataclasses import asdict

    from common.experiment_file import load_experiment
    from server.plan import make_plan
    from simulations.summary import json_text
    from simulations.terminal import plan_view

    experiment = load_experiment(source, overrides or ())
    made = make_plan(experiment)
    if as_json:
        names = {"name": experiment.name, "task": experiment.task.name, "strategy": experiment.strategy.name}
        print(json_text(names | asdict(made)))
    else:
        _console_print(plan_view(made, experiment))


@app.command()
def simulate(
    source: SourceArgument,
    overrides: SetOption = None,
    driver: Annotated[Driver | None, typer.Option("--driver", help="Where clients run.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    _plugins: PluginsOption = None,
) -> int:
    """Run a federation on this machine."""
    from common.experiment_file import load_experiment

    chosen = [f"simulation.driver={driver}"] if driver else []
    experiment = load_experiment(source, [*(overrides or ()), *chosen])
    output = _output(home, as_json, quiet)
    from simulations.session import run_session

    def begin() -> object:
        from simulations.run import simulate as run

        return run(experiment, output.home)

    return run_session(begin, output)


@app.command()
def resume(
    run: RunArgument,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds in all, to extend a run.")] = None,
    from_round: Annotated[int | None, typer.Option("--from-round", min=0, help="Go back to this round first.")] = None,
    source: Annotated[
        str | None, typer.Option("--experiment", metavar="FILE", help="Refuse to go on if the run is not of this one.")
    ] = None,
    overrides: SetOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    _plugins: PluginsOption = None,
) -> int:
    """Go on with an interrupted or failed run, or extend a finished one."""
    from common.experiment_file import load_experiment
    from simulations.session import run_session

    if overrides and source is None:
        raise UserError("--set belongs to --experiment; a run goes on with the settings it began with")
    experiment = load_experiment(source, overrides or ()) if source else None
    output = _output(home, as_json, quiet)

    def begin() -> object:
        from simulations.run import resume as go_on

        return go_on(run, output.home, rounds=rounds, experiment=experiment, from_round=from_round)

    return run_session(begin, output)


@app.command()
def compare(
    source: SourceArgument,
    vary: Annotated[
        list[str], typer.Option("--vary", metavar="KEY=V1,V2", help="Values to compare; repeatable. seed is averaged over.")
    ],
    overrides: SetOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where table and plot go.")] = Path("results"),
    references: Annotated[bool, typer.Option(help="Also train on pooled data, and every owner alone.")] = True,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="Where the runs are kept. [default: OUT/home]")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    _plugins: PluginsOption = None,
) -> int:
    """Run every combination of varied settings; make one table and one plot."""
    from simulations.compare import compare as compared
    from simulations.session import watching
    from simulations.summary import json_text
    from simulations.terminal import print_error

    output = _output(home or out / "home", as_json, quiet)
    try:
        with watching(output, whole_rounds=False):
            comparison = compared(source, list(overrides or ()), vary, out, home, references)
    except KeyboardInterrupt:
        print_error("interrupted; the same command goes on where it stopped")
        return 130
    if as_json:
        print(json_text(comparison.as_dict()))
    else:
        output.console.print(comparison.table(), f"\ntable, plot and data are in {out}")
    return 0


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; missing or empty.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.PEFT,
    number: Annotated[int | None, typer.Option("--round", min=0, help="Round to export. [default: the last]")] = None,
    best: Annotated[bool, typer.Option("--best", help="Export the round of the lowest loss.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
    _plugins: PluginsOption = None,
) -> None:
    """Write a run's adapter for PEFT, merged into its model, or as one file."""
    if best and number is not None:
        raise UserError("--round and --best exclude one another; give one")
    from server.export import export as exported
    from simulations.summary import json_text

    path = exported(run, _home(home), out, form.value, round=number, best=best)
    print(json_text({"path": str(path.absolute()), "format": form.value}) if as_json else f"written: {path}")


@app.command()
def plugins(as_json: JsonOption = False, _plugins: PluginsOption = None) -> None:
    """List strategies, adapter methods and tasks with their options, your own included."""
    from simulations.listings import plugins_view
    from simulations.plugin_list import family_title, listed_plugins
    from simulations.summary import json_text

    families = listed_plugins()
    if as_json:
        print(json_text({family: [plugin.as_dict() for plugin in found] for family, found in families.items()}))
    else:
        _console_print(*(plugins_view(family_title(family), found) for family, found in families.items()))


@app.command()
def doctor(home: HomeOption = None, as_json: JsonOption = False) -> int:
    """Check this machine: what LoRAFleet needs, what it may use, what to do."""
    from simulations.doctor import examine
    from simulations.listings import checks_view
    from simulations.summary import json_text

    checks = examine(_home(home))
    healthy = all(check.status != "fail" for check in checks)
    if as_json:
        print(json_text({"ok": healthy, "checks": [check.as_dict() for check in checks]}))
    else:
        _console_print(checks_view(checks))
    return 0 if healthy else UserError.exit_code


@runs.command("list")
def list_runs(
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the newest.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, newest first."""
    from simulations.listings import runs_view
    from simulations.summary import json_text, list_summary

    found = list_summary(_home(home), limit)
    if as_json:
        print(json_text({"runs": found}))
    else:
        _console_print(runs_view(found))


@runs.command("show")
def show_run(run: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show a run: its rounds, its clients, and why some were left out."""
    from common.store import RunStore
    from simulations.listings import run_view
    from simulations.summary import json_text, run_summary
    from simulations.terminal import what_next

    with RunStore.open(_home(home), read_only=True) as store:
        summary = run_summary(store, run)
    if as_json:
        print(json_text(summary))
    else:
        _console_print(run_view(summary), what_next(summary, str(home or "")))


@runs.command("delete")
def delete_run(
    run: RunArgument,
    sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a run with all its files."""
    from common.store import RunStore
    from simulations.summary import json_text

    with RunStore.open(_home(home)) as store:
        found = store.get_run(run).id
        if not sure:
            if not sys.stdin.isatty():
                raise UserError(f"deleting {found} needs an answer, and nobody is at the keyboard; add --yes")
            typer.confirm(f"Delete {found} and its files?", abort=True, err=True)
        store.delete_run(found)
    print(json_text({"deleted": found}) if as_json else f"deleted: {found}")


def main() -> None:
    """Run the command line and exit; a user's mistake ends in a line, not in a traceback."""
    from simulations.quiet import quiet_libraries

    quiet_libraries()
    try:
        code = app(prog_name="lorafleet", standalone_mode=False)
    except LoRAFleetError as error:
        from simulations.terminal import print_error

        print_error(error)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _show_usage(error)
    except click.Abort:
        code = UserError.exit_code
    sys.exit(code)


def _show_usage(error: click.ClickException) -> int:
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lorafleet"
    typer.echo(f"error: {error.format_message().rstrip('.')}; see {path} --help", err=True)
    return error.exit_code


def _home(home: Path | None) -> Path:
    from common.home import default_home

    return home.absolute() if home else default_home()


def _output(home: Path | None, as_json: bool, quiet: bool) -> Output:
    from simulations.session import Output

    return Output(_home(home), str(home or ""), as_json, quiet)


def _console_print(*parts: object) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part)


if __name__ == "__main__":
    main()
