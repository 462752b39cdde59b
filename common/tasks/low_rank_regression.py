"""Regression on a frozen linear model: a synthetic task whose optimum is known, drawn in memory in milliseconds.

One example is a pair of an input and its answer, as in ``x [0.3, -1.2, …]``, ``y [0.9, 0.1, …]``. The base model holds
one matrix ``W`` per layer; inputs and outputs of the layers stand side by side. Client ``i`` draws::

    y = (W + ΔWᵢ) x + noise · ε,    ΔWᵢ = ΔW + skew · Sᵢ,    x ~ N(0, diag(σᵢ²)),    ε ~ N(0, 1)

``ΔW`` and ``Sᵢ`` have the given rank and are scaled so that each moves an output by 1 (root mean square): the loss, a
row's mean squared error, begins near ``1 + skew² + noise²``. The federated objective, the clients' expected losses
weighted by their rows, is smallest, column by column, at ``ΔW*[:, j] = Σᵢ pᵢ σᵢⱼ² ΔWᵢ[:, j] / Σᵢ pᵢ σᵢⱼ²`` with
``pᵢ = nᵢ / Σ n``, which evaluation compares the model with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.seeds import derive_seed
from common.tasks import Batch, ClientData, Clients, Rows, Sample, Task

Side = Annotated[int, Field(ge=1, le=4096)]


class SideBySide(nn.Module):
    """Linear layers without bias, each with its own part of the input and of the output.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Shape (out, in) of each layer.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inn, out, bias=False) for out, inn in shapes])
        self.widths = [inn for _, inn in shapes]

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs, shape (batch, sum of in), to outputs, shape (batch, sum of out)."""
        parts = x.split(self.widths, dim=-1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=-1)

    def save_pretrained(self, folder: Path) -> None:
        """Write the weights as transformers' models do."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors", {"format": "pt"})


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where the federated objective is smallest.

    Parameters
    ----------
    weight : Tensor, shape (sum of out, sum of in)
        ``W + ΔW*``, one block per layer.
    change : float
        ``‖ΔW*‖``.
    curvature : Tensor, shape (sum of in,)
        ``Σ pᵢ σᵢ²``.
    """

    weight: Tensor
    change: float
    curvature: Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs and answers as a task's examples, with the optimum they are judged against."""

    x: Tensor
    y: Tensor
    optimum: Optimum

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.x)

    def take(self, numbers: Tensor) -> Batch:
        """Gather pairs into a batch: x, shape (batch, sum of in), and y, shape (batch, sum of out)."""
        return {"x": self.x[numbers], "y": self.y[numbers]}


class LowRankRegression(Task):
    """Regression with a known optimum, for controlled comparisons."""

    peft_task_type: ClassVar[str | None] = None
    synthetic: ClassVar[bool] = True
    row: ClassVar[str] = "one pair of an input and its answer"

    shapes: tuple[tuple[Side, Side], ...] = Field(
        ((24, 32), (16, 48)), min_length=1, description="Shape (out, in) of each layer of the base model."
    )
    rank: int = Field(4, ge=1, description="Rank of the update to learn, and of what each client adds to it.")
    skew: float = Field(0.0, ge=0, description="Size of each client's own part of its optimum; the common part has 1.")
    covariance_skew: float = Field(
        0.0, ge=0, description="Spread of the inputs' variances over clients: standard deviation of their logarithm."
    )
    noise: float = Field(0.1, ge=0, description="Standard deviation of the noise on the answers.")
    rows: int = Field(256, ge=1, description="Training rows of a client, on average.")
    held_out_rows: int = Field(128, ge=1, description="Held-out rows of each client.")
    size_ratio: float = Field(
        1.0, ge=1, description="Training rows of the largest client over those of the smallest; 1: all equal."
    )

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.rank > (least := min(min(shape) for shape in self.shapes)):
            raise ValueError(f"rank {self.rank} is above the smallest side of shapes, {least}; lower it")
        return self

    @property
    def base_place(self) -> str:
        """Say that the base model is made here."""
        return "builtin:low_rank_regression"

    def base_key(self, precision: str) -> str:
        """Name the base model and how it is held."""
        return f"{self.base_place}:{self.shapes}:{precision}"

    def load_base(self, precision: str) -> nn.Module:
        """Draw the base model; the same for all seeds.

        Raises
        ------
        ConfigurationError
            If it is to be held in 4 bits.
        """
        if precision == "4bit":
            raise ConfigurationError('task low_rank_regression has no 4-bit base model; use "fp32" or "bf16"')
        model = self.architecture().to_empty(device="cpu")
        for layer, weight in zip(model.get_submodule("layers").children(), _base_weights(self.shapes), strict=True):
            layer.weight = nn.Parameter(weight.clone())
        return model.to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def architecture(self) -> nn.Module:
        """Build the model on torch's meta device."""
        with torch.device("meta"):
            return SideBySide(self.shapes)

    def client_data(self, client: str, clients: Clients, seed: int) -> ClientData:
        """Draw one client's pairs, or join those of a pool's members; the last few clients stay in memory."""
        return _client_pairs(self, client, clients, seed)

    def check_data(self, clients: Clients, seed: int) -> list[str]:
        """Find clients that name data, which nobody will read."""
        named = [name for name, settings in clients if settings.data]
        return [f"task low_rank_regression draws its data; that of {', '.join(named)} is not read"] if named else []

    def public_data(self) -> Rows | None:
        """Have none: the optimum is known instead."""
        return None

    def made_up_rows(self, count: int) -> Batch:
        """Draw pairs that no client has."""
        generator = torch.Generator().manual_seed(0)
        widths = [sum(side) for side in zip(*self.shapes, strict=True)]
        y, x = (torch.randn(count, width, generator=generator) for width in widths)
        return {"x": x, "y": y}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of each row's outputs, shape (batch,)."""
        return (_outputs(model, batch["x"]) - batch["y"].to(_weight(model).device)).square().mean(dim=1)

    def evaluate(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Measure the loss on the rows, and how far the model is from the optimum of the federated objective.

        ``excess_loss`` is the objective above its smallest value, an expectation without sampling noise;
        ``distance`` is ``‖W_model − W − ΔW*‖ / ‖ΔW*‖``.
        """
        assert isinstance(rows, Pairs)
        best = rows.optimum
        with torch.inference_mode():
            losses = self.row_losses(model, rows.take(torch.arange(len(rows))))
            off = _outputs(model, torch.eye(best.weight.shape[1])).T.double().cpu() - best.weight
        return {
            "loss": float(losses.double().mean()),
            "excess_loss": float((off.square() * best.curvature).sum() / len(off)),
            "distance": float(torch.linalg.vector_norm(off)) / best.change,
        }

    def samples(self, model: nn.Module) -> Sequence[Sample]:
        """Show nothing: numbers are no text."""
        return ()


def _weight(model: nn.Module) -> Tensor:
    return next(model.parameters())


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    weight = _weight(model)
    outputs: Tensor = model(x.to(weight.device, weight.dtype))
    return outputs.float()


@dataclass(frozen=True, eq=False)
class _Source:
    """What one client draws from: its matrix ``W + ΔWᵢ``, the deviations of its inputs, and how many rows."""

    weight: Tensor
    deviation: Tensor
    rows: int


@lru_cache(maxsize=32)
def _client_pairs(task: LowRankRegression, client: str, clients: Clients, seed: int) -> ClientData:
    pool = dict(clients)[client].pool
    if pool:
        parts = [task.client_data(member, clients, seed) for member in pool]
        return ClientData(_joined([part.train for part in parts]), _joined([part.held_out for part in parts]))
    sources, optimum = _federation(task, _owners(clients), seed)
    source = sources[client]
    return ClientData(
        _draw(source, source.rows, task.noise, optimum, derive_seed(seed, "train", client)),
        _draw(source, task.held_out_rows, task.noise, optimum, derive_seed(seed, "held out", client)),
    )


def _joined(parts: Sequence[Rows]) -> Pairs:
    pairs = [part for part in parts if isinstance(part, Pairs)]
    return Pairs(torch.cat([part.x for part in pairs]), torch.cat([part.y for part in pairs]), pairs[0].optimum)


def _draw(source: _Source, rows: int, noise: float, optimum: Optimum, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    out, inn = source.weight.shape
    x = torch.randn(rows, inn, generator=generator, dtype=torch.float64) * source.deviation
    y = x @ source.weight.T + noise * torch.randn(rows, out, generator=generator, dtype=torch.float64)
    return Pairs(x.float(), y.float(), optimum)


def _owners(clients: Clients) -> tuple[str, ...]:
    """List who has data of its own; pools hold those of others."""
    return tuple(name for name, settings in clients if not settings.pool)


@lru_cache(maxsize=4)
def _federation(task: LowRankRegression, owners: tuple[str, ...], seed: int) -> tuple[dict[str, _Source], Optimum]:
    """Draw every client's source, and find the optimum of all together."""
    base = torch.block_diag(*_base_weights(task.shapes)).double()
    common = _update(task, derive_seed(seed, "common"))
    changes = {name: common + task.skew * _update(task, derive_seed(seed, "own", name)) for name in owners}
    sizes = _sizes(task, owners, seed)
    sources = {
        name: _Source(base + change, _deviation(task, derive_seed(seed, "inputs", name)), sizes[name])
        for name, change in changes.items()
    }
    total = sum(sizes.values())
    shares = {name: source.deviation.square() * source.rows / total for name, source in sources.items()}
    curvature = torch.stack(list(shares.values())).sum(dim=0)
    best = sum((changes[name] * shares[name] for name in owners), torch.zeros_like(base)) / curvature
    return sources, Optimum(base + best, float(torch.linalg.vector_norm(best)), curvature)


def _update(task: LowRankRegression, seed: int) -> Tensor:
    """Draw a low-rank matrix per layer with ``‖·‖² = out``, on the diagonal of one matrix."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for out, inn in task.shapes:
        b = torch.randn(out, task.rank, generator=generator, dtype=torch.float64)
        product = b @ torch.randn(task.rank, inn, generator=generator, dtype=torch.float64)
        blocks.append(product * (out**0.5 / torch.linalg.vector_norm(product)))
    diagonal: Tensor = torch.block_diag(*blocks)
    return diagonal


def _deviation(task: LowRankRegression, seed: int) -> Tensor:
    """Draw the inputs' standard deviations; the variances have mean 1 over the inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = sum(inn for _, inn in task.shapes)
    variance = (task.covariance_skew * torch.randn(inputs, generator=generator, dtype=torch.float64)).exp()
    return (variance / variance.mean()).sqrt()


def _sizes(task: LowRankRegression, owners: tuple[str, ...], seed: int) -> dict[str, int]:
    """Share rows out in geometric steps, in an order drawn from the seed."""
    order = sorted(owners, key=lambda name: derive_seed(seed, "size", name))
    steps = [task.size_ratio ** (number / max(len(order) - 1, 1)) for number in range(len(order))]
    scale = task.rows * len(order) / sum(steps)
    return {name: max(1, round(scale * step)) for name, step in zip(order, steps, strict=True)}


@lru_cache(maxsize=4)
def _base_weights(shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    """Draw the frozen matrices, entries N(0, 1/in)."""
    generator = torch.Generator().manual_seed(derive_seed(0, "low_rank_regression"))
    return tuple(torch.randn(out, inn, generator=generator) / inn**0.5 for out, inn in shapes)
