"""What of the launch needs no GPU."""

from __future__ import annotations

import pytest

from megaproof.toolchain import launch


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    ],
)
def test_chip_name(name: str, chip: str) -> None:
    assert launch.chip_name(name) == chip
