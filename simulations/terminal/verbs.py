"""What the verbs of the command line do, once their arguments are read; each returns its exit code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.store import RunStore
from simulations.terminal.listings import checks_view, matrix_view, plugins_view, run_view, runs_view
from simulations.terminal.planning import plan_view
from simulations.terminal.summary import list_summary, run_summary
from simulations.terminal.tables import INTERRUPTED, Output, print_interrupted, print_next, program

if TYPE_CHECKING:
    from common.experiment import Experiment
    from server.export import Format


def new(task: str, out: Path | None) -> int:
    """Write a commented experiment file to stdout or a new file."""
    from simulations.terminal.experiment_template import experiment_template

    text = experiment_template(task)
    if out is None:
        sys.stdout.write(text)
        return 0
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another --out") from None
    return 0


def _experiment(source: str, overrides: list[str]) -> Experiment:
    from common.experiment_file import load_experiment

    return load_experiment(source, overrides, _option_problems)


def _option_problems(table: Mapping[str, Any]) -> list[str]:
    from server.plan import option_problems  # brings torch along: a wrong name is told without

    return option_problems(table)


def plan(source: str, overrides: list[str], output: Output) -> int:
    """Check and plan an experiment."""
    from server.plan import make_plan
    from simulations.places import with_fixed_places
    from simulations.spent import spent_before

    experiment = with_fixed_places(_experiment(source, overrides), output.home)
    made = make_plan(experiment, spent_before(experiment, output.home))
    names = {"name": experiment.name, "task": experiment.task.name, "strategy": experiment.strategy.name}
    output.show(names | asdict(made), plan_view(made, experiment))
    return 0


def simulate(source: str, overrides: list[str], output: Output) -> int:
    """Run an experiment on this machine."""
    from simulations.terminal.session import run_session

    experiment = _experiment(source, overrides)

    def begin() -> None:
        from simulations.run import simulate

        simulate(experiment, output.home)

    return run_session(begin, output)


def resume(
    run: str,
    rounds: int | None,
    from_round: int | None,
    source: str | None,
    overrides: list[str],
    any_code: bool,
    persistent_ledger: bool,
    output: Output,
) -> int:
    """Go on with a run."""
    from common.experiment_file import load_experiment
    from simulations.terminal.session import run_session

    if overrides and source is None:
        raise UserError("--set belongs to --experiment; a run goes on with the settings it began with")
    experiment = load_experiment(source, overrides) if source else None

    def begin() -> None:
        from simulations.run import resume

        resume(run, output.home, rounds, experiment, from_round, any_code, persistent_ledger)

    return run_session(begin, output)


def compare(
    source: str, vary: list[str], overrides: list[str], out: Path, home: Path | None, references: bool, output: Output
) -> int:
    """Run every combination of settings and report on them."""
    from simulations.terminal.session import watching

    try:
        with watching(output, whole_rounds=False):
            from simulations.comparison.compare import compare

            comparison = compare(source, overrides, vary, out, home, references)
    except KeyboardInterrupt:
        print_interrupted("the same command goes on where it stopped")
        return INTERRUPTED
    pages = f"{program()} dashboard --home {shlex.quote(str(home or out / 'home'))}"
    output.show(comparison.as_dict(), comparison.table(), f"\ntable, plots and data are in {out}; on pages: {pages}")
    return 0


def export(
    run: str, out: Path, form: Format, number: int | None, best: bool, client: str | None, output: Output
) -> int:
    """Write a run's adapter for somebody else."""
    if best and number is not None:
        raise UserError("--round and --best exclude one another; give one")
    from server.export import export
    from simulations.personal import with_kept

    own = partial(with_kept, client) if client else None
    path = export(run, output.home, out, form, round=number, best=best, own=own)
    output.show({"path": str(path.absolute()), "format": form}, f"written: {path}")
    return 0


def merge(
    places: list[Path],
    out: Path,
    strategy: str,
    options: dict[str, Any],
    overrides: list[str],
    weights: list[float],
    seed: int,
    output: Output,
) -> int:
    """Merge PEFT folders into one."""
    from common.experiment_file import apply_override
    from server.merge import merge_folders
    from simulations.terminal.merging import merge_view

    for override in overrides:
        apply_override(options, override)
    made = merge_folders(places, out, strategy, options, weights, seed)
    output.show({"path": str(out.absolute())} | asdict(made), merge_view(made, places, out))
    return 0


def plugins(output: Output) -> int:
    """List the plug-ins of all families."""
    from simulations.terminal.plugin_list import family_title, listed_plugins
    from strategies.matrix import capability_matrix

    families = listed_plugins()
    broken = any(plugin.error for plugin in families["aggregation"] + families["robust"])
    output.show(
        {family: [plugin.as_dict() for plugin in found] for family, found in families.items()},
        *([] if broken else [matrix_view(capability_matrix())]),
        *(plugins_view(family_title(family), found) for family, found in families.items()),
    )
    return 0


def doctor(output: Output) -> int:
    """Check this machine."""
    from simulations.terminal.doctor import examine

    checks = examine(output.home)
    healthy = all(check.status != "fail" for check in checks)
    output.show({"ok": healthy, "checks": [asdict(check) for check in checks]}, checks_view(checks))
    return 0 if healthy else UserError.exit_code


def list_runs(limit: int | None, output: Output) -> int:
    """List the runs of a home."""
    found = list_summary(output.home, limit)
    output.show({"runs": found}, runs_view(found))
    return 0


def show_run(run: str, output: Output) -> int:
    """Show one run."""
    with RunStore.open(output.home, read_only=True) as store:
        summary = run_summary(store, run)
    output.show(summary, run_view(summary))
    if not output.as_json:
        print_next(output.console, summary, output.named_home)
    return 0


def delete_run(run: str, sure: bool, output: Output) -> int:
    """Delete a run, after asking."""
    with RunStore.open(output.home) as store:
        found = store.get_run(run).id
        if not sure and (output.as_json or not sys.stdin.isatty()):
            raise UserError(f"deleting {found} needs an answer, but nobody is at the keyboard; add --yes")
        if not sure and input(f"Delete {found} with its files? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was deleted")
        store.delete_run(found)
    output.show({"deleted": found}, f"deleted: {found}")
    return 0
