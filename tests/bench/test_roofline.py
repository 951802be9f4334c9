"""What a rank must do and how fast a chip could: bytes, multiplies and floors by hand, measured or by model. No GPU."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaproof.bench.measure.points import PRESETS
from megaproof.bench.model import chips
from megaproof.bench.model.chips import H20, H200
from megaproof.bench.model.roofline import Load, adjusted_tflops, reduction_us
from megaproof.quant.shapes import SHAPES

TINY = Load(hidden=128, intermediate=256, tokens=2, rows=6, touched=3)
FLASH_8 = Load(4096, 2048, 8, 48, 25)
MODELLED = dataclasses.replace(H200, read_gb_s=(), ceiling_tflops={})
LOADS = st.builds(
    Load,
    hidden=st.integers(1, 60).map(lambda n: 128 * n),
    intermediate=st.integers(1, 30).map(lambda n: 128 * n),
    tokens=st.integers(1, 8192),
    rows=st.integers(1, 65536),
    touched=st.integers(1, 64),
)


def test_flops_and_bytes_by_hand() -> None:
    assert TINY.flops == 1_179_648
    weights = 3 * 3 * (128 * 256 + 4 * 1 * 2)
    assert TINY.bytes == weights + 6 * (128 + 4) + 6 * 2 * (256 + 16) + 6 * 4 * 128 + 2 * 2 * 128 == 302_624


def test_half_the_scales_are_half_the_bytes_of_them() -> None:
    coarse = dataclasses.replace(TINY, granularity=128)
    assert TINY.bytes - coarse.bytes == 6 * 2 * 4 * (4 - 2)


def test_bytes_over_nvlink_and_of_the_reduction_by_hand() -> None:
    """Seven of eight rows come from elsewhere: 128 codes and a scale of 4 bytes there, 256 bytes back."""
    assert TINY.nvlink_bytes == 7 * 6 * (128 + 4 + 256) // 8 == 2037
    assert TINY.reduction_bytes == 6 * 2 * 128 + 2 * 2 * 128 == 2048


def test_bytes_of_a_decode_step() -> None:
    """dsv4_flash, one token: six experts of 25 MB each, and little else."""
    assert Load(4096, 2048, 1, 6, 6).bytes == 6 * 3 * (8388608 + 2048) + 6 * 4224 + 6 * 4352 + 6 * 16384 + 8192


@pytest.mark.parametrize(("gb", "rate"), H200.read_gb_s)
def test_a_measured_read_is_met(gb: float, rate: float) -> None:
    """And by the model of a chip that was not measured, here the H200 itself, to 8 %."""
    size = round(gb * 1e9)
    assert H200.read_us(size) == pytest.approx(gb * 1e6 / rate)
    assert MODELLED.read_us(size) == pytest.approx(H200.read_us(size), rel=0.08)


def test_a_read_between_and_beyond_measured_points() -> None:
    read_us, at_2, at_3 = H200.read_us, 2e6 / 4490, 3e6 / 4535
    assert read_us(2_500_000_000) == pytest.approx((at_2 + at_3) / 2)
    assert read_us(4_000_000_000) == pytest.approx(2 * at_3 - at_2)
    assert 0 < read_us(0) < read_us(100_000_000) < read_us(150_000_000)


def test_the_floor_is_the_longer_of_reading_and_multiplying() -> None:
    large = Load(4096, 2048, 8192, 49152, 32)
    assert H200.floor_us(FLASH_8) == H200.read_us(FLASH_8.bytes) > H200.multiply_us(FLASH_8)
    assert H200.floor_us(large) == H200.multiply_us(large) == pytest.approx(1940.4, abs=0.1)


def test_h20_by_hand() -> None:
    """4.0 TB/s x 4535/4800 and a start; 296 TFLOP/s x 1275/1979."""
    assert H20.read_us(10**9) == pytest.approx(10 + 1e9 / (4000e9 * 4535 / 4800) * 1e6)
    assert H20.multiply_us(FLASH_8) == pytest.approx(FLASH_8.flops / (296e12 * 1275 / 1979) * 1e6)
    assert not H20.measured
    assert MODELLED.multiply_us(FLASH_8) == pytest.approx(H200.multiply_us(FLASH_8))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_ceiling(preset: str) -> None:
    load = Load(SHAPES[preset].hidden, SHAPES[preset].intermediate, 1, 1, 1)
    assert all(chip.has_floor(load) for chip in (H200, H20))
    assert not any(chip.has_floor(TINY) for chip in (H200, H20))


@pytest.mark.parametrize(
    ("device", "chip"),
    [("NVIDIA H200", H200), ("NVIDIA H20", H20), ("NVIDIA H200 NVL", H200), ("NVIDIA H100 80GB HBM3", None)],
)
def test_the_chip_of_a_device(device: str, chip: chips.Chip | None) -> None:
    assert chips.of_device(device) is chip


@given(LOADS, st.floats(1, 1e5), st.floats(1, 1e5))
def test_the_adjusted_rate_is_higher_or_nothing(load: Load, us: float, read: float) -> None:
    reduction = reduction_us(load, read)
    assert 0 < reduction < read, "the combine's bytes are some of the load's"
    adjusted = adjusted_tflops(load, us, reduction)
    assert (adjusted is None) == (us <= reduction)
    assert adjusted is None or adjusted >= load.flops / us / 1e6
