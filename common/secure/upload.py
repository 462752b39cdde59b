"""What a client uploads to a secure sum: its numbers as wide as the widest client's, encoded, in a parcel.

A narrower adapter counts as padded with zeros, which is exact where its factors are the first columns or rows of the
others' (strategies with nested ranks). The 64-bit words travel as one extra ``masked`` of twice as many 32-bit numbers:
to whoever does not know the masks these are random bits and no floats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from common.adapter import Layout
from common.errors import ClientError
from common.federation import Part
from common.secure.masks import Words
from common.wire import Parcel, check_bytes

NAME = "masked"


def threshold(share: float, least: int, clients: int) -> int:
    """Count how many clients must stay to the end of a sum that so many began.

    Parameters
    ----------
    share : float in (0.5, 1]
        ``secure_aggregation.threshold``: above one half, so that no two disjoint groups can both lift masks.
    least : int
        ``secure_aggregation.min_cohort``.
    clients : int
        Clients whose keys are known.
    """
    return max(math.ceil(share * clients - 1e-9), least)  # 0.7 × 10 is a little above 7


def widened(numbers: Tensor, part: Part, layout: Layout, wide: Layout) -> Tensor:
    """Pad the numbers of a part of an adapter to a layout of higher ranks, with zeros.

    Parameters
    ----------
    numbers : Tensor, shape (part_numel(layout, part),)
        What would travel.
    part : Part
        What they are.
    layout, wide : Layout
        Of the adapter, and the one to pad to.

    Raises
    ------
    ClientError
        If ``wide`` has other layers or heads, or a lower rank.
    """
    if layout == wide:
        return numbers
    if _differ(layout, wide):
        raise ClientError("the secure sum is for other layers, ranks or heads than this client trains")
    padded, held = [], 0
    for (rows, columns), size in zip(_blocks(layout, part), _blocks(wide, part), strict=True):
        block = numbers.new_zeros(size)
        block[:rows, :columns] = numbers[held : held + rows * columns].view(rows, columns)
        padded.append(block.view(-1))
        held += rows * columns
    return torch.cat(padded)


def _differ(layout: Layout, wide: Layout) -> bool:
    """Tell whether an adapter is not the beginning of a wider one."""
    ours, theirs = ({name: (out, inn) for name, out, inn, _ in one.layers} for one in (layout, wide))
    if ours != theirs or (layout.extras, layout.method) != (wide.extras, wide.method):
        return True
    ranks = zip(layout.layers, wide.layers, strict=True)
    return any(not rank <= wider <= max(out, inn) for (_, out, inn, rank), (*_, wider) in ranks)


def _blocks(layout: Layout, part: Part) -> Iterator[tuple[int, int]]:
    """Return the shapes of the matrices that make up a part, in the order of its numbers."""
    if part in ("ab", "b"):
        yield from ((out, rank) for _, out, _, rank in layout.layers)
    if part == "core":
        yield from ((rank, rank) for *_, rank in layout.layers)
    if part != "inner":
        yield from ((1, math.prod(shape)) for _, shape in layout.extras)
    if part in ("ab", "a", "inner"):
        yield from ((rank, inn) for _, _, inn, rank in layout.layers)


def masked_parcel(words: Words) -> Parcel:
    """Pack masked words; the parcel is hashed, since a damaged word would spoil the whole sum."""
    data = words.astype("<u8", copy=False).tobytes()
    return Parcel(_layout(len(words)), "fp32", "ab", None, data, hashlib.sha256(data).hexdigest())


def masked_words(parcels: Mapping[str, Parcel], count: int) -> Words:
    """Read an upload of so many words, after checking size and hash.

    Raises
    ------
    ClientError
        If it is anything else.
    """
    parcel = parcels.get("update")
    if parcel is None or len(parcels) > 1:
        raise ClientError(f"expected one masked upload named update, got: {', '.join(sorted(parcels)) or 'none'}")
    if (parcel.layout, parcel.wire, parcel.part) != (_layout(count), "fp32", "ab") or not parcel.sha256:
        raise ClientError(f"the upload is not masked, or not {count} words long; it is not used")
    check_bytes(parcel)
    return np.frombuffer(parcel.data, dtype="<u8").astype(np.uint64, copy=False)


def masked_bytes(numbers: int) -> int:
    """Count the bytes of a masked upload of so many numbers: the weight joins them, 8 bytes each."""
    return 8 * (numbers + 1)


def _layout(words: int) -> Layout:
    return Layout((), ((NAME, (2 * words,)),))
