"""Numbers and choices among the arguments: what they may be, and which recipe they mean.

NumPy's scalars are taken where Python's are, since engines read sizes and clamps out of arrays. Whatever would have to
be guessed is refused: a bool as a number, a tensor, a Fraction, text.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np

from megaproof.kernel.host.sizes import ConfigError, check_recipe
from megaproof.quant.host_state import neutral
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.toolchain.errors import shown

BLOCKS = (128, 128, 128)
"""What the public call names `recipe`: the blocks that share an input scale."""
_INTS, _FLOATS, _BOOLS = (int, np.integer), (float, np.floating), (bool, np.bool_)
_NO_NUMBERS = (bool, np.timedelta64)
"""Of which Python and NumPy say that they are ints."""


def integer(name: str, value: Any) -> int:
    """The value as an int that fits 64 bits. Raises ConfigError."""
    if not isinstance(value, _INTS) or isinstance(value, _NO_NUMBERS):
        raise ConfigError(f"{name} = {shown(value)} must be an int")
    if not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{name} = {shown(value)} must be an int of 64 bits")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """The value as a bool. Raises ConfigError."""
    if not isinstance(value, _BOOLS):
        raise ConfigError(f"{name} = {shown(value)} must be a bool")
    return bool(value)


def choice(name: str, value: Any, *allowed: Any) -> None:
    """Raises ConfigError unless the value is one of the few legal ones: text, a bool or None."""
    for legal in allowed:
        if isinstance(value, type(legal)) and value == legal:
            return
    raise ConfigError(f"{name} = {shown(value)} must be {' or '.join(map(repr, allowed))}")


def nanoseconds(seconds: Any) -> int:
    """TIMEOUT_S as the kernel counts it. Raises ConfigError."""
    if type(seconds) not in (float, int) or not 1e-9 <= seconds < 1e9:
        raise ConfigError(f"TIMEOUT_S = {shown(seconds)} must be a number of seconds in [1e-9, 1e9)")
    return int(seconds * 1e9)


def resolve(recipe: Any, clamp: Any, fast_math: Any) -> Recipe:
    """The recipe that the three arguments mean. Raises ConfigError, or RecipeError for a field of a Recipe."""
    if clamp is not None and type(clamp) is not float:
        clamp = _float("activation_clamp", clamp)
    if fast_math is not None:
        fast_math = flag("fast_math", fast_math)
    if recipe is BLOCKS:
        return _resolved(None, clamp, fast_math)
    if isinstance(recipe, Recipe):
        return _resolved(recipe, clamp, fast_math)
    if isinstance(recipe, tuple | list) and all(isinstance(n, _INTS) for n in recipe) and tuple(recipe) == BLOCKS:
        return _resolved(None, clamp, fast_math)
    raise ConfigError(f"recipe = {shown(recipe)} must be {BLOCKS} or a Recipe")


def _float(name: str, value: Any) -> float:
    """A number that is no float as the float of its value; none is rounded to infinity."""
    if isinstance(value, _INTS + _FLOATS) and not isinstance(value, _NO_NUMBERS):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isinf(number) or value == number:
            return number
    raise ConfigError(f"{name} = {shown(value)} must be None or a float32 >= 0")


@lru_cache(maxsize=64)
def _resolved(recipe: Recipe | None, clamp: float | None, fast_math: bool | None) -> Recipe:
    with neutral(0):  # subnormal clamps are compared and rounded as they are
        try:
            wanted = Recipe(clamp=clamp, silu="precise" if fast_math is False else "fast")
        except RecipeError as error:
            raise ConfigError(f"activation_clamp = {clamp!r} must be None or a float32 >= 0 ({error})") from None
        if recipe is None:
            return wanted
        check_recipe(recipe)
        if clamp is not None and _float32(wanted.clamp) != _float32(recipe.clamp):
            raise ConfigError(f"activation_clamp = {clamp!r} must be left out or the recipe's clamp, {recipe.clamp!r}")
        if fast_math is not None and wanted.silu != recipe.silu:
            ours = f"the recipe's silu = {recipe.silu!r}"
            raise ConfigError(f"fast_math = {fast_math} must be left out or agree with {ours}")
        return recipe


def _float32(clamp: float | None) -> float | None:
    """The clamp as the kernel gets it."""
    return None if clamp is None else ctypes.c_float(clamp).value
