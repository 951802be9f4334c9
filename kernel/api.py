"""The public functions, under the names that serving engines call; a virtual group runs all its ranks on one GPU.

1. `transform_weights_for_mega_moe_sm90` brings the weights into the order in which the kernel reads them, once.
2. `get_symm_buffer_for_mega_moe` makes the buffer that holds the inputs, once for all layers of one shape.
3. `fp8_mega_moe` computes the layer of `reference/equations.md` in one launch of `moe_sm90.cu`.

Each serves what it is given, or raises an ArgumentError: one line that names argument, value and rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host import plans, values
from megaproof.kernel.host.buffer import BufferSize, RankViews
from megaproof.kernel.host.groups import VirtualGroup, local_group
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.kernel.host.timeout import KernelTimeout
from megaproof.kernel.host.transformed import TransformedWeights, transform
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.toolchain.errors import ArgumentError, EnvironmentMissing, shown
from megaproof.toolchain.launch import require_device

__all__ = ["fp8_mega_moe", "get_symm_buffer_for_mega_moe", "transform_weights_for_mega_moe_sm90"]
__all__ += ["TIMEOUT_S", "RankViews", "Recipe", "SymmBuffer", "TransformedWeights", "VirtualGroup"]
__all__ += ["ArgumentError", "ConfigError", "EnvironmentMissing", "KernelTimeout", "RecipeError"]
TIMEOUT_S = 10.0
"""Seconds that a role of the kernel waits before it gives up; read at every call."""


def transform_weights_for_mega_moe_sm90(
    l1: tuple[Tensor, Tensor], l2: tuple[Tensor, Tensor]
) -> tuple[TransformedWeights, TransformedWeights]:
    """Brings the weights of a rank's experts into the order in which the kernel reads them.

    Gate and up rows of W1 are interleaved in groups of 8; then the bytes of both matrices are laid out in swizzled
    tiles of 128 rows x 128 columns, the rows of each in the order of kernel/host/weights.py: element [e, n, k] of a
    result is no longer weight (n, k), and `untiled` gives it back.

    Args:
        l1: (float8_e4m3fn [E_loc, 2I, H] gate rows then up rows, float32 scales [E_loc, 2I/128, H/128]); on any device.
        l2: (float8_e4m3fn [E_loc, H, I], float32 scales [E_loc, H/128, I/128]).

    Returns:
        (l1, l2), tuples (codes, scales) of the same shapes and dtypes that say their order. Codes are copies; scales
        are the tensors that were passed, or a copy where those are not contiguous.

    Raises:
        ConfigError: naming the argument, what it is and what it must be. Weights that say that they are transformed are
            refused; those of a plain tuple are taken to be as above.
    """
    return transform(l1, l2)


def get_symm_buffer_for_mega_moe(
    group: VirtualGroup | Any | None,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool | None = None,
    mma_type: str = "fp8xfp8",
    activation: str = "swiglu",
    ring_blocks: int | None = None,
) -> SymmBuffer:
    """Allocates the symmetric memory for one layer shape, on the current device; all of it is zero.

    The views of a rank are written before a call: x float8_e4m3fn [capacity, H], x_sf float32 [capacity, H/128],
    topk_idx int64 [capacity, K] (-1: the slot is empty) and topk_weights float32 [capacity, K]. With one rank they are
    attributes of the buffer, with a VirtualGroup those of `.rank(r)`.

    Args:
        group: None or a torch.distributed group of one rank: one rank. VirtualGroup(R): R ranks on this GPU.
        num_experts: E of all ranks, a multiple of R, at most 512.
        num_max_tokens_per_rank: the capacity, in tokens.
        num_topk: K, in [1, 32].
        hidden: H, a multiple of 128.
        intermediate_hidden: I, a multiple of 128.
        use_fp8_dispatch: None or True; tokens travel as FP8.
        mma_type: "fp8xfp8".
        activation: "swiglu".
        ring_blocks: pool blocks, of 128 rows each, that activations have memory for, at least 48; None: 96. No bit of y
            depends on it. A ring that holds all blocks keeps every row of l1_acts and l2_acts to be read back.

    Returns:
        The buffer, until `.destroy()`. There is one of it: it can't be copied, and its views are written, not replaced.

    Raises:
        ConfigError: naming the argument, its value and the rule that it breaks.
        EnvironmentMissing: there is no SM90 GPU, or its driver is too old.
    """
    values.choice("use_fp8_dispatch", use_fp8_dispatch, None, True)
    values.choice("mma_type", mma_type, "fp8xfp8")
    values.choice("activation", activation, "swiglu")
    ranks = 1 if (group := local_group(group)) is None else group.size
    size = BufferSize(
        ranks,
        values.integer("num_experts", num_experts),
        values.integer("num_topk", num_topk),
        values.integer("hidden", hidden),
        values.integer("intermediate_hidden", intermediate_hidden),
        values.integer("num_max_tokens_per_rank", num_max_tokens_per_rank),
        None if ring_blocks is None else values.integer("ring_blocks", ring_blocks),
    )
    size.check_fits((device := require_device()).memory)
    return SymmBuffer(group, size, torch.device("cuda", device.index))


def fp8_mega_moe(
    y: Tensor | list[Tensor],
    l1_weights: TransformedWeights | list[TransformedWeights],
    l2_weights: TransformedWeights | list[TransformedWeights],
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | list[Tensor | None] | None = None,
    recipe: tuple[int, int, int] | Recipe = values.BLOCKS,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool | None = None,
    check: bool = False,
) -> None:
    """Computes the layer in one launch on the current stream, and returns at once.

    A CUDA graph can capture the call, after a first one. Inputs and weights are never written, no gradient is recorded.
    Threads may share a buffer. Launches on one buffer run one after the other, on whatever streams; replays of a graph
    alone are put in order by the caller. Types, shapes, dtypes, devices and recipe are checked at every call; what
    passed before is not checked again.

    Args:
        y: bfloat16 [T, H], written; T, at most the buffer's capacity, is how many tokens of the inputs are read.
        l1_weights: (float8_e4m3fn [E_loc, 2I, H], float32 [E_loc, 2I/128, H/128]) of the rank's experts, as
            `transform_weights_for_mega_moe_sm90` returned it; `TransformedWeights.adopt` of the two, if restored.
        l2_weights: (float8_e4m3fn [E_loc, H, I], float32 [E_loc, H/128, I/128]), likewise.
        sym_buffer: of `get_symm_buffer_for_mega_moe`, whose views hold the inputs. With a VirtualGroup y, weights and
            statistics are lists, one entry a rank.
        cumulative_local_expert_recv_stats: int32 [E_loc]; the rows that each expert received are added. None: not kept.
        recipe: the tuple, with activation_clamp and fast_math; or a Recipe, of granularity 64 or 128, with which the
            two are left out or agree.
        activation: "swiglu".
        activation_clamp: of gate and up, a number >= 0, 0 too; None: no clamp.
        fast_math: silu by approximate reciprocal and exponential; None: True.
        check: reads the inputs' indices back and refuses values outside [-1, E); this waits for the stream, so it is
            not possible while a graph is captured. Without it such a slot counts as empty.

    Raises:
        ConfigError: naming the argument, its value and the rule that it breaks.
        RecipeError: naming the field of a Recipe that the kernel does not compute.
        EnvironmentMissing: there is no SM90 GPU, or its driver is too old.

    A role that waits in vain for longer than TIMEOUT_S leaves the launch; `sym_buffer.check()` raises KernelTimeout.
    """
    if torch.compiler.is_compiling():
        raise ConfigError("fp8_mega_moe can't be traced; it must run outside of the graph: torch.compiler.disable")
    values.choice("activation", activation, "swiglu")
    chosen = values.resolve(recipe, activation_clamp, fast_math)
    check, timeout_ns = values.flag("check", check), values.nanoseconds(TIMEOUT_S)
    if not isinstance(sym_buffer, SymmBuffer):
        raise ConfigError(f"sym_buffer = {shown(sym_buffer)} must come from get_symm_buffer_for_mega_moe")
    ys, l1s, l2s, stats = y, l1_weights, l2_weights, cumulative_local_expert_recv_stats
    if sym_buffer.group is None:
        ys, l1s, l2s, stats = (ys,), (l1s,), (l2s,), None if stats is None else (stats,)
    with sym_buffer.lock:
        sym_buffer.require()
        plans.plan_of(sym_buffer, chosen, l1s, l2s, ys, stats, check).launch(sym_buffer, timeout_ns)
