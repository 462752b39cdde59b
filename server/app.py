"""The coordinator's ServerApp: opens the run, goes on where it stands, and settles how it ended."""

from __future__ import annotations

import secrets
import traceback
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import LoRAFleetError, RunError
from common.experiment import Experiment
from common.experiment_file import carried_experiment
from common.fingerprint import run_fingerprint
from common.home import default_home
from common.store import Run, RunLock, RunStatus, RunStore
from common.workspace import method_of, model_spec, protected_unit
from server.federation import Federation
from server.heartbeat import heartbeat
from server.initial import initial_state
from server.journal import StoreJournal
from server.nodes import Nodes
from server.plan import make_plan
from server.progress import Progress, announce, listening
from server.rounds import run_rounds
from strategies import aggregation_strategy

RECORDED = ("round_started", "dispatched", "left_out", "aggregated", "notice", "run_finished")
"""Steps that become events of their own; a commit brings its own event."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation to its end: one that was created in the store, or a new one of the experiment named."""
    config = {key: str(value) for key, value in context.run_config.items()}
    home = Path(config["home"]) if config["home"] else default_home()
    with RunStore.open(home) as store:
        _run_locked(grid, store, config["run-id"] or _new_run(store, config["experiment"]))


def _new_run(store: RunStore, text: str) -> str:
    experiment = carried_experiment(text)
    make_plan(experiment)
    return create_run(store, experiment).id


def create_run(store: RunStore, experiment: Experiment) -> Run:
    """Enter a new run into the store."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = store.create_run(
        f"{stamp}-{experiment.name}-{secrets.token_hex(2)}",
        name=experiment.name,
        task=experiment.task.name,
        strategy=experiment.strategy.name,
        seed=experiment.seed,
        experiment=experiment.model_dump_json(),
        rounds_planned=experiment.federation.rounds,
        fingerprint=run_fingerprint(),
    )
    if experiment.privacy.mode != "none":
        unit = protected_unit(experiment)
        store.add_event(run.id, "privacy", f"what is protected: {unit}", data={"unit": unit})
    return run


def _run_locked(grid: Grid, store: RunStore, run: str) -> None:
    with RunLock(store.run_folder(run)), listening(partial(_record, store, run)):
        try:
            with heartbeat(store, run):
                coordinate(grid, store, store.get_run(run))
        except KeyboardInterrupt:
            _end(store, run, "interrupted", "interrupted; go on with: lorafleet resume " + run)
            raise
        except LoRAFleetError as error:
            _end(store, run, "failed", str(error))
            raise
        except Exception as error:  # a fault of ours or of a plug-in: the run has failed, the details are kept
            details = store.run_folder(run) / "traceback.txt"
            details.write_text(traceback.format_exc(), encoding="utf-8")
            reason = f"{type(error).__name__}: {error}; the details are in {details}"
            _end(store, run, "failed", reason)
            raise RunError(reason) from error


def _record(store: RunStore, run: str, step: Progress) -> None:
    """Keep what a round's commit does not: how far it is, who was left out and why, anything worth a line."""
    if step.kind in RECORDED:
        store.add_event(run, step.kind, step.text, round=step.round, client=step.client or None, data=step.data)


def _end(store: RunStore, run: str, status: RunStatus, reason: str) -> None:
    store.set_status(run, status, reason)
    store.add_event(run, f"run_{status}", reason)


def coordinate(grid: Grid, store: RunStore, run: Run) -> None:
    """Run the rounds that are left of a run and publish its adapter."""
    experiment = Experiment.from_json(run.experiment)
    strategy = aggregation_strategy(experiment.strategy.name, **experiment.strategy.options)
    spec = model_spec(experiment)
    journal = StoreJournal(store, run.id, experiment.federation.keep_replies)
    federation = Federation(
        run.id,
        experiment,
        strategy,
        experiment.simulated_clients(),
        spec,
        method_of(experiment).rank,
        grid,
        Nodes(grid, run.id),
        journal,
    )
    store.set_status(run.id, "running")
    state = journal.restore(spec)
    first = 0 if state is None else run.rounds_done + 1
    if state is None:
        state = initial_state(experiment, strategy, spec)
    state = run_rounds(federation, state, first, run.best_metric, run.best_round)
    journal.publish(state)
    store.set_status(run.id, "completed")
    announce("run_finished", f"run {run.id} completed", state.round)
