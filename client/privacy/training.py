"""Local training that protects every row: DP-SGD on the adapter's factors, from the dispatched start, for one round.

Nothing about the rows is returned: neither losses, nor norms, nor how many were drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from client.privacy.account import Permit
from client.privacy.engine import open_engine
from client.privacy.self_check import check_gradients, check_moved, check_trainable
from client.privacy.steps import StepPlan, poisson_samples, private_step
from client.training import Position, autocast_dtype, learning_rate, penalties_of, training_mode
from common.adapted_model import AdaptedModel
from common.errors import NotPrivate, TrainingError
from common.federation import TrainedFactors
from common.privacy.noise import secret_generator
from common.tasks import Rows
from common.workspace import Workspace

CHECKED = 4
"""Rows on which gradients are compared with autograd's."""

_checked: WeakKeyDictionary[AdaptedModel, set[tuple[TrainedFactors, str]]] = WeakKeyDictionary()
"""What was checked of each worker's model: which factors learn, and how gradients are found."""


def prepare(workspace: Workspace, rows: Rows, client: str, trains: TrainedFactors) -> None:
    """Make sure that training will keep its promise, before anything is charged for it.

    Raises
    ------
    TrainingError
        If there are no rows.
    NotPrivate
        If rows are not of one unit each, or the model's per-row gradients are not what autograd gives.
    """
    if not len(rows):
        raise TrainingError(f"client {client} has no examples to train on")
    if coupled := workspace.task.couples_rows:
        raise NotPrivate(f"privacy protects single rows: {coupled}")
    adapted, gradients = workspace.adapted, workspace.experiment.privacy.gradients
    known = _checked.setdefault(adapted, set())
    if (trains, gradients) in known:
        return
    parameters = adapted.train_only(trains)
    check_trainable(adapted.model, parameters)
    made_up = workspace.task.made_up_rows(CHECKED)  # whether a check fails must not depend on anybody's rows
    losses = partial(workspace.task.row_losses, adapted.model)
    check_gradients(adapted.model, parameters, losses, made_up, gradients=gradients)
    known.add((trains, gradients))


def train_privately(
    workspace: Workspace,
    rows: Rows,
    position: Position,
    permit: Permit,
    trains: TrainedFactors = "ab",
    tail: tuple[float, float] | None = None,
) -> None:
    """Train the workspace's adapter in place, with the noise and the steps of a permit.

    Parameters
    ----------
    workspace : Workspace
        Its model already holds the start adapter.
    rows : Rows
        The client's examples.
    position : Position
        Round and client.
    permit : Permit
        What the ledger has reserved.
    trains, tail
        As for :func:`client.training.train`; penalties see parameters only, and are added after the noise.

    Raises
    ------
    NotPrivate
        If other parameters would learn than those meant, or none moved.
    TrainingError
        If what was learned is not finite.
    """
    experiment, adapted = workspace.experiment, workspace.adapted
    settings, test_seed = experiment.training, experiment.privacy.test_seed
    parameters = adapted.train_only(trains)
    check_trainable(adapted.model, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    penalties = penalties_of(adapted, parameters, settings.proximal_mu, tail)
    plan = StepPlan(permit.mechanism, permit.clipping_norm, permit.steps, settings.batch_size, test_seed)
    device, where = parameters[0].device, (position.round, position.client)
    engine = open_engine(
        adapted.model,
        parameters,
        optimizer,
        gradients=experiment.privacy.gradients,
        noise_multiplier=plan.mechanism.noise_multiplier,
        clipping_norm=plan.clipping_norm,
        expected_rows=settings.batch_size,
        generator=secret_generator(device, test_seed, "noise", *where),
    )
    losses_of = _losses(workspace, rows, device)
    before = [parameter.detach().clone() for parameter in parameters]
    with training_mode(adapted.model, optimizer), engine as running:
        for step, drawn in enumerate(poisson_samples(len(rows), plan, *where)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, position, step)
            private_step(running, drawn, plan.micro_batch, losses_of)
            for penalty in penalties:
                penalty().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:
                check_moved(before, parameters, adapted.model)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise TrainingError("what was learned is not finite; lower training.learning_rate")


def _losses(workspace: Workspace, rows: Rows, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what runs the forward pass of some rows; every pass has a dropout mask of its own."""
    adapted = workspace.adapted
    precision = autocast_dtype(workspace.experiment.training.precision, device)
    passes = iter(range(1 << 62))

    def losses_of(numbers: Tensor) -> Tensor:
        adapted.begin_pass(next(passes))
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            return workspace.task.row_losses(adapted.model, rows.take(numbers))

    return losses_of
