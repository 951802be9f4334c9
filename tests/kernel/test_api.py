"""The public names of the kernel: what is there, what it takes, and that its docstring says so."""

from __future__ import annotations

import inspect

import pytest

from megaproof.kernel import api

CALLS = ("fp8_mega_moe", "get_symm_buffer_for_mega_moe", "transform_weights_for_mega_moe_sm90")


def test_names_of_the_public_call() -> None:
    names = "y l1_weights l2_weights sym_buffer cumulative_local_expert_recv_stats recipe activation activation_clamp"
    assert list(inspect.signature(api.fp8_mega_moe).parameters) == [*names.split(), "fast_math", "check"]


def test_all_public_names_are_there() -> None:
    """What a caller catches and passes comes from here too: he needs no other module."""
    assert {name for name in api.__all__ if not hasattr(api, name)} == set()
    assert {*CALLS, "ConfigError", "EnvironmentMissing", "KernelTimeout", "Recipe", "RecipeError"} < {*api.__all__}


@pytest.mark.parametrize("name", CALLS)
def test_a_docstring_says_what_is_passed_and_raised(name: str) -> None:
    function = getattr(api, name)
    text = inspect.getdoc(function)
    assert text is not None
    arguments = text[text.index("\nArgs:\n") : text.index("\nRaises:\n")]
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in arguments
    assert "\n    ConfigError: " in text
    assert ("\nReturns:\n" in text) == (inspect.signature(function).return_annotation != "None")
