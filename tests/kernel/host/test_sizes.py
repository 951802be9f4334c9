"""The kernel's constants and its shared memory."""

from __future__ import annotations

import re

import pytest

from megaproof.kernel.host import sizes
from megaproof.kernel.programs import moe
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.tests.support.runs import ROOT
from megaproof.toolchain.gate import SHARED_LIMIT


def test_shared_memory_fits_a_block() -> None:
    assert (sizes.pipeline_bytes(), sizes.shared_bytes()) == (201_728, 227_328)
    assert sizes.shared_bytes() + 1024 <= SHARED_LIMIT


def test_the_sources_take_their_numbers_from_here() -> None:
    """Each macro names one constant of the sources; a number that stood in both could differ."""
    text = "".join(path.read_text() for path in sorted((ROOT / "kernel").glob("*.cuh")))
    own = {name for name, _ in re.findall(r"\bk\w+ = ([A-Z][A-Z_]+)([,;])", text)}
    assert own == {*sizes.DEFINES, "GRANULARITY"}
    for name in sizes.DEFINES:
        constant = "k" + name.title().replace("_", "")
        assert len(re.findall(rf"\b{constant} = {name}[,;]", text)) == 1
        assert len(re.findall(rf"\b{name}\b", text)) == 1
    for program in (*map(moe.moe, sizes.GRANULARITIES), moe.phases()):
        assert sizes.DEFINES.items() <= program.defines.items()


def test_recipes() -> None:
    for silu in ("fast", "precise"):
        for granularity in sizes.GRANULARITIES:
            assert sizes.check_recipe(recipe := Recipe(None, silu, activation_granularity=granularity)) is recipe
    with pytest.raises(RecipeError, match="field activation_granularity = 128 is not one that the kernel"):
        sizes.check_recipe(Recipe(activation_granularity=128), (sizes.GROUP,))
    for name in ("fp32_scales", "unfused", "pr323_small", "weight_in_combine"):
        field = next(field for field in RECIPES[name].diff(Recipe()) if field != "activation_granularity")
        with pytest.raises(RecipeError, match=f"recipe field {field} = "):
            sizes.check_recipe(RECIPES[name])
