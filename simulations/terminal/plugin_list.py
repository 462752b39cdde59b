"""The plug-ins of every family, the user's own included; a broken file is listed with its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import LoRAFleetError
from common.methods import METHODS
from common.plugins import Family
from common.tasks import TASKS
from simulations.terminal.settings_help import Setting, settings_of_model
from strategies import AGGREGATION
from strategies.oneshot import ONESHOT
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST


@dataclass(frozen=True)
class ListedPlugin:
    """One plug-in as it is shown.

    Parameters
    ----------
    name, source : str
        Its name, and ``built-in`` or the user's file.
    summary : str
        First line of its documentation.
    capabilities : mapping
        What it can do, by name.
    options : tuple of Setting
        Its hyper-parameters.
    error : str
        Why it cannot be used; empty if it can.
    """

    name: str
    source: str
    summary: str = ""
    capabilities: Mapping[str, Any] | None = None
    options: tuple[Setting, ...] = ()
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        options = {
            item.name: {
                "default": item.default,
                "required": item.required,
                "allowed": item.allowed,
                "description": item.description,
            }
            for item in self.options
        }
        shown: dict[str, Any] = {"name": self.name, "source": self.source, "summary": self.summary}
        shown |= {"capabilities": dict(self.capabilities or {}), "options": options}
        return shown | ({"error": self.error} if self.error else {})


_FAMILIES: tuple[tuple[Family[Any], str, Callable[[Any], dict[str, Any]]], ...] = (
    (AGGREGATION, "aggregation strategies", lambda strategy: strategy.capabilities.as_dict()),
    (ROBUST, "robust rules", lambda rule: {"equal_ranks": rule.needs_linear}),
    (OPTIMIZERS, "server optimizers", lambda _: {}),
    (ONESHOT, "one-shot merges", lambda _: {}),
    (METHODS, "adapter methods", lambda method: {"exact": method.exact}),
    (TASKS, "tasks", lambda _: {}),
)


def listed_plugins() -> dict[str, list[ListedPlugin]]:
    """List the plug-ins by family: ``aggregation``, ``robust``, ``optimizers``, ``oneshot``, ``methods``, ``tasks``.

    Raises
    ------
    ConfigurationError
        If the user's plug-in folder is not there.
    """
    return {
        _short(family): [_listed(family, name, capable) for name in family.names()] for family, _, capable in _FAMILIES
    }


def family_title(name: str) -> str:
    """Return what people call the members of a family."""
    return next(title for family, title, _ in _FAMILIES if _short(family) == name)


def _short(family: Family[Any]) -> str:
    return family.package.rpartition(".")[2]


def _listed(family: Family[Any], name: str, capable: Callable[[Any], dict[str, Any]]) -> ListedPlugin:
    source = family.source(name)
    try:
        plugin = family.plugin(name)
        capabilities = capable(plugin)
    except LoRAFleetError as error:
        return ListedPlugin(name, source, error=str(error))
    except AttributeError as error:
        return ListedPlugin(name, source, error=f"{source} is not complete: {error}")
    summary = (plugin.__doc__ or "").strip().partition("\n")[0]
    return ListedPlugin(name, source, summary, capabilities, tuple(settings_of_model(plugin)))
