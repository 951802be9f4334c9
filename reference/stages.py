"""The stages of the layer: one row each, in the order in which they are computed and compared.

Everything that is known of a stage is here: its equation, how its elements are stored, what its rows and columns are,
where it lies and who reads it. The trace, the comparison, the goldens, the reports and the adapters take it from here.
A new stage is a row here, the line of reference/layer.py that computes it, and each adapter that can show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megaproof.quant.cast import BLOCK
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.quant.stored import BF16_VALUES, E4M3_CODES, FP32_VALUES, INT32_COUNTS, Stored

Format = Callable[[Recipe], Stored]


@dataclass(frozen=True)
class Stage:
    """One stage of the trace."""

    name: str
    equation: str
    """The equations of reference/equations.md that lead from the stages before to this one."""
    format: Format
    """How its elements are stored under a recipe."""
    columns: Literal["hidden", "intermediate"] | None
    """The dimension of the layer along its columns; None: the stage is a vector."""
    rows: Literal["slot", "token", "expert"]
    """What a row belongs to. Slots are the active ones, in (source rank, token, slot) order; tokens and experts stand
    rank after rank."""
    lives: Literal["pool", "combine buffer", "output"]
    """The pool is on the rank of the row's expert, the combine buffer on the token's own rank. Outputs are returned by
    rank: every kernel has them, whereas the other stages are shown by a kernel that can."""
    read_by: Literal[1, 2] | None = None
    """The GEMM that reads its rows along K."""
    covers: Callable[[Recipe], int] | None = None
    """Of a stage of scale factors: columns of the dimension that share one."""

    def span(self, recipe: Recipe) -> int:
        """Columns of the dimension that one column of the stage stands for."""
        return self.covers(recipe) if self.covers else 1

    def width(self, shape: Shape, recipe: Recipe) -> int:
        """Columns of the stage; 1 for a vector."""
        return getattr(shape, self.columns) // self.span(recipe) if self.columns else 1

    @property
    def is_of_y(self) -> bool:
        """Whether its columns are those of y."""
        return self.columns == "hidden" and self.read_by is None


def _always(stored: Stored) -> Format:
    return lambda recipe: stored


_PAYLOADS = {"e4m3": E4M3_CODES, "bf16": BF16_VALUES}

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="l1_acts",
            equation="Eq. (1) dispatch",
            format=lambda recipe: _PAYLOADS[recipe.dispatch_payload],
            columns="hidden",
            rows="slot",
            lives="pool",
            read_by=1,
        ),
        Stage(
            name="l1_acts_sf",
            equation="Eq. (1) dispatch",
            format=_always(FP32_VALUES),
            columns="hidden",
            rows="slot",
            lives="pool",
            read_by=1,
            covers=lambda recipe: BLOCK,
        ),
        Stage(
            name="l2_acts",
            equation="Eq. (2)-(5) GEMM 1, SwiGLU, re-quantisation: codes",
            format=_always(E4M3_CODES),
            columns="intermediate",
            rows="slot",
            lives="pool",
            read_by=2,
        ),
        Stage(
            name="l2_acts_sf",
            equation="Eq. (2)-(5) GEMM 1, SwiGLU, re-quantisation: scale factors",
            format=_always(FP32_VALUES),
            columns="intermediate",
            rows="slot",
            lives="pool",
            read_by=2,
            covers=lambda recipe: recipe.activation_granularity,
        ),
        Stage(
            name="slots",
            equation="Eq. (6), (7) GEMM 2, output row",
            format=lambda recipe: _PAYLOADS[recipe.combine_payload],
            columns="hidden",
            rows="slot",
            lives="combine buffer",
        ),
        Stage("y", "Eq. (8) combine", _always(BF16_VALUES), "hidden", "token", "output"),
        Stage("stats", "Eq. (9) statistics", _always(INT32_COUNTS), None, "expert", "output"),
    )
}
"""Name -> stage, in order."""

POOL_STAGES = tuple(name for name, stage in STAGES.items() if stage.lives == "pool")
SHOWN = tuple(name for name, stage in STAGES.items() if stage.lives != "output")
"""Names of the stages that an adapter may show. The outputs it must return."""
OUTPUTS = tuple(name for name, stage in STAGES.items() if stage.lives == "output")
