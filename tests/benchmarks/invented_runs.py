"""Invented runs of a large federation: what a server would have recorded, drawn from a seed, without any training.

Losses fall, one client is always slow, some replies are late or refused; metrics bear the names the server gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.experiment import Experiment
from common.experiment_file import load_experiment
from common.store import Client, RunStatus

START = datetime(2026, 11, 1, 8, tzinfo=UTC)
DEADLINE_S = 60.0
OUTSIDE = 256
"""Inputs and outputs of every layer."""
RANKS = (4, 8, 8, 16)
FATES = ("accepted", "rejected", "failed", "late", "offline")
REASONS = {
    "rejected": "the update's norm 41.7 exceeds federation.max_update_norm 10.0",
    "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB",
    "late": f"no answer within the deadline of {DEADLINE_S:g} s",
    "offline": "its node is not connected",
}
DEVICES = (
    ("NVIDIA Jetson Orin Nano", 8),
    ("NVIDIA GeForce RTX 3060", 12),
    ("CPU (8 cores)", 16),
    ("NVIDIA L4", 24),
)
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How much there is; ``statistics_every``: of how many rounds one keeps its timeline, similarities and layers."""

    clients: int = 100
    rounds: int = 500
    layers: int = 8
    seed: int = 0
    statistics_every: int = 10


@dataclass(frozen=True)
class Story:
    """One run: its strategy, the loss it reaches, how fast, and how it ends."""

    strategy: str
    seed: int
    floor: float
    pace: float
    status: RunStatus = "completed"
    private: bool = False

    @property
    def name(self) -> str:
        """Name of the experiment; seeds of one experiment share it."""
        return f"{self.strategy}-private" if self.private else self.strategy


STORIES = (
    Story("flora", 0, 0.92, 0.10),
    Story("fedavg", 0, 1.14, 0.16),
    Story("ffa_lora", 0, 1.05, 0.20, private=True),
    Story("flora", 1, 0.92, 0.11),
    Story("fedavg", 1, 1.14, 0.15, status="failed"),
    Story("lora_lego", 0, 1.02, 0.13),
    Story("flora", 2, 0.92, 0.10),
    Story("ffa_lora", 0, 0.99, 0.14),
    Story("fedavg", 2, 1.14, 0.17, status="interrupted"),
    Story("flexlora", 0, 0.95, 0.12),
)


class InventedRun:
    """All numbers of one run, drawn at once.

    Parameters
    ----------
    story : Story
        What kind of run it is.
    size : Size
        How much of it there is.
    place : int
        Number of the run in its store.
    """

    def __init__(self, story: Story, size: Size, place: int) -> None:
        self.story, self.size, self.place = story, size, place
        self._random = np.random.default_rng([size.seed, place])
        self.names = list(self.experiment.simulated_clients())
        self.layers = [f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj" for i in range(size.layers)]
        shape = (size.rounds + 1, size.clients)
        self.ranks = np.array([8 if story.strategy == "fedavg" else RANKS[i % len(RANKS)] for i in range(size.clients)])
        self.examples = self._random.integers(40, 900, size.clients)
        self.straggler = (size.clients * 2) // 5
        self.fates = self._fates(shape)
        self.held_out = self._losses(shape)
        self.train_loss = self.held_out * self._random.normal(0.95, 0.02, shape)
        self.seconds = self._seconds(shape)
        self.cosine = np.clip(self._random.normal(0.7, 0.1, shape) - 0.3 * self._progress(shape[0]), -1, 1)
        self.norm = self._random.lognormal(0.0, 0.2, shape) * (1.2 - self._progress(shape[0]))

    @cached_property
    def experiment(self) -> Experiment:
        """Return the configuration, as a user would have written it."""
        overrides = {
            "name": self.story.name.replace("_", "-"),
            "seed": self.story.seed,
            "strategy.name": self.story.strategy,
            "simulation.clients": self.size.clients,
            "simulation.ranks": [8] if self.story.strategy == "fedavg" else list(RANKS),
            "federation.rounds": self.size.rounds,
            "federation.cohort_size": self.size.clients,
            "federation.deadline_s": DEADLINE_S,
            "federation.max_update_norm": 10.0,
            "evaluation.on": ["clients", "server"],
            "evaluation.every": 1,
        }
        return load_experiment("thousand", [f"{key}={_toml(value)}" for key, value in overrides.items()])

    @property
    def ended(self) -> int:
        """Last round: a run that did not complete stopped on its way."""
        share = {"completed": 1.0, "failed": 0.3, "interrupted": 0.6, "running": 0.5}[self.story.status]
        return max(1, round(share * self.size.rounds))

    @cached_property
    def durations(self) -> Numbers:
        """Return the seconds of each round: its slowest reply, merging, evaluating."""
        answered = np.where(self.fates == 0, self.seconds, 0.0).max(axis=1)
        waited = np.where((self.fates == FATES.index("late")).any(axis=1), DEADLINE_S, answered)
        return np.maximum(waited, 1.0) + self.aggregation + self.evaluation

    aggregation, evaluation = 0.8, 3.0
    """Seconds of the server's phases."""

    def started_at(self, number: int) -> datetime:
        """Tell when a round began; runs follow one another."""
        begun = START + timedelta(hours=8 * self.place)
        return begun + timedelta(seconds=float(self.durations[:number].sum()))

    def bytes_of(self, client: int) -> int:
        """Bytes of one client's adapter."""
        return int(self.ranks[client]) * self.size.layers * 2 * OUTSIDE * 4

    def members(self, run: str) -> list[Client]:
        """Return the clients as the server met them."""
        found = []
        for i, name in enumerate(self.names):
            device, memory = DEVICES[i % len(DEVICES)]
            reason = "set in the experiment" if i % 3 else f"largest that fits the device ({memory * 0.8:.1f} GB free)"
            joined = self.started_at(0) + timedelta(milliseconds=20 * i)
            rank = int(self.ranks[i])
            free = int(memory * 0.8 * 2**30)
            found.append(
                Client(run, name, joined, rank, reason, device, memory_bytes=free, max_rank=rank * (1 + i % 3))
            )
        return found

    def epsilon(self, number: int) -> Numbers | None:
        """Return each client's spending after a round; None for a run without privacy."""
        if not self.story.private:
            return None
        grown: Numbers = 0.25 * np.sqrt(number) * (1 + 60 / self.examples) + (0.3 if number else 0.0)
        return grown

    def layer_ranks(self, number: int) -> Numbers:
        """Draw a round's effective rank per layer."""
        random = np.random.default_rng([self.size.seed, self.place, number])
        highest = {"flora": 40, "flexlora": 16}.get(self.story.strategy, 8)
        return np.clip(random.normal(highest * 0.7, 1.0, self.size.layers).round(), 1, highest)

    def statistics(self, number: int, accepted: Sequence[int]) -> dict[str, Any]:
        """Draw what is kept of a round as a whole, by kind."""
        found: dict[str, Any] = {"timeline": self._timeline(number)}
        if accepted:
            found |= {"similarity": self._similarity(number, accepted), "layers": self._layer_map(number, accepted)}
        return found

    def _progress(self, rounds: int) -> Numbers:
        """Return how far training is after each round, as a column from 0 to 1."""
        progress: Numbers = (1 - np.exp(-np.arange(rounds) / max(1.0, self.story.pace * self.size.rounds)))[:, None]
        return progress

    def _losses(self, shape: tuple[int, int]) -> Numbers:
        private = np.linspace(-0.25, 0.35, shape[1])[self._random.permutation(shape[1])]
        noise = self._random.normal(0, 0.015 * (2 if self.story.private else 1), shape)
        progress = self._progress(shape[0])
        loss: Numbers = 2.35 - (2.35 - self.story.floor) * progress + private * (0.4 + 0.6 * progress) + noise
        return loss

    def _seconds(self, shape: tuple[int, int]) -> Numbers:
        speed = self._random.lognormal(0.0, 0.25, shape[1])
        seconds: Numbers = speed * self._random.lognormal(1.0, 0.08, shape)
        seconds[:, self.straggler] *= 6
        return np.minimum(seconds, DEADLINE_S - 1)

    def _fates(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """Draw places in FATES: a few per cent of the replies are missing, the straggler's often."""
        fates = self._random.choice(len(FATES), size=shape, p=[0.97, 0.006, 0.006, 0.006, 0.012])
        late = self._random.random(shape[0]) < 0.3
        fates[:, self.straggler] = np.where(late, FATES.index("late"), 0)
        return fates

    def _timeline(self, number: int) -> dict[str, Any]:
        clients: dict[str, Any] = {}
        trained = float(self.durations[number]) - self.aggregation - self.evaluation
        judged = trained + self.aggregation
        for i, name in enumerate(self.names):
            fate, seconds = FATES[self.fates[number, i]], float(self.seconds[number, i])
            spans: list[list[Any]] = []
            if number and fate == "accepted":
                times = np.cumsum([0.01, 0.05, 0.08, max(seconds - 0.2, 0.05), 0.06]).round(3).tolist()
                phases = ("wait", "download", "train", "upload")
                spans += [[phase, *times[k : k + 2]] for k, phase in enumerate(phases)]
            elif number and fate != "offline":
                spans.append(["lost", 0.01, round(trained if fate == "late" else seconds / 2, 3)])
            if fate != "offline":
                spans.append(["evaluate", round(judged, 3), round(judged + self.evaluation * (0.3 + (i % 7) / 10), 3)])
            if spans:
                clients[name] = spans
        server = [
            ["train", 0.0, round(trained, 3)],
            ["aggregate", round(trained, 3), round(judged, 3)],
            ["evaluate", round(judged, 3), round(judged + self.evaluation, 3)],
        ]
        return {"clients": clients, "server": server if number else server[2:]}

    def _similarity(self, number: int, accepted: Sequence[int]) -> dict[str, Any]:
        """Two groups of clients whose updates resemble one another."""
        random = np.random.default_rng([self.size.seed, self.place, number, 1])
        directions = random.normal(0, 0.6, (len(accepted), 16))
        directions[:, 0] += 1
        directions[:, 1] += np.where(np.array(accepted) % 3 == 0, 1.2, -0.4)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        cosine = (directions @ directions.T).clip(-1, 1).round(4)
        return {"clients": [self.names[i] for i in accepted], "cosine": cosine.tolist()}

    def _layer_map(self, number: int, accepted: Sequence[int]) -> dict[str, Any]:
        random = np.random.default_rng([self.size.seed, self.place, number, 2])
        ranks = np.repeat(self.ranks[list(accepted)][:, None], self.size.layers, axis=1)
        used = np.clip((ranks * random.uniform(0.4, 0.95, ranks.shape)).round(), 1, ranks).astype(int)
        names = [self.names[i] for i in accepted]
        return {"clients": names, "layers": self.layers, "rank": ranks.tolist(), "effective_rank": used.tolist()}


def _toml(value: object) -> str:
    """Write a setting's value as ``--set`` takes it."""
    return repr(value).replace("'", '"')
