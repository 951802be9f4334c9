"""Dimensions of a MoE layer, and the presets that the cases are made of."""

from __future__ import annotations

from dataclasses import dataclass

from megaproof.quant.recipe import RecipeError


@dataclass(frozen=True)
class Shape:
    """Dimensions of one MoE layer. Raises `RecipeError` when a dimension breaks a rule of the layer."""

    name: str
    hidden: int
    """H: columns of x and y; a multiple of 128."""
    intermediate: int
    """I: columns between the two GEMMs; a multiple of 128."""
    experts: int
    """E: experts over all ranks."""
    topk: int
    """K: slots of a token; at most 32."""

    def __post_init__(self) -> None:
        for field in ("hidden", "intermediate"):
            value = getattr(self, field)
            if not isinstance(value, int) or value <= 0 or value % 128:
                raise RecipeError(f"shape {self.name}: {field} = {value} must be a positive multiple of 128")
        if self.experts <= 0:
            raise RecipeError(f"shape {self.name}: experts = {self.experts} must be positive")
        if not 1 <= self.topk <= min(32, self.experts):
            raise RecipeError(f"shape {self.name}: topk = {self.topk} must be in [1, min(32, experts)]")

    def experts_per_rank(self, ranks: int) -> int:
        """E_loc = E / R. Raises `RecipeError` when R does not divide E."""
        if ranks <= 0 or self.experts % ranks:
            raise RecipeError(f"ranks = {ranks} must divide experts = {self.experts} (shape {self.name})")
        return self.experts // ranks


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("smoke", hidden=512, intermediate=256, experts=16, topk=4),
        Shape("dsv4_flash", hidden=4096, intermediate=2048, experts=256, topk=6),
        Shape("dsv4_pro", hidden=7168, intermediate=3072, experts=384, topk=6),
        Shape("mimo_pro", hidden=6144, intermediate=2048, experts=384, topk=8),
        Shape("glm", hidden=4096, intermediate=2048, experts=288, topk=8),
    )
}


def shape(name: str) -> Shape:
    """The named shape preset. Raises `RecipeError` naming the known ones."""
    if name not in SHAPES:
        raise RecipeError(f"shape {name!r} is unknown; known: {', '.join(SHAPES)}")
    return SHAPES[name]
