"""The probes of probe.cu from torch: what the chip at hand computes, one instruction a call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megaproof import HOME
from megaproof.toolchain.launch import require_device
from megaproof.toolchain.program import Program

WIDTHS = (8, 16, 32, 64, 128, 256)
"""N of the wgmma probes."""
A_SOURCES = {"shared": "ss", "registers": "rs"}
SWEEPS = {
    "rcp": torch.int32,
    "ex2": torch.int32,
    "exp_steps": torch.int32,
    "expf": torch.int32,
    "silu_fast": torch.int32,
    "silu_precise": torch.int32,
    "rcp_rn": torch.int32,
    "e4m3x2": torch.int16,
    "bf16": torch.int16,
}
"""Elementwise probes and the width of their output bits. e4m3x2: high byte of x, low byte of the complemented bits."""
PROGRAM = Program(
    name="probes",
    sources=(HOME / "kernel" / "programs" / "probe.cu",),
    entries=(
        *(f"wgmma_{kind}_n{n}" for kind in A_SOURCES.values() for n in WIDTHS),
        *(f"sweep_{name}" for name in SWEEPS),
        "probe_fma",
    ),
    gemm=("wgmma_",),
)


class WgmmaParams(ctypes.Structure):
    """WgmmaParams of probe.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "abcd"),
        ("steps", ctypes.c_uint32),
        ("scale_d", ctypes.c_uint32),
    )


class SweepParams(ctypes.Structure):
    """SweepParams of probe.cu, field by field."""

    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("start", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
    )


class FmaParams(ctypes.Structure):
    """FmaParams of probe.cu, field by field."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("a", "b", "c", "out")), ("count", ctypes.c_uint32))


class Probes:
    """The probes on the current device. Raises EnvironmentMissing without an SM90 chip."""

    def __init__(self) -> None:
        self.device = require_device()
        self.built = PROGRAM.compile()
        self._library = PROGRAM.library()

    def wgmma(self, a: Tensor, b: Tensor, c: Tensor, scale_d: bool, a_from: str) -> Tensor:
        """a uint8 [cases, 64, K], b uint8 [cases, N, K], c float32 [cases, 64, N] -> d int32 bits [cases, 64, N].

        K / 32 chained steps a case; scale_d False: c is in the accumulators, and must not count. a_from: 'shared'
        or 'registers'.
        """
        cases, n, depth = b.shape
        a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
        d = torch.empty(cases, 64, n, dtype=torch.int32, device=a.device)
        params = WgmmaParams(a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), depth // 32, int(scale_d))
        kernel = self._library.kernel(f"wgmma_{A_SOURCES[a_from]}_n{n}")
        kernel(params, grid=cases, block=128, shared=depth * (64 + n))
        return d

    def sweep(self, name: str, start: int, count: int, inputs: Tensor | None = None) -> Tensor:
        """Output bits [count], int32 or int16, of the inputs with fp32 bits start, start + 1, ... or int32 `inputs`."""
        out = torch.empty(count, dtype=SWEEPS[name], device=f"cuda:{self.device.index}")
        params = SweepParams(None if inputs is None else inputs.data_ptr(), out.data_ptr(), start, count)
        self._library.kernel(f"sweep_{name}")(params, grid=8 * self.device.sms, block=256)
        return out

    def fma(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """fma.rn.f32 of contiguous float32 [count] each -> int32 bits [count]."""
        out = torch.empty(a.numel(), dtype=torch.int32, device=a.device)
        params = FmaParams(a.data_ptr(), b.data_ptr(), c.data_ptr(), out.data_ptr(), a.numel())
        self._library.kernel("probe_fma")(params, grid=8 * self.device.sms, block=256)
        return out
