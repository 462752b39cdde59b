"""Which family of plug-ins each section of an experiment chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.methods import METHODS
from common.plugins import Family
from common.tasks import TASKS
from strategies.aggregation import AGGREGATION
from strategies.optimizers import OPTIMIZERS
from strategies.robust import ROBUST

SECTIONS: Mapping[str, Family[Any]] = {
    "task": TASKS,
    "adapter": METHODS,
    "strategy": AGGREGATION,
    "robust": ROBUST,
    "server_optimizer": OPTIMIZERS,
}
