"""A commented experiment file, generated from what the models say of themselves.

Every key is there with its description and default; those left at their default are commented out.
"""

from __future__ import annotations

import textwrap
from inspect import isclass
from typing import Any

from common.experiment import ClientSettings, Experiment, PluginChoice
from common.experiment_file import Table, preset_names, read_table, toml_value
from common.section import Section
from common.tasks import TASKS
from simulations.terminal.settings_help import Setting, settings_of_model
from strategies.sections import SECTIONS

WIDTH = 100
FIRST_CHOICE = "quickstart"
VIRTUAL_CLIENTS = 4

_HEAD = """\
# A federation for the task {task}. Every key is listed with its default; remove the # to change it.
#
#   lorafleet plan FILE        check it and see clients, ranks and bytes
#   lorafleet simulate FILE    run it on this machine
#   lorafleet plugins          the tasks, adapter methods and strategies there are, with their options
"""


def experiment_template(task: str) -> str:
    """Write a commented experiment file for a task; it can be run as it is unless the task needs options.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If there is no such task, or its file is broken.
    """
    TASKS.plugin(task)
    values = starting_values(task)
    parts = [_HEAD.format(task=task).rstrip()]
    fields = Experiment.model_fields
    top = [setting for setting in settings_of_model(Experiment) if not _is_table(setting.name)]
    parts.append(_keys(top, values))
    for name in filter(_is_table, fields):
        title = f"# ---- {fields[name].description}"
        parts.append(f"{title}\n\n{_table(name, values.get(name, {}))}")
    return "\n\n".join(parts) + "\n"


def starting_values(task: str) -> Table:
    """Return the settings a new experiment begins with: those of the task's preset, or a few virtual clients."""
    tables = map(read_table, sorted(preset_names(), key=lambda name: (name != FIRST_CHOICE, name)))
    table = next((table for table in tables if table["task"]["name"] == task), None)
    if table is None:
        table = {"task": {"name": task}, "simulation": {"clients": VIRTUAL_CLIENTS}}
    return table | {"name": task}


def _is_table(name: str) -> bool:
    kind = Experiment.model_fields[name].annotation
    return name == "clients" or (isclass(kind) and issubclass(kind, Section))


def _table(name: str, values: Table) -> str:
    kind = Experiment.model_fields[name].annotation
    if name == "clients":
        return _clients(values)
    if isinstance(kind, type) and issubclass(kind, PluginChoice):
        return _plugin(name, values)
    assert isclass(kind) and issubclass(kind, Section)
    return f"[{name}]\n{_keys(settings_of_model(kind), values)}"


def _plugin(section: str, values: Table) -> str:
    family = SECTIONS[section]
    default = Experiment.model_fields[section].get_default(call_default_factory=True)
    name = values.get("name") or default.name
    options = _keys(settings_of_model(family.plugin(name)), values.get("options", {}))
    choices = f"# The {family.kind} (one of {', '.join(family.names())})."
    return f"[{section}]\n{choices}\nname = {toml_value(name)}\n\n[{section}.options]\n{options}".rstrip()


def _clients(clients: Table) -> str:
    named = [f"[clients.{name}]\n{_given(values)}".rstrip() for name, values in clients.items()]
    keys = _keys(settings_of_model(ClientSettings), {})
    return "\n\n".join([*named, f"#[clients.another]\n{keys}"])


def _given(values: Table) -> str:
    return "\n".join(f"{key} = {toml_value(value)}" for key, value in values.items())


def _keys(settings: list[Setting], values: Table) -> str:
    return "\n".join(_key(setting, values.get(setting.name, setting.default)) for setting in settings)


def _key(setting: Setting, value: Any) -> str:
    words = textwrap.fill(setting.sentence, WIDTH, initial_indent="# ", subsequent_indent="# ")
    if setting.required and value is None:
        return f"{words}\n#{setting.name} =    # required"
    if value is None:
        return f"{words}\n#{setting.name} =    # not set"
    mark = "#" if value == setting.default else ""
    return f"{words}\n{mark}{setting.name} = {toml_value(value)}"
