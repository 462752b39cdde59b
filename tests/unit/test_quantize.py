"""Block quantisation: exact bytes worked out by hand, and everything that is not such bytes refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.errors import ClientError
from common.quantize import BLOCK, LIMITS, Quantized, decode, encode, encoded_size, is_quantized

KINDS: tuple[Quantized, ...] = ("int8", "int4")


def bf16(*values: float) -> bytes:
    """Write bf16 numbers: the upper half of their float32 form, little endian."""
    return torch.tensor(values).view(torch.int32).bitwise_right_shift(16).to(torch.int16).numpy().tobytes()


def test_int8_by_hand() -> None:
    """The largest number is 127 × 0.5, so the scale is 0.5 and codes are the numbers doubled."""
    numbers = torch.tensor([63.5, -63.5, 1.0, 0.0, -0.7])
    data = encode(numbers, "int8")
    assert data == bf16(0.5) + bytes([127, 256 - 127, 2, 0, 255])
    assert decode(data, 5, "int8").tolist() == [63.5, -63.5, 1.0, 0.0, -0.5]


def test_int4_by_hand() -> None:
    """Codes 7, −7 share a byte, the first one low: 7 and 9; then 2 and −1; then 1 alone."""
    numbers = torch.tensor([3.5, -3.5, 1.0, -0.6, 0.3])
    data = encode(numbers, "int4")
    assert data == bf16(0.5) + bytes([0x97, 0xF2, 0x01])
    assert decode(data, 5, "int4").tolist() == [3.5, -3.5, 1.0, -0.5, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_a_scale_of_its_own(kind: Quantized) -> None:
    loud, quiet = torch.linspace(-1000, 1000, BLOCK), torch.linspace(-1e-3, 1e-3, BLOCK)
    numbers = torch.cat([loud, quiet, torch.tensor([5.0])])
    got = decode(encode(numbers, kind), len(numbers), kind)
    assert torch.allclose(got[BLOCK : 2 * BLOCK], quiet, atol=1e-3 / LIMITS[kind])
    assert got[-1] == pytest.approx(5.0, rel=2**-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_stays_zero(kind: Quantized) -> None:
    numbers = torch.cat([torch.zeros(BLOCK), torch.ones(BLOCK)])
    got = decode(encode(numbers, kind), 2 * BLOCK, kind)
    assert torch.equal(got[:BLOCK], torch.zeros(BLOCK))
    assert bool(got[BLOCK:].all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_rounded_up_so_that_the_largest_number_fits(kind: Quantized) -> None:
    """Rounded to the nearest bf16, half of these scales would be too small and the code past its limit."""
    for step in range(200):
        largest = 1 + step / 777
        data = encode(torch.tensor([largest, -largest]), kind)
        scale = float(torch.frombuffer(bytearray(data), dtype=torch.bfloat16, count=1))
        assert largest / LIMITS[kind] <= scale * (1 + 1e-6)
        assert scale <= largest / LIMITS[kind] * (1 + 2**-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e38], ids=str)
def test_numbers_at_the_ends_of_float32_are_no_trouble(kind: Quantized, value: float) -> None:
    numbers = torch.tensor([value, -value, 0.0])
    got = decode(encode(numbers, kind), 3, kind)
    assert bool(torch.isfinite(got).all())
    assert torch.allclose(got, numbers, rtol=2**-7, atol=1e-38)


@pytest.mark.parametrize(
    ("count", "int8", "int4"), [(0, 0, 0), (1, 3, 3), (127, 129, 66), (128, 130, 66), (129, 133, 69), (1000, 1016, 516)]
)
def test_the_size_is_exact(count: int, int8: int, int4: int) -> None:
    numbers = torch.arange(count, dtype=torch.float32)
    for kind, size in zip(KINDS, (int8, int4), strict=True):
        assert encoded_size(count, kind) == len(encode(numbers, kind)) == size
        assert decode(encode(numbers, kind), count, kind).shape == (count,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("place", [0, BLOCK + 1], ids=["full block", "last block"])
def test_what_is_not_finite_is_refused(kind: Quantized, value: float, place: int) -> None:
    numbers = torch.ones(BLOCK + 2)
    numbers[place] = value
    with pytest.raises(ClientError, match=rf"not finite and cannot be sent as {kind}; lower training\.learning_rate"):
        encode(numbers, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_size_are_refused(kind: Quantized) -> None:
    data = encode(torch.ones(200), kind)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ClientError, match=rf"200 numbers as {kind} need {len(data)} bytes, got {len(wrong)}"):
            decode(wrong, 200, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 3e38])
def test_scales_that_are_not_finite_are_refused(kind: Quantized, scale: float) -> None:
    data = encode(torch.ones(200), kind)
    with pytest.raises(ClientError, match="scales are not finite"):
        decode(data[:2] + bf16(scale) + data[4:], 200, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_codes_decode_to_something_finite(kind: Quantized) -> None:
    """−128 and −8 are never written, but may arrive."""
    code = {"int8": 0x80, "int4": 0x88}[kind]
    got = decode(bf16(2.0) + bytes([code]), 1, kind)
    assert got.tolist() == [-2.0 * (LIMITS[kind] + 1)]


def test_a_view_is_read_where_it_lies() -> None:
    data = encode(torch.ones(300), "int8")
    assert torch.equal(decode(memoryview(data), 300, "int8"), decode(data, 300, "int8"))


def test_the_input_is_left_alone() -> None:
    numbers = torch.linspace(-1, 1, 2 * BLOCK)
    before: Tensor = numbers.clone()
    encode(numbers, "int4")
    assert torch.equal(numbers, before)


def test_which_formats_are_quantised() -> None:
    assert [is_quantized(wire) for wire in ("fp32", "fp16", "bf16", "int8", "int4")] == [
        False,
        False,
        False,
        True,
        True,
    ]
