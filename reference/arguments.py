"""What the layer accepts. Everything else is refused by an error that names argument, value and rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.quant.recipe import Recipe
from megaproof.reference.operands import FORMATS, ExpertWeights, Weights
from megaproof.toolchain.errors import ArgumentError, shown

BLOCK = 128
"""Columns of a token, and rows and columns of a weight block, that share one input scale."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Another subclass may have no memory, or mean other values than it holds."""


@dataclass(frozen=True)
class Dimensions:
    """The dimensions that the arguments agree on."""

    ranks: int
    hidden: int
    topk: int
    experts: int
    tokens: tuple[int, ...]
    """Tokens of each rank."""
    device: torch.device

    @property
    def experts_per_rank(self) -> int:
        return self.experts // self.ranks


def check(
    recipe: Recipe,
    x: Sequence[Tensor],
    x_sf: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    experts: int | None,
    stats: Sequence[Tensor] | None,
) -> Dimensions:
    """The problem's dimensions, or `ArgumentError`. experts None: read from stats, else the least that R divides."""
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"recipe = {shown(recipe)} must be a megaproof.quant.recipe.Recipe")
    if isinstance(x, list | tuple) and not x:
        raise ArgumentError("x = [] must hold one tensor a rank, at least one")
    ranks = len(topk_idx) if isinstance(x, Tensor) or x is None else len(x)
    by_rank = {"x": x, "x_sf": x_sf, "topk_idx": topk_idx, "topk_weights": topk_weights}
    if stats is not None:
        by_rank["stats"] = stats
    for name, tensors in by_rank.items():
        if not isinstance(tensors, list | tuple) or len(tensors) != ranks:
            raise ArgumentError(f"{name} must be a list of {ranks} tensors, one a rank, as x is")

    hidden, topk = _last_dim("x[0]", x[0]), _last_dim("topk_idx[0]", topk_idx[0])
    if hidden == 0 or hidden % BLOCK:
        raise ArgumentError(f"x[0] has hidden = {hidden}; it must be a positive multiple of {BLOCK}")
    if not 1 <= topk <= 32:
        raise ArgumentError(f"topk_idx[0] has topk = {topk}; it must be in [1, 32]")
    for rank in range(ranks):
        _last_dim(f"x[{rank}]", x[rank])
        tokens = x[rank].shape[0]
        _tensor(f"x[{rank}]", x[rank], torch.uint8, (tokens, hidden))
        _tensor(f"x_sf[{rank}]", x_sf[rank], torch.float32, (tokens, hidden // BLOCK))
        _tensor(f"topk_idx[{rank}]", topk_idx[rank], torch.int64, (tokens, topk))
        _tensor(f"topk_weights[{rank}]", topk_weights[rank], torch.float32, (tokens, topk))

    experts = _experts(experts, ranks, topk_idx, stats)
    for rank, idx in enumerate(topk_idx):
        wrong = (idx < -1) | (idx >= experts)
        if bool(wrong.any()):
            token, slot = (int(v) for v in wrong.nonzero()[0])
            value = int(idx[token, slot])
            raise ArgumentError(f"topk_idx[{rank}][{token}, {slot}] = {value} must be -1 (masked) or in [0, {experts})")
    if stats is not None:
        for rank in range(ranks):
            _tensor(f"stats[{rank}]", stats[rank], torch.int32, (experts // ranks,))
    return Dimensions(ranks, hidden, topk, experts, tuple(t.shape[0] for t in x), x[0].device)


def check_weights(recipe: Recipe, e: int, found: ExpertWeights, hidden: int) -> None:
    """Raises `ArgumentError` when what weights(e) returned does not fit the layer."""
    if not isinstance(found, ExpertWeights):
        raise ArgumentError(f"weights({e}) must return megaproof.reference.operands.ExpertWeights, two operands")
    intermediate = _last_dim(f"weights({e}) l2.codes", found.l2.codes)
    if intermediate == 0 or intermediate % BLOCK:
        raise ArgumentError(f"weights({e}): intermediate = {intermediate} must be a positive multiple of {BLOCK}")
    for name, operand, rows, columns in (
        ("l1", found.l1, 2 * intermediate, hidden),
        ("l2", found.l2, hidden, intermediate),
    ):
        if operand.format != FORMATS[recipe.weight_format]:
            said = getattr(operand.format, "name", operand.format)
            raise ArgumentError(f"weights({e}) {name}.format is {said}; the recipe's is {recipe.weight_format}")
        _tensor(f"weights({e}) {name}.codes", operand.codes, torch.uint8, (rows, columns))
        _tensor(f"weights({e}) {name}.scales", operand.scales, torch.float32, (rows // BLOCK, columns // BLOCK))


def check_source(weights: Weights) -> None:
    """Raises `ArgumentError` unless weights can be called."""
    if not callable(weights):
        raise ArgumentError(f"weights = {shown(weights)} must be a function of the expert, see operands.Weights")


def check_same_width(e: int, intermediate: int, first: int) -> None:
    """Raises `ArgumentError` when an expert's I is not that of the experts before it."""
    if intermediate != first:
        raise ArgumentError(f"weights({e}): intermediate = {intermediate} must be {first}, as the other experts' is")


def _experts(experts: int | None, ranks: int, topk_idx: Sequence[Tensor], stats: Sequence[Tensor] | None) -> int:
    if experts is None and stats is not None:
        if not isinstance(stats[0], Tensor) or stats[0].dim() != 1:
            raise ArgumentError(f"stats[0] is {_describe(stats[0])}; it must be torch.int32 [experts / ranks]")
        experts = ranks * stats[0].shape[0]
    if experts is None:
        largest = max((int(idx.max()) for idx in topk_idx if idx.numel()), default=-1)
        experts = max(1, -(-(largest + 1) // ranks)) * ranks
    if not isinstance(experts, int) or experts <= 0 or experts % ranks:
        raise ArgumentError(f"experts = {shown(experts)} must be a positive multiple of the number of ranks, {ranks}")
    return experts


def _last_dim(name: str, tensor: Tensor) -> int:
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        raise ArgumentError(f"{name} must be a 2-D tensor, not {_describe(tensor)}")
    return tensor.shape[-1]


def _tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name} is {_describe(tensor)}; it must be {dtype} {list(shape)}")
    if type(tensor) not in PLAIN or tensor.is_meta or tensor.layout != torch.strided:
        where = f"a {type(tensor).__name__} on {tensor.device}, {tensor.layout}"
        raise ArgumentError(f"{name} is {where}; it must be a plain strided tensor with memory")
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
