"""The command that gives a run's experiment again: a preset and the settings that make it, or a file that holds all.

Nothing is guessed: a command is offered only if reading it gives exactly the stored experiment.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.errors import LoRAFleetError
from common.experiment import Experiment
from common.experiment_file import load_experiment, preset_names, read_table, toml_value

MOST_SETTINGS = 16
"""Of a command that people still read; with more a file is better."""
LONGEST = 400_000
"""Letters of an experiment that is looked at."""
_BARE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Recipe:
    """How to run an experiment again.

    Attributes
    ----------
    words : tuple of str
        What to type after ``lorafleet``, where a preset will do; empty otherwise.
    toml : str
        The whole experiment as a file; empty where TOML cannot hold it.
    """

    words: tuple[str, ...]
    toml: str


@lru_cache(maxsize=64)
def recipe(text: str) -> Recipe | None:
    """Find out how to run an experiment again.

    Parameters
    ----------
    text : str
        The experiment as the store holds it.

    Returns
    -------
    Recipe or None
        None where this version of LoRAFleet does not understand it.
    """
    if len(text) > LONGEST:
        return None
    try:
        experiment = Experiment.from_json(text)
    except (LoRAFleetError, RecursionError):
        return None
    found = [words for name in preset_names() if (words := _from_preset(name, experiment)) is not None]
    return Recipe(min(found, key=len, default=()), _as_file(experiment))


def _from_preset(name: str, wanted: Experiment) -> tuple[str, ...] | None:
    """Return the words that make the experiment of a preset; None where that cannot be, or takes too many."""
    try:
        preset = Experiment.parse(read_table(name))
        settings = list(_changes("", preset.model_dump(mode="json"), wanted.model_dump(mode="json")))
        if len(settings) > MOST_SETTINGS or load_experiment(name, settings) != wanted:
            return None
    except (LoRAFleetError, ValueError):
        return None
    return ("simulate", name, *(word for setting in settings for word in ("--set", setting)))


def _changes(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """List as ``key.path=value`` what is different afterwards; what is gone cannot be said."""
    for key, value in after.items():
        place, old = f"{path}.{key}" if path else key, before.get(key)
        if isinstance(value, dict) and value:
            # A table that is chosen anew, such as another plug-in's options, holds nothing of the one before.
            yield from _changes(place, old if isinstance(old, dict) else {}, value)
        elif value != old and value is not None:
            yield f"{place}={_shortest(value)}"


def _shortest(value: Any) -> str:
    """Write a value for ``--set``: text that cannot be mistaken for anything else needs no quotes."""
    if isinstance(value, str) and _BARE.fullmatch(value) and value not in ("true", "false", "inf", "nan"):
        return value
    return toml_value(value)


def _as_file(experiment: Experiment) -> str:
    """Write an experiment as TOML, without what is at its default; empty where that does not give it again."""
    table = _without_none(experiment.model_dump(mode="json", exclude_defaults=True))
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in table.items() if isinstance(value, dict)}
    try:
        lines = [f"{key} = {toml_value(value)}" for key, value in plain.items()]
        for name, section in sections.items():
            lines += ["", f"[{name}]", *(f"{_key(key)} = {toml_value(value)}" for key, value in section.items())]
        text = "\n".join(lines) + "\n"
        return text if Experiment.parse(tomllib.loads(text)) == experiment else ""
    except (LoRAFleetError, ValueError, RecursionError):
        return ""


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def _without_none(value: Any) -> Any:
    """TOML has no null: what is none is left out, which is what it means in an experiment."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
