"""What a worker trains and evaluates in: task, method and model of an experiment, one model per thread."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from common.adapted_model import AdaptedModel, lora_layers, spec_of, trained_heads
from common.base_model import attach, base_model
from common.errors import ConfigurationError
from common.experiment import Experiment
from common.federation import ModelSpec
from common.methods import METHODS, AdapterMethod
from common.privacy.settings import UNIT
from common.tasks import TASKS, Task


@dataclass(frozen=True, eq=False)
class Workspace:
    """Everything needed to train or evaluate under one experiment, in one thread."""

    experiment: Experiment
    task: Task
    method: AdapterMethod
    adapted: AdaptedModel


_local = threading.local()


def workspace(experiment: Experiment) -> Workspace:
    """Return this thread's workspace; its model is kept for as long as task, adapter and training stay the same."""
    settings = experiment.model_dump_json(
        include={"task": True, "adapter": True, "training": True, "privacy": {"mode"}}
    )
    if getattr(_local, "settings", None) != settings:
        _local.workspace, _local.settings = _build(experiment), settings
    found: Workspace = _local.workspace
    return found if found.experiment == experiment else replace(found, experiment=experiment)


def _build(experiment: Experiment) -> Workspace:
    training = experiment.training
    task, method = task_of(experiment), method_of(experiment)
    device = choose_device(training.device)
    base = base_model(
        f"{task.base_key(training.base_precision)}:{device}",
        lambda: task.load_base(training.base_precision).to(device),
    )
    adapted = AdaptedModel(base, method, device, merge_global=training.global_adapter == "merged")
    if training.gradient_checkpointing:
        adapted.peft_model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.peft_model.enable_input_require_grads()
    return Workspace(experiment, task, method, adapted)


def task_of(experiment: Experiment) -> Task:
    """Build the experiment's task; where every row is protected, some of its defaults differ."""
    name, options = experiment.task.name, experiment.task.options
    if experiment.privacy.protects_rows:
        options = {**TASKS.plugin(name).private_options, **options}
    return TASKS.create(name, options)


def protected_unit(experiment: Experiment) -> str:
    """Say what an experiment's privacy protects: with or without it the run turns out nearly the same."""
    privacy = experiment.privacy
    return task_of(experiment).row if privacy.protects_rows else UNIT[privacy.mode]


def method_of(experiment: Experiment) -> AdapterMethod:
    """Build the experiment's adapter method."""
    return METHODS.create(experiment.adapter.name, experiment.adapter.options)


def model_spec(experiment: Experiment) -> ModelSpec:
    """Describe the experiment's model to a strategy, without loading weights unless a head needs them."""
    method = method_of(experiment)
    if getattr(method, "head", ()):
        return workspace(experiment).adapted.spec(experiment.seed)
    return _bare_spec(task_of(experiment), method, experiment.seed)


@lru_cache(maxsize=4)
def _bare_spec(task: Task, method: AdapterMethod, seed: int) -> ModelSpec:
    model = task.architecture()
    peft_model = attach(model, method.config(model))
    return spec_of(lora_layers(peft_model), trained_heads(peft_model), seed, method.plugin_name)


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists here.

    Raises
    ------
    ConfigurationError
        If the name is no device, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigurationError(f"training.device {name!r} is no device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"training.device {name!r}: this machine has {torch.cuda.device_count()} GPUs; use auto or cpu"
        )
    return device


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run a block with so many CPU threads: sums and decompositions differ in bits between thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Count the CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
