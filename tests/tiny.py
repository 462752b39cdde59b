"""The smallest real federation: the built-in base model, a few hundred words per client, runs of about a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from client.app import app as client_app
from common.experiment import Experiment
from common.experiment_file import apply_override, load_experiment
from common.store import RunStore
from server.app import app as server_app
from server.app import create_run
from simulations.drivers.inprocess import InProcessGrid
from simulations.run import FinishedRun, load_run

Client = Callable[[Message, Context], Message]

RANKS = {"ada": 2, "ben": 4, "cyd": 2, "dot": 8}
"""Four clients of unequal ranks, in the order of their names."""

WORDS = {
    "ada": "def add(self, value): return self.total + value",
    "ben": "for name in sorted(names): print(name, counts[name])",
    "cyd": "class Reader: pass  # reads one line after the other",
    "dot": "if not isinstance(text, str): raise TypeError(text)",
}


def write_texts(folder: Path, names: Sequence[str] = tuple(RANKS)) -> dict[str, str]:
    """Write each client's documents, a line repeated with small changes; return its folder by name."""
    places = {}
    for name in names:
        place = folder / "texts" / name
        place.mkdir(parents=True, exist_ok=True)
        for number in range(5):
            lines = [f"{WORDS.get(name, name)}  # {number} {line}" for line in range(12 + len(name) * number)]
            (place / f"{number}.py").write_text("\n".join(lines))
        places[name] = str(place)
    return places


def tiny_table(folder: Path, *overrides: str, ranks: dict[str, int] = RANKS) -> dict[str, Any]:
    """Build the nested tables of a tiny experiment, texts written into ``folder``."""
    places = write_texts(folder, tuple(ranks))
    table: dict[str, Any] = {
        "name": "tiny",
        "task": {"name": "causal_lm", "options": {"sequence_length": 16, "eval_rows": 2}},
        "adapter": {"name": "lora", "options": {"target_modules": ["q_proj", "v_proj"]}},
        "strategy": {"name": "flora"},
        "clients": {name: {"data": places[name], "rank": rank} for name, rank in ranks.items()},
        "training": {"steps": 1, "batch_size": 2},
        "federation": {"rounds": 2, "deadline_s": 60},
        "simulation": {"workers": 2},
    }
    for override in overrides:
        apply_override(table, override)
    return table


def tiny(folder: Path, *overrides: str, ranks: dict[str, int] = RANKS) -> Experiment:
    """Build a tiny experiment; ``overrides`` are as for ``--set``."""
    return Experiment.parse(tiny_table(folder, *overrides, ranks=ranks))


def synthetic(*overrides: str, ranks: Sequence[int] = (2, 4, 4, 8)) -> Experiment:
    """Build an even smaller experiment, on drawn numbers: four rounds of a quarter of a second."""
    known = [f"clients.client-{number}.rank={rank}" for number, rank in enumerate(ranks, 1)]
    shape = ["federation.rounds=4", "training.steps=2", "simulation.workers=2"]
    return load_experiment("synthetic", [*known, *shape, *overrides])


def drive(experiment: Experiment, home: Path, client: Client = client_app, run: str = "") -> FinishedRun:
    """Run an experiment, or go on with a run, with clients that may misbehave; return what the store knows.

    Clients are called as Flower calls a ClientApp, the server is the real one.
    """
    with RunStore.open(home) as store:
        name = run or create_run(store, experiment).id
        text = store.get_run(name).experiment
    config = {"experiment": text, "run-id": name, "home": str(home)}
    count = len(experiment.simulated_clients())
    with InProcessGrid(client, [{}] * count, dict(config), experiment.simulation.workers) as grid:  # type: ignore[arg-type]
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), dict(config)))
    return load_run(name, home)


def name_of(experiment: Experiment, context: Context) -> str:
    """Tell which client a context belongs to."""
    return list(experiment.simulated_clients())[int(context.node_config["partition-id"])]
