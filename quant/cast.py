"""Casts to E4M3 with scale factors, and the kernel's weight layout.

Per-token casts and 128x128 blocks are how a caller makes inputs; Eq. (5)'s cast of the L2 activations is here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaproof.quant.atoms import encode_e4m3
from megaproof.quant.host_state import guarded
from megaproof.quant.scale import activation_scale, input_scale

BLOCK = 128
INTERLEAVE = 8
"""Rows of gate, then rows of up, in the kernel's copy of W1."""


@guarded
def group_amax(v: Tensor, group: int) -> Tensor:
    """Eq. (5): max |v| of each `group` columns by fmaxf from 0, so NaN does not count. float32 [T,N] -> [T,N/group]."""
    magnitude = torch.where(torch.isnan(v), torch.zeros_like(v), v.abs())
    return magnitude.unflatten(-1, (_groups(v.shape[-1], group, "columns"), group)).amax(-1)


@guarded
def quantise_activation(v: Tensor, group: int, kind: str, zero_group: str) -> tuple[Tensor, Tensor]:
    """Eq. (5): float32 [T, I] -> (E4M3 codes uint8 [T, I], scale factors float32 [T, I/group])."""
    scale, factor = activation_scale(group_amax(v, group), kind, zero_group)
    return encode_e4m3(v * factor.repeat_interleave(group, dim=-1)), scale


@guarded
def quantise_per_token(x: Tensor, group: int = BLOCK) -> tuple[Tensor, Tensor]:
    """float32 [T, H] -> (codes uint8 [T, H], scales float32 [T, H/group]), one scale for `group` columns of a token."""
    scale = input_scale(group_amax(x, group))
    return encode_e4m3(torch.div(x, scale.repeat_interleave(group, dim=-1))), scale


@guarded
def quantise_per_block(w: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """float32 [N, K] -> (codes uint8 [N, K], scales float32 [N/block, K/block]), one scale a square scale block."""
    rows, columns = _groups(w.shape[0], block, "rows"), _groups(w.shape[1], block, "columns")
    scale = input_scale(w.abs().reshape(rows, block, columns, block).amax(dim=(1, 3)))
    return encode_e4m3(torch.div(w, expand_block_scale(scale, block))), scale


def expand_block_scale(scale: Tensor, block: int = BLOCK) -> Tensor:
    """Returns [N, K] from scales [N/block, K/block]: each scale, repeated over its scale block."""
    return scale.repeat_interleave(block, dim=0).repeat_interleave(block, dim=1)


@guarded
def interleave_gate_up(w1: Tensor) -> Tensor:
    """[..., 2I, H] with gate rows then up rows -> [g0..7, u0..7, g8..15, u8..15, ...]. Scales are not interleaved."""
    gate, up = w1.chunk(2, dim=-2)
    groups = _groups(gate.shape[-2], INTERLEAVE, "gate rows")
    pairs = torch.stack([t.unflatten(-2, (groups, INTERLEAVE)) for t in (gate, up)], dim=-3)
    return pairs.flatten(-4, -2).contiguous()


@guarded
def deinterleave_gate_up(w1: Tensor) -> Tensor:
    """Inverse of `interleave_gate_up`."""
    groups = _groups(w1.shape[-2], 2 * INTERLEAVE, "interleaved rows")
    pairs = w1.unflatten(-2, (groups, 2, INTERLEAVE))
    return torch.cat([pairs.select(-3, half).flatten(-3, -2) for half in (0, 1)], dim=-2).contiguous()


def _groups(size: int, group: int, what: str) -> int:
    if group <= 0 or size % group:
        raise ValueError(f"{what} = {size} must be a multiple of {group}")
    return size // group
