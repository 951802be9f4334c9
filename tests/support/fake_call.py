"""A legal call of `fp8_mega_moe` on CPU tensors, and a library that only records what would be launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaproof.kernel import api
from megaproof.kernel.host import plans, streams, symm_buffer
from megaproof.kernel.host.buffer import BufferSize
from megaproof.kernel.host.params import Params
from megaproof.kernel.host.transformed import TransformedWeights
from megaproof.toolchain.launch import Device, TensorMap

HIDDEN, INTER, EXPERTS, TOPK, CAPACITY, SMS = 256, 128, 4, 2, 8, 130
DEVICE = Device(0, "NVIDIA H200", "H200", SMS, "580", memory=1 << 28)
FP8, F32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16


def weights(ranks: int = 1, device: str = "cpu") -> tuple[Any, Any]:
    """(l1, l2) of one rank, zeros, which the transform leaves as they are."""
    e = EXPERTS // ranks
    sizes = ((2 * INTER, HIDDEN), (2, 2)), ((HIDDEN, INTER), (2, 1))
    l1, l2 = (
        TransformedWeights(
            torch.zeros(e, *size, dtype=torch.uint8, device=device).view(FP8), torch.ones(e, *blocks, device=device)
        )
        for size, blocks in sizes
    )
    return l1, l2


def call(ranks: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """The arguments of a legal call: of one rank, or of a virtual group."""
    group = None if ranks is None else api.VirtualGroup(ranks)
    count = ranks or 1
    size = BufferSize(count, EXPERTS, TOPK, HIDDEN, INTER, CAPACITY)
    buffer = api.SymmBuffer(group, size, torch.device(device))
    ys = [torch.zeros(3 + rank, HIDDEN, dtype=BF16, device=device) for rank in range(count)]
    l1s, l2s = map(list, zip(*[weights(count, device) for _ in range(count)], strict=True))
    stats = [torch.zeros(EXPERTS // count, dtype=torch.int32, device=device) for _ in range(count)]
    names = ("y", "l1_weights", "l2_weights", "cumulative_local_expert_recv_stats")
    values = (ys, l1s, l2s, stats)
    lists = dict(zip(names, values if group else [value[0] for value in values], strict=True))
    return lists | {"sym_buffer": buffer}


class FakeLibrary:
    """Keeps a copy of the Params of every launch, and what each stream waited for."""

    def __init__(self) -> None:
        self.stream = 0
        """The current one."""
        self.captures: dict[int, int] = {}
        """Stream -> the number of the capture that it is in."""
        self.waits: list[tuple[int, int]] = []
        """(stream, the one that it waits for)."""
        self.launches: list[tuple[str, Any, tuple]] = []
        self.granularities: list[int] = []
        self.encoded = 0

    def program(self, granularity: int) -> FakeLibrary:
        """What stands in for `SymmBuffer.program`."""
        self.granularities.append(granularity)
        return self

    def library(self) -> FakeLibrary:
        """What stands in for `Program.library`."""
        return self

    def kernel(self, name: str) -> Callable[..., None]:
        def launch(params: Any, *sizes: int, cooperative: bool, device: int, stream: int) -> None:
            if (cooperative, device, stream) != (True, 0, self.stream):
                raise AssertionError(f"launched with cooperative={cooperative} on device {device}, stream {stream}")
            self.launches.append((name, Params.from_buffer_copy(params), sizes))

        return launch

    def map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        self.encoded += 1
        return TensorMap((matrix.data_ptr(), *matrix.shape, box_rows))


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A library in the place of the kernel's in every new buffer, on a device that is made up."""
    fake = FakeLibrary()
    monkeypatch.setattr(symm_buffer, "moe", fake.program)
    monkeypatch.setattr(plans, "tensor_map", fake.map)
    monkeypatch.setattr(streams, "current_stream", lambda device: fake.stream)
    monkeypatch.setattr(streams, "capture_of", lambda stream, device: fake.captures.get(stream, 0))
    monkeypatch.setattr(streams, "wait_for", lambda stream, before, device: fake.waits.append((stream, before)))
    for module in (api, plans):
        monkeypatch.setattr(module, "require_device", lambda index=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return fake
