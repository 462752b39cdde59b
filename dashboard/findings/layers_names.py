"""Many names on few labels: what names have in common is dropped, and neighbours share a row where there are many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dashboard.words import labels, visible

Numbers = NDArray[np.float64]
LONGEST = 28


def short_names(names: Sequence[str]) -> list[str]:
    """Drop the parts between dots that all names share: ``layers.0.q_proj`` and ``layers.1.q_proj`` are 0 and 1."""
    parts = [name.split(".") for name in names]
    if len(names) < 2:
        return shown([part[-1] for part in parts])
    fewest = min(map(len, parts))
    first = _shared(parts, fewest - 1)
    last = _shared([part[::-1] for part in parts], fewest - 1 - first)
    kept = [part[first : len(part) - last] for part in parts]
    if len({len(part) for part in kept}) == 1:
        differ = [len(set(column)) > 1 for column in zip(*kept, strict=True)]
        kept = [[word for word, differs in zip(part, differ, strict=True) if differs] or part for part in kept]
    return shown([".".join(part) for part in kept])


def shown(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Make names, of which no two are alike, fit to be shown, and keep it so."""
    return list(labels(names, longest).values())


def kind_of(layer: str) -> str:
    """Return what kind of layer a name stands for: its last part that is no number."""
    words = [word for word in layer.split(".") if word and not word.isdigit()]
    return visible(words[-1] if words else layer, LONGEST)


def arranged(layers: Sequence[str], most: int) -> tuple[list[int], list[int]]:
    """Order layers by the numbers in their names, and cut them into groups; return the order and where groups begin.

    More than ``most`` are ordered by their kind first, so that neighbours of one kind share a group.
    """
    places = sorted(range(len(layers)), key=lambda place: natural(layers[place]))
    if len(layers) <= most:
        return places, list(range(len(layers)))
    kinds = [kind_of(name) for name in layers]
    places.sort(key=kinds.__getitem__)
    held = -(-len(layers) // most)
    starts = [0]
    for place in range(1, len(places)):
        if place - starts[-1] == held or kinds[places[place]] != kinds[places[place - 1]]:
            starts.append(place)
    return places, starts if len(starts) <= most * 5 // 4 else groups(len(places), most)


def groups(count: int, most: int) -> list[int]:
    """Cut ``count`` neighbours into at most ``most`` groups of one size; return where each begins."""
    return list(range(0, count, max(1, -(-count // most))))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return what sorts ``layers.10`` after ``layers.9``."""
    return tuple((0, int(word), "") if _is_number(word) else (1, 0, word) for word in name.split("."))


def group_labels(names: Sequence[str], starts: Sequence[int]) -> list[str]:
    """Name each group by its first and its last member."""
    ends = [*starts[1:], len(names)]
    return [
        names[first] if end - first == 1 else f"{names[first]} – {names[end - 1]}"
        for first, end in zip(starts, ends, strict=True)
    ]


def block_means(matrix: Numbers, rows: Sequence[int], columns: Sequence[int]) -> Numbers:
    """Return the mean of each block of a matrix, over what is known of it; NaN where nothing is."""
    known = np.isfinite(matrix)
    sums = _block_sums(np.where(known, matrix, 0.0), rows, columns)
    counts = _block_sums(known.astype(np.float64), rows, columns)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _block_sums(matrix: Numbers, rows: Sequence[int], columns: Sequence[int]) -> Numbers:
    of_rows = np.add.reduceat(matrix, np.asarray(rows), axis=0)
    return np.asarray(np.add.reduceat(of_rows, np.asarray(columns), axis=1), dtype=np.float64)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10


def _shared(parts: Sequence[Sequence[str]], most: int) -> int:
    """Count how many first words all have in common, at most ``most``."""
    count = 0
    while count < most and len({part[count] for part in parts}) == 1:
        count += 1
    return count
