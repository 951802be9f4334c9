"""CUDA texts that the gate has to pass or to catch."""

from __future__ import annotations

import pytest
import torch

from megaproof import HOME
from megaproof.toolchain import build, sass
from megaproof.toolchain.errors import EnvironmentMissing

PLAIN = 'extern "C" __global__ void plain(float* p) { p[threadIdx.x] = p[threadIdx.x] * 3.0f + 1.0f; }'
STACK = """
extern "C" __global__ void stack(const int* index, float* out) {
    float table[64];
    for (int i = 0; i < 64; ++i) table[index[i] & 63] = out[i];
    out[threadIdx.x] = table[index[threadIdx.x] & 63];
}
"""
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* p) {
    float v[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) p[(95 - i) * 1024 + threadIdx.x] = v[i] * v[(i + 1) % 96];
}
"""
SERIALISED = """
#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) serialised(const float* c, float* out, u64 desc_a, u64 desc_b) {
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[4 * threadIdx.x + i];
    ptx::wgmma_fence();
    ptx::wgmma_ss<8>(d, desc_a, desc_b, true);
    if (d[0] > 1.0f) __trap();
    ptx::wgmma_ss<8>(d, desc_a, desc_b, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}
"""
ROLES = """
#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) roles(float* p) {
    if (threadIdx.x < 128) {
        ptx::fewer_registers<LOW>();
        p[0] = 1.0f;
    } else {
        ptx::more_registers<HIGH>();
        p[threadIdx.x] = 2.0f;
    }
}
"""


def with_includes(text: str) -> str:
    """A text that includes files of the kernel, with them in their places."""
    return build.with_includes(text, HOME / "kernel")


def require_nvdisasm() -> None:
    """It must be there, but for a machine with a GPU: cubins are gated before they come to it."""
    try:
        sass.disassembler()
    except EnvironmentMissing as error:
        if torch.cuda.is_available():
            pytest.skip(str(error))
        raise
