"""Sizes and offsets, computed once: the symmetric buffer of a rank and the shared memory of a block. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megaproof.quant.recipe import Recipe, RecipeError

BLOCK_M, BLOCK_N, BLOCK_K, STAGES = 128, 256, 128, 4
"""The tile of a block and its ring of stages, gemm.cuh. One tile serves every shape: there is nothing to choose."""
THRESHOLDS = (64, 128)
"""Rows an expert beyond which its work is shared out otherwise: by rows and not by columns; in a second pool block."""
THREADS = 384
TURN_N = 128
"""`kTurnN` of gemm.cuh: weight rows of a half tile, and of one chain of a math warpgroup."""
DISPATCH_WARPS, TRANSIT_BYTES = 2, 8192
"""`kDispatchWarps` of storage.cuh and `kChunk` of dispatch.cuh."""
FEW_SLOTS = 1024
"""`kFewSlots` of dispatch.cuh: slots, empty ones included, up to which the blocks of a rank alone do not meet first."""
BOX_ROWS = 32
"""Activation rows of one TMA box: a part-filled block loads only the boxes that hold rows."""
TASKS = 8
"""`kTasks` of storage.cuh: tasks, of six numbers each, that the producer of a block may be ahead."""
GROUP_BLOCKS = 24
"""`kGroupBlocks` of scheduler.cuh: pool blocks whose tiles of GEMM 2 come after GEMM 1's of the next so many."""
RING_BLOCKS = 4 * GROUP_BLOCKS
"""Pool blocks that activations have memory for; a block takes the place of the one so many before it."""
GROUP = 64
"""Columns of L2 activations that share a scale at least: the buffer has memory for so many scales."""
GRANULARITIES = (GROUP, 128)
"""Columns of L2 activations that share a scale, `kGranularity` of storage.cuh: a cubin for each."""
MAX_RANKS, MAX_EXPERTS = 8, 512
"""`kMaxRanks` and `kMaxExperts` of params.cuh."""
WORKSPACE_BYTES = 4 * (3 + MAX_EXPERTS)
"""sizeof(Workspace) of params.cuh: what stands before the counters of the pool blocks."""
ALIGNMENT = 1024
SHARED_LIMIT = 227 * 1024


class ConfigError(ValueError):
    """A problem that the kernel cannot take; names argument, value and rule."""


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """The least multiple of `to` that holds `size`."""
    return -(-size // to) * to


def check_recipe(recipe: Recipe, granularities: tuple[int, ...] = GRANULARITIES) -> Recipe:
    """The recipe, if the kernel computes it. Raises RecipeError naming the first field that it does not."""
    granularity = recipe.activation_granularity if recipe.activation_granularity in granularities else GROUP
    own = Recipe(clamp=recipe.clamp, silu=recipe.silu, activation_granularity=granularity)
    for name, (value, _) in recipe.diff(own).items():
        raise RecipeError(f"recipe field {name} = {value!r} is not one that the kernel computes")
    return recipe


def ring_bytes() -> int:
    """sizeof(gemm::Ring): stages and their barriers."""
    stage = aligned((BLOCK_M + BLOCK_N) * BLOCK_K + BLOCK_K // GROUP * BLOCK_M * 4)
    return aligned(STAGES * stage + 2 * 8 * STAGES)


def shared_bytes() -> int:
    """sizeof(SharedStorage) of storage.cuh: the ring, the plan, rows in transit."""
    plan = 4 * (3 * MAX_EXPERTS + 2) + 2 * FEW_SLOTS
    tasks = aligned(ring_bytes() + plan + TASKS * 6 * 4, 8) + (3 + TASKS) * 8
    return aligned(aligned(tasks, 128) + DISPATCH_WARPS * aligned(TRANSIT_BYTES + 8, 128))


@dataclass(frozen=True)
class Problem:
    """What a symmetric buffer is made for. Raises ConfigError."""

    ranks: int
    experts: int
    topk: int
    hidden: int
    intermediate: int
    capacity: int
    """Tokens of a rank at most."""
    ring: int | None = None
    """Pool blocks that activations have memory for; None: RING_BLOCKS, or fewer where fewer can fill."""

    def __post_init__(self) -> None:
        for name, value in (("hidden", self.hidden), ("intermediate_hidden", self.intermediate)):
            if value <= 0 or value % 128:
                raise ConfigError(f"{name} = {value} must be a positive multiple of 128")
        if not 1 <= self.ranks <= MAX_RANKS:
            raise ConfigError(f"ranks = {self.ranks} must be in [1, {MAX_RANKS}]")
        if not 0 < self.experts <= MAX_EXPERTS or self.experts % self.ranks:
            rule = f"a multiple of ranks = {self.ranks}, at most {MAX_EXPERTS}"
            raise ConfigError(f"num_experts = {self.experts} must be {rule}")
        if not 1 <= self.topk <= 32:
            raise ConfigError(f"num_topk = {self.topk} must be in [1, 32]")
        if self.capacity <= 0 or self.capacity * self.topk >= 1 << 31:
            raise ConfigError(f"num_max_tokens_per_rank = {self.capacity} must be positive, times topk below 2^31")
        if self.pool_blocks * BLOCK_M >= 1 << 32:
            raise ConfigError(f"num_max_tokens_per_rank = {self.capacity}: the ranks' slots must be below 2^32")
        if self.ring is not None and self.ring < min(2 * GROUP_BLOCKS, self.pool_blocks):
            least = min(2 * GROUP_BLOCKS, self.pool_blocks)
            raise ConfigError(f"ring_blocks = {self.ring} must be at least {least}")

    @property
    def experts_local(self) -> int:
        return self.experts // self.ranks

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool: every slot of every rank may come here, each expert's last block may be part-filled."""
        slots = self.ranks * self.capacity * self.topk
        return (slots + self.experts_local * (BLOCK_M - 1)) // BLOCK_M

    @property
    def pool_rows(self) -> int:
        return self.pool_blocks * BLOCK_M

    @property
    def ring_blocks(self) -> int:
        """Blocks that activations have memory for."""
        return min(self.pool_blocks, RING_BLOCKS if self.ring is None else self.ring)

    @property
    def ring_rows(self) -> int:
        return self.ring_blocks * BLOCK_M

    def offsets(self) -> tuple[dict[str, int], int]:
        """(name -> byte offset of each field of `Layout` in params.cuh, total bytes)."""
        t, k, h, i = self.capacity, self.topk, self.hidden, self.intermediate
        rows, ring = self.pool_rows, self.ring_rows
        workspace = WORKSPACE_BYTES + 4 * 3 * self.pool_blocks
        sizes = {
            "x": t * h,
            "x_sf": 4 * t * (h // 128),
            "topk_idx": 8 * t * k,
            "topk_weights": 4 * t * k,
            "slots": 2 * t * k * h,
            "recv_count": 4 * self.experts,
            "recv_list": 4 * self.experts * t * k,
            "rank_counter": 4,
            "workspace": workspace,
            "l1_acts": ring * h,
            "l1_acts_sf": 4 * ring * (h // 128),
            "l2_acts": ring * i,
            "l2_acts_sf": 4 * ring * (i // GROUP),
            "pool_source": 8 * rows,
            "pool_weight": 4 * rows,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name], end = end, aligned(end + size)
        return offsets, end
