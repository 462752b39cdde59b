"""Options that name files, made to mean the same in every process and folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.experiment import Experiment, PluginChoice
from common.methods import METHODS
from common.store import RunStore
from common.tasks import TASKS
from strategies import AGGREGATION

RUN = "run:"


def with_fixed_places(experiment: Experiment, home: Path) -> Experiment:
    """Make paths absolute and turn ``run:NAME`` into that run's adapter file.

    Raises
    ------
    UnknownNameError, UserError
        If there is no such run, or it has no adapter yet.
    """
    changed: dict[str, Any] = {}
    for section, family in (("task", TASKS), ("adapter", METHODS)):
        choice: PluginChoice = getattr(experiment, section)
        named = {key: choice.options.get(key) for key in family.plugin(choice.name).path_options}
        fixed = {key: _fixed(value, home) for key, value in named.items() if isinstance(value, str)}
        changed[section] = choice.model_copy(update={"options": choice.options | fixed})
    changed["clients"] = {
        name: client.model_copy(update={"data": _fixed(client.data, home)}) if client.data else client
        for name, client in experiment.clients.items()
    }
    return experiment.model_copy(update=changed)


def _fixed(text: str, home: Path) -> str:
    if text.startswith(RUN):
        with RunStore.open(home, read_only=True) as store:
            run = store.get_run(text.removeprefix(RUN))
        if AGGREGATION.plugin(run.strategy).capabilities.client_memory:
            raise UserError(
                f"run {run.id} has no one model; start from a client's: "
                f"lorafleet export {run.id} --client NAME --out DIR"
            )
        if run.adapter_path is None:
            raise UserError(f"run {run.id} has no adapter to start from yet; let it finish first")
        return str((home / run.adapter_path).absolute())
    if text.startswith("builtin") or not os.path.exists(text):
        return text
    return str(Path(text).absolute())
