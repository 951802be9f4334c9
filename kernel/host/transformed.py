"""Weights that say in which order they lie: no byte of them could, and in another order y would be noise."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from megaproof.kernel.host.memory import check_plain, check_real, kind
from megaproof.kernel.host.sizes import BLOCK_K, ConfigError
from megaproof.kernel.host.weights import tiled, w1_rows, w2_rows

FP8 = torch.float8_e4m3fn
PAIR = "a tuple (fp8 weights, float32 scales)"


class _Pair(NamedTuple):
    codes: Tensor
    scales: Tensor


class TransformedWeights(_Pair):
    """One matrix of a rank's experts in the order in which the kernel reads it: a tuple (codes, scales).

    codes float8_e4m3fn [E_loc, N, K], scales float32 [E_loc, N/128, K/128] of blocks of 128 x 128 weights.
    `transform_weights_for_mega_moe_sm90` makes them; copies and pytrees keep the type. A module keeps the
    two tensors: what comes back from a parameter, a state dict or a file of tensors has lost it, and `adopt` says it.
    """

    __slots__ = ()
    matrix: ClassVar[str | None] = None
    """'l1' or 'l2', whose order it is; None: adopted, so the shape alone tells."""

    @classmethod
    def adopt(cls, codes: Tensor, scales: Tensor) -> TransformedWeights:
        """States that these tensors hold what the transform returned; it cannot be seen from them.

        Args:
            codes: float8_e4m3fn [E_loc, N, K], the `codes` of a transformed matrix, restored, moved or wrapped.
            scales: float32 [E_loc, N/128, K/128], its `scales`.

        Returns:
            The two, as they are.

        Raises:
            ConfigError: naming the argument, what it is and what it must be.
        """
        check_pair("codes", codes, "scales", scales)
        return cls(codes, scales)


class _L1(TransformedWeights):
    __slots__ = ()
    matrix = "l1"


class _L2(TransformedWeights):
    __slots__ = ()
    matrix = "l2"


ORDERS: dict[str, frozenset[type]] = {
    "l1": frozenset({TransformedWeights, _L1}),
    "l2": frozenset({TransformedWeights, _L2}),
}
"""The types that may be passed for each matrix."""


def transform(l1: Any, l2: Any) -> tuple[TransformedWeights, TransformedWeights]:
    """`transform_weights_for_mega_moe_sm90`; its errors too."""
    shapes = []
    for name, pair in (("l1", l1), ("l2", l2)):
        if isinstance(pair, TransformedWeights):
            raise ConfigError(f"{name} is transformed already; it must be {PAIR} in their own order")
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise ConfigError(f"{name} is {kind(pair)}; it must be {PAIR}")
        shapes.append(check_pair(name, pair[0], f"{name} scales", pair[1]))
    (e, n, k), found = shapes
    if found != (e, k, n // 2) or n % (2 * BLOCK_K):
        raise ConfigError(
            f"l1 is {[e, n, k]} and l2 {list(found)}; they must be [E_loc, 2I, H] and [E_loc, H, I], "
            f"I a multiple of {BLOCK_K}"
        )
    check_real("l1 and l2 can't be transformed")
    return _L1(_tiled(l1[0], w1_rows(n)), l1[1].contiguous()), _L2(_tiled(l2[0], w2_rows(k)), l2[1].contiguous())


def _tiled(codes: Tensor, rows: Tensor) -> Tensor:
    return tiled(codes.detach().view(torch.uint8), rows).view(FP8)


def check_pair(name: str, codes: Any, scales_name: str, scales: Any) -> tuple[int, int, int]:
    """(E, N, K) of a matrix with one scale a block of 128 x 128, with memory. Raises ConfigError."""
    for called, tensor in ((name, codes), (scales_name, scales)):
        check_plain(called, tensor, "with memory")
        if tensor.is_meta:
            raise ConfigError(f"{called} is on meta; it must be on a device with memory")
    if codes.dtype != FP8 or codes.dim() != 3:
        found = f"{codes.dtype} {list(codes.shape)}"
        raise ConfigError(f"{name} is {found}; it must be {FP8} [E_loc, rows, columns]")
    e, n, k = codes.shape
    if not n or not k or n % BLOCK_K or k % BLOCK_K:
        raise ConfigError(f"{name} has {n} rows and {k} columns; both must be positive multiples of {BLOCK_K}")
    if not e:
        raise ConfigError(f"{name} has 0 experts; it must have at least one")
    blocks = (e, n // BLOCK_K, k // BLOCK_K)
    if scales.dtype != torch.float32 or tuple(scales.shape) != blocks:
        found = f"{scales.dtype} {list(scales.shape)}"
        raise ConfigError(
            f"{scales_name} are {found}; they must be torch.float32 {list(blocks)}, one a block of 128 x 128"
        )
    return e, n, k
