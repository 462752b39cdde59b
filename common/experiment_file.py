"""Experiment files: TOML, presets by name, and ``--set key=value`` on top."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError, DataError, UnknownNameError
from common.experiment import Experiment

PRESETS = Path(__file__).resolve().parents[1] / "simulations" / "presets"
PLUGIN_SECTIONS = ("task", "adapter", "strategy", "robust", "server_optimizer")

Table = dict[str, Any]


def preset_names() -> list[str]:
    """List the presets that come with LoRAFleet."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_experiment(
    source: str, overrides: Iterable[str] = (), check: Callable[[Table], list[str]] | None = None
) -> Experiment:
    """Read a preset or a file and apply overrides.

    Parameters
    ----------
    source : str
        Name of a preset, or path of a TOML file.
    overrides : iterable of str
        ``key.path=value``, values in TOML form; what is not TOML is taken as text.
    check : callable, optional
        Finds further problems in the tables, to be told together with wrong settings.

    Raises
    ------
    UnknownNameError, DataError, ConfigurationError
        If there is no such preset or file, it is no TOML, or its content is wrong.
    """
    table = read_table(source)
    for override in overrides:
        apply_override(table, override)
    try:
        return Experiment.parse(table)
    except ConfigurationError as error:
        raise ConfigurationError([*error.problems, *(check(table) if check else [])]) from None


def carried_experiment(text: str) -> Experiment:
    """Read what Flower's run configuration carries: a whole experiment as JSON, or a preset or file by name.

    Empty text, as in a bare ``flwr run .``, is the quickstart.
    """
    return Experiment.from_json(text) if text.lstrip().startswith("{") else load_experiment(text or "quickstart")


def read_table(source: str) -> Table:
    """Read the nested tables of a preset or a TOML file, unchecked."""
    path = Path(source)
    if not path.suffix and not os.path.isfile(source):  # unlike Path.is_file, never raises
        if source not in preset_names():
            raise UnknownNameError("preset", source, preset_names(), "or give the path of a .toml file")
        path = PRESETS / f"{source}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"experiment file {source[:200]} cannot be read: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"experiment file {source[:200]} is not TOML: {str(error)[:200]}") from None


def apply_override(table: Table, override: str) -> None:
    """Set one ``key.path=value`` in nested tables.

    Choosing another plug-in drops the options of the one before, which are not its own.
    """
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigurationError(f"--set {override!r} is not of the form key.path=value")
    *path, last = parts
    place = table
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigurationError(f"--set {override!r}: {part} is a value, not a table")
    value = _value(text.strip())
    if last == "name" and len(path) == 1 and path[0] in PLUGIN_SECTIONS and place.get("name") != value:
        place.pop("options", None)
    place[last] = value


def toml_value(value: Any) -> str:
    """Write a value as TOML.

    Raises
    ------
    ValueError
        If TOML cannot hold it.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are among TOML's, which also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    raise ValueError(f"{value!r} cannot be written as TOML")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also numbers and nestings beyond what Python reads
        return text
