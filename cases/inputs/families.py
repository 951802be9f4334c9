"""Input families of random numbers: 'mixed', 'gaussian' and 'heavy_tail'.

mixed        what the gate runs: five classes of tokens, two of experts, a zero group in each, weights of any sign.
gaussian     what the public harnesses feed: one normal distribution, scales of one binade, positive weights. A clamp of
             10 never binds; it is here to be seen beside the others.
heavy_tail   most values small and a few large, in codes, in scales and in outlier columns, as in trained models.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaproof.cases.inputs.draws import (
    CHOICE,
    W1_CODES,
    W1_SF,
    W2_CODES,
    W2_SF,
    X_CODES,
    X_SF,
    Drawn,
    code_lut,
    powers,
    scales,
    stream,
    uniform_weights,
)
from megaproof.quant import philox
from megaproof.quant.cast import BLOCK
from megaproof.quant.twin import codes
from megaproof.reference.operands import ExpertWeights, e4m3

if TYPE_CHECKING:
    from megaproof.cases.cases import Case

TOKEN_CLASSES = ("hot", "plain", "spread", "zero", "subnormal", "plain", "spread", "plain")
"""Class of a token, by its row over all ranks, modulo 8. hot: scales 16 times larger, so that gates pass -90; spread:
codes over all binades; zero: an all-zero row; subnormal: every code a subnormal."""

ZERO_GROUP = 64
"""Rows of W1's gate that are zero in each expert, so that a 64-group of L2 activations is all zero."""

OUTLIERS = 5
"""Columns of x that are large in every token of the heavy-tailed family."""


def first_exponent(hidden: int) -> int:
    """Exponent of w1_sf at which gates and ups spread over about +-10, whatever H is: half a bit for each bit of H."""
    return -11 + ((4096).bit_length() - hidden.bit_length()) // 2


def draw_codes(case: Case, purpose: int, index: int, lut: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 codes of one stream."""
    return codes(case.seed, stream(purpose, index), shape[0] * shape[1], code_lut(lut).to(device)).reshape(shape)


def draw_scales(case: Case, purpose: int, index: int, rows: int, columns: int, exponent: int) -> Tensor:
    """float32 [rows/128, columns/128] on the CPU."""
    grid = rows // BLOCK, columns // BLOCK
    return scales(case.seed, stream(purpose, index), grid[0] * grid[1], exponent).reshape(grid)


def expert(case: Case, device: torch.device, lut: str, w2_exponent: int, e: int) -> ExpertWeights:
    """One expert's codes and scales, nothing special about them."""
    hidden, inter = case.shape.hidden, case.shape.intermediate
    return e4m3(
        draw_codes(case, W1_CODES, e, lut, (2 * inter, hidden), device),
        draw_scales(case, W1_SF, e, 2 * inter, hidden, first_exponent(hidden)).to(device),
        draw_codes(case, W2_CODES, e, lut, (hidden, inter), device),
        draw_scales(case, W2_SF, e, hidden, inter, w2_exponent).to(device),
    )


# --- mixed ------------------------------------------------------------------------------------------------------------


def make_mixed(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    """Classes of tokens and experts; see `TOKEN_CLASSES`."""
    x, x_sf = zip(*(_mixed_tokens(case, rank, device) for rank in range(case.ranks)), strict=True)
    weights = functools.partial(_mixed_expert, case, device)
    return list(x), list(x_sf), [_mixed_weights(case, rank).to(device) for rank in range(case.ranks)], weights


def _mixed_tokens(case: Case, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, hidden = case.tokens[rank], case.shape.hidden
    first = sum(case.tokens[:rank])
    kinds = ("gaussian", "spread", "subnormal")
    parts = {kind: draw_codes(case, X_CODES, rank, kind, (tokens, hidden), device) for kind in kinds}
    x = parts["gaussian"].clone()
    x_sf = scales(case.seed, stream(X_SF, rank), tokens * hidden // BLOCK, -7).reshape(tokens, hidden // BLOCK)
    for token in range(tokens):
        kind = TOKEN_CLASSES[(first + token) % len(TOKEN_CLASSES)]
        if kind in parts:
            x[token] = parts[kind][token]
        elif kind == "zero":
            x[token] = 0
        elif kind == "hot":
            x_sf[token] *= 16
    return x, x_sf.to(device)


def _mixed_expert(case: Case, device: torch.device, e: int) -> ExpertWeights:
    made = expert(case, device, "spread" if e % 4 == 3 else "gaussian", -12, e)
    zero = 5 * e % (case.shape.intermediate // ZERO_GROUP) * ZERO_GROUP
    made.l1.codes[zero : zero + ZERO_GROUP] = 0
    return made


def _mixed_weights(case: Case, rank: int) -> Tensor:
    """Every slot another weight; some negative, some zero."""
    tokens, topk = case.tokens[rank], case.shape.topk
    weight = uniform_weights(case.seed, rank, tokens, topk).reshape(-1)
    place = sum(case.tokens[:rank]) * topk + torch.arange(tokens * topk)
    weight = torch.where(place % 11 == 4, -weight, weight)
    return torch.where(place % 23 == 7, 0.0, weight).reshape(tokens, topk)


# --- gaussian ---------------------------------------------------------------------------------------------------------


def make_gaussian(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    """Normal codes; scales of about one binade; weights in (0, 1]. Gates have a standard deviation of about 1."""
    shape, x, x_sf = case.shape, [], []
    for rank, tokens in enumerate(case.tokens):
        x.append(draw_codes(case, X_CODES, rank, "gaussian", (tokens, shape.hidden), device))
        grid = tokens, shape.hidden // BLOCK
        x_sf.append(_one_binade(case, X_SF, rank, grid, -9).to(device))

    def weights(e: int) -> ExpertWeights:
        l1, l2 = expert(case, device, "gaussian", -12, e)
        w1_sf = _one_binade(case, W1_SF, e, l1.scales.shape, first_exponent(shape.hidden) - 1)
        w2_sf = _one_binade(case, W2_SF, e, l2.scales.shape, -12)
        return ExpertWeights(l1._replace(scales=w1_sf.to(device)), l2._replace(scales=w2_sf.to(device)))

    return x, x_sf, [_positive(case, rank).to(device) for rank in range(case.ranks)], weights


def _one_binade(case: Case, purpose: int, index: int, grid: tuple[int, ...], exponent: int) -> Tensor:
    """float32 grid in [2^exponent, 2^(exponent + 1)): what a cast of one distribution gives."""
    word = philox.words(case.seed, stream(purpose, index), grid[0] * grid[1])
    return ((1 << 23 | word >> 9).to(torch.float32) * powers(exponent - 23)).reshape(grid)


def _positive(case: Case, rank: int) -> Tensor:
    return uniform_weights(case.seed, rank, case.tokens[rank], case.shape.topk)


# --- heavy tail -------------------------------------------------------------------------------------------------------


def make_heavy_tail(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    """Codes, scales and routing weights over many binades, each half as likely as the one below; outlier columns."""
    shape, x, x_sf = case.shape, [], []
    where = philox.words(case.seed, stream(CHOICE, 0), OUTLIERS) % shape.hidden
    for rank, tokens in enumerate(case.tokens):
        part = draw_codes(case, X_CODES, rank, "heavy", (tokens, shape.hidden), device)
        column = where.to(device)
        part[:, column] = part[:, column] & 0x80 | 0x7E
        x.append(part)
        grid = tokens, shape.hidden // BLOCK
        plain = scales(case.seed, stream(X_SF, rank), grid[0] * grid[1], -7).reshape(grid)
        x_sf.append((plain * _tail(case, X_SF, rank, grid, 7)).to(device))

    def weights(e: int) -> ExpertWeights:
        l1, l2 = expert(case, device, "heavy", -9, e)
        w1_sf = l1.scales * _tail(case, W1_SF, e, l1.scales.shape, 5).to(device)
        w2_sf = l2.scales * _tail(case, W2_SF, e, l2.scales.shape, 5).to(device)
        return ExpertWeights(l1._replace(scales=w1_sf), l2._replace(scales=w2_sf))

    topk_weights = []
    for rank, tokens in enumerate(case.tokens):
        tail = _tail(case, CHOICE, 1 + rank, (tokens, shape.topk), 9)
        topk_weights.append((_positive(case, rank) / tail).to(device))
    return x, x_sf, topk_weights, weights


def _tail(case: Case, purpose: int, index: int, grid: tuple[int, ...], most: int) -> Tensor:
    """float32 grid: 2^j with probability 2^-(j + 1), j up to `most`. Words after those that `scales` takes."""
    count = grid[0] * grid[1]
    word = philox.words(case.seed, stream(purpose, index), count, start=2 * count) & (1 << most) - 1
    ones = sum(((word + 1) % (1 << j) == 0).to(torch.int64) for j in range(1, most + 1))  # trailing ones
    return powers(torch.as_tensor(ones)).reshape(grid)
