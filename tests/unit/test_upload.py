"""What a client sends and what it owes: nothing that quantisation loses is lost for good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.memory import recall, remember
from client.node import Node
from client.upload import OWED, upload
from common.adapter import Adapter
from common.errors import ClientError
from common.experiment import Experiment
from common.federation import Dispatch
from common.lowrank import LowRank
from common.messages import TrainOrder
from common.travel import take
from common.wire import Parcel, WireFormat, unseal, unseal_numbers

QUANTISED = ["int8", "int4"]


def adapter(seed: int, rank: int = 3) -> Adapter:
    numbers = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(torch.randn(20, rank, generator=numbers), torch.randn(rank, 30, generator=numbers))
        for name in ("p", "q")
    }
    return Adapter.pack(layers, {"head": torch.randn(7, generator=numbers)})


def node(folder: Path | None, wire: WireFormat) -> Node:
    table = {"task": {"name": "causal_lm"}, "simulation": {"clients": 1}, "federation": {"wire": wire}}
    return Node("ada", Experiment.parse(table), (), folder, None)


def order(number: int = 1, feedback: bool = True) -> TrainOrder:
    return TrainOrder(
        run="r", round=number, attempt=1, rounds=9, fingerprint="f", client="ada", base_version=0,
        global_hash="0" * 64, rank=3, seed=0, trains="ab", feedback=feedback,
    )  # fmt: skip


BOTH = Dispatch(Adapter.empty(), 3, 0)


def sent(folder: Path | None, wire: WireFormat, number: int, dispatch: Dispatch = BOTH, **options: Any) -> Parcel:
    """Send the change of round ``number``: from ``adapter(0)`` to ``adapter(number)``."""
    return upload(node(folder, wire), order(number, **options), dispatch, adapter(0), adapter(number))


@pytest.mark.parametrize("wire", ["fp32", "fp16", "bf16"])
def test_floats_are_sent_as_they_are_and_owe_nothing(tmp_path: Path, wire: WireFormat) -> None:
    parcel = sent(tmp_path, wire, 1)
    assert (parcel.wire, parcel.part) == (wire, "ab")
    assert torch.allclose(unseal(parcel).flat, adapter(1).flat, rtol=0 if wire == "fp32" else 2**-7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wire", QUANTISED)
def test_what_was_decoded_and_what_is_owed_are_the_whole_change(tmp_path: Path, wire: WireFormat) -> None:
    """Σ sent + owed = Σ change, round after round."""
    total, meant = torch.zeros(adapter(0).layout.numel, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for number in (1, 2, 3, 4):
        total += unseal_numbers(sent(tmp_path, wire, number)).double()
        meant = meant + (adapter(number).flat - adapter(0).flat).double()
        memory = recall(tmp_path, OWED, number + 1)
        assert memory is not None
        assert torch.allclose(total + memory["ab"].double(), meant, atol=1e-5)
        assert float(memory["ab"].abs().max()) > 0


@pytest.mark.parametrize("wire", QUANTISED)
def test_without_feedback_nothing_is_kept_and_nothing_paid(tmp_path: Path, wire: WireFormat) -> None:
    change = adapter(1).flat - adapter(0).flat
    remember(tmp_path, OWED, 0, {"ab": torch.ones_like(change)})
    alone = sent(None, wire, 1)
    assert sent(tmp_path, wire, 1, feedback=False).data == alone.data
    assert recall(tmp_path, OWED, 9) is not None
    assert recall(tmp_path, OWED, 0) is None
    assert sent(tmp_path, wire, 1).data != alone.data


def test_a_round_sent_again_is_sent_with_the_same_bytes(tmp_path: Path) -> None:
    sent(tmp_path, "int4", 1)
    second = sent(tmp_path, "int4", 2).data
    assert sent(tmp_path, "int4", 2).data == second


def test_each_part_owes_for_itself(tmp_path: Path) -> None:
    """A strategy that trains b and a in turn must not pay with the wrong factor."""
    outer, inner = replace(BOTH, trains="b"), replace(BOTH, trains="a")
    sent(tmp_path, "int4", 1, outer)
    fresh = sent(None, "int4", 2, inner).data
    assert sent(tmp_path, "int4", 2, inner).data == fresh
    assert sent(tmp_path, "int4", 3, outer).data != sent(None, "int4", 3, outer).data
    memory = recall(tmp_path, OWED, 4)
    assert memory is not None
    assert {part: len(kept) for part, kept in memory.items()} == {
        part: len(take(adapter(0), part)) for part in ("a", "b")  # type: ignore[arg-type]
    }  # fmt: skip


@pytest.mark.parametrize("kept", [torch.ones(3), torch.full((307,), torch.nan)], ids=["another rank", "not finite"])
def test_a_debt_that_does_not_fit_is_dropped(tmp_path: Path, kept: torch.Tensor) -> None:
    assert adapter(0).layout.numel == 307
    remember(tmp_path, OWED, 1, {"ab": kept})
    assert sent(tmp_path, "int8", 2).data == sent(None, "int8", 2).data


def test_the_server_adds_the_change_to_the_start_it_gave(tmp_path: Path) -> None:
    parcel = sent(tmp_path, "int8", 1)
    got = unseal(parcel, BOTH, adapter(0))
    largest = float((adapter(1).flat - adapter(0).flat).abs().max())
    assert torch.allclose(got.flat, adapter(1).flat, atol=largest / 127)


@pytest.mark.parametrize("wire", QUANTISED)
def test_an_update_that_is_not_finite_is_not_sent_and_not_owed(tmp_path: Path, wire: WireFormat) -> None:
    broken = adapter(1).with_flat(adapter(1).flat.clone().index_fill(0, torch.tensor([5]), torch.inf))
    with pytest.raises(ClientError, match=f"not finite and cannot be sent as {wire}; lower training.learning_rate"):
        upload(node(tmp_path, wire), order(), BOTH, adapter(0), broken)
    assert recall(tmp_path, OWED, 9) is None
