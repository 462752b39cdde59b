"""Laws of block quantisation, whatever the numbers."""

from __future__ import annotations

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ClientError
from common.quantize import BLOCK, LIMITS, Quantized, decode, encode, encoded_size

KINDS = st.sampled_from(["int8", "int4"])
FINITE = st.floats(-(2.0**126), 2.0**126, width=32)


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """Draw up to four blocks, numbers of one size or of very unlike ones, with some odd ones among them."""
    count = draw(st.integers(0, 4 * BLOCK))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    numbers = torch.randn(count, generator=generator)
    numbers *= 10.0 ** (torch.rand(count, generator=generator) * draw(st.integers(0, 30)) - 15)
    for value in draw(st.lists(FINITE, max_size=3 if count else 0)):
        numbers[draw(st.integers(0, count - 1))] = value
    return numbers


def slow(numbers: list[float], kind: Quantized) -> list[float]:
    """Quantise number by number, in double precision."""
    found: list[float] = []
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK]
        exact = struct.unpack("<I", struct.pack("<f", max(map(abs, block)) / LIMITS[kind]))[0]
        bits = max(-(-exact // 0x10000), 0x0080)  # rounded up to the upper half; 0x0080 is the smallest normal number
        scale = struct.unpack("<f", struct.pack("<I", bits * 0x10000))[0]
        found += [round(x / scale) * scale for x in block]
    return found


@given(vectors(), KINDS)
def test_it_equals_the_slow_way(numbers: Tensor, kind: Quantized) -> None:
    """Numbers halfway between two codes may go either way: the quick way divides in single precision."""
    got, expected = decode(encode(numbers, kind), len(numbers), kind), slow(numbers.tolist(), kind)
    for x, a, b in zip(numbers.tolist(), got.tolist(), expected, strict=True):
        assert a == b or abs(abs(a - x) - abs(b - x)) <= 2e-5 * abs(a - b)


@given(vectors(), KINDS)
def test_no_number_is_off_by_more_than_half_a_scale(numbers: Tensor, kind: Quantized) -> None:
    data = encode(numbers, kind)
    blocks = -(-len(numbers) // BLOCK)
    scales = torch.frombuffer(bytearray(data[: 2 * blocks] + b"\0\0"), dtype=torch.bfloat16).double()
    bound = scales[:blocks].repeat_interleave(BLOCK)[: len(numbers)] / 2
    error = (decode(data, len(numbers), kind).double() - numbers.double()).abs()
    assert bool((error <= bound * (1 + 2e-5)).all())  # 2e-5: x / scale is rounded to single precision


@given(vectors(), KINDS)
def test_equal_numbers_give_equal_bytes_of_the_promised_size(numbers: Tensor, kind: Quantized) -> None:
    data = encode(numbers, kind)
    assert len(data) == encoded_size(len(numbers), kind)
    assert encode(numbers.clone(), kind) == data


@given(vectors(), KINDS)
def test_the_mirror_image_is_the_mirror_image(numbers: Tensor, kind: Quantized) -> None:
    count = len(numbers)
    assert torch.equal(decode(encode(-numbers, kind), count, kind), -decode(encode(numbers, kind), count, kind))


@given(st.integers(1, 2 * BLOCK), KINDS, st.data())
def test_what_was_decoded_is_finite_or_refused(count: int, kind: Quantized, data: st.DataObject) -> None:
    size = encoded_size(count, kind)
    try:
        got = decode(data.draw(st.binary(min_size=size, max_size=size)), count, kind)
    except ClientError:
        return
    assert got.shape == (count,)
    assert bool(torch.isfinite(got).all())


@given(vectors(), KINDS)
def test_feedback_sends_in_the_end_what_one_message_loses(numbers: Tensor, kind: Quantized) -> None:
    """With error feedback the sum of what was decoded differs from the sum of what was meant by one residual."""
    numbers = numbers.clamp(-1e6, 1e6)
    sent, residual = torch.zeros(len(numbers), dtype=torch.float64), torch.zeros(len(numbers))
    for _ in range(5):
        wanted = numbers + residual
        decoded = decode(encode(wanted, kind), len(numbers), kind)
        residual = wanted - decoded
        sent += decoded.double()
    size = max(1.0, float(numbers.abs().max()) if len(numbers) else 1.0)
    assert bool(((5 * numbers.double() - sent - residual.double()).abs() <= 1e-5 * size).all())
