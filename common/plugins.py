"""Plug-ins found by file name: ``<package>/<name>.py`` *is* the plug-in ``<name>``.

A plug-in is one frozen pydantic class; its fields are its hyper-parameters, each with a description, a range
and a default. ``lorafleet --plugins DIR`` adds a user's own files: ``DIR/<family>/<name>.py``, where the
family is the last part of the package's name (``aggregation``, ``methods``, ``tasks``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from common.errors import ConfigurationError, UnknownNameError

PLUGINS_VARIABLE = "LORAFLEET_PLUGINS"
"""Environment variable that carries ``--plugins`` to worker processes."""


class Plugin(BaseModel):
    """Base of every plug-in: frozen options, unknown keys refused, named after its file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path_options: ClassVar[tuple[str, ...]] = ()
    """Options that may name a file or folder; a run keeps them absolute."""

    @property
    def plugin_name(self) -> str:
        """Name of the file that defines the plug-in."""
        return type(self).__module__.rpartition(".")[2]


T = TypeVar("T", bound=Plugin)


@dataclass(frozen=True)
class Family(Generic[T]):
    """All plug-ins of one package.

    Parameters
    ----------
    package : str
        Import path whose modules each define one ``contract``; names with a leading underscore are not
        plug-ins.
    contract : type
        Base class.
    kind : str
        What people call a member, for messages.
    """

    package: str
    contract: type[T]
    kind: str

    def names(self) -> list[str]:
        """List the members, the user's own included, without importing them."""
        return sorted({*self._built_in(), *self._own_files()})

    def source(self, name: str) -> str:
        """Tell where a member comes from: ``built-in`` or the user's file."""
        return str(self._own_files().get(name, "built-in"))

    def plugin(self, name: str) -> type[T]:
        """Import the member ``name``.

        Raises
        ------
        UnknownNameError
            If there is no such member; lists the known ones.
        ConfigurationError
            If its file does not define exactly one class of the family, or has a built-in member's name.
        """
        if name not in self.names():
            raise UnknownNameError(self.kind, name, self.names())
        own = self._own_files().get(name)
        if own and name in self._built_in():
            raise ConfigurationError(f"{own} has the name of the built-in {self.kind} {name}; rename the file")
        module = _load_file(self.package, name, own) if own else importlib.import_module(f"{self.package}.{name}")
        found = [
            member
            for member in vars(module).values()
            if inspect.isclass(member) and issubclass(member, self.contract) and member.__module__ == module.__name__
        ]
        found = [member for member in found if not inspect.isabstract(member)]
        if len(found) != 1:
            names = [member.__name__ for member in found]
            raise ConfigurationError(
                f"{own or module.__name__} must define exactly one {self.contract.__name__}, it defines {names}"
            )
        return found[0]

    def create(self, name: str, options: Mapping[str, Any] | None = None) -> T:
        """Build the member ``name`` from its options.

        Raises
        ------
        ConfigurationError
            With one problem per wrong option.
        """
        plugin = self.plugin(name)
        try:
            return plugin(**(options or {}))
        except ValidationError as error:
            raise ConfigurationError(explain(error, f"{self.kind} {name}", plugin)) from None

    def _built_in(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]

    def _own_files(self) -> dict[str, Path]:
        folder = os.environ.get(PLUGINS_VARIABLE)
        if not folder:
            return {}
        if not Path(folder).is_dir():
            raise ConfigurationError(f"there is no folder {folder}; --plugins expects one with your own plug-ins")
        files = (Path(folder) / self.package.rpartition(".")[2]).glob("[!_]*.py")
        return {file.stem: file.resolve() for file in sorted(files)}


@cache
def _load_file(package: str, name: str, file: Path) -> ModuleType:
    full_name = f"{package}.{name}"
    spec = importlib.util.spec_from_file_location(full_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[full_name]
        raise ConfigurationError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> list[str]:
    """Turn pydantic's errors into one line per faulty key: where, what was expected, what was given.

    Parameters
    ----------
    error : ValidationError
        What pydantic found.
    where : str
        What was checked, for people.
    model : type
        The model that was to be built.
    """
    problems: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path, known = _place(item["loc"], model)
        given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        if item["type"] == "extra_forbidden":
            found = f"unknown key {path!r}; known are: {', '.join(known) or 'none'}"
        elif item["type"] == "missing":
            found = f"{path} is missing"
        elif path in problems:  # the same value did not fit another member of a union
            found = f"or {_expected(item)}{given}"
            problems[path][-1] = problems[path][-1].removesuffix(given)
        else:
            found = f"{path + ': ' if path else ''}{_expected(item)}{given}"
        problems.setdefault(path, []).append(found)
    return [f"{where}: {' '.join(found)}" for found in problems.values()]


def _expected(item: ErrorDetails) -> str:
    """Say what was expected, in TOML's words."""
    return _EXPECTED.get(item["type"], item["msg"].removeprefix("Value error, "))


_EXPECTED = dict.fromkeys(("dict_type", "model_type"), "Input should be a table") | {
    "tuple_type": "Input should be a list"
}


def _place(location: Sequence[str | int], model: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the path of a key without pydantic's names for union members, and the keys known beside it."""
    path: list[str] = []
    known: list[str] = []
    kind: Any = model
    for part in location:
        if part == "[key]":  # what was to be a key is itself the fault
            break
        kind = _without_none(kind)
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            known = list(kind.model_fields)
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif not isinstance(part, int):
            continue
        path.append(str(part))
    return ".".join(path), known


def _without_none(kind: Any) -> Any:
    """Return what an optional value is where it is there."""
    members = [member for member in get_args(kind) if member is not NoneType]
    return members[0] if get_origin(kind) in (Union, UnionType) and len(members) == 1 else kind
