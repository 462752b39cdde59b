"""Compare experiments: one run per cell, one table, one plot.

Every table of the project is a call of :func:`compare`. Its runs are ordinary runs of a store; a cell whose run is
there already, from the same configuration and code, is not run again, so a comparison that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import ConfigurationError, RunError, StoreError, UserError
from common.experiment import Experiment
from common.fingerprint import run_fingerprint
from common.store import Run, RunStore
from server.progress import announce
from simulations.comparison.cells import Cell, federated_cells, parse_vary
from simulations.comparison.plot import draw
from simulations.comparison.references import federation, held_out_examples, reference_cells
from simulations.comparison.report import Comparison, this_machine, write_report
from simulations.comparison.rows import Outcome, Row, Trouble, alone, outcome_of
from simulations.places import with_fixed_places
from simulations.run import resume, simulate


@dataclass(frozen=True)
class Result:
    """A cell with what came of it: one of the two is there."""

    cell: Cell
    outcome: Outcome | None
    trouble: Trouble | None


def compare(
    source: str,
    overrides: list[str],
    vary: list[str],
    out: Path,
    home: Path | None = None,
    references: bool = True,
) -> Comparison:
    """Run every combination of varied settings, and write table and plot.

    References are made for the experiment as ``source`` and ``overrides`` give it, once per seed, whatever else is
    varied.

    Parameters
    ----------
    source : str
        Preset or experiment file.
    overrides : list of str
        ``key=value``, for all cells.
    vary : list of str
        ``key=value1,value2``; runs that differ by the seed alone make one row.
    out : Path
        Folder of ``comparison.json``, ``.csv``, ``.md``, ``.svg`` and ``.png``.
    home : Path, optional
        Store of the runs; default ``out/home``.
    references : bool
        Also run on pooled data, and each owner alone.

    Raises
    ------
    UserError
        If nothing can be run at all: the source, an argument, a folder or every cell is refused.
    """
    cells = federated_cells(source, overrides, parse_vary(vary))
    if all(cell.problem for cell in cells):
        raise ConfigurationError(dict.fromkeys(cell.problem for cell in cells))
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    extra = [cell for seed in seeds for cell in reference_cells(source, overrides, seed)] if references else []
    place = out / "home" if home is None else home
    _prepare(out, place)
    total = len(cells) + len(extra)
    results = [_result(cell, place, f"cell {n} of {total}: {cell.text}") for n, cell in enumerate(cells, 1)]
    if all(result.trouble and result.trouble.status == "refused" for result in results):
        raise ConfigurationError(dict.fromkeys(result.trouble.sentence for result in results if result.trouble))
    results += [
        _result(cell, place, f"cell {n} of {total}: {cell.text}") for n, cell in enumerate(extra, len(cells) + 1)
    ]

    def examples(seed: int) -> dict[str, int]:
        return held_out_examples(with_fixed_places(federation(source, overrides, seed), place))

    comparison = Comparison(
        command=_command(source, overrides, vary, out, home, references),
        seeds=tuple(seeds),
        fingerprint=run_fingerprint(),
        machine=this_machine(),
        home=place.absolute(),
        rows=_rows(results, examples),
    )
    try:
        write_report(comparison, out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written ({error.strerror}); free some space and compare again") from None
    draw(comparison.rows, out)
    return comparison


def configuration_hash(experiment: Experiment) -> str:
    """Hash a whole configuration, whatever order its options stand in."""
    text = json.dumps(experiment.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_before(experiment: Experiment, home: Path) -> Run | None:
    """Find the run of an experiment by the code of today: a completed one, or else one to go on with."""
    wanted, code = configuration_hash(experiment), run_fingerprint()
    with RunStore.open(home) as store:
        same = [
            run
            for run in store.runs()
            if (run.fingerprint, run.name, run.seed) == (code, experiment.name, experiment.seed)
            and configuration_hash(Experiment.from_json(run.experiment)) == wanted
        ]
    usable = [run for run in same if run.status != "failed"]
    return min(usable, key=lambda run: run.status != "completed", default=None)


def _prepare(out: Path, home: Path) -> None:
    """Find out before the first run whether the results can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {out} ({error.strerror}); choose another one with --out") from None
    if not os.access(out, os.W_OK):
        raise StoreError(f"cannot write into {out}; choose another folder with --out")
    with RunStore.open(home):
        pass


def _result(cell: Cell, home: Path, line: str) -> Result:
    """Run one cell, or take over the run there is."""
    try:
        if cell.experiment is None:
            raise ConfigurationError(cell.problem)
        announce("notice", line)
        experiment = with_fixed_places(cell.experiment, home)
        run = _run(experiment, home)
    except (UserError, RunError) as error:
        trouble = Trouble(cell.seed, "refused" if isinstance(error, UserError) else "failed", str(error))
        announce("notice", f"{line} {trouble.status}: {error}")
        return Result(cell, None, trouble)
    sharing = None if cell.reference else len(experiment.simulated_clients())
    with RunStore.open(home) as store:
        rounds, metrics, clients = store.rounds(run), store.metrics(run), store.client_rounds(run)
    return Result(cell, outcome_of(cell.seed, run, rounds, metrics, clients, sharing), None)


def _run(experiment: Experiment, home: Path) -> str:
    before = run_before(experiment, home)
    if before is None:
        return simulate(experiment, home).run.id
    if before.status == "completed":
        announce("notice", f"done before, as run {before.id}")
        return before.id
    announce("notice", f"going on with run {before.id}")
    return resume(before.id, home).run.id


def _rows(results: Sequence[Result], examples: Callable[[int], Mapping[str, int]]) -> tuple[Row, ...]:
    """Put the results of one row together; those of owners alone, seed by seed, first."""
    groups: dict[tuple[bool, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.reference, result.cell.row), []).append(result)
    rows = []
    for (reference, label), group in groups.items():
        if group[0].cell.owner:
            group = _owners_together(group, examples)
        outcomes = tuple(result.outcome for result in group if result.outcome)
        troubles = tuple(result.trouble for result in group if result.trouble)
        rows.append(Row(label, group[0].cell.settings, reference, outcomes, troubles))
    return tuple(rows)


def _owners_together(results: Sequence[Result], examples: Callable[[int], Mapping[str, int]]) -> list[Result]:
    """Make one result per seed of the runs of single owners; all of them are needed."""
    found = []
    for seed in dict.fromkeys(result.cell.seed for result in results):
        parts = [result for result in results if result.cell.seed == seed]
        if troubles := [(part.cell.owner, part.trouble) for part in parts if part.trouble]:
            named = [replace(trouble, sentence=f"{owner}: {trouble.sentence}") for owner, trouble in troubles]
            found += [Result(parts[0].cell, None, trouble) for trouble in named]
            continue
        weights = examples(seed)
        outcome = alone([(part.outcome, weights[part.cell.owner]) for part in parts if part.outcome])
        found.append(Result(parts[0].cell, outcome, None))
    return found


def _command(
    source: str, overrides: Sequence[str], vary: Sequence[str], out: Path, home: Path | None, references: bool
) -> str:
    words = ["lorafleet", "compare", source]
    for option, texts in (("--set", overrides), ("--vary", vary)):
        words += [word for text in texts for word in (option, text)]
    words += ["--out", str(out), *(["--home", str(home)] if home else []), *([] if references else ["--no-references"])]
    return shlex.join(words)
