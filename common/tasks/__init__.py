"""Tasks: data, base model, loss and evaluation of what is fine-tuned.

Each module of this package is one task, named after its file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from common.errors import NotPrivate
from common.experiment import ClientSettings
from common.plugins import Family, Plugin

Batch = Mapping[str, Tensor]
Clients = tuple[tuple[str, ClientSettings], ...]
"""All simulated clients with their settings, sorted by name; hashable, so that data can be cached."""


class Rows(Protocol):
    """Examples that can be counted and taken by number."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def take(self, numbers: Tensor) -> Batch:
        """Gather the examples ``numbers``, shape (batch,), into one batch."""
        ...


@dataclass(frozen=True)
class ClientData:
    """What one client trains on, and the part it is judged by."""

    train: Rows
    held_out: Rows


@dataclass(frozen=True)
class Sample:
    """Something the model made from a prompt, to show."""

    prompt: str
    text: str


class Task(Plugin):
    """Base of the tasks."""

    peft_task_type: ClassVar[str | None]
    """PEFT's name of the task, written into exported adapters; None: a model of no library's."""

    private_options: ClassVar[Mapping[str, Any]] = {}
    """Options that take other defaults where every row is protected."""

    synthetic: ClassVar[bool] = False
    """Whether the rows are drawn from a seed: nobody's data, so that clients may measure on them under privacy."""

    row: ClassVar[str] = "one example"
    """What one row is, for whom it protects: the unit of sample-level privacy."""

    @property
    def couples_rows(self) -> str | None:
        """Say why one row holds the data of several units, so that rows cannot be protected; None if none does."""
        return None

    @property
    @abstractmethod
    def base_place(self) -> str:
        """Folder or hub name of the base model."""

    @property
    def base_revision(self) -> str | None:
        """Hub revision of the base model; None is the newest."""
        return None

    @abstractmethod
    def base_key(self, precision: str) -> str:
        """Name the base model and how it is held, so that a process loads it once."""

    @abstractmethod
    def load_base(self, precision: str) -> nn.Module:
        """Load the base model; ``precision`` is ``fp32``, ``bf16`` or ``4bit``."""

    @abstractmethod
    def architecture(self) -> nn.Module:
        """Build the base model without weights (torch's meta device), for planning."""

    @abstractmethod
    def client_data(self, client: str, clients: Clients, seed: int) -> ClientData:
        """Read one client's examples.

        Raises
        ------
        DataError
            If its data is missing, unreadable or empty.
        """

    @abstractmethod
    def check_data(self, clients: Clients, seed: int) -> list[str]:
        """Find out early whether every client has data; return notices worth showing.

        Raises
        ------
        DataError
            Naming the client whose data cannot be used.
        """

    @abstractmethod
    def public_data(self) -> Rows | None:
        """Read the public examples the server evaluates on, if there are any."""

    def made_up_rows(self, count: int) -> Batch:
        """Make rows up that are nobody's, unlike one another; per-row gradients are checked on them.

        Raises
        ------
        NotPrivate
            If the task does not say how.
        """
        raise NotPrivate(
            f"task {self.plugin_name} makes no rows up, without which per-row gradients cannot be checked; "
            "give it a method made_up_rows, or train without privacy of rows"
        )

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute each example's loss, shape (batch,)."""

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Measure the model on examples; ``loss`` is always among the metrics."""

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Derive what people also want to see from the clients' mean metrics; must be finite."""
        return {}

    @abstractmethod
    def samples(self, model: nn.Module) -> Sequence[Sample]:
        """Let the model make something of the task's prompts."""


TASKS: Family[Task] = Family("common.tasks", Task, "task")  # type: ignore[type-abstract]


def clients_key(clients: Mapping[str, Any]) -> Clients:
    """Freeze simulated clients into a key for caches."""
    return tuple(sorted(clients.items()))
