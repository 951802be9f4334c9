"""What int64 arithmetic alone says of y: the lattice oracle on rows of a case, to be held against anybody's y.

The reference does not come in, so that a misreading which a kernel shares with it shows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.compare import Differs
from megaproof.cases.inputs import Inputs
from megaproof.quant.formats import BF16
from megaproof.reference import oracle
from megaproof.reference.operands import plain

Place = tuple[int, int]
"""(rank, token)."""
SMALL = 1 << 20
"""H times I up to which all columns are computed, of MANY tokens; of a larger layer COLUMNS, of FEW."""
MANY, FEW, COLUMNS = 128, 2, 96


@dataclass(frozen=True)
class Exact:
    """Rows of y, computed without a float."""

    row: list[Tensor]
    """int64 [T_r] by rank: the row of `bits` that belongs to a token, -1 where it was not computed."""
    columns: Tensor
    """int64 [c]: columns of y, ascending."""
    bits: Tensor
    """int16 [n, c]: BF16 bit patterns."""

    def moved(self, turned: Callable[[Sequence[Tensor]], list[Tensor]]) -> Exact:
        """Of a batch whose tokens are these, elsewhere: `turned` takes tensors by rank, one row a token."""
        return dataclasses.replace(self, row=turned(self.row))

    def compare(self, y: Sequence[Tensor]) -> int:
        """Elements of y, bfloat16 [T_r, H] by rank, found equal. Raises `Differs` at the first that is not."""
        compared = 0
        for rank, (row, own) in enumerate(zip(self.row, y, strict=True)):
            tokens = (row >= 0).nonzero().squeeze(1)
            expected = self.bits[row[tokens]]
            part = own[tokens.to(own.device)][:, self.columns.to(own.device)]
            found = part.contiguous().view(torch.int16).cpu()
            wrong = (expected != found).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                place = f"(rank, token) ({rank}, {int(tokens[at[0]])}), column {int(self.columns[at[1]])}"
                sides = f"{_show(expected[at])} by integers, {_show(found[at])} found"
                raise Differs(f"y at {place}: {sides}; {len(wrong)} of {expected.numel()} elements of the rank differ")
            compared += expected.numel()
        return compared


def _show(bits: Tensor) -> str:
    pattern = int(bits) & 0xFFFF
    return f"{pattern:#06x} = {float(BF16.decode(torch.tensor([pattern]))[0]):g}"


def on_lattice(case: Case) -> bool:
    """Whether the oracle has to take the case: a lattice, under a recipe whose steps it has."""
    recipe = case.recipe
    return case.family == "lattice" and modelled(case) and (recipe.clamp is None or recipe.clamp >= 32)


def modelled(case: Case) -> bool:
    """Whether the oracle's arithmetic is that of the case's recipe."""
    steps = (case.recipe.activation_scale, case.recipe.l1_rounding, case.recipe.weight_fold)
    return steps == ("ue8m0", "none", "before_quantisation")


def sample(case: Case, topk_idx: Sequence[Tensor]) -> tuple[list[Place], Tensor]:
    """(tokens, columns) that are computed: of a small layer nearly all, else few; tokens with an active slot first."""
    small = case.shape.hidden * case.shape.intermediate <= SMALL
    chance = random.Random(f"{case.id} integers {case.seed}")
    places = [(rank, token) for rank, tokens in enumerate(case.tokens) for token in range(tokens)]
    chance.shuffle(places)
    active = [(idx >= 0).any(1).tolist() for idx in topk_idx]
    places.sort(key=lambda place: not active[place[0]][place[1]])
    every = range(case.shape.hidden)
    columns = every if small else sorted(chance.sample(every, COLUMNS))
    return places[: MANY if small else FEW], torch.tensor(list(columns))


def of_case(case: Case, made: Inputs) -> Exact:
    """The sample of a case, computed. Raises `oracle.NotLattice` where a step would round."""
    places, columns = sample(case, made.topk_idx)
    row = [torch.full((tokens,), -1) for tokens in case.tokens]
    bits: list[Tensor] = []
    for rank in sorted({rank for rank, _ in places}):
        tokens = torch.tensor(sorted(token for other, token in places if other == rank))
        row[rank][tokens] = sum(map(len, bits)) + torch.arange(len(tokens))
        own = (part[rank] for part in made.arguments()[:4])
        granularity = case.recipe.activation_granularity
        bits.append(oracle.lattice_y(*own, plain(made.weights), tokens, columns, case.recipe.clamp, granularity))
    nothing = torch.empty(0, len(columns), dtype=torch.int16)
    return Exact(row, columns, torch.cat([nothing, *bits]))
