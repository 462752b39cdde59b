"""What a backward pass leaves behind for every parameter and row, and the clipped sum over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from client.privacy.gradients.outer import Grams, Outer, squared_norms
from common.errors import NotPrivate

SMALL = 1e-6
"""Added to norms before dividing by them, as Opacus does."""

STORES_LESS = 1.0
"""Outer products are kept where they take less than this share of the gradient's memory."""


class Record:
    """Per-row gradients of one pass.

    Every contribution is kept in one of two forms, which give the same result: the gradient itself, out · in numbers a
    row, or the vectors it is a sum of outer products of, positions · (out + in) numbers a row. Both need
    positions · out · in products a row, now or when rows are added up; the second needs positions² · (out + in) more
    for its norm. What stores less is kept; where that is the second, its norm costs no more than those products. So
    narrow adapters are formed, and heads, embeddings and wide adapters on short rows are not. (Rank 64, 32 positions,
    width 256: the same time in both forms, and a third less memory in the second.) What a parameter used more than once
    receives is added up.

    Parameters
    ----------
    parameters : sequence of Parameter
        In the order in which sums are returned.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.rows: int | None = None
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._whole: list[Tensor | None] = []
        self._squares: list[Tensor | None] = []
        self._pairs: list[list[Outer]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.rows = None
        self._whole = [None] * len(self.parameters)
        self._squares = [None] * len(self.parameters)
        self._pairs = [[] for _ in self.parameters]

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add every row's gradient of a parameter, shape (rows, *shape)."""
        number = self._number_of(parameter)
        held = self._whole[number]
        gradient = gradient.float()
        self._whole[number] = gradient if held is None else held + gradient
        # Now, while the numbers are in the processor's cache; it holds as long as nothing more arrives.
        self._squares[number] = _squares(gradient) if held is None else None

    def add_outer(self, parameter: Tensor, pair: Outer) -> None:
        """Add every row's gradient of a matrix as outer products."""
        if pair.numbers() < STORES_LESS * parameter.numel():
            self._pairs[self._number_of(parameter)].append(pair)
        else:
            self.add(parameter, pair.dense())

    def norms(self) -> Tensor:
        """Return every row's norm over all parameters together, shape (rows,)."""
        assert self.rows is not None
        device = self.parameters[0].device
        total, grams = torch.zeros(self.rows, device=device), Grams()
        for number in range(len(self.parameters)):
            total += self._squared_norms(number, grams).to(device)
        return total.sqrt()

    def clipped_sums(self, clipping_norm: float) -> list[Tensor | None]:
        """Sum every row's gradient, clipped to a norm over all parameters; None where nothing arrived.

        A row whose gradient is not finite counts as zero: a decision about that row alone.
        """
        norms = self.norms()
        factors = (clipping_norm / (norms + SMALL)).clamp(max=1.0)
        bad = ~torch.isfinite(norms)
        if bad.any():
            factors = factors.masked_fill(bad, 0.0)
            self._silence(bad)
        return [self._weighted(number, factors) for number in range(len(self.parameters))]

    def _number_of(self, parameter: Tensor) -> int:
        number = self._number.get(id(parameter))
        if number is None:
            raise NotPrivate(
                f"a parameter of shape {tuple(parameter.shape)} learns that is not among those to be trained; freeze "
                "it again (PEFT's set_adapter makes both factors trainable)"
            )
        return number

    def _squared_norms(self, number: int, grams: Grams) -> Tensor:
        self._settle(number)
        whole, pairs = self._whole[number], self._pairs[number]
        if whole is not None:
            squares = self._squares[number]
            return _squares(whole) if squares is None else squares
        if pairs:
            return squared_norms(pairs, grams)
        return torch.zeros(self.rows or 0, device=self.parameters[number].device)

    def _settle(self, number: int) -> None:
        """Form pairs after all where a parameter has received both kinds."""
        if (whole := self._whole[number]) is not None and self._pairs[number]:
            for pair in self._pairs[number]:
                whole = whole + pair.dense().view_as(whole)
            self._whole[number], self._squares[number], self._pairs[number] = whole, None, []

    def _silence(self, bad: Tensor) -> None:
        for number, (whole, pairs) in enumerate(zip(self._whole, self._pairs, strict=True)):
            if whole is not None:
                self._whole[number] = whole.masked_fill(bad.to(whole.device).view(-1, *[1] * (whole.dim() - 1)), 0)
            self._pairs[number] = [pair.silenced(bad) for pair in pairs]

    def _weighted(self, number: int, factors: Tensor) -> Tensor | None:
        whole, parameter = self._whole[number], self.parameters[number]
        if whole is not None:
            return _weighted_rows(whole, factors.to(whole.device)).reshape(parameter.shape)
        total = None
        for pair in self._pairs[number]:
            found = pair.weighted(factors.to(pair.left.device))
            total = found if total is None else total + found
        return None if total is None else total.reshape(parameter.shape)


def _squares(gradient: Tensor) -> Tensor:
    """Return each row's squared norm; the numbers are taken in whichever order they lie."""
    ordered = gradient if gradient.is_contiguous() else gradient.transpose(1, -1)
    found: Tensor = torch.linalg.vector_norm(ordered.flatten(1), dim=1).square()
    return found


def _weighted_rows(gradient: Tensor, factors: Tensor) -> Tensor:
    if gradient.is_contiguous():
        return torch.mv(gradient.flatten(1).t(), factors).view(gradient.shape[1:])
    turned = gradient.transpose(1, -1)
    return torch.mv(turned.flatten(1).t(), factors).view(turned.shape[1:]).transpose(0, -1)
