"""The register of rules: how a layer of some class leaves every row's gradient behind. A new rule is one decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from client.privacy.gradients.record import Record
from common.errors import NotPrivate

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """A layer to which a rule is attached.

    Parameters
    ----------
    module : nn.Module
        The layer.
    name : str
        Its name in the model.
    record : Record
        Where its rows' gradients go.
    original : callable
        Its own forward pass.
    """

    module: Any
    name: str
    record: Record
    original: Forward

    def __str__(self) -> str:
        return described(self.name, self.module)

    def checked(self, x: Tensor) -> Tensor:
        """Return an input as it is, once its first dimension is known to be the rows.

        Raises
        ------
        NotPrivate
            If it is another: the layer mixes rows, or takes them apart.
        """
        if not x.dim() or x.shape[0] != self.record.rows:
            raise NotPrivate(
                f"{self} gets an input of shape {tuple(x.shape)} for {self.record.rows} rows; privacy per row needs "
                "the rows first (mixtures of experts and tables shared by all rows do not keep them): leave it frozen"
            )
        return x


@dataclass(frozen=True)
class Rule:
    """How per-row gradients of one class of layers are found.

    Parameters
    ----------
    build : callable
        Takes a site and returns the forward pass that replaces the layer's own while a pass is recorded.
    parameters : callable
        Lists the parameters it covers.
    refuse : callable
        Tells why it does not fit a certain layer; None where it does.
    """

    build: Callable[[Site], Forward]
    parameters: Callable[[Any], Iterable[nn.Parameter]]
    refuse: Callable[[Any], str | None]


_RULES: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}


def weight_and_bias(module: nn.Module) -> Iterable[nn.Parameter]:
    """List what most layers hold; anything else a layer holds has no rule."""
    own = dict(module.named_parameters(recurse=False))
    return [own[key] for key in ("weight", "bias") if key in own]


def rule(
    *classes: type[nn.Module] | str,
    parameters: Callable[[Any], Iterable[nn.Parameter]] = weight_and_bias,
    refuse: Callable[[Any], str | None] = lambda module: None,
) -> Callable[[Callable[[Site], Forward]], Callable[[Site], Forward]]:
    """Register the decorated function as the rule of some classes; text matches the end of a class's name."""

    def register(build: Callable[[Site], Forward]) -> Callable[[Site], Forward]:
        made = Rule(build, parameters, refuse)
        for kind in classes:
            if isinstance(kind, str):
                _BY_NAME[kind] = made
            else:
                _RULES[kind] = made
        return build

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """Find a layer's rule: its own class's, or that of a class whose forward pass it has inherited."""
    for kind in type(module).__mro__:
        if kind in _RULES and type(module).forward is kind.forward:
            return _RULES[kind]
    return next((made for end, made in _BY_NAME.items() if type(module).__name__.endswith(end)), None)


def described(name: str, module: nn.Module) -> str:
    """Name a module and its class."""
    return f"{name or 'the model'} ({type(module).__name__})"
