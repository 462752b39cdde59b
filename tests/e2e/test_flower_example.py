"""The example app: its ServerApp and ClientApp as they are, over our grid and on Flower's own runtime."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from torch import Tensor

from common.peft_folder import read_adapter
from simulations.drivers.inprocess import InProcessGrid
from simulations.drivers.superlink import CONNECTION, flower_runtime

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "flower-app"
MODULES = ("tiny_task", "client_app", "server_app")
ROUNDS = 2


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Import the example's modules as Flower does, from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


def run(apps: dict[str, Any], out: Path, strategy: str) -> list[RecordDict]:
    """Run the app; return what the clients answered to training, as they sent it."""
    answers: list[RecordDict] = []

    def client(message: Message, context: Context) -> Message:
        reply: Message = apps["client_app"].app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            answers.append(reply.content)
        return reply

    config = {"num-server-rounds": ROUNDS, "strategy": strategy, "out": str(out)}
    nodes: list[dict[str, Any]] = [{}] * 3
    with InProcessGrid(client, nodes, {**config}, 1) as grid:  # type: ignore[arg-type]
        apps["server_app"].app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), {**config}))
    return answers


def exact(answers: list[RecordDict], layer: str, alpha: float) -> Tensor:
    """Average ``alpha / r · B A`` of the replies by examples, round by round, in float64."""
    total = torch.zeros(())
    for number in range(ROUNDS):
        replies = answers[3 * number : 3 * number + 3]
        weights = [float(str(reply["metrics"]["num-examples"])) for reply in replies]
        for reply, weight in zip(replies, weights, strict=True):
            state = reply.array_records["arrays"].to_torch_state_dict()
            a = state[f"base_model.model.{layer}.lora_A.weight"].double()
            b = state[f"base_model.model.{layer}.lora_B.weight"].double()
            total = total + (weight / sum(weights)) * (alpha / len(a)) * (b @ a)
    return total


def loss(apps: dict[str, Any], change: dict[str, Tensor]) -> float:
    """Measure the base model with a change on the rows of all owners."""
    task = apps["tiny_task"]
    net = task.Net()
    for layer, update in change.items():
        net.get_submodule(layer).weight.data += update.float()
    with torch.no_grad():
        return sum(float((net(x) - y).square().mean()) for x, y in map(task.rows, range(3))) / 3


def test_the_merged_adapter_is_the_exact_average(apps: dict[str, Any], tmp_path: Path) -> None:
    answers = run(apps, tmp_path / "merged", "flora")
    ranks = [answer.array_records["arrays"]["base_model.model.first.lora_A.weight"].shape[0] for answer in answers]
    assert sorted(ranks[:3]) == sorted(ranks[3:]) == [2, 4, 8]
    merged = {name: update.dense() for name, update in read_adapter(tmp_path / "merged").layers.items()}
    assert sorted(merged) == ["first", "second"]
    for layer, update in merged.items():
        wanted = exact(answers, layer, apps["tiny_task"].ALPHA)
        assert float(torch.linalg.vector_norm(update.double() - wanted)) < 1e-6 * float(
            torch.linalg.vector_norm(wanted)
        )
    assert loss(apps, merged) < 0.5 * loss(apps, {})


def test_another_strategy_is_one_word(apps: dict[str, Any], tmp_path: Path) -> None:
    run(apps, tmp_path / "merged", "lora_lego")
    merged = {name: update.dense() for name, update in read_adapter(tmp_path / "merged").layers.items()}
    assert loss(apps, merged) < loss(apps, {})


@pytest.mark.long
def test_it_runs_as_a_bundle_on_flowers_own_runtime(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    out, log = tmp_path / "merged", tmp_path / "flower.log"
    with flower_runtime() as runtime:
        bundle = shutil.copytree(FOLDER, runtime.folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
        command = [runtime.program("flwr"), "run", str(bundle), CONNECTION, "--stream"]
        command += ["--run-config", f"num-server-rounds=1 out='{out}'"]
        command += ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1"]
        runtime.start(command, log).wait(timeout=180)
    assert (out / "adapter_config.json").is_file(), log.read_text()
    assert sorted(read_adapter(out).layers) == ["first", "second"]
