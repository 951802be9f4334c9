"""Shapes that the host accepts, far from any model's: odd multiples of 128, one expert, 512, 32 slots, uneven ranks.

SWEEP is a pairwise table (`cases/pairwise.py`) and corners by hand; in REPEATED tokens name an expert in several slots
and have more slots than there are experts.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from megaproof.cases import inputs
from megaproof.cases.cases import Case
from megaproof.cases.inputs import Inputs
from megaproof.cases.inputs.draws import MASK, TOPK, stream
from megaproof.cases.pairwise import Row, table
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import BLOCK_M, GRANULARITIES, GROUP, MAX_EXPERTS, MAX_RANKS, WAVE_BLOCKS
from megaproof.proof.adapters import Adapter, Prepared
from megaproof.proof.prove import Proof, prove
from megaproof.quant import philox
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.reference.layer import moe_layer

SPREADS = {
    "one": (1, 0, 0, 0, 0, 0, 0, 0),
    "few": (3, 1, 0, 7, 2, 5, 0, 9),
    "edges": (65, 0, 128, 1, 64, 33, 127, 129),
    "last": (2, 0, 0, 131, 0, 0, 0, 260),
    "many": (300, 17, 150, 0, 31, 200, 1, 96),
}
"""Tokens of ranks 0, 1, 2 ...; fewer ranks take the first of them."""

AXES: dict[str, tuple[object, ...]] = {
    "hidden": (128, 384, 512, 896, 1408),
    "intermediate": (128, 256, 640, 1152),
    "ranks": (1, 2, 4, 8),
    "local": (1, 2, 5, 12, 33),
    "topk": (1, 2, 5, 8, 19, 32),
    "tokens": tuple(SPREADS),
    "spare": (0, 1, 77),
    "routing": ("uniform", "zipf", "one_hot", "one_rank"),
    "masked": (0, 30),
    "silu": ("fast", "precise"),
    "clamp": (None, 0.5, 10.0),
    "granularity": GRANULARITIES,
}
"""local: experts of a rank. spare: how much larger than the largest T the capacity is."""


def allowed(row: Row) -> bool:
    """Whether a row, whole or in part, is a case: a token's experts are distinct, and a case takes below a second."""
    experts = row.get("ranks", MAX_RANKS) * row.get("local", max(AXES["local"]))
    return row.get("topk", 1) <= experts and not (row.get("topk", 1) > 8 and row.get("tokens") in ("last", "many"))


def _case(hidden: int, inter: int, experts: int, topk: int, tokens: tuple[int, ...], **axes: object) -> Case:
    shape = Shape(f"h{hidden}i{inter}e{experts}k{topk}", hidden, inter, experts, topk)
    return Case(shape, tokens, _recipe(axes), **axes)


def _recipe(axes: dict[str, object]) -> Recipe:
    """Takes what belongs to a recipe out of `axes`."""
    changes = {name: axes.pop(name) for name in ("clamp", "silu") if name in axes}
    return Recipe(**changes, activation_granularity=axes.pop("granularity", GROUP))


def _from_row(row: Row) -> tuple[Case, int]:
    axes = {name: row[name] for name in ("routing", "masked", "silu", "clamp", "granularity")}
    tokens = SPREADS[row["tokens"]][: row["ranks"]]
    experts = row["ranks"] * row["local"]
    return _case(row["hidden"], row["intermediate"], experts, row["topk"], tokens, **axes), row["spare"]


CORNERS = (
    (_case(128, 128, 1, 1, (1,)), 0),  # the smallest of everything
    (_case(128, 128, 2, 2, (0,)), 0),
    (_case(128, 128, 8, 8, (1, 0, 0, 0, 0, 0, 0, 1)), 0),
    (_case(128, 128, 1, 1, (300,), silu="precise"), 0),  # one expert, many rows: whole tiles
    (_case(384, 640, 2, 2, (257, 300), clamp=None), 3),
    (_case(128, 128, 32, 32, (33,)), 0),
    (_case(384, 128, 32, 32, (9, 0, 5, 1, 2, 17, 3, 4), masked=30), 1),
    (_case(128, 384, 33, 31, (64,), silu="precise"), 0),
    (_case(256, 128, 7, 7, (129,), routing="zipf"), 0),
    (_case(128, 128, MAX_EXPERTS, 6, (65,)), 0),
    (_case(128, 128, MAX_EXPERTS, 32, (9, 0, 1, 2, 3, 4, 5, 6), routing="zipf"), 11),
    (_case(128, 256, 511, 3, (100,)), 0),
    (_case(16256, 128, 2, 2, (5, 3)), 0),  # H / I = 127, and the reverse
    (_case(128, 16256, 2, 2, (5, 3), silu="precise"), 0),
    (_case(7296, 128, 8, 3, (2, 0, 1, 0, 0, 3, 0, 1), clamp=None), 5),
    (_case(128, 4224, 4, 1, (130, 0), routing="one_hot"), 0),
    (_case(640, 384, 8, 2, (0, 0, 0, 300, 0, 0, 0, 0), routing="one_rank"), 0),
    (_case(128, 128, 1, 1, (1,), granularity=128), 0),
    (_case(128, 128, 1, 1, (300,), granularity=128), 0),
    (_case(384, 640, 2, 2, (257, 300), clamp=None, granularity=128), 3),
    (_case(128, 384, 33, 31, (64,), silu="precise", granularity=128), 0),
    (_case(128, 128, MAX_EXPERTS, 6, (65,), granularity=128), 0),
    (_case(128, 16256, 2, 2, (5, 3), silu="precise", granularity=128), 0),
    (_case(128, 4224, 4, 1, (130, 0), routing="one_hot", granularity=128), 0),
)

ROWS = table(AXES, allowed)

SWEEP = (*CORNERS, *map(_from_row, ROWS))
"""(case, spare)."""


class Repeating(Shape):
    """One whose tokens may name an expert in several slots, and so have more slots than there are experts."""

    def __post_init__(self) -> None:
        """All rules of a shape but that one."""
        Shape(self.name, self.hidden, self.intermediate, self.experts, min(self.topk, self.experts))


def _repeating(experts: int, topk: int, tokens: tuple[int, ...], size: int = 128, **axes: object) -> Case:
    shape = Repeating(f"h{size}i{size}e{experts}k{topk}_repeating", size, size, experts, topk)
    return Case(shape, tokens, _recipe(axes), **axes)


REPEATED = (
    (_repeating(1, 2, (3,)), 0),  # twice the same expert: there is no other
    (_repeating(1, 32, (9,), masked=30), 1),
    (_repeating(2, 5, (33, 64), masked=30, silu="precise"), 0),
    (_repeating(3, 8, (129,), routing="one_hot"), 0),  # one expert in all slots of all tokens
    (_repeating(4, 32, (9, 0, 5, 17), masked=70, granularity=128), 3),
    (_repeating(8, 6, (65, 0, 1, 7, 0, 3, 0, 9), masked=30), 0),  # no more slots than experts, and still repeated
    (_repeating(2, 3, (130, 7), clamp=None, granularity=128), 0),
    (_repeating(6, 9, (40, 0, 71), 256, masked=30), 11),
)
"""(case, spare); routing one_hot: one expert for all; else experts are drawn with replacement."""


def made(case: Case, device: str) -> Inputs:
    """The case's inputs; where experts repeat, with indices of our own."""
    if not isinstance(case.shape, Repeating):
        return inputs.make(case, device)
    topk_idx = [_repeated(case, rank) for rank in range(case.ranks)]
    x, x_sf, topk_weights, weights = inputs.FAMILIES[case.family](case, topk_idx, torch.device(device))
    return Inputs(x, x_sf, [idx.to(device) for idx in topk_idx], topk_weights, weights)


def _repeated(case: Case, rank: int) -> Tensor:
    """int64 [T_r, K]: experts with replacement, masked slots -1."""
    shape = (case.tokens[rank], case.shape.topk)
    word, mask = (philox.words(case.seed, stream(what, rank), shape[0] * shape[1]).view(shape) for what in (TOPK, MASK))
    expert = case.seed if case.routing == "one_hot" else word
    return torch.where(mask % 100 < case.masked, -1, expert % case.shape.experts)


def work(case: Case) -> int:
    """Multiplications of the layer."""
    return sum(case.tokens) * case.shape.topk * case.shape.hidden * case.shape.intermediate


def size_of(case: Case, spare: int) -> BufferSize:
    shape, capacity = case.shape, max(1, max(case.tokens) + spare)
    return BufferSize(case.ranks, shape.experts, shape.topk, shape.hidden, shape.intermediate, capacity)


def padded_work(case: Case, spare: int) -> int:
    """What the emulator multiplies at most, padding rows too."""
    busy = min(case.shape.experts, sum(case.tokens) * case.shape.topk)
    blocks = busy + sum(case.tokens) * case.shape.topk // BLOCK_M
    return 3 * blocks * BLOCK_M * case.shape.hidden * case.shape.intermediate


MOST_EMULATED = 330_000_000
"""Multiplications that the emulator does within a second or two."""

LEAST = 2 * WAVE_BLOCKS

RECYCLED = [entry for entry in SWEEP if size_of(*entry).pool_blocks > LEAST]
"""Where the smallest ring is smaller than the pool."""

SMALL = sorted(SWEEP, key=lambda entry: work(entry[0]))[:8]

EMULATED = [entry for entry in (*REPEATED, *SWEEP) if padded_work(*entry) < MOST_EMULATED]


def sweep_id(value: Case | int) -> str:
    return value.id if isinstance(value, Case) else f"spare{value}"


def prove_with_spare(adapter: Adapter, case: Case, spare: int, device: str) -> Proof:
    """The proof, in a buffer that a larger batch made before."""
    drawn = made(case, device)
    drawn = replace(drawn, weights=functools.cache(drawn.weights))
    if spare:
        capacity = max(case.tokens) + spare
        larger = [[part.new_zeros(capacity, part.shape[1]) for part in parts] for parts in drawn.arguments()[:4]]
        first = replace(case, tokens=(capacity,) * case.ranks)
        adapter.prepare(Prepared(first, Inputs(*larger, drawn.weights), torch.device(device), whole=False))
    expected = moe_layer(case.recipe, *drawn.arguments(), trace=True, experts=case.shape.experts)
    return prove(adapter, Prepared(case, drawn, torch.device(device)), expected)
