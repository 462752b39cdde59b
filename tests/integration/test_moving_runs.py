"""A run that was packed goes on in another home with the bits it would have had."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.store import RunStore
from common.store.packing import pack_run
from common.store.unpacking import add_run
from server.export import export
from server.progress import Progress, listening
from server.replay import replay
from simulations import resume, simulate
from simulations.run import FinishedRun
from strategies import aggregation_strategy
from tests.tiny import synthetic


def interrupt(step: Progress) -> None:
    """Interrupt round 3 when one of its clients has answered."""
    if (step.kind, step.round) == ("reply", 3):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The run as it would have been."""
    return simulate(synthetic("simulation.workers=1"), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, packed when it had been interrupted."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.raises(KeyboardInterrupt), listening(interrupt):
        simulate(synthetic("simulation.workers=1"), folder)
    assert pack_run(folder, "last", folder / "packed").replies == 1
    return folder / "packed"


@pytest.mark.parametrize("new_id", [None, "mine"])
def test_an_interrupted_run_goes_on_elsewhere(
    whole: FinishedRun, packed: Path, tmp_path: Path, new_id: str | None
) -> None:
    added = add_run(tmp_path, packed, new_id=new_id).run
    assert (added.status, added.rounds_done) == ("interrupted", 2)
    done = resume(added.id, tmp_path)
    assert (done.run.status, done.run.rounds_done) == ("completed", 4)
    assert done.run.adapter_sha256 == whole.run.adapter_sha256
    assert done.metrics["held_out_loss"] == whole.metrics["held_out_loss"]
    with RunStore.open(tmp_path, read_only=True) as store:
        assert not [event.text for event in store.events(added.id) if "is not used" in event.text]


def test_a_run_of_other_code_goes_on_only_when_told_to(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.run.run_fingerprint", lambda: "feed")
    run = add_run(tmp_path, packed).run
    with pytest.raises(UserError, match="begun by other code"):
        resume(run.id, tmp_path)
    assert resume(run.id, tmp_path, any_code=True).run.status == "completed"


def test_a_finished_run_is_exported_and_replayed_elsewhere(tmp_path: Path) -> None:
    done = simulate(synthetic("federation.keep_replies=true", "federation.rounds=2"), tmp_path / "here")
    assert pack_run(tmp_path / "here", "last", tmp_path / "packed").replies == 8
    add_run(tmp_path / "there", tmp_path / "packed", new_id="mine")
    export("mine", tmp_path / "there", tmp_path / "out", "lorafleet")
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    strategy = aggregation_strategy("fedavg_svd", rank=2)
    here = list(replay(done.run.id, tmp_path / "here", strategy))
    assert list(replay("mine", tmp_path / "there", strategy)) == here
    assert [row.replies for row in here] == [4, 4]
