"""What `fp8_mega_moe` refuses, by argument, value and rule. Pure: tensors of any device, meta included, are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host.sizes import BLOCK_K, ConfigError, check_recipe
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.quant.recipe import Recipe, RecipeError

STATS = "cumulative_local_expert_recv_stats"
ALIGNED = 16
"""Bytes: TMA reads weights, and y is written, at addresses that are multiples of this."""


def resolve(recipe: Any, clamp: Any, fast_math: Any) -> Recipe:
    """The recipe that the three arguments mean. Raises ConfigError, or RecipeError for a field of a Recipe."""
    try:
        return _resolved(recipe if isinstance(recipe, Recipe) else tuple(recipe), clamp, fast_math)
    except TypeError:  # not iterable, or not hashable
        raise ConfigError(
            f"recipe = {recipe!r}, activation_clamp = {clamp!r}, fast_math = {fast_math!r} must be (128, 128, 128) or "
            "a Recipe, a number >= 0 or None, and a bool or None"
        ) from None


@lru_cache(maxsize=64, typed=True)
def _resolved(recipe: Recipe | tuple[int, ...], clamp: float | None, fast_math: bool | None) -> Recipe:
    if fast_math is not None and not isinstance(fast_math, bool):
        raise ConfigError(f"fast_math = {fast_math!r} must be a bool, or None")
    try:
        wanted = Recipe(clamp=clamp, silu="precise" if fast_math is False else "fast")
    except RecipeError as error:
        raise ConfigError(f"activation_clamp = {clamp!r} must be None or a float32 >= 0 ({error})") from None
    if not isinstance(recipe, Recipe):
        if recipe != (128, 128, 128):
            raise ConfigError(f"recipe = {recipe!r} must be (128, 128, 128) or a Recipe")
        return wanted
    check_recipe(recipe)
    if clamp is not None and wanted.clamp != recipe.clamp:
        raise ConfigError(f"activation_clamp = {clamp!r} must be left out or the recipe's clamp, {recipe.clamp!r}")
    if fast_math is not None and wanted.silu != recipe.silu:
        raise ConfigError(f"fast_math = {fast_math} must be left out or agree with the recipe's silu = {recipe.silu!r}")
    return recipe


def check_weights(buffer: SymmBuffer, l1s: Any, l2s: Any) -> None:
    """l1s, l2s: an entry a rank, each (fp8 [E_loc, 2I, H] or [E_loc, H, I], float32 scales of 128x128 blocks)."""
    e, h, i = buffer.size.experts_local, buffer.size.hidden, buffer.size.intermediate
    for argument, values, (n, k) in (("l1_weights", l1s, (2 * i, h)), ("l2_weights", l2s, (h, i))):
        for name, pair in _by_rank(buffer, argument, values):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"{name} is {_kind(pair)}; it must be a tuple (fp8 weights, float32 scales)")
            _check_tensor(buffer, name, pair[0], torch.float8_e4m3fn, (e, n, k))
            _check_tensor(buffer, f"{name} scales", pair[1], torch.float32, (e, n // 128, k // 128), align=4)


def check_to_transform(l1: Any, l2: Any) -> None:
    """l1, l2: (fp8 [E, 2I, H], float32 [E, 2I/128, H/128]) and (fp8 [E, H, I], float32 [E, H/128, I/128])."""
    shapes = []
    for name, pair in (("l1", l1), ("l2", l2)):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair):
            raise ConfigError(f"{name} is {_kind(pair)}; it must be a tuple (fp8 weights, float32 scales)")
        w, sf = pair
        if w.dtype != torch.float8_e4m3fn or w.dim() != 3:
            raise ConfigError(
                f"{name} is {w.dtype} {list(w.shape)}; it must be torch.float8_e4m3fn [E_loc, rows, columns]"
            )
        e, n, k = w.shape
        if n % BLOCK_K or k % BLOCK_K:
            raise ConfigError(f"{name} has {n} rows and {k} columns; both must be multiples of {BLOCK_K}")
        blocks = (e, n // BLOCK_K, k // BLOCK_K)
        if sf.dtype != torch.float32 or tuple(sf.shape) != blocks:
            found = f"{sf.dtype} {list(sf.shape)}"
            raise ConfigError(
                f"{name} scales are {found}; they must be torch.float32 {list(blocks)}, one a block of 128 x 128"
            )
        shapes.append((e, n, k))
    (e, n, k), second = shapes
    if second != (e, k, n // 2) or n % (2 * BLOCK_K):
        raise ConfigError(
            f"l1 is {[e, n, k]} and l2 {list(second)}; they must be [E_loc, 2I, H] and [E_loc, H, I], "
            f"I a multiple of {BLOCK_K}"
        )


def check_outputs(buffer: SymmBuffer, ys: Any, stats: Any) -> None:
    """ys: bfloat16 [T, H] a rank, in memory of their own; stats: int32 [E_loc] or None a rank."""
    size = buffer.size
    for name, y in _by_rank(buffer, "y", ys):
        tokens: Any = y.shape[0] if isinstance(y, Tensor) and y.dim() else "T"
        _check_tensor(buffer, name, y, torch.bfloat16, (tokens, size.hidden))
        if y.shape[0] > size.capacity:
            rule = f"the buffer holds num_max_tokens_per_rank = {size.capacity}"
            raise ConfigError(f"{name} has {y.shape[0]} tokens; {rule}")
    _check_disjoint("y", ys)
    _check_outside(buffer, "y", ys)
    for name, counts in _by_rank(buffer, STATS, stats):
        if counts is not None:
            _check_tensor(buffer, name, counts, torch.int32, (size.experts_local,), align=4)
    _check_disjoint(STATS, stats)
    _check_outside(buffer, STATS, stats)


def _check_disjoint(name: str, tensors: Sequence[Tensor | None]) -> None:
    real = [(rank, t) for rank, t in enumerate(tensors) if t is not None and t.numel() and not t.is_meta]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, rank) for rank, t in real)
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            others = f"{name} of rank {first}"
            raise ConfigError(f"{name} of rank {second} overlaps {others}; each rank must have its own memory")


def _check_outside(buffer: SymmBuffer, name: str, tensors: Sequence[Tensor | None]) -> None:
    """Inputs and workspace stay: no output is in the symmetric memory of a rank."""
    for rank in range(buffer.size.ranks):
        storage = buffer.rank(rank).storage
        for tensor in tensors:
            if tensor is None or tensor.is_meta or not tensor.numel():
                continue
            if (
                storage.data_ptr() < tensor.data_ptr() + tensor.nbytes
                and tensor.data_ptr() < storage.data_ptr() + storage.nbytes
            ):
                raise ConfigError(f"{name} lies in sym_buffer's memory of rank {rank}; it must have its own")


def check_indices(buffer: SymmBuffer, tokens: Sequence[int]) -> None:
    """Reads topk_idx[:T] of every rank back: every value must be in [-1, E). tokens: T of each rank."""
    if buffer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError("check = True reads indices back, which a CUDA graph can't capture; it must be False here")
    for rank, count in enumerate(tokens):
        idx = buffer.rank(rank).topk_idx[:count]
        bad = ((idx < -1) | (idx >= buffer.size.experts)).nonzero()
        if len(bad):
            token, slot = bad[0].tolist()
            value = idx[token, slot].item()
            where = f"topk_idx of rank {rank}, token {token}, slot {slot}"
            raise ConfigError(f"{where} = {value} must be in [-1, {buffer.size.experts})")


def check_choice(name: str, value: str, allowed: str) -> None:
    """An argument that has one legal value."""
    if value != allowed:
        raise ConfigError(f"{name} = {value!r} must be {allowed!r}")


def check_ints(sizes: Mapping[str, Any], ring_blocks: Any) -> None:
    """Sizes of a buffer, by argument, are ints; what values they may have, `BufferSize` checks."""
    for name, size in sizes.items():
        if type(size) is not int:
            raise ConfigError(f"{name} = {size!r} must be an int")
    if ring_blocks is not None and type(ring_blocks) is not int:
        raise ConfigError(f"ring_blocks = {ring_blocks!r} must be None or an int")


def _by_rank(buffer: SymmBuffer, argument: str, values: Any) -> Iterator[tuple[str, Any]]:
    """(what errors call it, the value) of every rank."""
    ranks = buffer.size.ranks
    if not isinstance(values, tuple | list):
        raise ConfigError(f"{argument} is {_kind(values)}; with a VirtualGroup it must be a list, one entry a rank")
    if len(values) != ranks:
        raise ConfigError(f"{argument} has {len(values)} entries; it must have one for each of {ranks} ranks")
    for rank, value in enumerate(values):
        yield argument if buffer.group is None else f"{argument} of rank {rank}", value


def _check_tensor(
    buffer: SymmBuffer, name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], align: int = ALIGNED
) -> None:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is {_kind(tensor)}; it must be a tensor, {_wanted(dtype, shape)}")
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        found = f"{tensor.dtype} {list(tensor.shape)}{strides}"
        raise ConfigError(f"{name} is {found}; it must be {_wanted(dtype, shape)}")
    if tensor.device != buffer.device:
        raise ConfigError(f"{name} is on {tensor.device}; it must be on the buffer's device, {buffer.device}")
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    if not tensor.is_meta and (held := tensor.untyped_storage().nbytes()) < end:
        raise ConfigError(
            f"{name} ends at byte {end} of a storage of {held}; its memory must be there, and was let go of"
        )
    if tensor.data_ptr() % align:
        raise ConfigError(f"{name} begins at {tensor.data_ptr():#x}; its address must be a multiple of {align}")


def _wanted(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"contiguous {dtype} [{', '.join(map(str, shape))}]"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
