"""The host side of `fp8_mega_moe`: each rule with a case just outside, on CPU tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megaproof.kernel import api
from megaproof.kernel.host import checks, sizes
from megaproof.kernel.host.sizes import ConfigError
from megaproof.kernel.host.transformed import TransformedWeights
from megaproof.quant.recipe import RECIPES, Recipe, RecipeError
from megaproof.tests.support.fake_call import BF16, CAPACITY, EXPERTS, FP8, HIDDEN, SMS, FakeLibrary, call, installed


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    return installed(monkeypatch)


def changed(tensor: Tensor, how: str) -> Tensor:
    """The same values with one property wrong."""
    if how == "strides":
        return torch.empty(*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]).to(tensor.dtype).mT
    if how == "address":
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return tensor.to("meta")


ONE_RANK = {
    "y dtype": ("y", lambda y: y.float(), "y is torch.float32 \\[3, 256\\]; it must be contiguous torch.bfloat16"),
    "y dim": ("y", lambda y: y[0], "y is torch.bfloat16 \\[256\\]"),
    "y hidden": ("y", lambda y: y[:, :-1].contiguous(), "y is torch.bfloat16 \\[3, 255\\]"),
    "y strides": ("y", lambda y: changed(y, "strides"), "y is .* with strides \\(1, 3\\)"),
    "y address": (
        "y",
        lambda y: changed(y, "address"),
        "y begins at 0x[0-9a-f]*; its address must be a multiple of 16",
    ),
    "y device": ("y", lambda y: changed(y, "device"), "y is on meta; it must be on the buffer's device, cpu"),
    "y capacity": ("y", lambda y: y.new_zeros(CAPACITY + 1, HIDDEN), "y has 9 tokens; .* num_max_tokens_per_rank = 8"),
    "y list": ("y", lambda y: [y], "y is a list of 1; it must be a tensor"),
    "y None": ("y", lambda y: None, "y is None; it must be a tensor"),
    "l1 bare": ("l1_weights", lambda l1: l1[0], "l1_weights is a Tensor; it must be TransformedWeights"),
    "l1 three": ("l1_weights", lambda l1: (*l1, None), "l1_weights is a tuple of 3; it must be TransformedWeights"),
    "l1 None": ("l1_weights", lambda l1: None, "l1_weights is None"),
    "l1 number": (
        "l1_weights",
        lambda l1: TransformedWeights(l1[0], 1.0),
        "l1_weights scales is a float; it must be a tensor",
    ),
    "l1 dtype": (
        "l1_weights",
        lambda l1: TransformedWeights(l1[0].view(torch.uint8), l1[1]),
        "l1_weights is torch.uint8",
    ),
    "l1 address": (
        "l1_weights",
        lambda l1: TransformedWeights(changed(l1[0], "address"), l1[1]),
        "l1_weights begins at",
    ),
    "l1 scales": (
        "l1_weights",
        lambda l1: TransformedWeights(l1[0], l1[1].double()),
        "l1_weights scales is torch.float64",
    ),
    "l1 device": (
        "l1_weights",
        lambda l1: TransformedWeights(changed(l1[0], "device"), l1[1]),
        "l1_weights is on meta; it must be on",
    ),
    "l1 scales strides": (
        "l1_weights",
        lambda l1: TransformedWeights(l1[0], changed(l1[1], "strides")),
        "l1_weights scales .* strides",
    ),
    "l2 scales device": (
        "l2_weights",
        lambda l2: TransformedWeights(l2[0], changed(l2[1], "device")),
        "l2_weights scales is on meta",
    ),
    "l2 shape": (
        "l2_weights",
        lambda l2: TransformedWeights(l2[0][:3], l2[1]),
        "l2_weights is .*\\[3, 256, 128\\]; .*\\[4, 256, 128\\]",
    ),
    "l2 strides": (
        "l2_weights",
        lambda l2: TransformedWeights(changed(l2[0], "strides"), l2[1]),
        "l2_weights is .* with strides",
    ),
    "l2 scales": (
        "l2_weights",
        lambda l2: TransformedWeights(l2[0], l2[1][:, :1]),
        "l2_weights scales is torch.float32 \\[4, 1, 1\\]",
    ),
    "stats": (
        "cumulative_local_expert_recv_stats",
        lambda s: s.long(),
        "cumulative_local_expert_recv_stats is .*int64",
    ),
    "stats strides": (
        "cumulative_local_expert_recv_stats",
        lambda s: s.repeat(2)[::2],
        "_recv_stats is .* with strides \\(2,\\)",
    ),
    "stats device": (
        "cumulative_local_expert_recv_stats",
        lambda s: changed(s, "device"),
        "_recv_stats is on meta; it must be on",
    ),
    "stats size": ("cumulative_local_expert_recv_stats", lambda s: s[1:], "_recv_stats is torch.int32 \\[3\\]"),
    "buffer": ("sym_buffer", lambda b: None, "sym_buffer = None must come from"),
}


@pytest.mark.parametrize("rule", ONE_RANK)
def test_one_rank_refuses_by_name(library: FakeLibrary, rule: str) -> None:
    good = call()
    argument, change, message = ONE_RANK[rule]
    for _ in range(2):  # the second time with a plan that is in order
        with pytest.raises(ConfigError, match=message):
            api.fp8_mega_moe(**good | {argument: change(good[argument])})
        assert api.fp8_mega_moe(**good) is None
    assert len(library.launches) == 2


GROUP = {
    "no list": ("y", lambda ys: ys[0], "y is a Tensor; with a VirtualGroup it must be a list, one entry a rank"),
    "short": ("l1_weights", lambda l1s: l1s[:1], "l1_weights has 1 entries; it must have one for each of 2 ranks"),
    "rank": ("y", lambda ys: [ys[0], ys[1].half()], "y of rank 1 is torch.float16"),
    "weights": (
        "l2_weights",
        lambda l2s: [l2s[0], TransformedWeights(*l2s[1][::-1])],
        "l2_weights of rank 1 is torch.float32",
    ),
    "stats": ("cumulative_local_expert_recv_stats", lambda s: s[:1], "_recv_stats has 1 entries"),
    "same stats": ("cumulative_local_expert_recv_stats", lambda s: [s[0], s[0]], "_recv_stats of rank 1 overlaps"),
    "same y": ("y", lambda ys: [ys[0], ys[0]], "y of rank 1 overlaps y of rank 0"),
    "overlap": ("y", lambda ys: [ys[1][:2], ys[1][1:]], "y of rank 1 overlaps y of rank 0"),
}


@pytest.mark.parametrize("rule", GROUP)
def test_a_virtual_group_refuses_by_name_and_rank(library: FakeLibrary, rule: str) -> None:
    good = call(2)
    argument, change, message = GROUP[rule]
    with pytest.raises(ConfigError, match=message):
        api.fp8_mega_moe(**good | {argument: change(good[argument])})
    both = good["y"][1]
    api.fp8_mega_moe(**good | {"y": [both[:2], both[2:]], "cumulative_local_expert_recv_stats": [None, None]})
    api.fp8_mega_moe(**good | {"cumulative_local_expert_recv_stats": None})
    assert [params.ranks[1].num_tokens for _, params, _ in library.launches] == [2, 4]


def freed(tensor: Tensor) -> Tensor:
    """The same tensor after its memory was let go of, as FSDP does."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


@pytest.mark.parametrize("argument", ["y", "l1_weights", "cumulative_local_expert_recv_stats"])
def test_memory_that_is_not_there_is_refused(library: FakeLibrary, argument: str) -> None:
    good = call()
    value = good[argument]
    gone = TransformedWeights(freed(value[0]), value[1]) if isinstance(value, tuple) else freed(value)
    with pytest.raises(ConfigError, match=f"{argument} ends at byte .* of a storage of 0; its memory must be there"):
        api.fp8_mega_moe(**good | {argument: gone})
    assert not library.launches


@pytest.mark.parametrize("field", ["slots", "topk_weights"])
def test_outputs_in_the_buffer_are_refused(library: FakeLibrary, field: str) -> None:
    good = call(2)
    inside = getattr(good["sym_buffer"].rank(1), field).flatten()
    y = inside.view(BF16)[:HIDDEN].view(1, HIDDEN) if field == "slots" else good["y"][1]
    counts = inside.view(torch.int32)[: EXPERTS // 2] if field == "topk_weights" else None
    stats = None if counts is None else [None, counts]
    with pytest.raises(
        ConfigError,
        match=r"(y|_recv_stats) of rank 1 overlaps sym_buffer's memory of rank 1; what a launch writes must",
    ):
        api.fp8_mega_moe(**good | {"y": [good["y"][0], y], "cumulative_local_expert_recv_stats": stats})
    assert not library.launches


def test_meta_tensors_are_judged_too() -> None:
    good = call(2, device="meta")
    checks.check_weights(good["sym_buffer"], good["l1_weights"], good["l2_weights"])
    held = good["sym_buffer"], good["l1_weights"], good["l2_weights"]
    checks.check_outputs(*held, good["y"], [None, None])
    with pytest.raises(ConfigError, match=r"y of rank 0 is torch\.float32"):
        checks.check_outputs(*held, [y.float() for y in good["y"]], [None, None])


@pytest.mark.parametrize(
    ("options", "entry", "clamp"),
    [
        ({}, "moe_fast", None),
        ({"recipe": [128, 128, 128], "fast_math": False}, "moe_precise", None),
        ({"activation_clamp": 0}, "moe_fast", 0.0),
        ({"activation_clamp": math.inf, "fast_math": True}, "moe_fast", None),
        ({"recipe": Recipe(silu="precise")}, "moe_precise", 10.0),
        ({"recipe": Recipe(silu="precise"), "fast_math": False, "activation_clamp": 10}, "moe_precise", 10.0),
        ({"recipe": Recipe(clamp=None, activation_granularity=128), "fast_math": True}, "moe_fast", None),
    ],
    ids=str,
)
def test_recipes_that_are_taken(library: FakeLibrary, options: dict, entry: str, clamp: float | None) -> None:
    api.fp8_mega_moe(**call(), **options)
    ((name, params, launched),) = library.launches
    assert (name, params.swiglu.is_clamped, params.swiglu.clamp) == (entry, clamp is not None, clamp or 0.0)
    assert launched == (SMS, sizes.THREADS, sizes.shared_bytes())
    recipe = options.get("recipe")
    assert library.granularities == [recipe.activation_granularity if isinstance(recipe, Recipe) else 64]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "gelu"}, ConfigError, "activation = 'gelu' must be 'swiglu'"),
        ({"activation_clamp": math.nan}, ConfigError, "activation_clamp = nan must be"),
        ({"activation_clamp": -1e-30}, ConfigError, "activation_clamp = -1e-30 must be"),
        ({"activation_clamp": "10"}, ConfigError, "activation_clamp = '10' must be"),
        ({"activation_clamp": [10]}, ConfigError, "activation_clamp = \\[10\\]"),
        ({"activation_clamp": True}, ConfigError, "activation_clamp = True must be"),
        ({"fast_math": 2}, ConfigError, "fast_math = 2 must be a bool"),
        ({"recipe": (1, 128, 128)}, ConfigError, "recipe = \\(1, 128, 128\\) must be"),
        ({"recipe": None}, ConfigError, "recipe = None"),
        ({"recipe": Recipe(), "activation_clamp": 9.0}, ConfigError, "activation_clamp = 9.0 must be left out or"),
        ({"recipe": Recipe(), "fast_math": False}, ConfigError, "fast_math = False must be left out or agree"),
        ({"recipe": Recipe(silu="precise"), "fast_math": True}, ConfigError, "fast_math = True must be left out"),
        ({"recipe": RECIPES["unfused"]}, RecipeError, "field l1_rounding = 'bf16'"),
        ({"recipe": RECIPES["fp32_scales"]}, RecipeError, "field activation_scale = 'fp32'"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(library: FakeLibrary, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        api.fp8_mega_moe(**call(), **options)
    assert not library.launches


@pytest.mark.parametrize("value", [-2, EXPERTS])
def test_check_names_an_index_outside(library: FakeLibrary, value: int) -> None:
    good = call(2)
    idx = good["sym_buffer"].rank(1).topk_idx
    idx[:4] = torch.tensor([[-1, 0], [1, 2], [3, -1], [EXPERTS - 1, -1]])
    idx[4:] = value  # beyond T
    api.fp8_mega_moe(**good, check=True)
    idx[2, 1] = value
    api.fp8_mega_moe(**good)
    message = f"topk_idx of rank 1, token 2, slot 1 = {value} must be in \\[-1, {EXPERTS}\\)"
    with pytest.raises(ConfigError, match=message):
        api.fp8_mega_moe(**good, check=True)
    assert len(library.launches) == 2


def untransformed(**changes: Any) -> dict[str, Any]:
    """Legal l1 and l2 of E = 2, H = 256, I = 128, with some of the four tensors replaced."""
    made = {
        "w1": torch.zeros(2, 256, 256).to(FP8),
        "w1_sf": torch.ones(2, 2, 2),
        "w2": torch.zeros(2, 256, 128).to(FP8),
        "w2_sf": torch.ones(2, 2, 1),
    } | changes
    return {"l1": (made["w1"], made["w1_sf"]), "l2": (made["w2"], made["w2_sf"])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": torch.zeros(2, 256, 256)}, r"l1 is torch.float32 \[2, 256, 256\]; it must be torch.float8_e4m3fn"),
        ({"w2": torch.zeros(2, 256, 128, dtype=torch.uint8)}, r"l2 is torch.uint8 \[2, 256, 128\]"),
        ({"w2": torch.zeros(256, 128).to(FP8)}, r"l2 is torch.float8_e4m3fn \[256, 128\]; it must be"),
        (
            {"w1": torch.zeros(2, 192, 256).to(FP8)},
            "l1 has 192 rows and 256 columns; both must be positive multiples of 128",
        ),
        (
            {"w1_sf": torch.ones(2, 2, 1)},
            r"l1 scales are torch.float32 \[2, 2, 1\]; they must be torch.float32 \[2, 2, 2\]",
        ),
        ({"w2_sf": torch.ones(2, 2, 1).double()}, r"l2 scales are torch.float64"),
        ({"w2_sf": None}, r"l2 is a tuple of 2; it must be a tuple \(fp8 weights, float32 scales\)"),
        (
            {"w1": torch.zeros(2, 128, 256).to(FP8), "w1_sf": torch.ones(2, 1, 2)},
            r"l1 is \[2, 128, 256\] and l2 \[2, 256, 128\]; they must be \[E_loc, 2I, H\] and",
        ),
        ({"w2": torch.zeros(3, 256, 128).to(FP8), "w2_sf": torch.ones(3, 2, 1)}, r"and l2 \[3, 256, 128\]"),
    ],
    ids=["float", "bytes", "two dimensions", "192 rows", "few scales", "double", "no scales", "I = 64", "experts"],
)
def test_weights_that_cannot_be_transformed_are_refused(changes: dict[str, Any], message: str) -> None:
    api.transform_weights_for_mega_moe_sm90(**untransformed())
    with pytest.raises(ConfigError, match=message):
        api.transform_weights_for_mega_moe_sm90(**untransformed(**changes))


def test_weights_are_pairs() -> None:
    pairs = untransformed()
    for wrong in (pairs["l1"][0], None, pairs["l1"][:1]):
        with pytest.raises(ConfigError, match=r"l1 is .*; it must be a tuple"):
            api.transform_weights_for_mega_moe_sm90(wrong, pairs["l2"])
