"""Block quantisation: whole numbers of 8 or 4 bits in place of floats, with one bf16 scale per block of 128.

A number x of a block is sent as q = round(x / scale), with scale = max|x| / L and L = 127 or 7: every number is off by
half a scale at most. Layout of the bytes: all scales, then all codes; two 4-bit codes share a byte, the first one low.
"""

from __future__ import annotations

import math
from typing import Literal, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.adapter import tensor_bytes
from common.errors import ClientError

Quantized = Literal["int8", "int4"]
LIMITS: dict[str, int] = {"int8": 127, "int4": 7}
BLOCK = 128
SCALE = torch.bfloat16
LARGEST = 1e38
"""Numbers beyond are as good as infinite: rounded up, they would not fit float32."""


def is_quantized(wire: str) -> TypeGuard[Quantized]:
    """Tell whether a wire format sends whole numbers with scales."""
    return wire in LIMITS


def encoded_size(count: int, kind: Quantized) -> int:
    """Count the bytes of so many encoded numbers."""
    return SCALE.itemsize * math.ceil(count / BLOCK) + (count if kind == "int8" else math.ceil(count / 2))


def encode(numbers: Tensor, kind: Quantized) -> bytes:
    """Quantise numbers to bytes; equal numbers give equal bytes.

    Parameters
    ----------
    numbers : Tensor, shape (count,), float32
        Any values; those at the end that fill no block have one of their own.
    kind : {"int8", "int4"}
        Codes from −127 to 127, or from −7 to 7.

    Raises
    ------
    ClientError
        If a number is not finite, or beyond 1e38.
    """
    blocks = pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    lowest, highest = torch.aminmax(blocks, dim=1)
    largest = torch.maximum(-lowest, highest)
    if not bool((largest <= LARGEST).all()):  # nor if it is not a number
        raise ClientError(f"the update is not finite and cannot be sent as {kind}; lower training.learning_rate")
    scales = _rounded_up(largest / LIMITS[kind])
    codes = (blocks / scales.float()[:, None]).round_().to(torch.int8).view(-1)[: len(numbers)]
    return tensor_bytes(scales) + tensor_bytes(codes if kind == "int8" else _packed(codes))


def decode(data: bytes | memoryview, count: int, kind: Quantized) -> Tensor:
    """Read numbers that ``encode`` wrote, trusting nothing.

    Parameters
    ----------
    data : bytes-like
        Scales and codes.
    count : int
        How many numbers they are.
    kind : {"int8", "int4"}
        Their format.

    Returns
    -------
    Tensor, shape (count,), float32
        Finite.

    Raises
    ------
    ClientError
        If the bytes are too many or too few, or a scale is not finite.
    """
    if len(data) != encoded_size(count, kind):
        raise ClientError(f"{count} numbers as {kind} need {encoded_size(count, kind)} bytes, got {len(data)}")
    if not count:
        return torch.empty(0)
    blocks = math.ceil(count / BLOCK)
    scales = torch.frombuffer(data, dtype=SCALE, count=blocks).float()
    if not bool(torch.isfinite(scales * (LIMITS[kind] + 1)).all()):
        raise ClientError(f"the update's {kind} scales are not finite; it was damaged on its way")
    codes = torch.frombuffer(data, dtype=torch.int8, offset=SCALE.itemsize * blocks)
    codes = (codes if kind == "int8" else _unpacked(codes))[:count]
    numbers = pad(codes.float(), (0, -count % BLOCK)).view(-1, BLOCK)
    return numbers.mul_(scales[:, None]).view(-1)[:count]


def _rounded_up(scales: Tensor) -> Tensor:
    """Round up to bf16, so that no code exceeds its limit, and at least to its smallest normal number."""
    bits = scales.clamp(min=torch.finfo(SCALE).tiny).view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(SCALE)


def _packed(codes: Tensor) -> Tensor:
    """Put two codes into each byte; a last one without a partner gets a zero."""
    pairs = pad(codes, (0, len(codes) % 2)).view(torch.int16)  # little endian: the first code is the low byte
    return (pairs & 0x0F | pairs >> 4 & 0xF0).to(torch.uint8)


def _unpacked(data: Tensor) -> Tensor:
    low, high = data << 4 >> 4, data >> 4  # shifts of signed numbers keep the sign
    return torch.stack([low, high], dim=1).view(-1)
