"""Adapters and server states on disk: safetensors, shapes and names in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.adapter import Adapter, Layout
from common.errors import ConfigurationError, CorruptArtefact
from common.federation import ModelSpec, ServerState
from common.lowrank import add

EXTRA = "extra."


def adapter_bytes(adapter: Adapter) -> bytes:
    """Build the content of an adapter file."""
    return save({"adapter": adapter.flat}, {"adapter": adapter.layout.to_json()})


def read_adapter_file(path: Path) -> Adapter:
    """Read an adapter file."""
    tensors, metadata = _read(path)
    return _adapter("adapter", tensors, metadata, path)


def state_bytes(state: ServerState) -> bytes:
    """Build the content of a state file: all that a resumed run needs beside the experiment."""
    tensors = {"start": state.start.flat, "global": state.global_adapter.flat}
    tensors |= {EXTRA + name: tensor.contiguous() for name, tensor in state.extras.items()}
    described = {
        "start": state.start.layout.to_json(),
        "global": state.global_adapter.layout.to_json(),
        "round": state.round,
        "base_version": state.base_version,
    }
    # One entry: safetensors writes several in random order, and equal states would differ in their hashes.
    return save(tensors, {"state": json.dumps(described)})


def read_state(path: Path, spec: ModelSpec) -> ServerState:
    """Read a state file.

    Raises
    ------
    CorruptArtefact
        If it is no state file, or damaged.
    """
    tensors, metadata = _read(path)
    try:
        described = json.loads(metadata["state"])
        return ServerState(
            spec,
            _adapter("start", tensors, described, path),
            _adapter("global", tensors, described, path),
            int(described["round"]),
            int(described["base_version"]),
            {name.removeprefix(EXTRA): tensor for name, tensor in tensors.items() if name.startswith(EXTRA)},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptArtefact(f"{path} is not a state file ({error!r})") from None


def whole_adapter(state: ServerState) -> Adapter:
    """Return what the base model needs to become the state's model: global and start adapter in one."""
    layers = dict(state.global_adapter.layers)
    for name, update in state.start.layers.items():
        layers[name] = add(layers[name], update) if name in layers else update
    return Adapter.pack(layers, state.start.extras, state.start.method)


def _read(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptArtefact(f"{path} cannot be read: {error}") from None


def _adapter(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Adapter:
    try:
        return Adapter(tensors[name], Layout.from_json(metadata[name]))
    except (KeyError, TypeError, ConfigurationError) as error:
        raise CorruptArtefact(f"{path} holds no {name} adapter ({error})") from None
