"""THE recipe: every numeric decision of the layer is one field here, and nowhere else.

Two recipes that compute different bits have different ids; two runs with the same id must agree to the last bit.
The arithmetic behind each field is written out in `reference/equations.md`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from megaproof.toolchain.errors import ArgumentError


class RecipeError(ArgumentError):
    """A recipe, shape or field value that is unknown, illegal or not built yet; names field, value and rule."""


FP32_MAX = float.fromhex("0x1.fffffep+127")
"""Largest finite float32: the layer clamps in float32."""

#: Every field but `clamp` is a choice: the values that work, then the values that are known but not built yet.
CHOICES: dict[str, tuple[tuple[str | int, ...], tuple[str | int, ...]]] = {
    "silu": (("fast", "precise"), ()),
    "activation_scale": (("ue8m0", "fp32"), ()),
    "activation_granularity": ((64, 128), ()),
    "l1_rounding": (("none", "bf16"), ()),
    "weight_fold": (("before_quantisation", "in_combine"), ()),
    "zero_group": (("clamp", "public"), ()),
    "accumulation": (("promoted",), ("rescaled", "bf16x2")),
    "combine_payload": (("bf16",), ("fp8",)),
    "weight_format": (("e4m3",), ("mxfp4",)),
    "dispatch_payload": (("e4m3",), ("e2m1",)),
}

#: Fields added after the first release, with the value that means "as before". A field at its neutral value stays out
#: of the id, so that goldens made before the field existed keep theirs.
NEUTRAL: dict[str, Any] = {}


@dataclass(frozen=True)
class Recipe:
    """One way to compute the layer, to the last bit.

    Raises `RecipeError` for an unknown or unbuilt value.
    """

    clamp: float | None = 10.0
    """Eq. (4): gate <= clamp, |up| <= clamp. None (or inf, which becomes None): no clamp."""
    silu: str = "fast"
    """Eq. (4): 'fast' = ex2.approx and rcp.approx; 'precise' = expf and an IEEE division."""
    activation_scale: str = "ue8m0"
    """Eq. (5): scale factor of a group of L2 activations. 'ue8m0' = power of two, rounded up; 'fp32' = amax / 448."""
    activation_granularity: int = 64
    """Eq. (5): columns of the intermediate dimension that share one scale factor."""
    l1_rounding: str = "none"
    """Eq. (3): rounding of gate and up before the activation: 'none' keeps fp32, 'bf16' rounds to nearest even."""
    weight_fold: str = "before_quantisation"
    """Where the routing weight enters: Eq. (4), before the amax is taken, or 'in_combine', Eq. (8)."""
    zero_group: str = "clamp"
    """Eq. (5): scale of an all-zero group: 'clamp' = 2^-126; 'public' = 0, as the public SM90 kernel stores it."""
    accumulation: str = "promoted"
    """Eq. (3), (6): 'promoted' = one fp32 fma into the sum for each scaled block."""
    combine_payload: str = "bf16"
    """Eq. (7): format in which an output row travels back to its source rank."""
    weight_format: str = "e4m3"
    """Format of W1 and W2."""
    dispatch_payload: str = "e4m3"
    """Eq. (1): format in which a token travels to its experts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "clamp", _checked_clamp(self.clamp))
        for name, (built, unbuilt) in CHOICES.items():
            value = getattr(self, name)
            if value in built and type(value) is type(built[0]):
                continue
            allowed = " | ".join(map(str, built))
            if value in unbuilt:
                raise RecipeError(f"recipe field {name} = {value!r} is known but not built yet; built: {allowed}")
            raise RecipeError(f"recipe field {name} = {value!r} is unknown; it must be one of: {allowed}")

    def fields(self) -> dict[str, Any]:
        """The decisions as plain JSON values; floats in hex, so that they round-trip exactly."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.hex() if isinstance(value, float) else value
            for name, value in values.items()
            if name not in NEUTRAL or value != NEUTRAL[name]
        }

    @property
    def recipe_id(self) -> str:
        """sha256 of the fields as sorted-key JSON: two recipes are the same if and only if their ids are."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed. Raises `RecipeError` for a field that does not exist."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise RecipeError(f"recipe has no field {name!r}; its fields: {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Recipe:
        """Inverse of `fields()`: a field left out is neutral. Raises `RecipeError` for a field that does not exist."""
        clamp = fields.get("clamp", cls.clamp)
        try:
            clamp = float.fromhex(clamp) if isinstance(clamp, str) else clamp
        except (ValueError, OverflowError) as error:
            raise RecipeError(f"recipe field clamp = {clamp!r} must be a number in hex ({error})") from None
        return cls(**NEUTRAL).replace(**dict(fields, clamp=clamp))

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields in which two recipes differ: name -> (ours, theirs)."""
        names = [field.name for field in dataclasses.fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _checked_clamp(clamp: Any) -> float | None:
    if clamp is None:
        return None
    if isinstance(clamp, bool) or not isinstance(clamp, int | float):
        raise RecipeError(f"recipe field clamp = {clamp!r} must be a number >= 0 or None")
    if clamp != clamp or clamp < 0:
        raise RecipeError(f"recipe field clamp = {clamp!r} must be >= 0 (None or inf: no clamp)")
    if clamp == math.inf:
        return None
    if clamp > FP32_MAX:
        raise RecipeError(f"recipe field clamp = {clamp!r} must be a float32 (None or inf: no clamp)")
    return float(clamp) + 0.0  # + 0.0: -0 is 0


#: Named points of the recipe space. The public kernels' own points that we can compute are here too.
RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "precise": Recipe(silu="precise"),
    "no_clamp": Recipe(clamp=None),
    "granularity_128": Recipe(activation_granularity=128),
    "fp32_scales": Recipe(activation_scale="fp32"),
    "unfused": Recipe(l1_rounding="bf16", activation_granularity=128),
    "pr323_small": Recipe(zero_group="public"),
    "weight_in_combine": Recipe(weight_fold="in_combine"),
}


def recipe(name: str) -> Recipe:
    """The named recipe. Raises `RecipeError` naming the known ones."""
    if name not in RECIPES:
        raise RecipeError(f"recipe {name!r} is unknown; known: {', '.join(RECIPES)}")
    return RECIPES[name]
