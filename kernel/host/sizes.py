"""The kernel's constants, and the shared memory of a block that follows from them. Pure."""

from __future__ import annotations

from megaproof.quant.recipe import Recipe, RecipeError

BLOCK_M, BLOCK_N, BLOCK_K, STAGES = 128, 256, 128, 4
"""The tile of a block and its ring of stages, gemm.cuh. One tile serves every shape: there is nothing to choose."""
THRESHOLDS = (64, 128)
"""Rows an expert beyond which its work is shared out otherwise: by rows and not by columns; in a second pool block."""
ROLES = {"producer": 128, "math": 256}
"""Threads of each role of a block: the producer's warpgroup gives registers away, the two of math take them."""
THREADS = sum(ROLES.values())
TURN_N = 128
"""`kHalfN` of gemm.cuh: weight rows of a half tile, and of one chain of a math warpgroup."""
DISPATCH_WARPS, TRANSIT_BYTES = 2, 8192
"""`kNumDispatchWarps` of storage.cuh and `kStagingBytes` of dispatch.cuh."""
FEW_SLOTS = 1024
"""`kFewSlots` of dispatch.cuh: slots, empty ones included, up to which the blocks of a rank alone do not meet first."""
BOX_ROWS = 32
"""Activation rows of one TMA box: a part-filled block loads only the boxes that hold rows."""
TASKS = 8
"""`kNumTasks` of storage.cuh: tasks, of six numbers each, that the producer of a block may be ahead."""
GROUP_BLOCKS = 24
"""`kWaveBlocks` of scheduler.cuh: pool blocks whose tiles of GEMM 2 come after GEMM 1's of the next so many."""
RING_BLOCKS = 4 * GROUP_BLOCKS
"""Pool blocks that activations have memory for; a block takes the place of the one so many before it."""
GROUP = 64
"""Columns of L2 activations that share a scale at least: the buffer has memory for so many scales."""
GRANULARITIES = (GROUP, 128)
"""Columns of L2 activations that share a scale, `kGranularity` of params.cuh: a cubin for each."""
MAX_RANKS, MAX_EXPERTS = 8, 512
"""`kMaxRanks` and `kMaxExperts` of params.cuh."""
WORKSPACE_BYTES = 4 * (3 + MAX_EXPERTS)
"""sizeof(Workspace) of params.cuh: what stands before the counters of the pool blocks."""
ALIGNMENT = 1024


class ConfigError(ValueError):
    """An argument that the kernel cannot take; names argument, value and rule."""


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
