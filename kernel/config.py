"""Sizes and offsets, computed once: the symmetric buffer of a rank and the shared memory of a block. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from quant.recipe import Recipe, RecipeError

BLOCK_N, BLOCK_K, THREADS = 128, 128, 384
DISPATCH_WARPS, TRANSIT_BYTES = 3, 4096
"""`kDispatchWarps` of storage.cuh and `kChunk` of dispatch.cuh."""
BOX_ROWS = 32
"""Activation rows of one TMA box: a part-filled block loads only the boxes that hold rows."""
GROUP = 64
"""Columns of L2 activations that share a scale."""
MAX_RANKS, MAX_EXPERTS = 8, 512
"""`kMaxRanks` and `kMaxExperts` of params.cuh."""
ALIGNMENT = 1024
SHARED_LIMIT = 227 * 1024


class ConfigError(ValueError):
    """A problem that the kernel cannot take; names argument, value and rule."""


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """The least multiple of `to` that holds `size`."""
    return -(-size // to) * to


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe, if the kernel computes it. Raises RecipeError naming the first field that it does not."""
    for name, (value, _) in recipe.diff(Recipe(clamp=recipe.clamp, silu=recipe.silu)).items():
        raise RecipeError(f"recipe field {name} = {value!r} is not one that the kernel computes")
    return recipe


@dataclass(frozen=True)
class Tile:
    """A tile configuration, one cubin: rows of a tile of BLOCK_N columns, and stages of the ring."""

    block_m: int
    stages: int

    def shared_bytes(self) -> int:
        """sizeof(SharedStorage) of storage.cuh: the ring, its barriers, the plan, rows in transit."""
        stage = aligned((self.block_m + BLOCK_N) * BLOCK_K + BLOCK_K // GROUP * self.block_m * 4)
        plan = aligned(self.stages * stage + 2 * 8 * self.stages + 4 * (3 * MAX_EXPERTS + 1), 128)
        return aligned(plan + DISPATCH_WARPS * aligned(TRANSIT_BYTES + 8, 128))


TILES = (Tile(128, 6), Tile(256, 4))
TALL_FROM = 112
"""Rows an expert, on average, from which the tall tile is faster on an H200: it reads the weights half as often.

By events, just before the last change of gemm.cuh; short against tall, us: 96 rows 353.7, 352.7 (flash T 512) and 1184,
1199 (pro T 768); 120 rows 424, 396 (flash T 640); 128 rows 1667, 1420 (pro T 1024).
"""


def choose_tile(problem: Problem, tokens: int) -> Tile:
    """The tile for the largest number of tokens of a rank: by the rows that an expert gets when all are alike."""
    rows = tokens * problem.topk * problem.ranks / problem.experts
    return TILES[rows >= TALL_FROM]


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

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate"):
            value = getattr(self, name)
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

    @property
    def experts_local(self) -> int:
        return self.experts // self.ranks

    @property
    def pool_rows(self) -> int:
        """Rows of the pool: every slot of every rank may come here, and each expert's last block may be part-filled."""
        slots = self.ranks * self.capacity * self.topk
        tallest = max(tile.block_m for tile in TILES)
        return aligned(slots + self.experts_local * (tallest - 1), tallest)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool under the smallest tile: one counter of each kind for each."""
        return self.pool_rows // min(tile.block_m for tile in TILES)

    def offsets(self) -> tuple[dict[str, int], int]:
        """(name -> byte offset of each field of `Layout` in params.cuh, total bytes)."""
        t, k, h, i = self.capacity, self.topk, self.hidden, self.intermediate
        rows = self.pool_rows
        workspace = 4 * (4 + MAX_EXPERTS + 2 * self.pool_blocks)
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
            "l1_acts": rows * h,
            "l1_acts_sf": 4 * rows * (h // 128),
            "l2_acts": rows * i,
            "l2_acts_sf": 4 * rows * (i // GROUP),
            "pool_source": 8 * rows,
            "pool_weight": 4 * rows,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name], end = end, aligned(end + size)
        return offsets, end
