"""What the oracle knows of formats and layouts: E4M3 as a table from its definition, and the shapes of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BLOCK = 128
"""Columns of x, and rows and columns of a weight, that share one scale factor."""

Weights = Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Global expert -> (w1 uint8 [2I,H], w1_sf float32 [2I/128,H/128], w2 uint8 [H,I], w2_sf float32 [H/128,I/128])."""


class Refused(ValueError):
    """The oracle has no opinion on this input (NaN, infinity, overflow, not a lattice ...). The message says why."""


def _units(code: int) -> int:
    """An E4M3 code (1 sign, 4 exponent bits of bias 7, 3 fraction bits) as an integer multiple of 2^-9."""
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = fraction if exponent == 0 else (8 + fraction) << (exponent - 1)
    return -magnitude if code >> 7 else magnitude


def _exponent(code: int) -> int:
    """The exponent the tensor core gives an operand: E - 7, -6 for a subnormal; none for a zero."""
    if code & 127 == 0:
        return NO_EXPONENT
    return max(code >> 3 & 15, 1) - 7


NAN_MAGNITUDE = 127
"""Code without its sign of the two E4M3 NaNs; the format has no infinity."""
NO_EXPONENT = -60
"""Exponent of a zero operand: two of them still fit int8, and one with any other stays below every real product."""
UNITS = torch.tensor([_units(code) for code in range(256)], dtype=torch.int64)
"""code -> value in units of 2^-9; entries 127 and 255 (NaN) are never used."""
VALUES = UNITS.to(torch.float64) / 512
"""code -> value, exactly."""
EXPONENTS = torch.tensor([_exponent(code) for code in range(256)], dtype=torch.int8)
"""code -> unnormalised exponent, NO_EXPONENT for zero."""


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table [256] at uint8 codes of any shape, on the CPU. By numpy, which takes a sixth of torch's time for bytes."""
    return torch.from_numpy(table.numpy()[codes.numpy()])


def host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on the CPU: the oracle's arithmetic never runs on the device under test."""
    return tuple(tensor.detach().cpu() for tensor in tensors)


def check_codes(codes: Tensor, name: str) -> None:
    """Raises `Refused` unless codes is uint8 and holds no NaN."""
    if codes.dtype != torch.uint8:
        raise Refused(f"{name} has dtype {codes.dtype}; E4M3 codes are uint8")
    if ((codes.cpu().numpy() & 127) == NAN_MAGNITUDE).any():
        raise Refused(f"{name} holds a NaN code (0x7f or 0xff); the oracle covers finite inputs only")


def check_scales(scales: Tensor, name: str) -> None:
    """Raises `Refused` unless scales is float32 and finite."""
    if scales.dtype != torch.float32:
        raise Refused(f"{name} has dtype {scales.dtype}; scale factors and weights are float32")
    if not torch.isfinite(scales).all():
        raise Refused(f"{name} holds a NaN or an infinity; the oracle covers finite inputs only")


def check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises `Refused` unless the tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise Refused(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def check_tokens(x: Tensor, x_sf: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> None:
    """Raises `Refused` when the token tensors do not form one rank's part of a layer."""
    tokens, hidden = x.shape
    if hidden == 0 or hidden % BLOCK:
        raise Refused(f"x has {hidden} columns; H must be a positive multiple of {BLOCK}")
    check_shape(x_sf, (tokens, hidden // BLOCK), "x_sf")
    check_shape(topk_idx, (tokens, topk_idx.shape[-1]), "topk_idx")
    check_shape(topk_weights, tuple(topk_idx.shape), "topk_weights")


def check_expert(expert: tuple[Tensor, Tensor, Tensor, Tensor], hidden: int, name: str) -> int:
    """Checks the shapes of one expert's weights. Returns I. Raises `Refused`."""
    w1, w1_sf, w2, w2_sf = expert
    intermediate = w2.shape[-1]
    if intermediate == 0 or intermediate % BLOCK:
        raise Refused(f"w2 of {name} has {intermediate} columns; I must be a positive multiple of {BLOCK}")
    check_shape(w1, (2 * intermediate, hidden), f"w1 of {name}")
    check_shape(w1_sf, (2 * intermediate // BLOCK, hidden // BLOCK), f"w1_sf of {name}")
    check_shape(w2, (hidden, intermediate), f"w2 of {name}")
    check_shape(w2_sf, (hidden // BLOCK, intermediate // BLOCK), f"w2_sf of {name}")
    return intermediate


def by_expert(topk_idx: Tensor) -> Iterable[tuple[int, list[tuple[int, int]]]]:
    """topk_idx [t, K] -> (expert, [(row, slot), ...]) for every expert that is used; -1 is masked."""
    pairs: dict[int, list[tuple[int, int]]] = {}
    for row, slots in enumerate(topk_idx.tolist()):
        for slot, expert in enumerate(slots):
            if expert < -1:
                raise Refused(f"topk_idx[{row}, {slot}] = {expert}; it must be -1 or an expert")
            if expert >= 0:
                pairs.setdefault(expert, []).append((row, slot))
    return sorted(pairs.items())
