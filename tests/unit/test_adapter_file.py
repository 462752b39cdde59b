"""Adapters, server states and parcels on disk: written, read again, and refused when they are anything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.adapter import Adapter
from common.adapter_file import adapter_bytes, read_adapter_file, read_state, state_bytes, whole_adapter
from common.errors import CorruptArtefact
from common.federation import ModelSpec, ServerState
from common.lowrank import Dense, LowRank, Update
from common.parcel_file import parcel_bytes, read_parcel
from common.wire import seal, unseal

SPEC = ModelSpec({"a": (3, 4), "b": (2, 2)}, seed=1)


def adapter(start: float = 0.0, **heads: torch.Tensor) -> Adapter:
    low = LowRank(start + torch.arange(6.0).view(3, 2), start - torch.arange(8.0).view(2, 4))
    return Adapter.pack({"a": low, "b": Dense(torch.full((2, 2), start + 0.1))}, heads)


def state(**extras: torch.Tensor) -> ServerState:
    return ServerState(SPEC, adapter(1.0, head=torch.ones(3)), adapter(2.0), 4, 3, extras)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "given", [adapter(), adapter(0.5, x=torch.eye(2)), Adapter.empty("other")], ids=["layers", "heads", "empty"]
)
def test_an_adapter_keeps_its_bits(tmp_path: Path, given: Adapter) -> None:
    assert read_adapter_file(written(tmp_path, adapter_bytes(given))).sha256() == given.sha256()
    assert adapter_bytes(given) == adapter_bytes(given)


def test_a_state_keeps_its_bits(tmp_path: Path) -> None:
    given = state(momentum=torch.arange(4.0).view(2, 2).T)
    again = read_state(written(tmp_path, state_bytes(given)), SPEC)
    assert again.start.sha256() == given.start.sha256()
    assert again.global_adapter.sha256() == given.global_adapter.sha256()
    assert (again.round, again.base_version, again.spec) == (4, 3, SPEC)
    assert again.extras.keys() == {"momentum"}
    assert torch.equal(again.extras["momentum"], given.extras["momentum"])
    assert again.merged is None
    assert state_bytes(again) == state_bytes(given)


def test_the_whole_adapter_is_the_sum_of_global_and_start() -> None:
    start: dict[str, Update] = {"a": LowRank(torch.ones(3, 1), torch.ones(1, 4)), "c": Dense(torch.eye(2))}
    given = ServerState(SPEC, Adapter.pack(start, {"head": torch.ones(3)}), adapter())
    whole = whole_adapter(given)
    assert list(whole.layers) == ["a", "b", "c"]
    torch.testing.assert_close(whole.layers["a"].dense(), adapter().layers["a"].dense() + 1)
    assert torch.equal(whole.layers["b"].dense(), adapter().layers["b"].dense())
    assert torch.equal(whole.layers["c"].dense(), torch.eye(2))
    assert list(whole.extras) == ["head"]


def edited(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    """Write a state file again after a change of its tensors or of what describes them."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    described = json.loads(metadata["state"])
    change(tensors, described)
    save_file(tensors, path, {"state": json.dumps(described)})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, described: tensors.pop("start"), "holds no start adapter"),
        (lambda tensors, described: described.pop("global"), "holds no global adapter"),
        (lambda tensors, described: described.update(start="{}"), "holds no start adapter"),
        (lambda tensors, described: described.update(start=3), "holds no start adapter"),
        (lambda tensors, described: tensors.update(start=torch.ones(3)), "holds no start adapter"),
        (lambda tensors, described: described.pop("round"), "is not a state file (KeyError('round'))"),
        (lambda tensors, described: described.update(base_version="x"), "is not a state file"),
        (lambda tensors, described: described.update(base_version=None), "is not a state file"),
    ],
    ids=range(8),
)
def test_a_state_that_lacks_something_is_refused(tmp_path: Path, change: Callable[..., Any], said: str) -> None:
    path = edited(written(tmp_path, state_bytes(state())), change)
    with pytest.raises(CorruptArtefact, match=re.escape(said)) as caught:
        read_state(path, SPEC)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_adapter_file, lambda path: read_state(path, SPEC), read_parcel])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "folder"])
def test_a_damaged_file_is_refused(tmp_path: Path, read: Callable[[Path], Any], damage: str) -> None:
    content = state_bytes(state())
    path = tmp_path / "file.safetensors"
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[:-1])
    with pytest.raises(CorruptArtefact, match=re.escape(str(path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_one_kind_of_file_is_not_taken_for_another(tmp_path: Path) -> None:
    parcel = written(tmp_path, parcel_bytes(seal(adapter()), "{}"))
    for read in (read_adapter_file, lambda path: read_state(path, SPEC)):
        with pytest.raises(CorruptArtefact, match=r"holds no adapter adapter|is not a state file"):
            read(parcel)
    with pytest.raises(CorruptArtefact, match="holds no adapter adapter"):
        read_adapter_file(written(tmp_path, state_bytes(state())))
    with pytest.raises(CorruptArtefact, match="is not a readable reply"):
        read_parcel(written(tmp_path, adapter_bytes(adapter())))
    save_file({"data": torch.ones(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(CorruptArtefact, match="is not a readable reply"):
        read_parcel(tmp_path / "bare.safetensors")


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_a_parcel_keeps_its_bytes(tmp_path: Path, wire: Any, hashed: bool) -> None:
    given = seal(adapter(0.5), wire, hashed=hashed)
    parcel, header, key = read_parcel(written(tmp_path, parcel_bytes(given, '{"round": 1}', "key")))
    assert (header, key) == ('{"round": 1}', "key")
    assert bytes(parcel.data) == bytes(given.data)
    assert parcel.manifest == given.manifest
    assert torch.equal(unseal(parcel).flat, adapter(0.5).flat.to(torch.float16 if wire == "fp16" else torch.float32))


def test_an_empty_parcel_is_a_file_too(tmp_path: Path) -> None:
    parcel, _, _ = read_parcel(written(tmp_path, parcel_bytes(seal(Adapter.empty()), "")))
    assert parcel.nbytes == 0
    assert unseal(parcel).layers == {}


def test_a_changed_byte_of_a_hashed_parcel_is_found(tmp_path: Path) -> None:
    content = bytearray(parcel_bytes(seal(adapter()), ""))
    content[-1] ^= 1
    with pytest.raises(CorruptArtefact, match="do not match their hash"):
        read_parcel(written(tmp_path, bytes(content)))
