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
    assert (grid, params.blocks_per_rank) == (SMS, SMS // 2)
    assert params.status == good["sym_buffer"].status.data_ptr()
    for rank in range(2):
        own, views = params.rank[rank], good["sym_buffer"].rank(rank)
        (w1, w1_sf), (w2, w2_sf) = good["l1_weights"][rank], good["l2_weights"][rank]
        rows = good["sym_buffer"].size.ring_rows
        assert list(own.l1_acts.opaque[:4]) == [views.l1_acts.data_ptr(), rows, HIDDEN, sizes.BOX_ROWS]
        assert list(own.l2_acts.opaque[:4]) == [views.l2_acts.data_ptr(), rows, INTER, sizes.BOX_ROWS]
        pointers = own.w1, own.w2, own.w1_sf, own.w2_sf
        assert pointers == tuple(tensor.data_ptr() for tensor in (w1, w2, w1_sf, w2_sf))
        assert (own.y, own.tokens) == (good["y"][rank].data_ptr(), 3 + rank)
        assert own.stats == good["cumulative_local_expert_recv_stats"][rank].data_ptr()
        assert params.buffer[rank] == views.storage.data_ptr()
    size = good["sym_buffer"].size
    assert (params.shape.pool_blocks, params.shape.ring_blocks) == (size.pool_blocks, size.ring_blocks)
    assert params.shape.ring_rows == size.ring_rows
