"""The kernel's constants, and the shared memory of a block that follows from them. Pure."""

from __future__ import annotations

from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.toolchain.errors import ArgumentError

BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES = 128, 256, 128, 4
"""The tile of a thread block and the stages of its pipeline, gemm.cuh. One tile serves every shape."""
HALF_N = 128
"""Weight rows of a half tile, and of one chain of a math warpgroup."""
THRESHOLDS = (64, 128)
"""Rows an expert beyond which its work is shared out otherwise: by rows and not by columns; in a second pool block."""
ROLES = {"producer": 128, "math": 256}
"""Threads of each role of a thread block: the producer's warpgroup gives registers away, the two of math take them."""
THREADS = sum(ROLES.values())
NUM_DISPATCH_WARPS, STAGING_BYTES = 2, 8192
"""Dispatch warps of a thread block, and the bytes of a row that pass through the staging buffer of each at a time."""
FEW_SLOTS = 1024
"""Slots, empty ones included, up to which the thread blocks of an only rank need no barrier before rows travel."""
BOX_ROWS = 32
"""Activation rows of one TMA box: of a part-filled pool block only the boxes that hold rows are loaded."""
NUM_TASKS = 8
"""Most tasks under way in a thread block, of six numbers each."""
WAVE_BLOCKS = 24
"""Pool blocks of a wave: the tiles of GEMM 2 of a wave come after those of GEMM 1 of the next."""
RING_BLOCKS = 4 * WAVE_BLOCKS
"""Pool blocks that activations have memory for; a block takes the place of the one so many before it."""
GROUP = 64
"""Columns of L2 activations that share a scale at least: the buffer has memory for so many scales."""
GRANULARITIES = (GROUP, 128)
"""Columns of L2 activations that share a scale, the macro GRANULARITY: a cubin for each."""
MAX_RANKS, MAX_EXPERTS = 8, 512
"""Ranks of one launch, and experts of all ranks together."""
WORKSPACE_BYTES = 4 * (3 + MAX_EXPERTS)
"""sizeof(Workspace) of params.cuh, behind which the counters of the pool blocks follow."""
ALIGNMENT = 1024

GEMM_DEFINES = {
    "BLOCK_M": BLOCK_M,
    "BLOCK_N": BLOCK_N,
    "BLOCK_K": BLOCK_K,
    "NUM_STAGES": NUM_STAGES,
    "HALF_N": HALF_N,
    "NUM_MATH_WARPS": ROLES["math"] // 32,
}
"""The macros of gemm.cuh, which every program with a promoted GEMM needs."""
DEFINES = GEMM_DEFINES | {
    "MAX_RANKS": MAX_RANKS,
    "MAX_EXPERTS": MAX_EXPERTS,
    "BOX_ROWS": BOX_ROWS,
    "WAVE_BLOCKS": WAVE_BLOCKS,
    "FEW_SLOTS": FEW_SLOTS,
    "STAGING_BYTES": STAGING_BYTES,
    "NUM_DISPATCH_WARPS": NUM_DISPATCH_WARPS,
    "NUM_TASKS": NUM_TASKS,
}
"""The macros of the fused kernel, whatever its granularity. The sources take these numbers from here alone."""


class ConfigError(ArgumentError):
    """An argument that the kernel cannot take: one line that names the argument, its value and the rule."""


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


def pipeline_bytes() -> int:
    """sizeof(gemm::Pipeline): stages and their barriers."""
    stage = aligned((BLOCK_M + BLOCK_N) * BLOCK_K + BLOCK_K // GROUP * BLOCK_M * 4)
    return aligned(NUM_STAGES * stage + 2 * 8 * NUM_STAGES)


def shared_bytes() -> int:
    """sizeof(SharedStorage) of storage.cuh: the pipeline, the plan, the tasks, the staging buffers."""
    plan = 4 * (3 * MAX_EXPERTS + 2) + 2 * FEW_SLOTS
    tasks = aligned(pipeline_bytes() + plan + NUM_TASKS * 6 * 4, 8) + (3 + NUM_TASKS) * 8
    return aligned(aligned(tasks, 128) + NUM_DISPATCH_WARPS * aligned(STAGING_BYTES + 8, 128))
