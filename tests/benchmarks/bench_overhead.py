"""What the platform adds to each client and round: no training, no store, no error metric; 64 tensors."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from reporting import in_fresh_process, report

from common.experiment import Experiment
from common.federation import Dispatch, ModelSpec, ServerState
from common.messages import Presence, Query, TrainAnswer, TrainOrder
from common.start import starting_adapter
from common.store import Client
from common.wire import Parcel, read_message, seal, unseal, write_message
from server.federation import Federation
from server.journal import Begun, Released
from server.nodes import Nodes
from server.record import RoundRecord
from server.rounds import run_rounds
from simulations.drivers.inprocess import InProcessGrid
from strategies import aggregation_strategy

CLIENTS, ROUNDS, LAYERS, RANK = 8, 20, 32, 8
SIZES = {"0.1 MB": 49, "8 MB": 3906}
START_UP = """
import time; start = time.perf_counter()
from client.app import app
from simulations.drivers.inprocess import InProcessGrid
imported = time.perf_counter()
with InProcessGrid(app, [{}] * 4, {"experiment": "", "run-id": "", "home": ""}, 2) as grid: grid.get_node_ids()
print(imported - start, time.perf_counter() - imported)
"""


class MemoryJournal:
    """A journal without a disk; notes when each round ended."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[TrainAnswer, Parcel]] = {}
        self.ends: list[float] = []

    def begin(self, number: int, cohort: Sequence[str], base_version: int) -> Begun:
        """Begin a round."""
        self.replies.clear()
        return Begun(tuple(cohort), 1)

    def meet(self, clients: Sequence[Client]) -> None:
        """Remember nobody."""

    def kept(self, number: int) -> Mapping[str, tuple[TrainAnswer, Parcel]]:
        """Nothing is kept."""
        return {}

    def keep(self, number: int, answer: TrainAnswer, parcel: Parcel, rank: int) -> None:
        """Keep a reply in memory."""
        self.replies[answer.client] = (answer, parcel)

    def reply(self, number: int, client: str) -> tuple[TrainAnswer, Parcel]:
        """Return a kept reply."""
        return self.replies[client]

    def released(self) -> Sequence[Released]:
        """Nothing was released."""
        return ()

    def commit(self, record: RoundRecord, state: ServerState, best: bool) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def client_app(spec: ModelSpec) -> ClientApp:
    """Build a client that does everything but train."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        read_message(message.content, Query)
        name = f"client-{int(context.node_config['partition-id']) + 1}"
        return Message(write_message(Presence(client=name)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order, parcels = read_message(message.content, TrainOrder)
        given = unseal(parcels["start"])
        start = given if given.layout.layers else starting_adapter(Dispatch(given, order.rank, order.seed), spec)
        answer = TrainAnswer(client=order.client, round=order.round, base_version=0, num_examples=1, seconds=0)
        return Message(write_message(answer, {"update": seal(start, hashed=False)}), reply_to=message)

    return app


def ours(width: int) -> float:
    """Return seconds per client and round of our loop."""
    spec = ModelSpec({f"layer.{i:02d}": (width, width) for i in range(LAYERS)}, seed=0)
    experiment = Experiment.parse(
        {
            "task": {"name": "causal_lm"},
            "simulation": {"clients": CLIENTS},
            "federation": {"rounds": ROUNDS},
            "evaluation": {"on": [], "certificate": False},
        }
    )
    strategy, journal = aggregation_strategy("fedavg"), MemoryJournal()
    with InProcessGrid(client_app(spec), [{}] * CLIENTS, {}, 2) as grid:
        federation = Federation(
            "bench",
            experiment,
            strategy,
            experiment.simulated_clients(),
            spec,
            RANK,
            grid,
            Nodes(grid, "bench"),
            journal,
        )
        run_rounds(federation, strategy.init(spec), 1)
    return statistics.median(b - a for a, b in pairwise(journal.ends[1:])) / CLIENTS


def stock_flower(width: int) -> float:
    """Return seconds per client and round of Flower's own FedAvg, one Array per tensor, over the same grid."""
    app, ends = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        tensors = message.content["arrays"].to_torch_state_dict()
        content = RecordDict({"arrays": ArrayRecord(tensors), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]):  # type: ignore[no-untyped-def]
            result = super().aggregate_train(server_round, replies)
            ends.append(time.perf_counter())
            return result

    record = ArrayRecord({f"t{i}": Array(torch.zeros(RANK, width).numpy()) for i in range(2 * LAYERS)})
    with InProcessGrid(app, [{}] * CLIENTS, {}, 2) as grid:
        Timed(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS).start(
            grid=grid, initial_arrays=record, num_rounds=ROUNDS
        )
    return statistics.median(b - a for a, b in pairwise(ends[1:])) / CLIENTS


def main() -> None:
    """Compare both in one run."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name, width in SIZES.items():
        flower, own = stock_flower(width), ours(width)
        rows.append([name, f"{flower * 1000:.2f} ms", f"{own * 1000:.2f} ms", f"{flower / own:.1f}"])
    imports, start = map(float, in_fresh_process(["-c", START_UP]).split())
    rows.append(["start-up (imports apart)", "–", f"{start * 1000:.1f} ms (imports {imports:.1f} s)", "–"])
    report(
        "overhead",
        "Overhead per client and round",
        f"{CLIENTS} clients, {2 * LAYERS} tensors, strategy fedavg, no training, store or error metric. "
        "Flower: its own FedAvg with one Array per tensor, over the same in-process grid.",
        ["adapter", "Flower's FedAvg", "LoRAFleet", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
