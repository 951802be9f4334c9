"""amax -> scale factor, every reciprocal named.

amax / 448, amax * fl(1/448) and 448 / amax differ in more than half of all mantissas, so each is a choice of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant.formats import f32_bits, f32_from_bits, pow2
from megaproof.quant.host_state import guarded_atom

E4M3_MAX = 448.0
RECIPROCAL_448_BITS = 0x3B124925
"""fp32 bits of fl(1 / 448)."""
FP32_FLOOR = 1e-10
"""The fp32 scale kind's least amax, so that a zero group has a finite reciprocal."""


@guarded_atom
def amax_over_448(amax: Tensor) -> Tensor:
    """fl(amax * fl(1/448)): a multiplication, as the kernels have it. float32 -> float32."""
    return amax * f32_from_bits(torch.tensor(RECIPROCAL_448_BITS, device=amax.device))


@guarded_atom
def ue8m0_exponent(amax: Tensor) -> Tensor:
    """Eq. (5): least e with 2^e >= fl(amax * fl(1/448)), in [-126, 126]; int64. Equals ceil(log2(amax / 448)).

    Read from the bits, never through log2. amax = 0 and amax = inf land on the two ends.
    """
    bits = f32_bits(amax_over_448(amax))
    exponent = (bits >> 23 & 0xFF) - 127 + (bits & 0x7FFFFF != 0).to(torch.int64)
    return exponent.clamp(-126, 126)


@guarded_atom
def activation_scale(amax: Tensor, kind: str, zero_group: str) -> tuple[Tensor, Tensor]:
    """Eq. (5): (scale factor to store, factor to multiply the values with before the cast), both float32 like amax.

    kind 'ue8m0': sf = 2^e and 2^-e; 'fp32': sf = fl(max(amax, 1e-10) * fl(1/448)) and fl(1 / sf).
    zero_group 'public' stores sf = 0 where fl(amax * fl(1/448)) is 0; the bytes stay the same.
    """
    if kind == "ue8m0":
        exponent = ue8m0_exponent(amax)
        factor = pow2(-exponent)
        stored = pow2(exponent)
        if zero_group == "public":
            # The public kernel does not clamp e: a scaled amax of 0 gets exponent field 0, which is the value 0.
            stored = torch.where(amax_over_448(amax) == 0, torch.zeros_like(stored), stored)
        return stored, factor
    floor = torch.tensor(FP32_FLOOR, dtype=torch.float32, device=amax.device)
    stored = amax_over_448(torch.maximum(amax, floor))
    return stored, torch.div(torch.ones_like(stored), stored)


@guarded_atom
def input_scale(amax: Tensor) -> Tensor:
    """Scale of 128 input columns or of a 128x128 weight block: fl(amax / 448), a division; 1 for an all-zero group.

    Not part of the layer: inputs arrive quantised. This is how a caller makes them.
    """
    return torch.where(amax == 0, torch.ones_like(amax), torch.div(amax, E4M3_MAX))
