"""Which arithmetic the layer runs on: the compiled twin of a device, or the readable atoms if there is no twin.

Each is a module with the names of `quant/atoms.py`, so that the layer is one text for all of them. `codes` is the
generator in the same three forms.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megaproof.quant import atoms, philox


@cache
def _choose(kind: str) -> tuple[ModuleType, str]:
    try:
        if kind == "cuda":
            from megaproof.quant import twin_gpu

            twin_gpu.PROGRAM.compile()
            return twin_gpu, twin_gpu.NAME
        from megaproof.quant import twin_cpu

        return twin_cpu, twin_cpu.NAME
    except Exception as error:  # no numba, no NVRTC: slower, and the same bits
        return atoms, f"readable torch atoms on {kind}: no compiled twin ({error})"


def arith(device: torch.device | str = "cpu") -> ModuleType:
    """Returns the atoms to compute with on a device: twin_cpu, twin_gpu or quant.atoms. The bits are the same."""
    return _choose(torch.device(device).type)[0]


def describe(device: torch.device | str = "cpu") -> str:
    """Returns one line: which arithmetic `arith` chose for a device, and the reason if it is the slow one."""
    return _choose(torch.device(device).type)[1]


def codes(seed: int, stream: int, count: int, lut: Tensor) -> Tensor:
    """`philox.codes`, compiled where possible: uint8 [count] on lut's device."""
    module = arith(lut.device)
    return (philox if module is atoms else module).codes(seed, stream, count, lut)
