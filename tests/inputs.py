"""Tensors of a case, from one counter-based generator: the same bytes on every machine and device.

Weights come per expert, on demand. Families: 'mixed' holds what exposes faults (see `TOKEN_CLASSES`), 'lattice' makes
every step of the layer exact (`tests/lattice.py`). Scales differ in every block; routing weights differ in every slot.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import philox
from quant.cast import BLOCK
from quant.formats import E4M3, f32_from_bits
from quant.twin import codes
from reference.arguments import Weights
from tests.cases import Case

X_CODES, X_SF, TOPK, TOPK_WEIGHTS, MASK, W1_CODES, W1_SF, W2_CODES, W2_SF = range(1, 10)
"""Streams of the generator, one a purpose; the low half of a stream is the rank or the expert."""

TOKEN_CLASSES = ("hot", "plain", "spread", "zero", "subnormal", "plain", "spread", "plain")
"""Class of a token, by its row over all ranks, modulo 8. hot: scales 16 times larger, so that gates pass -90; spread:
codes over all binades; zero: an all-zero row; subnormal: every code a subnormal."""

ZERO_GROUP = 64
"""Rows of W1's gate that are zero in each expert, so that a 64-group of L2 activations is all zero."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of `moe_layer`; lists by rank."""

    x: list[Tensor]
    x_sf: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]
    weights: Weights

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Weights]:
        """In the order that `moe_layer` takes them."""
        return self.x, self.x_sf, self.topk_idx, self.topk_weights, self.weights

    def sha256(self) -> str:
        """Digest of everything but the weights (they follow from seed and expert)."""
        digest = hashlib.sha256()
        for tensors in (self.x, self.x_sf, self.topk_idx, self.topk_weights):
            for tensor in tensors:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


# --- values -----------------------------------------------------------------------------------------------------------


@functools.cache
def code_lut(kind: str) -> Tensor:
    """uint8 [256]: a random byte -> an E4M3 code. 'gaussian' (sigma 96), 'spread' (every finite code), 'subnormal'."""
    byte = torch.arange(256)
    if kind == "gaussian":
        normal = statistics.NormalDist(0, 96)
        return E4M3.encode(torch.tensor([normal.inv_cdf((b + 0.5) / 256) for b in range(256)]))
    if kind == "spread":
        return torch.where(byte & 0x7F == 0x7F, byte & 0x80, byte).to(torch.uint8)
    if kind == "subnormal":
        return (byte & 0x87).to(torch.uint8)
    raise KeyError(kind)


def scales(seed: int, stream: int, count: int, exponent: int) -> Tensor:
    """float32 [count]: 2^(exponent -1 .. +1) times a random mantissa.

    Every fifth is a plain power of two: never two neighbours, along a row or (where a row is no multiple of five) down
    a column, so that neighbouring blocks always differ.
    """
    word = philox.words(seed, stream, 2 * count).reshape(count, 2)
    field = 127 + exponent - 1 + word[:, 0] % 3
    mantissa = torch.where(torch.arange(count) % 5 == 2, 0, word[:, 1] & 0x7FFFFF)
    return f32_from_bits(field << 23 | mantissa)


def _stream(purpose: int, index: int) -> int:
    return purpose << 32 | index


def _tokens(case: Case, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, hidden = case.tokens[rank], case.shape.hidden
    first = sum(case.tokens[:rank])
    count = tokens * hidden
    parts = {
        kind: codes(case.seed, _stream(X_CODES, rank), count, code_lut(kind).to(device)).reshape(tokens, hidden)
        for kind in ("gaussian", "spread", "subnormal")
    }
    x = parts["gaussian"].clone()
    x_sf = scales(case.seed, _stream(X_SF, rank), tokens * hidden // BLOCK, -7).reshape(tokens, hidden // BLOCK)
    for token in range(tokens):
        kind = TOKEN_CLASSES[(first + token) % len(TOKEN_CLASSES)]
        if kind in parts:
            x[token] = parts[kind][token]
        elif kind == "zero":
            x[token] = 0
        elif kind == "hot":
            x_sf[token] *= 16
    return x, x_sf.to(device)


def _expert(case: Case, device: torch.device, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, inter = case.shape.hidden, case.shape.intermediate
    lut = code_lut("spread" if e % 4 == 3 else "gaussian").to(device)
    w1 = codes(case.seed, _stream(W1_CODES, e), 2 * inter * hidden, lut).reshape(2 * inter, hidden)
    w2 = codes(case.seed, _stream(W2_CODES, e), hidden * inter, lut).reshape(hidden, inter)
    zero = 5 * e % (inter // ZERO_GROUP) * ZERO_GROUP
    w1[zero : zero + ZERO_GROUP] = 0
    # Gates and ups of a plain token spread over about +-10, whatever H is: half a bit of scale for each bit of H.
    exponent = -11 + ((4096).bit_length() - hidden.bit_length()) // 2
    w1_sf = scales(case.seed, _stream(W1_SF, e), w1.numel() // BLOCK**2, exponent)
    w2_sf = scales(case.seed, _stream(W2_SF, e), w2.numel() // BLOCK**2, -12)
    return (
        w1,
        w1_sf.reshape(2 * inter // BLOCK, hidden // BLOCK).to(device),
        w2,
        w2_sf.reshape(hidden // BLOCK, inter // BLOCK).to(device),
    )


def _topk_weights(case: Case, rank: int) -> Tensor:
    """Every slot another weight in (0, 1); some negative, some zero."""
    tokens, topk = case.tokens[rank], case.shape.topk
    word = philox.words(case.seed, _stream(TOPK_WEIGHTS, rank), tokens * topk)
    weight = ((word >> 8) + 1).to(torch.float32) * 2.0**-24
    place = sum(case.tokens[:rank]) * topk + torch.arange(tokens * topk)
    weight = torch.where(place % 11 == 4, -weight, weight)
    return torch.where(place % 23 == 7, 0.0, weight).reshape(tokens, topk)


# --- routing ----------------------------------------------------------------------------------------------------------


def _uniform(case: Case, key: Tensor) -> Tensor:
    return key


def _zipf(case: Case, key: Tensor) -> Tensor:
    """Expert of popularity place j wins a race in which its key counts j + 1 times."""
    e = torch.arange(case.shape.experts)
    return key * ((e * 101 + case.seed) % case.shape.experts + 1)


def _one_hot(case: Case, key: Tensor) -> Tensor:
    """One expert is in every token's slots."""
    key[:, case.seed % case.shape.experts] = -1
    return key


def _one_rank(case: Case, key: Tensor) -> Tensor:
    """Every slot goes to the experts of one rank."""
    local = case.shape.experts_per_rank(case.ranks)
    key[:, torch.arange(case.shape.experts) // local != case.ranks // 2] += 1 << 40
    return key


def _few_experts(case: Case, key: Tensor) -> Tensor:
    """All but twice top-k experts are empty."""
    used = torch.arange(case.shape.experts) % (case.shape.experts // (2 * case.shape.topk)) == 1
    key[:, ~used] += 1 << 40
    return key


ROUTINGS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_hot": _one_hot,
    "one_rank": _one_rank,
    "few_experts": _few_experts,
}


def route(case: Case, rank: int) -> Tensor:
    """int64 [T_r, K]: distinct experts a token, the smallest keys; masked slots are -1."""
    tokens, experts, topk = case.tokens[rank], case.shape.experts, case.shape.topk
    key = philox.words(case.seed, _stream(TOPK, rank), tokens * experts).reshape(tokens, experts)
    idx = torch.argsort(ROUTINGS[case.routing](case, key), dim=1, stable=True)[:, :topk].contiguous()
    mask = philox.words(case.seed, _stream(MASK, rank), tokens * topk).reshape(tokens, topk) % 100 < case.masked
    return torch.where(mask, -1, idx)


# --- the case ---------------------------------------------------------------------------------------------------------


def make(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's arguments on a device. Deterministic in the case alone."""
    device = torch.device(device)
    topk_idx = [route(case, rank) for rank in range(case.ranks)]
    return FAMILIES[case.family](case, topk_idx, device)


def _mixed(case: Case, topk_idx: list[Tensor], device: torch.device) -> Inputs:
    ranks = range(case.ranks)
    x, x_sf = zip(*(_tokens(case, rank, device) for rank in ranks), strict=True)
    topk_weights = [_topk_weights(case, rank).to(device) for rank in ranks]
    weights = functools.partial(_expert, case, device)
    return Inputs(list(x), list(x_sf), [idx.to(device) for idx in topk_idx], topk_weights, weights)


def _lattice(case: Case, topk_idx: list[Tensor], device: torch.device) -> Inputs:
    from tests.lattice import make_lattice

    shape = case.shape
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.topk)
    x, x_sf, topk_weights, weights = make_lattice(*sizes, list(case.tokens), topk_idx, case.seed, device)
    return Inputs(x, x_sf, [idx.to(device) for idx in topk_idx], topk_weights, weights)


FAMILIES: dict[str, Callable[[Case, list[Tensor], torch.device], Inputs]] = {"mixed": _mixed, "lattice": _lattice}
