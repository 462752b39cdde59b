"""What this node's device can carry."""

from __future__ import annotations

import os

import torch

from common.federation import ModelSpec

BYTES_PER_TRAINED_NUMBER = 16
"""fp32 weight, gradient and AdamW's two moments."""

MEMORY_SHARE = 0.25
"""Part of the free memory an adapter may claim; activations and the base need the rest."""


def device_name(device: torch.device) -> str:
    """Name the device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"


def free_memory(device: torch.device) -> int:
    """Count the free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_rank(spec: ModelSpec, memory: int) -> int:
    """Return the highest rank whose factors, gradients and moments fit a share of the memory, at least 1."""
    per_rank = sum(out + inn for out, inn in spec.layers.values()) * BYTES_PER_TRAINED_NUMBER
    limit = max(min(shape) for shape in spec.layers.values())
    return max(1, min(int(memory * MEMORY_SHARE) // per_rank, limit))
