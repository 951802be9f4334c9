"""The symmetric buffer on CPU tensors: what it is refused for, and its end."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaproof.kernel import api
from megaproof.kernel.host import sizes
from megaproof.kernel.host.buffer import BufferSize, RankViews, names_of
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


# --- one buffer, whose views are written ------------------------------------------------------------------------------

INPUTS = names_of("inputs")


@pytest.mark.parametrize("name", [*INPUTS, "slots", "storage"])
def test_a_forgotten_colon_is_refused(library: FakeLibrary, name: str) -> None:
    """`buffer.x = t` would leave the memory that the kernel reads as it is."""
    one, two = call()["sym_buffer"], call(2)["sym_buffer"]
    for owner, called in (
        (one, "sym_buffer"),
        (one.rank(0), r"sym_buffer\.rank\(r\)"),
        (two.rank(1), r"sym_buffer\.rank\(r\)"),
    ):
        view = getattr(owner, name)
        for other in (torch.ones_like(view), view.clone(), view[:1], None, 1):
            with pytest.raises(
                ConfigError, match=rf"^{called}\.{name} = .*; {called}\.{name}\[:\] = \.\.\. must be used"
            ):
                setattr(owner, name, other)
        with pytest.raises(ConfigError, match=rf"{called}\.{name} can't be deleted"):
            delattr(owner, name)
        assert getattr(owner, name) is view
    with pytest.raises(ConfigError, match=rf"sym_buffer\.{name} = "):
        setattr(two, name, torch.ones_like(getattr(two.rank(0), name)))


def test_views_are_written(library: FakeLibrary) -> None:
    good = call()
    buffer = good["sym_buffer"]
    buffer.topk_weights[:] = 3.0
    buffer.topk_weights *= 2  # Python sets the attribute to what it is
    buffer.rank(0).x_sf += 1
    buffer.topk_idx[:3] = torch.ones(3, 2, dtype=torch.int64)
    views = RankViews(buffer.size, buffer.storage)
    assert (views.topk_weights.unique().tolist(), views.x_sf.unique().tolist()) == ([6.0], [1.0])
    assert views.topk_idx.sum() == 6
    api.fp8_mega_moe(**good)
    assert library.launches[0][1].layout.buffer_ptr[0] == buffer.storage.data_ptr()


@pytest.mark.parametrize("name", INPUTS)
def test_a_view_with_other_memory_is_refused(library: FakeLibrary, name: str) -> None:
    good = call(2)
    view = getattr(good["sym_buffer"].rank(1), name)
    before = view.data
    view.data = view.clone()
    with pytest.raises(ConfigError, match=rf"view {name} of rank 1 begins at .*: {name}\[:\] = \.\.\. writes into it"):
        api.fp8_mega_moe(**good)
    view.data = before
    api.fp8_mega_moe(**good)
    assert len(library.launches) == 1


@pytest.mark.parametrize("name", ["size", "group", "device", "bytes_per_rank"])
def test_what_a_buffer_was_made_for_stays(library: FakeLibrary, name: str) -> None:
    buffer = call()["sym_buffer"]
    with pytest.raises(ConfigError, match=f"sym_buffer.{name} must stay as it was made; make another buffer"):
        setattr(buffer, name, None)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda made: torch.save(made, io.BytesIO()),
    "in a module": lambda made: copy.deepcopy({"layer": [made]}),
}


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_refused_by_name(library: FakeLibrary, how: str, ranks: int | None) -> None:
    """A launch on a copy would go to the memory of the original, or to none. Before and after a launch."""
    good = call(ranks)
    buffer = good["sym_buffer"]
    for _ in range(2):
        for made, called in ((buffer, "sym_buffer"), (buffer.rank(0), r"sym_buffer\.rank\(r\)")):
            with pytest.raises(ConfigError, match=f"^{called} can't be copied or pickled: .*$"):
                COPIES[how](made)
        api.fp8_mega_moe(**good)
    assert len(library.launches) == 2


def test_a_buffer_needs_memory(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SymmBuffer", OnCpu)
    with (
        FakeTensorMode(),
        pytest.raises(ConfigError, match="sym_buffer can't be made under a FakeTensorMode"),
    ):
        api.get_symm_buffer_for_mega_moe(None, **SIZES)
    with pytest.raises(ConfigError, match=r"num_max_tokens_per_rank = 1000000: a buffer of .* bytes, .* must fit"):
        api.get_symm_buffer_for_mega_moe(None, **SIZES | {"num_max_tokens_per_rank": 1_000_000})


def test_indices_are_not_read_where_nothing_can_be_read(library: FakeLibrary) -> None:
    good = call()
    with FakeTensorMode(), pytest.raises(ConfigError, match="check = True can't be under a FakeTensorMode"):
        api.fp8_mega_moe(**good, check=True)
    assert not library.launches
