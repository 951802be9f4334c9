"""Inputs that functions of float32 must agree on, and the comparison of bits that these tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant import philox
from megaproof.quant.formats import f32_bits, f32_from_bits

SPECIAL = (
    *(0x00000000, 0x00000001, 0x00000002, 0x007FFFFF, 0x00800000, 0x00800001),  # zero, subnormals, least normals
    *(0x00FFFFFF, 0x01000000, 0x33800000, 0x34000000, 0x3F000000, 0x3F7FFFFF),  # 2^-24, 2^-23, 1/2, just below 1
    *(
        0x3F800000,
        0x3F800001,
        0x40000000,
        0x42AEAC4F,
        0x42B17217,
        0x42B17218,
    ),  # 1, 2, 87.3, log(2^128) and its neighbour
    *(0x42FC0000, 0x42FE0000, 0x43000000, 0x43150000, 0x43160000, 0x43E00000),  # 126, 127, 128, 149, 150, 448
    *(0x7E7FFFFF, 0x7E800000, 0x7E800001, 0x7F000000, 0x7F7FFFFF, 0x7F800000),  # around 2^126, 2^127, largest, inf
    *(0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF),  # NaN
)
"""Magnitudes; every one counts with both signs."""
NAN, INF, MINUS = 0x7FFFFFFF, 0x7F800000, 0x80000000


def bits(x: Tensor) -> list[int]:
    return f32_bits(x).reshape(-1).tolist()


def floats(*patterns: int) -> Tensor:
    return f32_from_bits(torch.tensor(patterns))


def specials() -> Tensor:
    """float32: SPECIAL with both signs, and three neighbours on each side where that stays a magnitude."""
    magnitude = (torch.tensor(SPECIAL)[:, None] + torch.arange(-3, 4)).clamp(0, 0x7FFFFFFF).reshape(-1).unique()
    return f32_from_bits(torch.cat([magnitude, magnitude | 1 << 31]))


def scattered(count: int, stream: int) -> Tensor:
    """float32: random bits, random values of magnitude 2^-32 to 2^15, every upper half of the bits, and `specials`."""
    word = philox.words(11, stream, 2 * count)
    near = (word[count:] & 0x807FFFFF) | (95 + word[:count] % 48) << 23
    every = torch.arange(1 << 16) << 16
    return torch.cat([f32_from_bits(torch.cat([word[:count], near, every, every | 0x8000])), specials()])


def assert_same(actual: Tensor, expected: Tensor, inputs: Tensor | None = None) -> None:
    """Same dtype, shape and bits, NaN payloads included."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        wanted = f"{expected.dtype} {list(expected.shape)}"
        raise AssertionError(f"{actual.dtype} {list(actual.shape)} instead of {wanted}")
    got, want = (_integers(t) for t in (actual.cpu(), expected.cpu()))
    wrong = (got != want).reshape(-1).nonzero().squeeze(1)
    if len(wrong):
        first = int(wrong[0])
        at = f" of input {int(_integers(inputs.cpu()).reshape(-1)[first]):#x}" if inputs is not None else ""
        pair = f"{int(got.reshape(-1)[first]):#x} instead of {int(want.reshape(-1)[first]):#x}"
        raise AssertionError(f"{len(wrong)} of {want.numel()} differ; first at {first}{at}: {pair}")


def _integers(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return f32_bits(x)
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    return x.to(torch.int64)
