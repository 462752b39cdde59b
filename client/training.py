"""Local training: AdamW on the adapter's factors, from the dispatched start, for one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from client.penalties import proximal, tail_norms
from common.adapted_model import ADAPTER, AdaptedModel
from common.errors import TrainingError
from common.experiment import TrainingSettings
from common.federation import TrainedFactors
from common.seeds import derive_seed
from common.tasks import Rows
from common.workspace import Workspace


@dataclass(frozen=True)
class Position:
    """Where in the run a round of training stands: seeds and learning rate follow from it."""

    round: int
    rounds: int
    client: str


def train(
    workspace: Workspace,
    rows: Rows,
    position: Position,
    trains: TrainedFactors = "ab",
    tail: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Train the workspace's adapter in place.

    Parameters
    ----------
    workspace : Workspace
        Its model already holds the start adapter.
    rows : Rows
        The client's examples.
    position : Position
        Round and client.
    trains : {"ab", "b", "a", "core", "sparse"}
        What learns.
    tail : (float, float), optional
        HetLoRA's γ and λ, to penalise the rank slots after the first share γ.

    Returns
    -------
    dict
        ``train_loss``: mean over the round's steps; ``last_loss``: of the last step. Both without penalties.

    Raises
    ------
    TrainingError
        If there are no examples, or the loss is not finite.
    """
    if not len(rows):
        raise TrainingError(f"client {position.client} has no examples to train on")
    settings, adapted = workspace.experiment.training, workspace.adapted
    parameters = adapted.train_only(trains)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    penalties = penalties_of(adapted, parameters, settings.proximal_mu, tail)
    device = parameters[0].device
    precision = autocast_dtype(settings.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    seed = derive_seed(workspace.experiment.seed, "batches", position.round, position.client)
    batches = numbers_of_batches(len(rows), settings.batch_size, seed)
    losses = []
    with training_mode(adapted.model, optimizer):
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, position, step)
            numbers = list(islice(batches, settings.accumulation))
            loss = _gradients(workspace, rows, numbers, step * settings.accumulation, scaler, precision)
            for penalty in penalties:
                scaler.scale(penalty()).backward()
            losses.append(_finite(float(loss), step))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return {"train_loss": sum(losses) / len(losses), "last_loss": losses[-1]}


def _gradients(
    workspace: Workspace,
    rows: Rows,
    batches: Sequence[Tensor],
    first_pass: int,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
) -> Tensor:
    """Add up the gradients of a step's batches, and return their mean loss."""
    adapted = workspace.adapted
    device = next(adapted.model.parameters()).device
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, first_pass):
        adapted.begin_pass(number)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            loss = workspace.task.row_losses(adapted.model, rows.take(batch)).mean() / len(batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def penalties_of(
    adapted: AdaptedModel, parameters: Sequence[nn.Parameter], mu: float, tail: tuple[float, float] | None
) -> list[Callable[[], Tensor]]:
    """List what is added to the data's loss once per step; nothing by default, so that no bit changes."""
    found: list[Callable[[], Tensor]] = []
    if mu:
        start = [parameter.detach().clone() for parameter in parameters]
        found.append(lambda: proximal(parameters, start, mu))
    if tail is not None:
        share, strength = tail
        found.append(lambda: tail_norms(_factors(adapted), share, strength))
    return found


def _factors(adapted: AdaptedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's b, every scale in it, and a."""
    for layer in adapted.layers.values():
        b, a = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
        yield b.flatten(1) * layer.scaling[ADAPTER], a.flatten(1)


@contextmanager
def training_mode(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Switch to training; whatever happens, the worker's next client finds neither that mode nor old gradients."""
    model.train()
    try:
        yield
    finally:
        model.eval()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(settings: TrainingSettings, position: Position, step: int) -> float:
    """Return the learning rate of one step: warm-up inside the round, fall over the whole run."""
    done = (position.round - 1) * settings.steps + step
    share = min(done / (position.rounds * settings.steps), 1.0)
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * warm * fall[settings.schedule]


def numbers_of_batches(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of example numbers for ever: shuffled passes over the data, one after another."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(examples, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose the number format of forward and backward."""
    if precision == "auto":
        gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if gpu else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in step {step + 1}; lower training.learning_rate")
    return loss
