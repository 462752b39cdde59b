"""The in-process and the ray driver run the same apps and come to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations import simulate
from tests.tiny import tiny

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.e2e


def test_both_drivers_give_the_same_adapter(tmp_path: Path) -> None:
    here = simulate(tiny(tmp_path, "training.steps=2"), tmp_path / "here")
    there = simulate(tiny(tmp_path, "training.steps=2", "simulation.driver=ray"), tmp_path / "there")
    assert there.run.status == here.run.status == "completed"
    assert there.run.adapter_sha256 == here.run.adapter_sha256
    assert there.metrics["held_out_loss"] == here.metrics["held_out_loss"]
    assert [row.state_sha256 for row in there.rounds] == [row.state_sha256 for row in here.rounds]
