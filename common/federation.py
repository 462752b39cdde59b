"""What server, strategy and client tell each other about a round.

One rule holds for every strategy, in training, evaluation and export::

    model = pristine base + global adapter + start adapter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from common.adapter import Adapter

TrainedFactors = Literal["ab", "b", "a", "core", "sparse"]
"""What learns: both factors, one of them, the square core between two frozen frames, or a few entries of the matrix."""

Part = Literal["ab", "b", "a", "inner", "core", "sparse"]
"""What of an adapter travels, always with the heads except for ``inner``: the factors ``a`` alone."""


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What a strategy may know of the model.

    Parameters
    ----------
    layers : mapping of str to (int, int)
        Shape (out, in) of every target layer, by module name.
    seed : int
        The run's seed.
    heads : mapping of str to Tensor
        Initial values of parameters trained whole (a classifier), by parameter name.
    method : str
        Name of the adapter method.
    """

    layers: Mapping[str, tuple[int, int]]
    seed: int
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    method: str = "lora"

    def layer_rank(self, layer: str, rank: int) -> int:
        """Clamp a client's rank to what the layer can hold."""
        return min(rank, *self.layers[layer])


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a node before a round.

    Parameters
    ----------
    name : str
        Unique in the federation.
    rank : int
        Rank this client trains with, at least 1.
    """

    name: str
    rank: int


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one client's training gave.

    Parameters
    ----------
    client : str
        Name of the client.
    adapter : Adapter
        The trained factors, whole: ``b @ a`` per layer with every scale in ``b``, and heads as extras.
    num_examples : float
        Weight of the update in the average: examples trained on, or the declared weight; positive.
    base_version : int
        Version of the global adapter it was trained on.
    metrics : mapping of str to float
        Training loss and the like.
    """

    client: str
    adapter: Adapter
    num_examples: float
    base_version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Dispatch:
    """The strategy's half of a training order.

    Parameters
    ----------
    start : Adapter
        Where the client starts; may lack layers or be narrower than ``rank``. Its extras are the current
        heads.
    rank : int
        Rank to train.
    seed : int
        Draws the rows of ``a`` that ``start`` lacks; their ``b`` is zero.
    trains : {"ab", "b", "a", "core", "sparse"}
        What learns.
    frozen_a : int, optional
        Seed of the ``a`` all clients share; it then never travels.
    frames : Adapter, optional
        For ``core``: frozen ``b`` with orthonormal columns and ``a`` with orthonormal rows, sent to a node once. Only
        the core ``r`` of ``b @ r @ a`` travels.
    keeps_b : bool
        ``b`` and the heads learn, but stay with the client from round to round.
    density : float in (0, 1], optional
        For ``sparse``: share of each matrix that learns, at places drawn from ``seed``.
    tail : (float, float), optional
        Share of the rank slots that is not penalised, and the strength of the penalty on the others (HetLoRA).
    """

    start: Adapter
    rank: int
    seed: int
    trains: TrainedFactors = "ab"
    frozen_a: int | None = None
    frames: Adapter | None = None
    keeps_b: bool = False
    density: float | None = None
    tail: tuple[float, float] | None = None

    @property
    def sends(self) -> Part:
        """What of the trained adapter travels up."""
        return "inner" if self.keeps_b else self.trains

    @property
    def receives(self) -> Part:
        """What of the start adapter travels down: all that the client cannot know by itself."""
        if self.density is not None:
            return "sparse"
        if self.frames is not None:
            return "core"
        if self.keeps_b:
            return "inner"
        return "ab" if self.frozen_a is None else "b"


@dataclass(frozen=True, eq=False)
class ServerState:
    """The whole memory of a run; saved after each round. No random state: seeds are derived.

    Parameters
    ----------
    spec : ModelSpec
        Rebuilt from the base model when a run resumes, not saved.
    start : Adapter
        Where clients start the next round; extras are the heads.
    global_adapter : Adapter
        Exact sum of all updates merged so far; empty for strategies that merge nothing.
    round : int
        Rounds merged so far.
    base_version : int
        Counts changes of ``global_adapter``.
    extras : mapping of str to Tensor
        What the strategy itself remembers.
    merged : Adapter, optional
        What the last round's replies became: compared with their exact average, not saved.
    metrics : mapping of str to float
        What the strategy has to say about the last merge (discarded energy, clamped clusters); not saved.
    """

    spec: ModelSpec
    start: Adapter
    global_adapter: Adapter
    round: int = 0
    base_version: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    merged: Adapter | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
