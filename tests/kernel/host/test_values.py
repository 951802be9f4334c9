"""Numbers and choices: what is taken for what it is, and what would have to be guessed."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from megaproof.kernel import api
from megaproof.kernel.host import values
from megaproof.kernel.host.sizes import ConfigError
from megaproof.quant.recipe import Recipe
from megaproof.tests.support.fake_call import FakeLibrary, call, installed

GUESSES = [True, np.bool_(True), "10", b"10", 10j, Fraction(10), Decimal(10), np.timedelta64(10), np.array(10.0)]
GUESSES += [torch.tensor(10), torch.tensor(10.0), [10], (10,), {10}, np.array([10])]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


@pytest.mark.parametrize(
    "clamp", [10, np.float32(10), np.float64(10), np.float16(10), np.int64(10), np.uint8(10)], ids=repr
)
def test_a_clamp_is_any_real_number(library: FakeLibrary, clamp: Any) -> None:
    for recipe in (values.BLOCKS, Recipe(clamp=10.0)):
        api.fp8_mega_moe(**call(), activation_clamp=clamp, recipe=recipe)
    found = [(params.swiglu.clamp, params.swiglu.is_clamped) for _, params, _ in library.launches]
    assert found == [(10.0, 1)] * 2


@pytest.mark.parametrize("clamp", [*GUESSES, np.longdouble("1e4000"), 10**400, -1, np.float32("nan")], ids=repr)
def test_a_clamp_is_not_guessed(library: FakeLibrary, clamp: Any) -> None:
    with pytest.raises(ConfigError, match=r"^activation_clamp = .* must be None or a float32 >= 0.*$"):
        api.fp8_mega_moe(**call(), activation_clamp=clamp)
    assert not library.launches


def test_a_clamp_agrees_with_a_recipe_if_the_kernel_computes_the_same() -> None:
    """As float32: 0.1 is the same clamp whether it was rounded before."""
    tenth = Recipe(clamp=0.1)
    assert values.resolve(tenth, np.float32(0.1), None) is tenth
    assert values.resolve(tenth, 0.1, None) is tenth
    unclamped = Recipe(clamp=None)
    assert values.resolve(unclamped, np.float32("inf"), None) is unclamped
    for recipe, clamp in ((tenth, 0.2), (Recipe(clamp=10.0), 0), (Recipe(clamp=10.0), float("inf")), (unclamped, 10)):
        with pytest.raises(ConfigError, match=r"^activation_clamp = .* must be left out or the recipe's clamp, .*$"):
            values.resolve(recipe, clamp, None)


def test_a_clamp_of_zero_is_a_clamp(library: FakeLibrary) -> None:
    """Not the absence of one: alone it is taken, and beside a Recipe of another clamp it is refused."""
    for zero in (0, 0.0, -0.0, np.float32(0)):
        assert values.resolve(values.BLOCKS, zero, None).clamp == 0.0
        with pytest.raises(
            ConfigError, match=r"activation_clamp = -?0\.0 must be left out or the recipe's clamp, 10\.0"
        ):
            api.fp8_mega_moe(**call(), recipe=Recipe(), activation_clamp=zero)
    api.fp8_mega_moe(**call(), recipe=Recipe(clamp=0.0), activation_clamp=0)
    ((_, params, _),) = library.launches
    assert (params.swiglu.clamp, params.swiglu.is_clamped) == (0.0, 1)


@pytest.mark.parametrize(
    "size", [*GUESSES, 10.0, np.float32(10), None, 1 << 63, 10**5000], ids=lambda size: type(size).__name__
)
def test_a_size_is_not_guessed(size: Any) -> None:
    assert values.integer("hidden", np.int64(128)) == values.integer("hidden", 128) == 128
    assert type(values.integer("hidden", np.uint8(128))) is int
    with pytest.raises(ConfigError, match=r"^hidden = .* must be an int( of 64 bits)?$"):
        values.integer("hidden", size)


@pytest.mark.parametrize(
    "recipe",
    [
        *(
            128,
            "128",
            (128, 128),
            (128, 128, 128, 128),
            (128.0, 128, 128),
            (True, 128, 128),
            {128},
            None,
            torch.Size([]),
        ),
        *(np.array([128, 128, 128]), torch.tensor([128, 128, 128]), (torch.tensor(128), 128, 128), "default"),
    ],
    ids=repr,
)
def test_a_recipe_is_not_guessed(recipe: Any) -> None:
    for taken in (values.BLOCKS, (128, 128, 128), [128, 128, 128], (np.int64(128), 128, 128)):
        assert values.resolve(taken, None, None) == Recipe(clamp=None)
    with pytest.raises(ConfigError, match=r"^recipe = .* must be \(128, 128, 128\) or a Recipe$"):
        values.resolve(recipe, None, None)


def test_flags_and_choices() -> None:
    assert [values.flag("check", value) for value in (True, np.bool_(False))] == [True, False]
    for wrong in (1, 0, None, "no", torch.tensor(True)):
        with pytest.raises(ConfigError, match=r"^check = .* must be a bool$"):
            values.flag("check", wrong)
    values.choice("use_fp8_dispatch", True, None, True)
    values.choice("activation", np.str_("swiglu"), "swiglu")
    for wrong in (1, "True", np.array([True]), False):
        with pytest.raises(ConfigError, match=r"^use_fp8_dispatch = .* must be None or True$"):
            values.choice("use_fp8_dispatch", wrong, None, True)
