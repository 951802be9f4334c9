"""The public names of the kernel: what is there, what it takes, and that its docstring says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megaproof.kernel import api
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.tests.support import hostile
from megaproof.tests.support.fake_call import FakeLibrary, call, installed
from megaproof.tests.support.threads import threads

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


# --- every argument is served or refused ------------------------------------------------------------------------------


class OnCpu(SymmBuffer):
    """A buffer that asks for no GPU memory."""

    def __init__(self, group: Any, size: Any, device: torch.device) -> None:
        super().__init__(group, size, torch.device("cpu"))


def untransformed() -> dict[str, Any]:
    l1, l2 = (tuple(call()[name]) for name in ("l1_weights", "l2_weights"))
    return {"l1": l1, "l2": l2}


SIZES = {"num_experts": 4, "num_max_tokens_per_rank": 8, "num_topk": 2, "hidden": 256, "intermediate_hidden": 128}
OPTIONS = {"use_fp8_dispatch": None, "mma_type": "fp8xfp8", "activation": "swiglu", "ring_blocks": None}
LAUNCH = {
    "recipe": (128, 128, 128),
    "activation": "swiglu",
    "activation_clamp": 10.0,
    "fast_math": True,
    "check": False,
}
PUBLIC: dict[str, tuple[Callable, Callable[[], dict[str, Any]]]] = {
    "transform": (api.transform_weights_for_mega_moe_sm90, untransformed),
    "adopt": (api.TransformedWeights.adopt, lambda: call()["l1_weights"]._asdict()),
    "buffer": (api.get_symm_buffer_for_mega_moe, lambda: {"group": None, **SIZES, **OPTIONS}),
    "group": (api.VirtualGroup, lambda: {"size": 2}),
    "rank": (SymmBuffer.rank, lambda: {"self": call(2)["sym_buffer"], "r": 1}),
    "launch": (api.fp8_mega_moe, lambda: call() | LAUNCH),
    "launch of two ranks": (api.fp8_mega_moe, lambda: call(2) | LAUNCH),
}
CALLED = {"r": "rank", "size": "group"}
"""What errors call a parameter that has another name."""


def with_hostile(good: Any, bad: Any) -> Iterator[Any]:
    """The value alone, and wherever the good one has a tensor."""
    yield bad
    if isinstance(good, list):
        yield from ([good[0], inner] for inner in with_hostile(good[1], bad))
    elif isinstance(good, tuple) and isinstance(good[0], torch.Tensor):
        kind = getattr(type(good), "_make", tuple)
        yield from (kind(pair) for pair in ((bad, good[1]), (good[0], bad)))


def refusal(function: Callable, arguments: dict[str, Any]) -> str | None:
    """What an ArgumentError says; None where the arguments are served. Any other error is raised."""
    try:
        function(**arguments)
    except api.ArgumentError as error:
        return str(error)
    return None


@pytest.fixture
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_hostile_argument_is_served_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = installed(monkeypatch)
    monkeypatch.setattr(api, "SymmBuffer", OnCpu)
    function, make = PUBLIC[name]
    good = make()
    assert refusal(function, good) is None
    assert {*good} == {*inspect.signature(function).parameters}
    wrong, tried, refused = [], 0, 0
    for parameter in good.keys() - {"self"}:
        for kind, bad in hostile.values():
            for value in with_hostile(good[parameter], bad):
                what = f"{parameter} {kind} in a {type(value).__name__}"
                library.launches.clear()
                tried += 1
                try:
                    said = refusal(function, good | {parameter: value})
                except Exception as error:
                    wrong.append(f"{what}: {type(error).__name__}: {error}")
                    continue
                refused += said is not None
                if said is not None and (not said.isprintable() or CALLED.get(parameter, parameter) not in said):
                    wrong.append(f"{what}: {said}")
                wrong += [f"{what}: address 0 was launched" for launch in library.launches if nowhere(launch[1])]
    assert wrong == []
    assert refused > 0.7 * tried, "a table in which little is hostile tests little"


def nowhere(params: Any) -> bool:
    """Whether a launch would read or write at address 0."""
    own = list(params.ranks[: params.shape.num_ranks])
    return any(
        not all((rank.weights.w1_ptr, rank.weights.w1_sf_ptr, rank.weights.w2_ptr, rank.weights.w2_sf_ptr))
        or (rank.num_tokens and not rank.outputs.y_ptr)
        for rank in own
    )


@pytest.mark.parametrize("seconds", ["10", None, True, 0, -1.0, float("nan"), float("inf"), 1e300], ids=repr)
def test_a_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> None:
    library: FakeLibrary = installed(monkeypatch)
    monkeypatch.setattr(api, "TIMEOUT_S", seconds)
    with pytest.raises(ConfigError, match=r"TIMEOUT_S = .* must be a number of seconds in"):
        api.fp8_mega_moe(**call())
    assert not library.launches
