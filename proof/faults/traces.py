"""A small traced layer, and errors planted in its stages: one for each pattern that a comparison claims to know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.run import CaseRun, run_case
from megaproof.proof.divergence import Divergence, first_divergence, place
from megaproof.proof.divergence.place import Rows
from megaproof.quant.shapes import SHAPES
from megaproof.quant.stored import Stored, unsigned
from megaproof.reference.stages import SHOWN, STAGES

CASE = Case(SHAPES["smoke"], (100, 60), routing="one_hot")
"""160 tokens, all of them in one expert's rows: two tiles of it; 42 a rank and expert elsewhere."""


@functools.cache
def layer() -> CaseRun:
    """CASE with its inputs and its trace on the CPU, computed once."""
    return run_case(CASE, "cpu")


@functools.cache
def rows_of(stage: str) -> Rows:
    """Rank, token, slot and expert of every row of a stage."""
    return place.rows_of(CASE, STAGES[stage], layer().inputs.topk_idx)


def stored(stage: str) -> Stored:
    """How the elements of a stage are stored under the recipe of CASE."""
    return STAGES[stage].format(CASE.recipe)


def expected(stage: str) -> Tensor:
    """A stage of the trace, [rows, columns]; stats and y as the trace has them."""
    return layer().trace[stage]


def found(stage: str, planted: Tensor, **known: object) -> Divergence:
    """The divergence of one planted stage."""
    stages = {name: planted if name == stage else expected(name) for name in SHOWN}
    y = list((planted if stage == "y" else expected("y")).split(list(CASE.tokens)))
    stats = list((planted if stage == "stats" else expected("stats")).split(8))
    divergence = first_divergence(layer().result, stages, y, stats, CASE, topk_idx=layer().inputs.topk_idx, **known)
    if divergence is None or divergence.stage != stage:
        raise AssertionError(f"a fault planted in {stage} is found in {divergence and divergence.stage}")
    return divergence


def bits_to(stage: str, bits: Tensor) -> Tensor:
    """Unsigned bits -> a tensor of the stage."""
    return stored(stage).tensor(bits)


@functools.cache
def some() -> Tensor:
    """int64 [2]: rows of two tokens and two experts, far apart, that are nearly free of zeros in every stage."""
    rows = rows_of("slots")
    full = torch.stack([(unsigned(expected(stage)) != 0).float().mean(1) > 0.7 for stage in SHOWN]).all(0)
    first = int(full.nonzero()[3])
    other = full & (rows.expert != rows.expert[first]) & (rows.rank != rows.rank[first])
    return torch.tensor([first, int(other.nonzero()[0])])


# --- errors ---------------------------------------------------------------------------------------------------------

Edit = Callable[[Tensor, Rows], object]


@dataclass(frozen=True)
class Plant:
    """One error: an edit of a stage's unsigned bits in place, and the names it must be given, all of them."""

    stage: str
    edit: Edit
    names: set[str]
    says: str = ""
    """Part of the report's text; {0} and {1} are the rows `some`."""


def noise(bits: Tensor, stage: str, where: tuple[Tensor, ...]) -> None:
    """Other bits of the stage's width, anything but what they were."""
    chance = torch.Generator().manual_seed(5)
    width = stored(stage).width
    change = torch.randint(1, 1 << min(width, 31), (len(where[0]),), generator=chance)
    bits[where] ^= change


def scramble(bits: Tensor, _: Rows, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> None:
    """Different bits in a block, no two alike in a pattern."""
    width = 8 if int(bits.max()) < 256 else 16
    index = torch.arange(bits.numel()).reshape(bits.shape)
    change = (index * 2654435761 >> 7) % ((1 << width) - 4) + 2
    block = torch.zeros_like(bits, dtype=torch.bool)
    rows = torch.arange(len(bits))[rows]
    block[rows[:, None], torch.arange(bits.shape[1])[columns]] = True
    bits[block] ^= change[block]


def swap(bits: Tensor, i: int, j: int, columns: slice = slice(None)) -> None:
    """Exchanges two rows, or these columns of them."""
    bits[[i, j], columns] = bits[[j, i], columns].clone()


def shift_expert(bits: Tensor, rows: Rows, step: int) -> None:
    """Moves each expert's rows by `step` places among themselves, the last ones to the front."""
    for e in rows.expert.unique():
        mine = (rows.expert == e).nonzero().squeeze(1)
        bits[mine] = bits[mine.roll(step)].clone()


def scale(stage: str, k: int, columns: slice = slice(None)) -> Edit:
    """An edit that multiplies the values of the two rows of `some` by 2^k."""

    def edit(bits: Tensor, _: Rows) -> None:
        form = stored(stage)
        for row in some().tolist():
            bits[row, columns] = form.encode(form.values(bits[row, columns]) * 2.0**k)

    return edit


def in_expert(rows: Rows, e: int) -> Tensor:
    """int64 [n]: the rows of expert e."""
    return (rows.expert == e).nonzero().squeeze(1)


def hot(rows: Rows) -> int:
    """The expert with the most rows."""
    return int(rows.expert.mode().values)


def cold(rows: Rows) -> int:
    """Another busy expert."""
    return int(rows.expert[rows.expert != hot(rows)][0])


def with_value(bits: Tensor, rows: Tensor | int | slice, value: int) -> None:
    """Sets every element of these rows to one bit pattern."""
    bits[rows] = value


def even_groups(bits: Tensor, rows: Rows) -> None:
    """Scrambles the first 64 of every 128 columns, in two rows."""
    for start in range(0, bits.shape[1], 128):
        scramble(bits, rows, slice(3, 5), slice(start, start + 64))


def core(bits: Tensor, rows: Rows) -> None:
    """Scrambles one core matrix, 8 rows of one expert by 8 columns."""
    block = in_expert(rows, hot(rows))[8:16]
    scramble(bits, rows, block, slice(24, 32))


def tile_rows(bits: Tensor, rows: Rows, first: bool) -> None:
    """Scrambles a few columns of the first or the last row of each of an expert's tiles of 128 rows."""
    edge = rows.expert_row % 128 == 0
    if not first:
        edge = (rows.expert_row % 128 == 127) | (rows.expert_row == rows.expert_rows - 1)
    scramble(bits, rows, edge.nonzero().squeeze(1), slice(5, 9))


def some_of(key: str, value: int, columns: slice) -> Edit:
    """Wrong elements in every row whose `key` is `value`, in a few columns."""
    return lambda bits, rows: scramble(bits, rows, (getattr(rows, key) == value).nonzero().squeeze(1), columns)


def one_token(bits: Tensor, rows: Rows) -> None:
    """Scrambles a few columns of every row of token 9 of rank 1."""
    mine = ((rows.rank == 1) & (rows.token == 9)).nonzero().squeeze(1)
    scramble(bits, rows, mine, slice(5, 9))


def nudge(bits: Tensor, places: Tensor) -> None:
    """One ulp up or down; the last bit flipped."""
    bits[some()[0], places] ^= 1


PLANTS = {
    "whole row": Plant("slots", lambda b, r: scramble(b, r, slice(11, 12)), {"whole row", "one token only"}, "11"),
    "two whole rows": Plant("slots", lambda b, r: scramble(b, r, some()), {"whole row"}, "{0}, {1}"),
    "whole row of y": Plant("y", lambda b, r: scramble(b, r, slice(11, 12)), {"whole row", "one token only"}),
    "whole column": Plant("slots", lambda b, r: scramble(b, r, slice(None), slice(77, 78)), {"whole column"}, "77"),
    "rows swapped": Plant(
        "slots", lambda b, r: swap(b, *some().tolist()), {"whole row", "rows swapped"}, "{0} and {1}"
    ),
    "rows of y swapped": Plant("y", lambda b, r: swap(b, 9, 10), {"whole row", "rows swapped"}, "9 and 10"),
    "part of two rows swapped": Plant(
        "slots", lambda b, r: swap(b, *some().tolist(), slice(128, 256)), {"rows swapped"}, "in columns 128 to 255"
    ),
    "a row copied": Plant(
        "slots",
        lambda b, r: b[some()[0]].copy_(b[some()[1]]),
        {"whole row", "rows moved", "one token only"},
        "row {0} holds row {1}",
    ),
    "shifted in the experts": Plant(
        "slots", lambda b, r: shift_expert(b, r, 1), {"everything", "shifted by one row"}, "its expert's rows"
    ),
    "shifted back": Plant(
        "slots", lambda b, r: shift_expert(b, r, -1), {"everything", "shifted by one row"}, "row after it"
    ),
    "shifted in y": Plant(
        "y",
        lambda b, r: b[20:40].copy_(b[19:39].clone()),
        {"whole row", "shifted by one row", "one source rank only"},
        "canonical order",
    ),
    "stale NaN": Plant("slots", lambda b, r: with_value(b, some(), 0x7FA0), {"stale: NaN", "whole row"}),
    "stale zero": Plant("slots", lambda b, r: with_value(b, some(), 0), {"stale: zero", "whole row"}),
    "stale zero of y": Plant("y", lambda b, r: with_value(b, slice(None), 0), {"stale: zero", "everything"}),
    "a constant": Plant("slots", lambda b, r: with_value(b, some(), 0x4242), {"constant", "whole row"}),
    "codes times 2": Plant("l2_acts", scale("l2_acts", 1, slice(8, 150)), {"scaled by a power of two"}, "2^1"),
    "slots times 2^-3": Plant("slots", scale("slots", -3), {"scaled by a power of two", "whole row"}, "2^-3"),
    "scale factors times 2": Plant("l2_acts_sf", scale("l2_acts_sf", 1), {"scaled by a power of two"}, "2^1"),
    "one scale factor halved": Plant(
        "l2_acts_sf", lambda b, r: b[some()[0], 2].sub_(1 << 23), {"scaled by a power of two"}, "2^-1"
    ),
    "an 8x8 core matrix": Plant("slots", core, {"8x8 core matrix", "one expert only"}, "column 24"),
    "every other 64-group": Plant("l2_acts", even_groups, {"64 against 128"}, "even"),
    "every other scale factor": Plant(
        "l2_acts_sf", lambda b, r: b[300:440, 1::2].bitwise_xor_(0x155555), {"64 against 128"}, "odd"
    ),
    "first rows of tiles": Plant("slots", lambda b, r: tile_rows(b, r, True), {"first row of a tile"}),
    "last rows of tiles": Plant(
        "slots", lambda b, r: tile_rows(b, r, False), {"last row of a tile", "one source rank only"}
    ),
    "one source rank": Plant("slots", some_of("rank", 1, slice(5, 9)), {"one source rank only"}, "rank 1"),
    "one source rank of y": Plant("y", some_of("rank", 1, slice(5, 9)), {"one source rank only"}, "rank 1"),
    "one destination rank": Plant("slots", some_of("destination", 1, slice(5, 9)), {"one destination rank only"}),
    "one expert": Plant("slots", lambda b, r: scramble(b, r, in_expert(r, cold(r)), slice(5, 9)), {"one expert only"}),
    "one token": Plant("slots", one_token, {"one token only"}, "token 9 of rank 1"),
    "sign flip": Plant(
        "slots", lambda b, r: b[some()[0], 5:90:7].bitwise_xor_(0x8000), {"sign flip", "one token only"}
    ),
    "sign of a zero": Plant(
        "y", lambda b, r: b[3, 5:7].bitwise_xor_(0x8000), {"sign flip", "one token only"}, "all are zeros"
    ),
    "last bit of one byte": Plant("l2_acts", lambda b, r: b[some()[0], 5].bitwise_xor_(1), {"last bit only"}),
    "last bits": Plant("y", lambda b, r: nudge(b, torch.arange(5, 90, 7)), {"last bit only", "one token only"}),
    "a count doubled": Plant("stats", lambda b, r: b.mul_(2), {"everything", "scaled by a power of two"}, "2^1"),
    "counts dropped": Plant("stats", lambda b, r: b.mul_(0), {"everything", "stale: zero"}),
}


def plant(error: Plant) -> Tensor:
    """The stage of `error` with the error in it; the trace itself stays as it is."""
    stage = expected(error.stage)
    bits = unsigned(stage).reshape(len(stage), -1)
    error.edit(bits, rows_of(error.stage))
    return bits_to(error.stage, bits.reshape(stage.shape))
