"""A worker's workspace: kept while its model stays the same, one per thread; devices and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.base_model import add_update, base_model, layer_shape
from common.errors import ConfigurationError
from common.workspace import choose_device, cores, cpu_threads, model_spec, workspace
from tests.tiny import tiny


def test_a_workspace_is_kept_while_its_model_stays_the_same(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    first = workspace(experiment)
    assert workspace(experiment) is first
    other = tiny(tmp_path, "seed=1", "federation.rounds=9")
    changed = workspace(other)
    assert changed.adapted is first.adapted
    assert changed.experiment == other
    assert workspace(tiny(tmp_path, "adapter.options.alpha=3")).adapted is not first.adapted


def test_every_thread_has_a_model_of_its_own_on_shared_weights(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    mine = workspace(experiment)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(workspace, experiment).result()
    assert other.adapted is not mine.adapted
    for (name, one), (_, two) in zip(
        mine.adapted.model.named_parameters(), other.adapted.model.named_parameters(), strict=True
    ):
        assert (one.data_ptr() == two.data_ptr()) != ("lora_" in name), name


@pytest.mark.parametrize("head", [(), ("model.norm",)], ids=str)
def test_the_outline_is_the_models(tmp_path: Path, head: tuple[str, ...]) -> None:
    experiment = tiny(tmp_path, f"adapter.options.head={list(head)}", "seed=5")
    spec, real = model_spec(experiment), workspace(experiment).adapted.spec(5)
    assert spec.layers == real.layers
    assert (spec.seed, spec.method) == (5, "lora")
    assert spec.heads.keys() == real.heads.keys() == {f"{name}.weight" for name in head}


def test_gradient_checkpointing_is_switched_on(tmp_path: Path) -> None:
    assert not workspace(tiny(tmp_path)).adapted.peft_model.is_gradient_checkpointing
    option = "training.gradient_checkpointing=true"
    assert workspace(tiny(tmp_path, option)).adapted.peft_model.is_gradient_checkpointing


def test_auto_takes_the_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto").type == kind


@pytest.mark.parametrize(("name", "count", "fits"), [("cuda", 1, True), ("cuda:1", 2, True), ("cuda:2", 2, False)])
def test_a_gpu_must_be_there(monkeypatch: pytest.MonkeyPatch, name: str, count: int, fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if fits:
        assert choose_device(name) == torch.device(name)
    else:
        with pytest.raises(ConfigurationError, match=f"training.device '{name}': this machine has {count} GPUs"):
            choose_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "meta", "mps", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"training.device '{name}' is no device; use auto, cpu, cuda or cu"):
        choose_device(name)


def test_threads_are_put_back_whatever_happens() -> None:
    before = torch.get_num_threads()
    with suppress(KeyError), cpu_threads(before + 1):
        inside = torch.get_num_threads()
        raise KeyError
    assert (inside, torch.get_num_threads()) == (before + 1, before)
    assert cores() >= 1


def test_a_base_model_is_loaded_once_and_only_the_last_is_kept() -> None:
    loads: list[str] = []

    def load(name: str) -> Any:
        def build() -> nn.Module:
            loads.append(name)
            return nn.Linear(2, 2)

        return base_model(name, build)

    assert load("one") is load("one")
    load("two")
    load("one")
    assert loads == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (3, 4)),
        (nn.Conv2d(2, 5, 3), (5, 18)),
        (nn.Conv2d(4, 6, 3, groups=2), (6, 18)),
    ],
    ids=["linear", "convolution", "grouped"],
)
def test_an_update_fits_its_layer_or_is_refused(module: nn.Module, shape: tuple[int, int]) -> None:
    assert layer_shape(module) == shape
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(add_update(module, torch.ones(shape)), weight + 1)
    with pytest.raises(ConfigurationError, match=r"an update of shape \(7, 7\) does not fit a weight of"):
        add_update(module, torch.ones(7, 7))
