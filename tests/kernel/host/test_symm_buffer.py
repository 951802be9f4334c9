"""The symmetric buffer on CPU tensors: what it is refused for, and its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaproof.kernel import api
from megaproof.kernel.host import sizes
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.timeout import KernelTimeout
from megaproof.tests.support.fake_call import FakeLibrary, call, installed


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


class OnCpu(api.SymmBuffer):
    """A buffer that asks for no GPU memory."""

    def __init__(self, group: Any, size: BufferSize, device: torch.device) -> None:
        assert device == torch.device("cuda", 0)
        super().__init__(group, size, torch.device("cpu"))


SIZES = {"num_experts": 4, "num_max_tokens_per_rank": 8, "num_topk": 2, "hidden": 256, "intermediate_hidden": 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 2}, "group = 2 must be None, a VirtualGroup or a torch.distributed ProcessGroup"),
        (
            {"group": torch.distributed.ProcessGroup(0, 2)},
            "group = a ProcessGroup of 2 ranks; .* not available in this",
        ),
        ({"num_topk": 2.0}, "num_topk = 2.0 must be an int"),
        ({"hidden": 255}, "hidden = 255 must be"),
        ({"intermediate_hidden": 192}, "intermediate_hidden = 192 must be a positive multiple of 128"),
        ({"group": api.VirtualGroup(2), "num_experts": 5}, "num_experts = 5 must be a multiple of ranks = 2"),
        ({"num_topk": 33}, "num_topk = 33 must be in"),
        ({"num_max_tokens_per_rank": 0}, "num_max_tokens_per_rank = 0 must be positive"),
        ({"use_fp8_dispatch": False}, "use_fp8_dispatch = False"),
        ({"mma_type": "bf16"}, "mma_type = 'bf16' must be 'fp8xfp8'"),
        ({"activation": "gelu"}, "activation = 'gelu'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "refused",
)
def test_buffers_refuse_by_name(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setattr(api, "SymmBuffer", OnCpu)
    with pytest.raises(ConfigError, match=message):
        api.get_symm_buffer_for_mega_moe(**{"group": None, **SIZES, **changes})
    for group in (None, torch.distributed.ProcessGroup(0, 1)):
        buffer = api.get_symm_buffer_for_mega_moe(group, **SIZES, use_fp8_dispatch=True)
        assert buffer.group is None
        assert buffer.x.shape == (8, 256)
    assert api.get_symm_buffer_for_mega_moe(api.VirtualGroup(2), **SIZES).rank(1).x.shape == (8, 256)
    many = SIZES | {"num_max_tokens_per_rank": 8192}
    for ring_blocks, held in ((None, sizes.RING_BLOCKS), (48, 48), (49, 49), (1000, 131)):
        small = api.get_symm_buffer_for_mega_moe(None, **many, ring_blocks=ring_blocks)
        assert small.l1_acts.shape == (128 * held, 256)
        assert small.l2_acts_sf.shape == (128 * held, 2)
        assert small.pool_source.shape == (128 * 131, 2), "where a row came from stays"
    with pytest.raises(ConfigError, match="ring_blocks = 47 must be at least 48"):
        api.get_symm_buffer_for_mega_moe(None, **many, ring_blocks=47)


def test_a_destroyed_buffer_is_refused(library: FakeLibrary) -> None:
    good = call()
    buffer = good["sym_buffer"]
    api.fp8_mega_moe(**good)
    assert buffer.x.data_ptr() == buffer.rank(0).x.data_ptr()
    for _ in range(2):
        buffer.destroy()
    assert not hasattr(buffer, "x")
    assert not hasattr(buffer, "storage")
    assert not buffer.plans
    for use in (lambda: api.fp8_mega_moe(**good), lambda: buffer.rank(0)):
        with pytest.raises(ConfigError, match="sym_buffer was destroyed"):
            use()


def test_a_failure_is_raised_once_and_clears_the_counters_alone() -> None:
    buffer = call(2)["sym_buffer"]
    storages = [buffer.rank(rank).storage for rank in range(2)]
    for storage in storages:
        storage.fill_(7)
    before = storages[0].clone()
    buffer.check()  # nobody has waited in vain
    assert torch.equal(storages[0], before)
    buffer.status[:6] = torch.tensor([1, 1, 0, 2, 2, 1])
    with pytest.raises(KernelTimeout, match="rank 1, thread block 0, all roles waited for ranks: expected 2, saw 1"):
        buffer.check()
    buffer.check()
    offsets, _ = buffer.size.offsets()
    cleared = torch.zeros(len(before), dtype=torch.bool)
    for name, size in (("rank_counter", 4), ("workspace", 4 * (3 + 512 + 3 * buffer.size.pool_blocks))):
        cleared[offsets[name] : offsets[name] + size] = True
    for storage in storages:
        assert torch.equal(storage == 0, cleared)
        assert bool((storage[~cleared] == 7).all())
