"""Start a federation on this machine, or go on with one, and return what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flwr.app import Context, RecordDict

from common.errors import ConfigurationError, RunError, UserError
from common.experiment import Experiment, differences
from common.fingerprint import run_fingerprint
from common.home import default_home
from common.store import Metric, Round, Run, RunLock, RunStatus, RunStore, is_locked
from common.workspace import choose_device, cores
from server.app import create_run
from server.journal import rewind
from server.plan import make_plan, rank_summary
from server.progress import announce
from server.rounds import out_of_patience
from simulations.places import with_fixed_places
from simulations.spent import spent_before
from strategies import AGGREGATION


@dataclass(frozen=True)
class FinishedRun:
    """A run as the store knows it.

    Parameters
    ----------
    run : Run
        Its row.
    rounds : tuple of Round
        Rounds that ended, 0 first.
    measured : tuple of Metric
        Every number of every round.
    home : Path
        Where its files are.
    """

    run: Run
    rounds: tuple[Round, ...]
    measured: tuple[Metric, ...]
    home: Path

    @cached_property
    def metrics(self) -> Mapping[str, list[float]]:
        """The federation's numbers by name, one per round that has them, in order."""
        found: dict[str, list[float]] = {}
        for metric in self.measured:
            if not metric.client and not metric.layer:
                found.setdefault(metric.name, []).append(metric.value)
        return found

    def round_metrics(self, number: int) -> dict[str, float]:
        """Return the federation's numbers of one round."""
        return {m.name: m.value for m in self.measured if m.round == number and not m.client and not m.layer}

    @property
    def adapter(self) -> Path | None:
        """File of the final adapter."""
        return self.home / self.run.adapter_path if self.run.adapter_path else None


def simulate(experiment: Experiment, home: Path | str | None = None) -> FinishedRun:
    """Run a federation on this machine.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    home : Path, optional
        Folder of the store; default as for the command line.

    Raises
    ------
    ConfigurationError, DataError, StoreError
        If it cannot start.
    RunError
        If it failed.
    """
    place = Path(home) if home is not None else default_home()
    experiment = with_fixed_places(experiment, place)
    plan = make_plan(experiment, spent_before(experiment, place))
    announce("planned", f"{plan.rounds} rounds, ranks {rank_summary(plan)}", plan=plan, experiment=experiment)
    for notice in plan.notices:
        announce("notice", notice)
    with RunStore.open(place) as store:
        run = create_run(store, experiment)
    return _drive(run, experiment, place)


def resume(
    name: str,
    home: Path | str | None = None,
    rounds: int | None = None,
    experiment: Experiment | None = None,
    from_round: int | None = None,
    any_code: bool = False,
    persistent_ledger: bool = False,
) -> FinishedRun:
    """Go on with an interrupted or failed run, or extend a finished one.

    Parameters
    ----------
    name : str
        Id of the run, its beginning, or ``last``.
    home : Path, optional
        Folder of the store.
    rounds : int, optional
        New number of rounds in all.
    experiment : Experiment, optional
        What the user believes the run to be; refused if it differs from what the run began with.
    from_round : int, optional
        Forget the rounds after this one and go on from there.
    any_code : bool
        Go on although the code has changed since the run began.
    persistent_ledger : bool
        The user believes that the run counts over all experiments; refused if it does not.

    Raises
    ------
    UserError
        If there is nothing left to do, another process writes the run, or experiment or code changed.
    """
    place = Path(home) if home is not None else default_home()
    with RunStore.open(place, read_only=True) as store:  # a home that is not there is not made
        name = store.get_run(name).id
    with RunStore.open(place) as store:
        run = store.get_run(name)
        with RunLock(store.run_folder(run.id)):
            begun = _checked(run, with_fixed_places(experiment, place) if experiment else None, any_code)
            _check_budget(begun, run, rounds, from_round)
            _check_ledger(begun, run, persistent_ledger)
            if from_round is not None:
                _check_way_back(begun, store.rounds(run.id), run, from_round)
                run = rewind(store, run.id, from_round)
            wanted = begun.federation.rounds if rounds is None else rounds
            extended = rounds is not None or from_round is not None
            if run.status == "completed" and (wanted <= run.rounds_done or not extended):
                raise UserError(f"run {run.id} has done its {run.rounds_done} rounds; extend it with --rounds N")
            if run.status == "completed" and out_of_patience(begun, run.rounds_done, run.best_round):
                raise UserError(f"run {run.id} was ended by federation.patience; start a new run with more of it")
            if wanted < run.rounds_done:
                raise UserError(f"run {run.id} has done {run.rounds_done} rounds already; --rounds must be more")
            federation = begun.federation.model_copy(update={"rounds": wanted})
            begun = begun.model_copy(update={"federation": federation})
            run = store.update_run(run.id, rounds_planned=wanted, experiment=begun.model_dump_json())
    return _drive(run, begun, place)


def _checked(run: Run, experiment: Experiment | None, any_code: bool) -> Experiment:
    begun = Experiment.from_json(run.experiment)
    changed = [] if experiment is None else differences(begun, experiment)
    changed = [change for change in changed if not change.startswith("federation.rounds:")]  # --rounds says those
    if changed:
        raise ConfigurationError(
            [f"the experiment is not what run {run.id} began with; start a new run, or resume without it", *changed]
        )
    if run.fingerprint != run_fingerprint() and not any_code:
        raise UserError(
            f"run {run.id} was begun by other code ({run.fingerprint}, this is {run_fingerprint()}); "
            "resume it with that version, or with --any-code, which gives up the promise of equal bits"
        )
    return begun


def _check_budget(begun: Experiment, run: Run, rounds: int | None, from_round: int | None) -> None:
    """Refuse what a privacy budget was not planned for: what is spent stays spent."""
    if begun.privacy.mode == "none":
        return
    if from_round is not None:
        raise UserError(
            f"run {run.id} is under differential privacy: its rounds are spent and cannot be trained again; "
            "start a new run"
        )
    if rounds is not None and rounds > begun.federation.rounds:
        raise UserError(
            f"run {run.id} is under differential privacy: its noise was chosen for {begun.federation.rounds} rounds, "
            f"which spend its budget; start a new run with adapter.options.start_from = run:{run.id}"
        )


def _check_ledger(begun: Experiment, run: Run, persistent: bool) -> None:
    """Refuse to change ledgers within a run: each would lack what the other holds."""
    if persistent and not begun.simulation.persistent_ledger:
        raise UserError(
            f"run {run.id} began without --persistent-ledger and counts its own spending only; resume it without, "
            "or start a new run with it"
        )


def _check_way_back(begun: Experiment, rounds: Sequence[Round], run: Run, number: int) -> None:
    """Refuse to go back to a round that clients could not train again as they did."""
    if begun.secure_aggregation.enabled:
        raise UserError(
            f"run {run.id} summed its updates under masks; clients do not let a round be summed twice, so it "
            "cannot go back: start a new run"
        )
    earliest = rounds[-1].round - 1 if rounds else 0
    if 0 < number < earliest and AGGREGATION.plugin(run.strategy).capabilities.client_memory:
        raise UserError(
            f"under strategy {run.strategy} clients keep factors of their own, those of the newest two rounds; "
            f"go back to round {earliest}, or to 0"
        )


def _drive(run: Run, experiment: Experiment, home: Path) -> FinishedRun:
    config = {"experiment": experiment.model_dump_json(), "run-id": run.id, "home": str(home.absolute())}
    driver, workers = experiment.simulation.driver, worker_count(experiment)
    announce("run_started", f"run {run.id}", run.rounds_done, run=run.id, driver=driver, workers=workers)
    try:
        if driver == "ray":
            _on_ray(experiment, run.id, home)
        else:
            _in_process(experiment, config, workers)
    except KeyboardInterrupt:
        _ended(run.id, home, "interrupted", f"interrupted; go on with: lorafleet resume {run.id}")
        raise
    except RunError as error:
        # Of a server in another process, only the store knows the reason.
        reason = _ended(run.id, home, "failed", str(error)).reason
        if reason and reason != str(error):
            raise RunError(reason) from error
        raise
    except Exception as error:
        _ended(run.id, home, "failed", str(error))
        raise
    finished = load_run(run.id, home)
    if finished.run.status != "completed":
        raise RunError(f"run {run.id} {finished.run.status}: {finished.run.reason}")
    return finished


def _ended(run: str, home: Path, status: RunStatus, reason: str) -> Run:
    """Say how a run ended, if its server could not."""
    with RunStore.open(home) as store:
        row = store.get_run(run)
        lost = row.status == "running" and not is_locked(store.run_folder(run))
        return store.set_status(run, status, reason) if lost else row


def worker_count(experiment: Experiment) -> int:
    """Count the clients that train side by side."""
    simulation, count = experiment.simulation, len(experiment.simulated_clients())
    if simulation.driver == "ray":
        return min(max(1, int(cores() / simulation.client_cpus)), count)
    gpu = choose_device(experiment.training.device).type == "cuda"
    return min(simulation.workers or (1 if gpu else cores()), count)


def _in_process(experiment: Experiment, config: dict[str, str], workers: int) -> None:
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.drivers.inprocess import InProcessGrid

    count = len(experiment.simulated_clients())
    with InProcessGrid(client_app, [{}] * count, dict(config), workers) as grid:
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(config)))


def _on_ray(experiment: Experiment, run: str, home: Path) -> None:
    from simulations.drivers.flower_runtime import run_on_flower

    run_on_flower(
        experiment.model_dump_json(),
        run_id=run,
        home=home.absolute(),
        num_clients=len(experiment.simulated_clients()),
        cpus_per_client=experiment.simulation.client_cpus,
        gpus_per_client=experiment.simulation.client_gpus,
    )


def load_run(name: str, home: Path) -> FinishedRun:
    """Read a run with its rounds and numbers from the store."""
    with RunStore.open(home) as store:
        run = store.get_run(name)
        rounds = tuple(row for row in store.rounds(run.id) if row.status != "running")
        return FinishedRun(run, rounds, tuple(store.metrics(run.id)), home)
