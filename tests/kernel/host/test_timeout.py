"""What is said when a role waited in vain."""

from __future__ import annotations

import re

import torch

from megaproof.kernel.host import timeout
from megaproof.tests.support.runs import ROOT


def test_who_waited_in_vain_is_said() -> None:
    """`Status` of params.cuh: flag, rank, block, counter, expected, seen."""
    enum = re.search(r"enum Counter : u32 \{([^}]*)\}", (ROOT / "kernel" / "barrier.cuh").read_text())
    assert enum is not None
    assert {int(value) for value in re.findall(r"= (\d+)", enum[1])} == {*timeout.WAITS}
    said = "rank 2, thread block 3, scout or dispatch waited for GEMM 1 half tiles of a pool block: expected 128, saw 5"
    assert timeout.waited(torch.tensor([1, 2, 3, 4, 128, 5])) == said
    assert timeout.waited(torch.tensor([0, 2, 3, 4, 128, 5])) is None
