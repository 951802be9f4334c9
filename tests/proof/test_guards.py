"""Guards between the fields of the symmetric buffer and around its outputs: where they lie, and that they are seen.

Under the emulator, with the kernel's own sources; on silicon test_kernel_invariance.py does the same.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from megaproof.cases.cases import Case
from megaproof.kernel import emulator
from megaproof.kernel.host.buffer import BufferSize, RankViews
from megaproof.kernel.host.sizes import ALIGNMENT, GRANULARITIES
from megaproof.proof.faults import catalogue, source, source_values
from megaproof.proof.guards import (
    COUNTS,
    GUARD,
    ROWS,
    GuardedEmulatedAdapter,
    Overwritten,
    assert_nothing_else_is_written,
    gaps,
    sizes,
)
from megaproof.proof.prove import prove
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.tests.support.problems import prepared
from megaproof.tests.support.sizes import SIZES

emulated = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler is on PATH (g++ or clang++)")
WHOLE = {"l1_acts", "l2_acts", "l2_acts_sf", "pool_source"}
"""Fields of whole pool blocks whose bytes are always a multiple of the alignment: there is nothing behind them."""


def narrow(experts: int, tokens: tuple[int, ...], topk: int = 2, **axes: object) -> Case:
    granularity = axes.pop("granularity", 64)
    shape = Shape(f"narrow_e{experts}k{topk}", hidden=128, intermediate=128, experts=experts, topk=topk)
    return Case(shape, tokens, recipe=Recipe(activation_granularity=granularity), **axes)


# --- where they lie ---------------------------------------------------------------------------------------------------


@given(SIZES)
def test_every_byte_belongs_to_a_field_or_to_a_gap(size: BufferSize) -> None:
    offsets, total = size.offsets()
    assert list(gaps(size)) == list(offsets)
    end = 0
    for name, gap in gaps(size).items():
        assert offsets[name] == end
        assert gap.start == end + sizes(size)[name]
        assert 0 <= len(gap) < ALIGNMENT
        end = gap.stop
    assert end == total
    assert not any(len(gaps(size)[name]) for name in WHOLE)


def test_a_gap_is_behind_what_the_views_show() -> None:
    size = BufferSize(2, 6, 3, 128, 384, 33)
    storage = torch.zeros(size.offsets()[1], dtype=torch.uint8)
    for gap in gaps(size).values():
        storage[gap.start : gap.stop] = GUARD
    views = RankViews(size, storage)
    shown = [view for name, view in vars(views).items() if name != "storage"]
    assert len(shown) == len(size.offsets()[0])
    assert not any(bool(view.float().any()) for view in shown)


# --- that nothing is written there ------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda granularity: f"g{granularity}")
@pytest.mark.parametrize(
    "tokens, experts",
    [((33,), 3), ((33, 0, 59), 3), ((129, 65), 6)],
    ids=["one_rank", "an_idle_rank", "two_blocks"],
)
def test_a_proof_leaves_every_guard(tokens: tuple[int, ...], experts: int, granularity: int) -> None:
    """Three launches each. The pool has an odd number of blocks, so that every gap that there can be is there."""
    adapter = GuardedEmulatedAdapter()
    problem = prepared(narrow(experts, tokens, granularity=granularity, masked=30), "cpu")
    print(prove(adapter, *problem))
    guarded = {name for name, gap in gaps(adapter.buffer.size).items() if len(gap)}
    assert guarded == set(sizes(adapter.buffer.size)) - WHOLE
    assert len(adapter.between) == sum(map(len, gaps(adapter.buffer.size).values()))


@emulated
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda granularity: f"g{granularity}")
@pytest.mark.parametrize("tokens", [(70,), (5, 0, 17)], ids=lambda tokens: f"r{len(tokens)}")
def test_nothing_else_is_written(tokens: tuple[int, ...], granularity: int) -> None:
    problem = prepared(narrow(3, tokens, granularity=granularity, masked=30), "cpu")
    guarded = assert_nothing_else_is_written(GuardedEmulatedAdapter(), *problem)
    print(f"{guarded:,} bytes inside of fields that the batch has nothing for, all as before")


# --- that it would be seen --------------------------------------------------------------------------------------------


FAULTS = [fault.change for fault in catalogue.of("source") if fault.change in source_values.OVERWRITES]


@emulated
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_write_too_far_is_seen(fault: source.Source) -> None:
    adapter = GuardedEmulatedAdapter(run=emulator.Run(change=fault.change))
    with pytest.raises(Overwritten, match=f"^{fault.check} of rank 0: byte") as caught:
        prove(adapter, *prepared(fault.case, "cpu"))
    print(f"{fault.id}: {caught.value}")


@emulated
@pytest.mark.parametrize("name, index, where", [("y", ROWS - 1, "before y"), ("stats", COUNTS - 1, "before stats")])
def test_a_write_too_early_is_seen(name: str, index: int, where: str) -> None:
    adapter = GuardedEmulatedAdapter()
    problem, _ = prepared(narrow(2, (3, 2)), "cpu")
    adapter.prepare(problem)
    adapter.launch()
    adapter.around[name][1][index] = 0
    with pytest.raises(Overwritten, match=f"^{where} of rank 1: byte"):
        adapter.assert_intact()


@emulated
def test_what_a_batch_does_not_use_is_looked_at() -> None:
    """A slot row of a token that the batch does not have: inside of the field, so no guard of the gaps sees it."""

    class WritesBehind(GuardedEmulatedAdapter):
        def launch(self) -> None:
            super().launch()
            self.buffer.rank(0).slots[1, -1, 5] = 0.0

    problem = prepared(narrow(3, (70,), masked=30), "cpu")
    with pytest.raises(AssertionError, match="slots of no token of rank 0 was written"):
        assert_nothing_else_is_written(WritesBehind(), *problem)
