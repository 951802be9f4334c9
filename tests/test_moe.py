"""The fused kernel on silicon: all ranks of a case in one launch, every stage against the reference, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kernel import api
from quant.recipe import SHAPES, Recipe
from reference import dispatch
from reference.layer import moe_layer
from tests import inputs
from tests.cases import GATE, SMOKE, Case
from tests.compare import same

FP8 = torch.float8_e4m3fn


class Launched:
    """A case on the kernel: buffers filled, weights transformed; `run` launches and compares."""

    def __init__(self, case: Case, capacity: int | None = None) -> None:
        self.case, shape = case, case.shape
        self.made = inputs.make(case, "cuda")
        group = api.VirtualGroup(case.ranks)
        capacity = capacity or max(1, *case.tokens)
        sizes = (shape.experts, capacity, shape.topk, shape.hidden, shape.intermediate)
        self.buffer = api.get_symm_buffer_for_mega_moe(group, *sizes)
        local = shape.experts_per_rank(case.ranks)
        self.l1, self.l2 = [], []
        for rank in range(case.ranks):
            parts = zip(*map(self.made.weights, range(rank * local, (rank + 1) * local)), strict=True)
            w1, w1_sf, w2, w2_sf = (torch.stack(part) for part in parts)
            l1, l2 = api.transform_weights_for_mega_moe_sm90((w1.view(FP8), w1_sf), (w2.view(FP8), w2_sf))
            self.l1.append(l1)
            self.l2.append(l2)
        self.stats = [torch.zeros(local, dtype=torch.int32, device="cuda") for _ in range(case.ranks)]
        self.reference = moe_layer(case.recipe, *self.made.arguments(), trace=True, experts=shape.experts)

    def fill(self) -> None:
        for rank in range(self.case.ranks):
            views, tokens = self.buffer.rank(rank), self.case.tokens[rank]
            views.x.view(torch.uint8)[:tokens] = self.made.x[rank]
            views.x_sf[:tokens] = self.made.x_sf[rank]
            views.topk_idx[:tokens] = self.made.topk_idx[rank]
            views.topk_weights[:tokens] = self.made.topk_weights[rank]

    def launch(self) -> list[Tensor]:
        hidden = self.case.shape.hidden
        y = [torch.full((t, hidden), torch.nan, dtype=torch.bfloat16, device="cuda") for t in self.case.tokens]
        api.fp8_mega_moe(y, self.l1, self.l2, self.buffer, self.stats, recipe=self.case.recipe)
        self.buffer.check()
        return y

    def stages(self) -> dict[str, Tensor]:
        """Stages in (rank, token, slot) order, read back from the pools and the slots."""
        where = dispatch.routes(self.made.topk_idx)
        local = self.case.shape.experts_per_rank(self.case.ranks)
        names = ("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf")
        out: dict[str, list[Tensor]] = {name: [] for name in (*names, "slots")}
        found = []
        for rank in range(self.case.ranks):
            views = self.buffer.rank(rank)
            counts = torch.bincount(
                where.expert[where.expert // local == rank] - rank * local, minlength=local
            ).tolist()
            rows, first = [], 0
            for count in counts:
                rows += range(first, first + count)
                first += -(-count // 128) * 128
            index = torch.tensor(rows, dtype=torch.int64, device="cuda")
            source = views.pool_source[index].to(torch.int64)
            expert = torch.repeat_interleave(torch.arange(local, device="cuda"), torch.tensor(counts, device="cuda"))
            found.append(torch.cat([source, (expert + rank * local)[:, None]], dim=1))
            for name in names:
                out[name].append(
                    getattr(views, name).view(torch.uint8 if name.endswith("acts") else torch.float32)[index]
                )
        place = torch.cat(found)
        topk = self.case.shape.topk
        key = (place[:, 0] << 40) + place[:, 1]
        order = torch.argsort(key)
        wanted = (where.rank << 40) + where.token * topk + where.slot
        assert torch.equal(key[order], wanted), "a routed row is missing, doubled or came from another place"
        assert torch.equal(place[order, 2], where.expert), "a row went to another expert"
        stages = {name: torch.cat(out[name])[order] for name in names}
        rows = [self.buffer.rank(int(r)).slots[k, t] for r, t, k in where.triples().tolist()]
        stages["slots"] = torch.stack(rows) if rows else self.reference.trace["slots"]
        return stages

    def compare(self, launches: int = 1) -> int:
        trace, compared = self.reference.trace, 0
        for n in range(1, launches + 1):
            y = self.launch()
            if n == 1 and len(trace["rows"]):
                for name, actual in self.stages().items():
                    compared += same(name, trace[name], actual, trace["rows"]) * actual.element_size()
            for rank, expected in enumerate(self.reference.y):
                compared += 2 * same("y", expected, y[rank])
            for rank, expected in enumerate(self.reference.stats):
                compared += 4 * same("stats", expected * n, self.stats[rank])
        return compared


def launched(case: Case, **options: int) -> Launched:
    state = Launched(case, **options)
    state.fill()
    return state


KERNEL_CASES = [
    case for case in (*SMOKE, *GATE) if not case.recipe.diff(Recipe(clamp=case.recipe.clamp, silu=case.recipe.silu))
]


def test_the_cubin_passes_the_gate() -> None:
    assert set(api.compile_moe().report.entries) == set(api.ENTRIES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_every_stage_equals_the_reference(case: Case) -> None:
    compared = launched(case).compare(launches=3)
    print(f"{case.id}: {compared:,} bytes compared, 0 differ")
    assert compared > 0 or not sum(case.tokens)


@pytest.mark.gpu
def test_repeats_are_equal() -> None:
    state = launched(dataclasses.replace(SMOKE[3], tokens=(33, 0, 64, 1, 7, 128, 129, 65)))
    state.compare()
    for _ in range(200):
        for rank, y in enumerate(state.launch()):
            same("y", state.reference.y[rank], y)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
def test_one_rank_of_full_size(tokens: int) -> None:
    flash = SHAPES["dsv4_flash"]
    local = type(flash)("dsv4_flash_local", flash.hidden, flash.intermediate, experts=32, topk=flash.topk)
    assert launched(Case(local, (tokens,)), capacity=1024).compare(launches=2) > 0
