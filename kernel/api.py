"""The public functions, under the names that serving engines call; a virtual group runs all its ranks on one GPU.

`fp8_mega_moe` computes the layer of `reference/equations.md` in one launch of `moe_sm90.cu`. A call whose recipe and
weights were seen before finds its launch plan, patches y and statistics if they are others, and launches.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from itertools import chain
from operator import call, is_
from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host import checks, params
from megaproof.kernel.host.buffer import KernelTimeout, RankViews, SymmBuffer, VirtualGroup, local_group
from megaproof.kernel.host.params import KernelShape, Layout, Params, RankParams, Swiglu
from megaproof.kernel.host.sizes import THREADS, ConfigError, Problem, shared_bytes
from megaproof.kernel.host.weights import tiled, w1_rows, w2_rows
from megaproof.quant.recipe import Recipe
from megaproof.toolchain import build
from megaproof.toolchain.launch import Library, require_device, tensor_map

__all__ = [
    "ENTRIES",
    "SOURCES",
    "TIMEOUT_S",
    "ConfigError",
    "KernelShape",
    "KernelTimeout",
    "Layout",
    "Params",
    "RankParams",
    "RankViews",
    "Swiglu",
    "SymmBuffer",
    "VirtualGroup",
    "compile_moe",
    "fp8_mega_moe",
    "get_symm_buffer_for_mega_moe",
    "require_device",
    "transform_weights_for_mega_moe_sm90",
]
SOURCES = ("moe_sm90.cu",)
ENTRIES = ("moe_fast", "moe_precise")
TIMEOUT_S = 10.0
"""How long a role of the kernel waits; read at every call."""
MAX_PLANS = 256
"""Launch plans that a buffer keeps: more than a model has layers, of 3 KB each."""
MAX_OUTPUTS = 16
"""Places of y and statistics that a plan remembers as in order: an allocator gives the same few again and again."""


def defines(granularity: int) -> dict[str, int]:
    """The macros of the kernel's sources, which assert the sizes."""
    return {"SHARED_BYTES": shared_bytes(), "PARAMS_BYTES": ctypes.sizeof(Params), "GRANULARITY": granularity}


def compile_moe(granularity: int = 64) -> build.Built:
    """The gated cubin for one of `config.GRANULARITIES`; needs NVRTC but no GPU."""
    built = build.build(SOURCES, ENTRIES, defines=defines(granularity))
    build.gate(built)
    return built


@cache
def _library(granularity: int) -> Library:
    return Library(compile_moe(granularity).cubin)


# --- before the first launch ------------------------------------------------------------------------------------------


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
    """Symmetric memory for one layer shape, on the current device.

    group: None or a torch.distributed group of one rank: one rank; VirtualGroup(R): R ranks on this GPU.
    Views (a rank): x float8_e4m3fn [capacity, H], x_sf float32 [capacity, H/128], topk_idx int64 [capacity, K], with -1
    for an empty slot, topk_weights float32 [capacity, K]. Activations pass through a ring of blocks of 128 rows:
    ring_blocks of them, None: config.RING_BLOCKS. No bit depends on it; a ring that holds all blocks keeps every row,
    so that l1_acts, l2_acts and their scales can be read back. Raises ConfigError by argument, value and rule.
    """
    if use_fp8_dispatch not in (None, True):
        raise ConfigError(f"use_fp8_dispatch = {use_fp8_dispatch!r}: tokens travel as FP8 (None or True)")
    _only("mma_type", mma_type, "fp8xfp8")
    _only("activation", activation, "swiglu")
    group = local_group(group)
    sizes = {
        "num_experts": num_experts,
        "num_topk": num_topk,
        "hidden": hidden,
        "intermediate_hidden": intermediate_hidden,
        "num_max_tokens_per_rank": num_max_tokens_per_rank,
    }
    for name, size in sizes.items():
        if type(size) is not int:
            raise ConfigError(f"{name} = {size!r} must be an int")
    if ring_blocks is not None and type(ring_blocks) is not int:
        raise ConfigError(f"ring_blocks = {ring_blocks!r} must be None or an int")
    problem = Problem(1 if group is None else group.size, *sizes.values(), ring=ring_blocks)
    return SymmBuffer(group, problem, torch.device("cuda", require_device().index))


def transform_weights_for_mega_moe_sm90(
    l1: tuple[Tensor, Tensor], l2: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights in the order in which the kernel reads them, as copies of the same shapes; scales stay as they are.

    Gate and up rows of W1 are interleaved in groups of 8; then the bytes of both matrices stand in swizzled tiles of
    128 rows x 128 columns, the rows of each in the order of kernel/host/weights.py: element [e, n, k] of a result is no
    longer weight (n, k), and `untiled` gives it back. l1: (fp8 [E_loc, 2I, H] gate rows then up rows, float32
    [E_loc, 2I/128, H/128]); l2: (fp8 [E_loc, H, I], float32 [E_loc, H/128, I/128]). Raises ConfigError.
    """
    checks.check_to_transform(l1, l2)
    (w1, w1_sf), (w2, w2_sf) = l1, l2
    (_, n1, _), (_, n2, _) = w1.shape, w2.shape
    w1 = tiled(w1.view(torch.uint8), w1_rows(n1)).view(w1.dtype)
    return (w1, w1_sf), (tiled(w2.view(torch.uint8), w2_rows(n2)).view(w2.dtype), w2_sf)


def _only(name: str, value: str, allowed: str) -> None:
    if value != allowed:
        raise ConfigError(f"{name} = {value!r} must be {allowed!r}")


# --- the layer --------------------------------------------------------------------------------------------------------


def fp8_mega_moe(
    y: Tensor | list[Tensor],
    l1_weights: Any,
    l2_weights: Any,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | list[Tensor | None] | None = None,
    recipe: tuple[int, int, int] | Recipe = (128, 128, 128),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool | None = None,
    check: bool = False,
) -> None:
    """The layer in one launch on the current stream; returns at once. A CUDA graph can capture it, after a first call.

    y bfloat16 [T, H] is written; T of a rank is y.shape[0], at most the buffer's capacity. l1_weights, l2_weights: the
    transformed (fp8 [E_loc, 2I, H], float32 [E_loc, 2I/128, H/128]) and (fp8 [E_loc, H, I], float32
    [E_loc, H/128, I/128]) of the rank's experts. cumulative_local_expert_recv_stats: int32 [E_loc], added to. With a
    VirtualGroup y, weights and stats are lists, one entry a rank. recipe: the tuple, with activation_clamp (None: no
    clamp) and fast_math (None: True); or a Recipe, of granularity 64 or 128, with which the two are left out or agree.
    check: reads the inputs' indices back and refuses values outside [-1, E) (waits for the stream, so not while a graph
    is captured); that shapes, dtypes and recipe are one for all ranks is checked always.
    Raises ConfigError or RecipeError naming argument, value and rule; EnvironmentMissing without an SM90 GPU.
    """
    _only("activation", activation, "swiglu")
    chosen = checks.resolve(recipe, activation_clamp, fast_math)
    if not isinstance(sym_buffer, SymmBuffer):
        raise ConfigError(f"sym_buffer = {sym_buffer!r} must come from get_symm_buffer_for_mega_moe")
    sym_buffer.require()
    stats = cumulative_local_expert_recv_stats
    if sym_buffer.group is None:
        ys, l1s, l2s, stats = (y,), (l1_weights,), (l2_weights,), None if stats is None else (stats,)
    else:
        ys, l1s, l2s = y, l1_weights, l2_weights
    counts = (None,) * sym_buffer.problem.ranks if stats is None else stats
    try:
        weights = [*chain(*l1s, *l2s)]
        outputs = [*ys] if stats is None else [*ys, *stats]
        key = (chosen.silu, chosen.clamp, chosen.activation_granularity, *map(Tensor.data_ptr, weights))
        places = (
            *map(Tensor.data_ptr, ys),
            None if stats is None else (*[None if out is None else out.data_ptr() for out in stats],),
            *[out.shape for out in ys],
        )
    except (AttributeError, TypeError):  # no tensors, or no pairs
        checks.check_weights(sym_buffer, l1s, l2s)
        checks.check_outputs(sym_buffer, ys, counts)
        raise
    plan = sym_buffer.plans.get(key)
    known = plan is not None and plan.weights.covers(weights)
    judged = None if plan is None else plan.judged.get(places)
    in_order = judged is not None and judged.covers(outputs)
    if not known:
        checks.check_weights(sym_buffer, l1s, l2s)
    if not in_order:
        checks.check_outputs(sym_buffer, ys, counts)
    if check:
        _check_indices(sym_buffer, ys)
    if plan is None:
        plan = _Plan(sym_buffer, chosen, l1s, l2s)
        _keep(sym_buffer.plans, key, plan, MAX_PLANS)
    if not known:
        plan.weights = _Judged(weights)
    if not in_order:
        _keep(plan.judged, places, _Judged(outputs), MAX_OUTPUTS)
    if plan.places != places:
        plan.patch(places)
    plan.launch()


def _keep(kept: dict, key: tuple, value: Any, most: int) -> None:
    """Sets it; what was kept first goes first."""
    if key not in kept and len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value


class _Judged:
    """Tensors (or None) that were in order. Held weakly: a plan keeps no memory alive."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.forms = [*map(_form, tensors)]
        self.references = _references(tensors)

    def covers(self, tensors: list[Tensor | None]) -> bool:
        """Whether these, as many of them at the same addresses, are the very objects, or others of the same form.

        A tensor in memory that was freed is another object, so its form is compared. What changes in place is seen
        where its address does, and y by its shape too. A resize that keeps the address is not seen in weights and
        stats, nor are strides: the launch stays in the memory that was judged. Data swapped in place for fewer rows at
        the very same address is a caller's error that goes unseen.
        """
        if all(map(is_, map(call, self.references), tensors)):
            return True
        if self.forms != [*map(_form, tensors)]:
            return False
        self.references = _references(tensors)
        return True


def _references(tensors: list[Tensor | None]) -> list[Any]:
    """Called, each gives its tensor, or None."""
    return [type(None) if tensor is None else weakref.ref(tensor) for tensor in tensors]


def _form(tensor: Tensor | None) -> tuple | None:
    """All that is judged of a tensor beside its address, which is of one device."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _check_indices(buffer: SymmBuffer, ys: Any) -> None:
    if buffer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError("check = True reads indices back, which a CUDA graph can't capture; it must be False here")
    views = [buffer.rank(rank) for rank in range(buffer.problem.ranks)]
    checks.check_indices(buffer.problem, views, [y.shape[0] for y in ys])


class _Plan:
    """Params of one recipe and one set of weights on one buffer; y, stats and timeout are patched between launches.

    A launch copies them, so a patch never reaches an earlier one.
    """

    def __init__(self, buffer: SymmBuffer, recipe: Recipe, l1s: Any, l2s: Any) -> None:
        if buffer.template is None:
            buffer.template = _template(buffer)
        self.device = buffer.device.index or 0
        self.problem, self.entry = buffer.problem, f"moe_{recipe.silu}"
        self.granularity = recipe.activation_granularity
        self.shared = shared_bytes()
        self.params = Params.from_buffer_copy(buffer.template)
        self.grid = self.params.blocks_per_rank * buffer.problem.ranks
        self.params.swiglu = params.swiglu_of(recipe)
        self.ranks = [self.params.rank[rank] for rank in range(buffer.problem.ranks)]
        for own, l1, l2 in zip(self.ranks, l1s, l2s, strict=True):
            params.set_weights(own, l1, l2)
        self.weights = _Judged([])
        """At this plan's addresses."""
        self.places: tuple = ()
        """What the params hold: the address of each y, those of stats or None, the shape of each y."""
        self.judged: dict[tuple, _Judged] = {}
        """y and stats by their places."""

    def patch(self, places: tuple) -> None:
        """Writes what is new: mostly another y alone, and each field takes the time of a few lines of Python."""
        ranks = len(self.ranks)
        for own, pointer in zip(self.ranks, places, strict=False):
            own.y = pointer
        if self.places[ranks:] != places[ranks:]:
            stats, *shapes = places[ranks:]
            for own, counts, shape in zip(self.ranks, stats or (None,) * ranks, shapes, strict=True):
                own.stats, own.tokens = counts, shape[0]
        self.places = places

    def launch(self) -> None:
        if (device := torch.cuda.current_device()) != self.device:
            current = f"cuda:{device}"
            raise ConfigError(f"sym_buffer is on cuda:{self.device}; it must be on the current device, {current}")
        self.params.timeout_ns = int(TIMEOUT_S * 1e9)
        kernel = _library(self.granularity).kernel(self.entry)
        kernel(self.params, self.grid, THREADS, self.shared, cooperative=True, device=device)


def _template(buffer: SymmBuffer) -> Params:
    problem, sms = buffer.problem, require_device(buffer.device.index).sms
    if sms < problem.ranks:
        raise ConfigError(f"group has {problem.ranks} ranks; there must be an SM for each, and the device has {sms}")
    views = [buffer.rank(rank) for rank in range(problem.ranks)]
    return params.of_problem(problem, views, sms // problem.ranks, buffer.status, _map)


def _map(matrix: Tensor, box_rows: int) -> Any:
    return tensor_map(matrix.view(torch.uint8), box_rows)
