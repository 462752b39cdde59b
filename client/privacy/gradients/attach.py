"""Attach the rules to a model for a while, and refuse models whose rows cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from client.privacy.gradients import convolution, embedding, linear, lora, norms
from client.privacy.gradients.record import Record
from client.privacy.gradients.rules import Rule, Site, described, rule_of
from common.errors import NotPrivate

KINDS = (convolution, embedding, linear, lora, norms)
"""Importing a module registers its rules."""


@contextmanager
def per_sample(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[Record]:
    """Let backward passes leave per-row gradients of ``parameters`` in a record instead of ordinary ones.

    While ``record.rows`` is set, passes are recorded; otherwise the model runs as always. At the end nothing is left on
    modules or parameters.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are exactly ``parameters``.
    parameters : sequence of Parameter
        What is trained.

    Raises
    ------
    NotPrivate
        If a trainable parameter has no rule, another one is trainable, or a layer couples rows; names the module.
    """
    refuse_coupled(model)
    refuse_others(model, parameters)
    record = Record(parameters)
    rules = {name: (module, found) for name, module, found in _rules(model)}
    _refuse_uncovered(model, parameters, list(rules.values()))
    with ExitStack() as stack:
        for name, (module, found) in rules.items():
            stack.enter_context(_replaced(name, module, found, record))
        try:
            yield record
        finally:
            record.clear()


def refuse_coupled(model: nn.Module) -> None:
    """Refuse layers in which one row changes another's result, trained or not.

    Raises
    ------
    NotPrivate
        Naming the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise NotPrivate(
                f"{described(name, module)} normalises over the rows of a batch, so that no row's gradient is its own; "
                "use a base model with group or layer normalisation"
            )


def refuse_others(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a model in which other parameters than those named would learn.

    Raises
    ------
    NotPrivate
        Naming the parameter.
    """
    meant = {id(parameter) for parameter in parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in meant:
            raise NotPrivate(f"{name} is trainable but not among the parameters to be trained; freeze it")
    held = {id(parameter) for parameter in model.parameters()}
    for number, parameter in enumerate(parameters, 1):
        shape = tuple(parameter.shape)
        if id(parameter) not in held:
            raise NotPrivate(
                f"parameter {number} of {len(parameters)}, shape {shape}, belongs to no module of the model, so that "
                "no rule finds its per-row gradients; train a method whose parameters are layers"
            )
        if not parameter.requires_grad:
            raise NotPrivate(f"parameter {number} of {len(parameters)}, shape {shape}, is frozen; it cannot be trained")


def _rules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Find the rules of all layers below which something is trainable."""
    trained = [name for name, held in model.named_parameters(remove_duplicate=False) if held.requires_grad]
    above = {"", *(name[:place] for name in trained for place, letter in enumerate(name) if letter == ".")}
    for name, module in model.named_modules():
        if name not in above or (found := rule_of(module)) is None:
            continue
        reason = found.refuse(module)
        if "forward" in module.__dict__:
            reason = "its forward pass is not its class's own: something else, or another engine, has replaced it"
        if reason is not None:
            raise NotPrivate(f"{described(name, module)}: {reason}; leave it frozen or use another adapter method")
        yield name, module, found


def _refuse_uncovered(
    model: nn.Module, parameters: Sequence[nn.Parameter], rules: Sequence[tuple[nn.Module, Rule]]
) -> None:
    covered = {id(parameter) for module, found in rules for parameter in found.parameters(module)}
    missing = {id(parameter) for parameter in parameters} - covered
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in missing:
                raise NotPrivate(
                    f"{described(name, module)} has a trainable parameter {key} but no rule for per-row gradients; "
                    "freeze it or use another adapter method"
                )


@contextmanager
def _replaced(name: str, module: nn.Module, found: Rule, record: Record) -> Iterator[None]:
    """Replace a layer's forward pass for a while."""
    original = module.forward
    recorded = found.build(Site(module, name, record, original))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (original if record.rows is None else recorded)(*args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
