"""What `fp8_mega_moe` refuses, by argument, value and rule. Pure: tensors of any device, meta included, are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megaproof.kernel.host.buffer import names_of
from megaproof.kernel.host.memory import Named, check_apart, check_plain, check_real, check_tensor, kind, wanted
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.kernel.host.transformed import FP8, ORDERS, TransformedWeights

STATS = "cumulative_local_expert_recv_stats"


def check_weights(buffer: SymmBuffer, l1s: Any, l2s: Any) -> None:
    """l1s, l2s: an entry a rank, each TransformedWeights (fp8 [E_loc, 2I, H] or [E_loc, H, I], float32 scales)."""
    e, h, i = buffer.size.experts_local, buffer.size.hidden, buffer.size.intermediate
    for matrix, values, (n, k) in (("l1", l1s, (2 * i, h)), ("l2", l2s, (h, i))):
        for name, pair in _by_rank(buffer, f"{matrix}_weights", values):
            _check_order(name, matrix, pair)
            check_tensor(name, pair[0], buffer.device, FP8, (e, n, k))
            scales = (e, n // 128, k // 128)
            check_tensor(f"{name} scales", pair[1], buffer.device, torch.float32, scales, align=4)
    check_apart(_memory(buffer), _weights(buffer, l1s, l2s))


def _check_order(name: str, matrix: str, pair: Any) -> None:
    if type(pair) in ORDERS[matrix]:
        return
    if isinstance(pair, TransformedWeights):
        raise ConfigError(f"{name} is what the transform made of {pair.matrix}; it must be made of {matrix}")
    raise ConfigError(
        f"{name} is {kind(pair)}; it must be TransformedWeights, which say their order: what "
        "transform_weights_for_mega_moe_sm90 returns, or TransformedWeights.adopt(codes, scales) of that, restored"
    )


def check_outputs(buffer: SymmBuffer, l1s: Any, l2s: Any, ys: Any, stats: Any) -> None:
    """ys: bfloat16 [T, H] a rank; stats: int32 [E_loc] or None a rank; in memory of their own, weights' included."""
    size = buffer.size
    check_views(buffer)
    for name, y in _by_rank(buffer, "y", ys):
        check_plain(name, y, wanted(torch.bfloat16, ("T", size.hidden)))
        tokens = y.shape[0] if y.dim() else 0
        check_tensor(name, y, buffer.device, torch.bfloat16, (tokens, size.hidden))
        if y.shape[0] > size.capacity:
            rule = f"the buffer holds num_max_tokens_per_rank = {size.capacity}"
            raise ConfigError(f"{name} has {y.shape[0]} tokens; {rule}")
        if y.requires_grad:
            raise ConfigError(f"{name} requires grad; it must not: a launch writes it and records no gradient")
    for name, counts in _by_rank(buffer, STATS, stats):
        if counts is not None:
            check_tensor(name, counts, buffer.device, torch.int32, (size.experts_local,), align=4)
    outputs = [*_by_rank(buffer, "y", ys), *_by_rank(buffer, STATS, stats)]
    inputs = [*_memory(buffer), *_weights(buffer, l1s, l2s)]
    check_apart([(name, tensor) for name, tensor in outputs if tensor is not None], inputs)


def check_views(buffer: SymmBuffer) -> None:
    """Raises ConfigError if a view of the inputs was given other memory, by `.data = ...` or `set_`."""
    offsets, _ = buffer.size.offsets()
    for rank in range(buffer.size.ranks):
        views = buffer.rank(rank)
        for name in names_of("inputs"):
            view, begin = getattr(views, name), views.storage.data_ptr() + offsets[name]
            if not view.is_meta and view.data_ptr() != begin:
                raise ConfigError(
                    f"sym_buffer's view {name} of rank {rank} begins at {view.data_ptr():#x}; it must stay at "
                    f"{begin:#x}, in the buffer: {name}[:] = ... writes into it"
                )


def _memory(buffer: SymmBuffer) -> list[Named]:
    """Inputs, workspace and status: a launch writes to all but the inputs."""
    ranks = range(buffer.size.ranks)
    storages = [(f"sym_buffer's memory of rank {rank}", buffer.rank(rank).storage) for rank in ranks]
    return [*storages, ("sym_buffer's status", buffer.status)]


def _weights(buffer: SymmBuffer, l1s: Any, l2s: Any) -> Iterator[Named]:
    for argument, values in (("l1_weights", l1s), ("l2_weights", l2s)):
        for name, (codes, scales) in _by_rank(buffer, argument, values):
            yield from ((name, codes), (f"{name} scales", scales))


def check_indices(buffer: SymmBuffer, tokens: Sequence[int]) -> None:
    """Reads topk_idx[:T] of every rank back: every value must be in [-1, E). tokens: T of each rank."""
    if buffer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError("check = True reads indices back, which a CUDA graph can't capture; it must be False here")
    check_real("check = True can't be")
    for rank, count in enumerate(tokens):
        idx = buffer.rank(rank).topk_idx[:count]
        bad = ((idx < -1) | (idx >= buffer.size.experts)).nonzero()
        if len(bad):
            token, slot = bad[0].tolist()
            value = idx[token, slot].item()
            where = f"topk_idx of rank {rank}, token {token}, slot {slot}"
            raise ConfigError(f"{where} = {value} must be in [-1, {buffer.size.experts})")


def _by_rank(buffer: SymmBuffer, argument: str, values: Any) -> Iterator[tuple[str, Any]]:
    """(what errors call it, the value) of every rank."""
    ranks = buffer.size.ranks
    if type(values) not in (tuple, list):
        raise ConfigError(f"{argument} is {kind(values)}; with a VirtualGroup it must be a list, one entry a rank")
    if len(values) != ranks:
        raise ConfigError(f"{argument} has {len(values)} entries; it must have one for each of {ranks} ranks")
    for rank, value in enumerate(values):
        yield argument if buffer.group is None else f"{argument} of rank {rank}", value
