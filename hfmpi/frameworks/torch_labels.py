"""The assignment of a layer's rows to the examples of a batch.

The cotangents of each example are multiplied by a different number, so that every row of an output gradient
is multiplied by the number of its example. A row that mixes examples is multiplied by none of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Rows", "grouped", "labelled", "taken"]

DIGITS = 32
"""Number of exponents of two, and of steps between two powers of two, that identify examples."""

PURE = 1e-3
"""Relative difference above which a row is a mixture of examples: less than a tenth of a step."""


class Rows:
    """Rows (R, width), to compare with the same rows of scaled cotangents."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.size, column = rows.abs().max(1)
        self.column, self.used = column[:, None], self.size > 0
        self._largest = rows.gather(1, self.column)[:, 0]

    def ratio(self, changed: Any) -> Any:
        """Return the scale (R,) of each row, 1 for a row of zeros; wrong if the entries of a row disagree."""
        quotient = changed.gather(1, self.column)[:, 0] / self._largest
        return torch.where(self.used & (quotient > 0), quotient, 1)

    def are_scaled(self, changed: Any, factors: Any) -> bool:
        """Return whether each row is scaled by its factor in `factors` (R,)."""
        wrong = (changed - factors[:, None] * self.rows).abs().amax(1)
        return bool((wrong <= PURE * factors * self.size).all())


def labelled(groups: list[Rows], examples: int, scaled: Callable[[Any], list[Any]]) -> list[Any]:
    """Return the example (R,) that each row belongs to, B for a row of zeros, for each group of rows.

    Parameters
    ----------
    scaled : callable
        Maps numbers (B,) to the groups for which the cotangents of each example are multiplied by its number.

    Raises
    ------
    RuntimeError
        If a row belongs to several examples.
    """
    if not groups:
        return []
    like, numbers = groups[0].rows, torch.arange(examples, device=groups[0].rows.device)

    def code(labels: Any) -> Any:
        power = torch.pow(2.0, torch.div(labels, DIGITS, rounding_mode="floor"))
        return (power * (1 + labels % DIGITS / DIGITS)).to(like)

    def decoded(ratio: Any) -> Any:
        power = torch.floor(torch.log2(ratio * (1 + 1 / (4 * DIGITS)))).clamp(0, DIGITS - 1)
        step = ((ratio / torch.pow(2.0, power) - 1) * DIGITS).round().clamp(0, DIGITS - 1)
        return (DIGITS * power + step).long()

    def checked(labels: list[Any]) -> list[Any]:
        if any((of >= examples).any() for of in labels):
            raise RuntimeError("a row of a layer belongs to several examples")
        return [torch.where(one.used, of, examples) for one, of in zip(groups, labels, strict=True)]

    if examples <= DIGITS**2:
        changed = scaled(code(numbers))
        labels = [decoded(one.ratio(other)) for one, other in zip(groups, changed, strict=True)]
        triples = zip(groups, changed, labels, strict=True)
        if all(one.are_scaled(other, code(of)) for one, other, of in triples):
            return checked(labels)
    labels, unit = [torch.zeros_like(one.column[:, 0]) for one in groups], 1
    while unit < examples:  # products with powers of two are exact, whatever cancels in a row
        changed = scaled(torch.pow(2.0, torch.div(numbers, unit, rounding_mode="floor") % DIGITS).to(like))
        for i, (one, other) in enumerate(zip(groups, changed, strict=True)):
            digits = one.ratio(other).log2().round().clamp(0, DIGITS - 1)
            if not one.are_scaled(other, torch.pow(2.0, digits).to(like)):
                raise RuntimeError("a row of a layer belongs to several examples")
            labels[i] = labels[i] + unit * digits.long()
        unit *= DIGITS
    return checked(labels)


def grouped(labels: Any, examples: int) -> Any:
    """Return the indices (B, n) of the rows with each label (R,) less than B, padded with R."""
    count = torch.bincount(labels, minlength=examples + 1)[:examples]
    order = torch.argsort(labels, stable=True)[: int(count.sum())]
    starts = torch.cumsum(count, 0) - count
    label = labels[order]
    index = torch.full((examples, max(1, int(count.max()))), len(labels), device=labels.device)
    index[label, torch.arange(len(order), device=labels.device) - starts[label]] = order
    return index


def taken(rows: Any, index: Any) -> Any:
    """Return rows (R, ...) by index (B, n), and zeros for the index R."""
    if int(index.max()) < len(rows):  # all examples have equally many rows
        return rows[index]
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[index]
