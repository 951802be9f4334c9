"""The kernel's parameters: their sizes, and that they hold what was passed."""

from __future__ import annotations

import ctypes
import re

import pytest

from megaproof.kernel import api
from megaproof.kernel.host import sizes
from megaproof.kernel.host.params import Params, RankParams
from megaproof.kernel.host.sizes import MAX_EXPERTS
from megaproof.tests.support.fake_call import HIDDEN, INTER, SMS, FakeLibrary, call, installed
from megaproof.tests.support.runs import ROOT


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def test_the_workspace_has_its_size() -> None:
    (struct,) = re.findall(r"struct Workspace \{(.*?)\};", (ROOT / "kernel" / "params.cuh").read_text(), re.DOTALL)
    names = ", ".join(re.findall(r"u32 ([^;]+);", struct)).split(", ")
    assert names[-1] == "send_count[kMaxExperts]"
    assert 4 * (len(names) - 1 + MAX_EXPERTS) == sizes.WORKSPACE_BYTES


def test_params_fit_the_argument_space() -> None:
    assert ctypes.sizeof(Params) == 2816
    assert ctypes.sizeof(RankParams) == 320


def test_params_hold_what_was_passed(library: FakeLibrary) -> None:
    good = call(2)
    api.fp8_mega_moe(**good)
    ((_, params, (grid, *_)),) = library.launches
    assert (grid, params.grid.num_ctas_per_rank) == (SMS, SMS // 2)
    assert params.barrier.status_ptr == good["sym_buffer"].status.data_ptr()
    for rank in range(2):
        own, views = params.ranks[rank], good["sym_buffer"].rank(rank)
        (w1, w1_sf), (w2, w2_sf) = good["l1_weights"][rank], good["l2_weights"][rank]
        rows = good["sym_buffer"].size.ring_rows
        assert list(own.l1_acts_map.opaque[:4]) == [views.l1_acts.data_ptr(), rows, HIDDEN, sizes.BOX_ROWS]
        assert list(own.l2_acts_map.opaque[:4]) == [views.l2_acts.data_ptr(), rows, INTER, sizes.BOX_ROWS]
        held = own.weights
        pointers = held.w1_ptr, held.w2_ptr, held.w1_sf_ptr, held.w2_sf_ptr
        assert pointers == tuple(tensor.data_ptr() for tensor in (w1, w2, w1_sf, w2_sf))
        assert (own.outputs.y_ptr, own.num_tokens) == (good["y"][rank].data_ptr(), 3 + rank)
        assert own.outputs.stats_ptr == good["cumulative_local_expert_recv_stats"][rank].data_ptr()
        assert params.layout.buffer_ptr[rank] == views.storage.data_ptr()
    size = good["sym_buffer"].size
    assert (params.shape.num_pool_blocks, params.shape.num_ring_blocks) == (size.pool_blocks, size.ring_blocks)
    assert params.shape.num_ring_rows == size.ring_rows
