"""What the guesses at a pattern look at: one stage, expected and actual, as bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megaproof.proof.divergence.place import Rows
from megaproof.quant.stored import Stored

UNLIKELY = 1e-4
"""A pattern is named when wrong bits strewn at random would look like it less often than this."""
PLACE_UNLIKELY = 1e-2
"""The same for patterns of place, where a false alarm only narrows the search."""
FULL = 0.75
"""Share of the elements of a row, column or block that must be wrong for the whole of it to count as wrong; some
elements of a wrong row are right by chance, for instance zeros."""


@dataclass(frozen=True)
class Pattern:
    """A guess: what the wrong elements have in common."""

    name: str
    text: str


@dataclass(frozen=True)
class Evidence:
    """One stage that differs."""

    expected: Tensor
    """Bits, int64 [n, C]."""
    actual: Tensor
    stored: Stored
    rows: Rows
    wide: int
    """Columns of the layer that one column of the stage stands for."""
    previous: Tensor | None = None
    """Bits of the same stage in the launch before, [m, C], where they are known."""
    fill: int | None = None
    """Bits with which the buffer was filled before the launch, where they are known."""
    wrong: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wrong", self.expected != self.actual)

    @cached_property
    def count(self) -> int:
        return int(self.wrong.sum())

    @cached_property
    def wrong_rows(self) -> Tensor:
        """Indices of the rows with a wrong element, ascending."""
        return self.wrong.any(1).nonzero().squeeze(1)

    @cached_property
    def wrong_columns(self) -> Tensor:
        return self.wrong.any(0).nonzero().squeeze(1)

    @cached_property
    def before(self) -> Tensor:
        """Expected bits of the wrong elements."""
        return self.expected[self.wrong]

    @cached_property
    def after(self) -> Tensor:
        """Actual bits of the wrong elements."""
        return self.actual[self.wrong]

    @cached_property
    def everywhere(self) -> bool:
        """Nearly all rows are wrong as a whole, but for rows of zeros, which many errors leave right."""
        fill = float(self.wrong[self.wrong_rows].float().mean())
        rows = int((self.expected != 0).any(1).sum())
        return self.wrong.numel() > 1 and len(self.wrong_rows) >= 0.9 * rows and fill >= FULL

    def by_chance(self, bits_each: float, free: float = 0) -> float:
        """Chance that all wrong elements agree with a rule that random bits meet once in 2^bits_each times."""
        return 2.0 ** (free - bits_each * self.count)


def inside(size: int, wrong: int, of: int, choices: int = 1) -> float:
    """Chance that `wrong` rows strewn over `of` all fall into one of `choices` sets of `size` rows."""
    if wrong > size:
        return 0.0
    log = math.lgamma(size + 1) - math.lgamma(size - wrong + 1) - math.lgamma(of + 1) + math.lgamma(of - wrong + 1)
    return min(1.0, choices * math.exp(log))


def some(values: list[str], limit: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = len(values) - limit
    return ", ".join(values[:limit]) + (f" and {more} more" if more > 0 else "")


def ints(values: Tensor) -> list[str]:
    """The values in decimal."""
    return [str(value) for value in values.tolist()]


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """bool [n]: rows of two [n, C] tensors that are equal in every column."""
    return (a == b).all(1) if a.numel() else torch.zeros(len(a), dtype=torch.bool)
