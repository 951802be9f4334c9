"""The public functions, under the names that serving engines call; a virtual group runs all its ranks on one GPU.

`fp8_mega_moe` computes the layer of `reference/equations.md` in one launch of `moe_sm90.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernel import build
from kernel.config import MAX_RANKS, THREADS, ConfigError, Problem, check_recipe, shared_bytes
from kernel.launch import Library, TensorMap, require_device, tensor_map
from quant.cast import interleave_gate_up
from quant.recipe import Recipe

SOURCES = ("moe_sm90.cu",)
ENTRIES = ("moe_fast", "moe_precise")
TIMEOUT_S = 10.0
COUNTERS = {1: "blocks of the rank", 2: "ranks", 3: "rows of a pool block", 4: "L1 tiles of a pool block", 5: "a stage"}
"""`Counter` of barrier.cuh, in words."""


class KernelTimeout(RuntimeError):
    """A role waited longer than the timeout; the message says who, for what, and what it saw."""


@dataclass(frozen=True)
class VirtualGroup:
    """R ranks on one GPU, in one cooperative launch."""

    size: int


# --- structs of params.cuh --------------------------------------------------------------------------------------------


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_LAYOUT = (
    *("x", "x_sf", "topk_idx", "topk_weights", "slots", "recv_count", "recv_list", "rank_counter", "workspace"),
    *("l1_acts", "l1_acts_sf", "l2_acts", "l2_acts_sf", "pool_source", "pool_weight"),
)
_SHAPE = ("ranks", "experts", "experts_local", "topk", "hidden", "intermediate", "capacity", "pool_rows")
Layout = _struct("Layout", *((name, ctypes.c_uint64) for name in _LAYOUT))
KernelShape = _struct("KernelShape", *((name, ctypes.c_uint32) for name in _SHAPE))
Swiglu = _struct("Swiglu", ("clamp", ctypes.c_float), ("clamped", ctypes.c_uint32))
RankParams = _struct(
    "RankParams",
    *((name, TensorMap) for name in ("l1_acts", "w1", "l2_acts", "w2")),
    *((name, ctypes.c_void_p) for name in ("w1_sf", "w2_sf", "y", "stats")),
    ("tokens", ctypes.c_uint32),
    ("unused", ctypes.c_uint32 * 7),
)
Params = _struct(
    "Params",
    ("rank", RankParams * MAX_RANKS),
    ("buffer", ctypes.c_void_p * MAX_RANKS),
    ("layout", Layout),
    ("shape", KernelShape),
    ("swiglu", Swiglu),
    ("first_rank", ctypes.c_uint32),
    ("blocks_per_rank", ctypes.c_uint32),
    ("timeout_ns", ctypes.c_uint64),
    ("status", ctypes.c_void_p),
    ("padding", ctypes.c_uint8 * 8),
)


def compile_moe() -> build.Built:
    """The gated cubin; needs NVRTC but no GPU."""
    defines = {"SHARED_BYTES": shared_bytes(), "PARAMS_BYTES": ctypes.sizeof(Params)}
    built = build.build(SOURCES, ENTRIES, defines=defines)
    build.gate(built)
    return built


@cache
def _library() -> Library:
    return Library(compile_moe().cubin)


# --- the symmetric buffer ---------------------------------------------------------------------------------------------


class RankViews:
    """Views of one rank's part of the symmetric buffer; x, x_sf, topk_idx and topk_weights are the inputs."""

    def __init__(self, problem: Problem, storage: Tensor) -> None:
        self.storage = storage
        offsets, _ = problem.offsets()

        def view(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            count = torch.Size(shape).numel() * dtype.itemsize
            return storage[offsets[name] : offsets[name] + count].view(dtype).view(shape)

        t, k, h, i = problem.capacity, problem.topk, problem.hidden, problem.intermediate
        rows = problem.pool_rows
        self.x = view("x", torch.float8_e4m3fn, t, h)
        self.x_sf = view("x_sf", torch.float32, t, h // 128)
        self.topk_idx = view("topk_idx", torch.int64, t, k)
        self.topk_weights = view("topk_weights", torch.float32, t, k)
        self.l1_acts = view("l1_acts", torch.float8_e4m3fn, rows, h)
        self.l1_acts_sf = view("l1_acts_sf", torch.float32, h // 128, rows).t()
        self.l2_acts = view("l2_acts", torch.float8_e4m3fn, rows, i)
        self.l2_acts_sf = view("l2_acts_sf", torch.float32, i // 64, rows).t()
        self.slots = view("slots", torch.bfloat16, k, t, h)
        self.pool_source = view("pool_source", torch.int32, rows, 2)


class SymmBuffer:
    """Symmetric memory of a group: `.rank(r)` for each rank of a virtual group; with one rank, the views themselves."""

    def __init__(self, group: VirtualGroup | None, problem: Problem, device: torch.device) -> None:
        self.group, self.problem = group, problem
        self.offsets, self.bytes_per_rank = problem.offsets()
        storage = torch.zeros(problem.ranks, self.bytes_per_rank, dtype=torch.uint8, device=device)
        self._ranks: list[RankViews] = [RankViews(problem, part) for part in storage]
        self.status = torch.zeros(8, dtype=torch.int32, device=device)
        if group is None:
            self.__dict__.update(vars(self._ranks[0]))

    def rank(self, r: int) -> RankViews:
        """The views of rank r."""
        if not 0 <= r < self.problem.ranks:
            raise ConfigError(f"rank = {r} must be in [0, {self.problem.ranks})")
        return self._ranks[r]

    def destroy(self) -> None:
        """Frees the memory; the views are gone."""
        self._ranks.clear()

    def check(self) -> None:
        """Waits for the launches so far. Raises KernelTimeout when a role gave up waiting."""
        flag, rank, block, counter, expected, seen, *_ = self.status.tolist()
        if flag:
            self.status.zero_()
            what = COUNTERS.get(counter, "nothing known")
            raise KernelTimeout(f"rank {rank}, block {block} waited for {what}: expected {expected}, saw {seen}")


def get_symm_buffer_for_mega_moe(
    group: VirtualGroup | None,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool | None = None,
    mma_type: str = "fp8xfp8",
    activation: str = "swiglu",
) -> SymmBuffer:
    """Symmetric memory for one layer shape. group None: one rank. Raises ConfigError by argument, value and rule."""
    if use_fp8_dispatch is False:
        raise ConfigError("use_fp8_dispatch = False: tokens travel as FP8 (None or True)")
    _only("mma_type", mma_type, "fp8xfp8")
    _only("activation", activation, "swiglu")
    if group is not None and not isinstance(group, VirtualGroup):
        raise ConfigError(f"group = {group!r} must be None or a VirtualGroup")
    ranks = 1 if group is None else group.size
    problem = Problem(ranks, num_experts, num_topk, hidden, intermediate_hidden, num_max_tokens_per_rank)
    return SymmBuffer(group, problem, torch.device("cuda", torch.cuda.current_device()))


def transform_weights_for_mega_moe_sm90(
    l1: tuple[Tensor, Tensor], l2: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Interleaves gate and up rows of W1 in groups of 8; scales and W2 stay as they are.

    l1: (fp8 [E_loc, 2I, H] gate rows then up rows, float32 [E_loc, 2I/128, H/128]); l2: (fp8 [E_loc, H, I], float32).
    """
    w1, w1_sf = l1
    return (interleave_gate_up(w1.view(torch.uint8)).view(w1.dtype), w1_sf), l2


def _only(name: str, value: str, allowed: str) -> None:
    if value != allowed:
        raise ConfigError(f"{name} = {value!r} must be {allowed!r}")


# --- the layer --------------------------------------------------------------------------------------------------------


def fp8_mega_moe(
    y: Tensor | list[Tensor],
    l1_weights: Any,
    l2_weights: Any,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: Tensor | list[Tensor] | None = None,
    recipe: tuple[int, int, int] | Recipe = (128, 128, 128),
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
) -> None:
    """The layer in one launch on the current stream; returns at once.

    y bfloat16 [T, H] is written; T of a rank is y.shape[0]. l1_weights, l2_weights: the transformed (fp8, float32
    scales) of the rank's experts. With a VirtualGroup y, weights and stats are lists, one entry a rank. recipe: the
    tuple, with activation_clamp and fast_math; or a Recipe.
    Raises ConfigError or RecipeError naming argument, value and rule.
    """
    _only("activation", activation, "swiglu")
    recipe = _recipe(recipe, activation_clamp, fast_math)
    problem = sym_buffer.problem
    one = sym_buffer.group is None
    ys, l1s, l2s = ([y], [l1_weights], [l2_weights]) if one else (y, l1_weights, l2_weights)
    stats = cumulative_local_expert_recv_stats
    by_rank = [None] * problem.ranks if stats is None else [stats] if one else stats
    for name, values in (("y", ys), ("l1_weights", l1s), ("l2_weights", l2s), ("stats", by_rank)):
        if len(values) != problem.ranks:
            raise ConfigError(f"{name} has {len(values)} entries; it must have one for each of {problem.ranks} ranks")
    params = Params(
        layout=Layout(**sym_buffer.offsets),
        shape=KernelShape(**{name: getattr(problem, name) for name in _SHAPE}),
        swiglu=Swiglu(recipe.clamp or 0.0, recipe.clamp is not None),
        blocks_per_rank=require_device().sms // problem.ranks,
        timeout_ns=int(TIMEOUT_S * 1e9),
        status=sym_buffer.status.data_ptr(),
    )
    for rank in range(problem.ranks):
        params.rank[rank] = _rank_params(problem, sym_buffer.rank(rank), ys[rank], l1s[rank], l2s[rank], by_rank[rank])
        params.buffer[rank] = sym_buffer.rank(rank).storage.data_ptr()
    grid = params.blocks_per_rank * problem.ranks
    _library().kernel(f"moe_{recipe.silu}")(params, grid, THREADS, shared_bytes(), cooperative=True)


def _recipe(recipe: tuple[int, int, int] | Recipe, clamp: float | None, fast_math: bool) -> Recipe:
    if isinstance(recipe, Recipe):
        return check_recipe(recipe)
    if tuple(recipe) != (128, 128, 128):
        raise ConfigError(f"recipe = {recipe!r} must be (128, 128, 128) or a Recipe")
    return Recipe(clamp=clamp, silu="fast" if fast_math else "precise")


def _rank_params(problem: Problem, views: RankViews, y: Tensor, l1: Any, l2: Any, stats: Tensor | None) -> Any:
    (w1, w1_sf), (w2, w2_sf) = l1, l2
    e, h, i = problem.experts_local, problem.hidden, problem.intermediate
    fp8, f32 = torch.float8_e4m3fn, torch.float32
    for name, tensor, dtype, shape in (
        ("l1_weights", w1, fp8, (e, 2 * i, h)),
        ("l1_weights scales", w1_sf, f32, (e, 2 * i // 128, h // 128)),
        ("l2_weights", w2, fp8, (e, h, i)),
        ("l2_weights scales", w2_sf, f32, (e, h // 128, i // 128)),
        ("y", y, torch.bfloat16, (y.shape[0], h)),
        *([("stats", stats, torch.int32, (e,))] if stats is not None else []),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ConfigError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be contiguous {dtype} {list(shape)}"
            )
    if y.shape[0] > problem.capacity:
        raise ConfigError(f"y has {y.shape[0]} tokens; the buffer holds num_max_tokens_per_rank = {problem.capacity}")
    maps = (views.l1_acts, w1.view(-1, h), views.l2_acts, w2.view(-1, i))
    pointers = (w1_sf.data_ptr(), w2_sf.data_ptr(), y.data_ptr(), stats.data_ptr() if stats is not None else None)
    return RankParams(*(tensor_map(t.view(torch.uint8), 128) for t in maps), *pointers, y.shape[0])
