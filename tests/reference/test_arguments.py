"""Every rule of the layer's arguments, one case just outside each: the message names argument, value and rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaproof.quant.formats import E2M1
from megaproof.quant.recipe import Recipe, RecipeError
from megaproof.reference.arguments import ArgumentError, check
from megaproof.reference.layer import moe_layer
from megaproof.reference.operands import ExpertWeights, e4m3

RANKS, HIDDEN, INTER, TOPK, EXPERTS, TOKENS = 2, 256, 128, 2, 4, (3, 1)

U8, F32 = {"dtype": torch.uint8}, {"dtype": torch.float32}


def weights(e: int) -> ExpertWeights:
    return e4m3(
        torch.zeros(2 * INTER, HIDDEN, **U8),
        torch.ones(2 * INTER // 128, HIDDEN // 128),
        torch.zeros(HIDDEN, INTER, **U8),
        torch.ones(HIDDEN // 128, INTER // 128),
    )


def arguments() -> dict[str, Any]:
    """A problem that is in order: R = 2, H = 256, I = 128, K = 2, E = 4."""
    return {
        "recipe": Recipe(),
        "x": [torch.zeros(t, HIDDEN, **U8) for t in TOKENS],
        "x_sf": [torch.ones(t, HIDDEN // 128) for t in TOKENS],
        "topk_idx": [torch.arange(t * TOPK).reshape(t, TOPK) % EXPERTS for t in TOKENS],
        "topk_weights": [torch.ones(t, TOPK) for t in TOKENS],
        "weights": weights,
        "stats": [torch.zeros(EXPERTS // RANKS, dtype=torch.int32) for _ in TOKENS],
        "experts": EXPERTS,
    }


def changed(name: str, value: Any, rank: int | None = None) -> dict[str, Any]:
    new = arguments()
    if rank is None:
        new[name] = value
    else:
        new[name][rank] = value
    return new


def item(name: str, rank: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return changed(name, change(arguments()[name][rank]), rank)


def index(value: int) -> dict[str, Any]:
    new = arguments()
    new["topk_idx"][0][2, 1] = value
    return new


def returned(place: int, tensor: Tensor) -> dict[str, Any]:
    def other(e: int) -> ExpertWeights:
        four = list(weights(e).tensors())
        if e == 1:
            four[place] = tensor
        return e4m3(*four)

    return changed("weights", other)


def apart(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


# What is wrong -> (arguments, what the message says: argument, value, rule).
BAD: dict[str, tuple[Callable[[], dict[str, Any]], str, str, str]] = {
    "recipe": (lambda: changed("recipe", "default"), "recipe", "'default'", "must be a megaproof.quant.recipe.Recipe"),
    "no rank": (lambda: changed("x", []), "x", "[]", "at least one"),
    "x is a tensor": (lambda: changed("x", torch.zeros(2, HIDDEN, **U8)), "x", "", "must be a list of 2 tensors"),
    "x_sf short": (lambda: changed("x_sf", [torch.ones(3, 2)]), "x_sf", "", "must be a list of 2 tensors"),
    "x_sf None": (lambda: changed("x_sf", None), "x_sf", "", "must be a list of 2 tensors"),
    "topk_idx long": (lambda: changed("topk_idx", arguments()["topk_idx"] * 2), "topk_idx", "", "list of 2 tensors"),
    "stats short": (lambda: changed("stats", arguments()["stats"][:1]), "stats", "", "must be a list of 2 tensors"),
    "x[0] no tensor": (lambda: changed("x", None, 0), "x[0]", "None", "must be a 2-D tensor"),
    "x[1] no tensor": (lambda: changed("x", None, 1), "x[1]", "None", "must be"),
    "x[1] 0-D": (lambda: changed("x", torch.tensor(1, **U8), 1), "x[1]", "torch.uint8 []", "must be"),
    "x dims": (lambda: item("x", 0, lambda t: t[None]), "x[0]", "torch.uint8 [1, 3, 256]", "2-D"),
    "x dtype": (lambda: item("x", 1, Tensor.float), "x[1]", "torch.float32 [1, 256]", "must be torch.uint8 [1, 256]"),
    "x hidden differs": (lambda: item("x", 1, lambda t: t[:, :128].clone()), "x[1]", "[1, 128]", "[1, 256]"),
    "x strided": (lambda: item("x", 0, apart), "x[0]", "strides", "must be contiguous"),
    "hidden 0": (lambda: item("x", 0, lambda t: t[:, :0]), "x[0]", "hidden = 0", "positive multiple of 128"),
    "hidden 192": (lambda: item("x", 0, lambda t: t[:, :192]), "x[0]", "hidden = 192", "positive multiple of 128"),
    "x_sf dtype": (lambda: item("x_sf", 0, Tensor.double), "x_sf[0]", "torch.float64 [3, 2]", "torch.float32 [3, 2]"),
    "x_sf columns": (lambda: item("x_sf", 1, lambda t: t[:, :1].clone()), "x_sf[1]", "[1, 1]", "torch.float32 [1, 2]"),
    "x_sf strided": (lambda: item("x_sf", 0, apart), "x_sf[0]", "strides (4, 2)", "must be contiguous"),
    "x_sf MN-major": (lambda: item("x_sf", 0, lambda t: t.t().contiguous().t()), "x_sf[0]", "(1, 3)", "contiguous"),
    "topk 0": (lambda: item("topk_idx", 0, lambda t: t[:, :0]), "topk_idx[0]", "topk = 0", "must be in [1, 32]"),
    "topk 33": (
        lambda: item("topk_idx", 0, lambda t: t[:, :1].repeat(1, 33)),
        "topk_idx[0]",
        "topk = 33",
        "must be in [1, 32]",
    ),
    "topk_idx dtype": (lambda: item("topk_idx", 0, Tensor.int), "topk_idx[0]", "torch.int32 [3, 2]", "torch.int64"),
    "topk_idx rows": (lambda: item("topk_idx", 0, lambda t: t[:2].clone()), "topk_idx[0]", "[2, 2]", "[3, 2]"),
    "topk_idx strided": (lambda: item("topk_idx", 1, apart), "topk_idx[1]", "strides", "must be contiguous"),
    "topk_idx -2": (lambda: index(-2), "topk_idx[0][2, 1]", "= -2", "must be -1 (masked) or in [0, 4)"),
    "topk_idx E": (lambda: index(EXPERTS), "topk_idx[0][2, 1]", "= 4", "must be -1 (masked) or in [0, 4)"),
    "topk_weights dtype": (lambda: item("topk_weights", 1, Tensor.half), "topk_weights[1]", "torch.float16", "float32"),
    "topk_weights slots": (
        lambda: item("topk_weights", 0, lambda t: t[:, :1].clone()),
        "topk_weights[0]",
        "[3, 1]",
        "[3, 2]",
    ),
    "topk_weights strided": (lambda: item("topk_weights", 0, apart), "topk_weights[0]", "strides", "contiguous"),
    "experts 3": (lambda: changed("experts", 3), "experts", "= 3", "multiple of the number of ranks, 2"),
    "experts 0": (lambda: changed("experts", 0), "experts", "= 0", "must be a positive multiple"),
    "experts -2": (lambda: changed("experts", -2), "experts", "= -2", "must be a positive multiple"),
    "experts 4.0": (lambda: changed("experts", 4.0), "experts", "= 4.0", "must be"),
    "stats dtype": (lambda: item("stats", 0, Tensor.long), "stats[0]", "torch.int64 [2]", "torch.int32 [2]"),
    "stats size": (lambda: item("stats", 1, lambda t: t[:1].clone()), "stats[1]", "[1]", "torch.int32 [2]"),
    "stats strided": (lambda: item("stats", 1, apart), "stats[1]", "strides", "must be contiguous"),
    "stats[0] no tensor": (
        lambda: changed("stats", [[0, 0], [0, 0]]) | {"experts": None},
        "stats[0]",
        "[0, 0]",
        "must be",
    ),
    "weights list": (lambda: changed("weights", lambda e: list(weights(e))), "weights(0)", "", "ExpertWeights"),
    "four tensors": (lambda: changed("weights", lambda e: weights(e).tensors()), "weights(0)", "", "ExpertWeights"),
    "weights of another format": (
        lambda: changed("weights", lambda e: weights(e)._replace(l2=weights(e).l2._replace(format=E2M1))),
        "weights(0) l2.format",
        "E2M1",
        "the recipe's is e4m3",
    ),
    "weights None": (lambda: changed("weights", None), "weights", "None", "must be"),
    "intermediate 192": (
        lambda: returned(2, torch.zeros(HIDDEN, 192, **U8)),
        "weights(1)",
        "intermediate = 192",
        "positive multiple of 128",
    ),
    "w1 dtype": (
        lambda: returned(0, torch.zeros(2 * INTER, HIDDEN)),
        "weights(1) l1.codes",
        "torch.float32",
        "torch.uint8 [256, 256]",
    ),
    "w1 half": (
        lambda: returned(0, torch.zeros(INTER, HIDDEN, **U8)),
        "weights(1) l1.codes",
        "[128, 256]",
        "torch.uint8 [256, 256]",
    ),
    "w1 strided": (
        lambda: returned(0, torch.zeros(HIDDEN, 2 * INTER, **U8).t()),
        "weights(1) l1.codes",
        "strides",
        "must be contiguous",
    ),
    "w1_sf per row": (
        lambda: returned(1, torch.ones(2 * INTER, 2)),
        "weights(1) l1.scales",
        "[256, 2]",
        "torch.float32 [2, 2]",
    ),
    "w1_sf strided": (
        lambda: returned(1, torch.ones(2, 2).t()),
        "weights(1) l1.scales",
        "strides (1, 2)",
        "must be contiguous",
    ),
    "w2 no tensor": (lambda: returned(2, None), "weights(1) l2.codes", "None", "must be a 2-D tensor"),
    "w2 rows": (
        lambda: returned(2, torch.zeros(INTER, INTER, **U8)),
        "weights(1) l2.codes",
        "[128, 128]",
        "torch.uint8 [256, 128]",
    ),
    "w2_sf dtype": (
        lambda: returned(3, torch.ones(2, 1, dtype=torch.float64)),
        "weights(1) l2.scales",
        "torch.float64",
        "torch.float32 [2, 1]",
    ),
}


def call(arguments: dict[str, Any]) -> Any:
    names = ("recipe", "x", "x_sf", "topk_idx", "topk_weights", "weights")
    return moe_layer(*(arguments[name] for name in names), stats=arguments["stats"], experts=arguments["experts"])


@pytest.mark.parametrize("what", BAD)
def test_refused_by_name_value_and_rule(what: str) -> None:
    make, argument, value, rule = BAD[what]
    with pytest.raises(ArgumentError) as error:
        call(make())
    message = str(error.value)
    assert message.startswith(argument), message
    assert value in message, message
    assert rule in message, message
    assert "\n" not in message


def test_an_error_leaves_stats_alone() -> None:
    given = index(EXPERTS)
    for part in given["stats"]:
        part.fill_(3)
    with pytest.raises(ArgumentError):
        call(given)
    assert [part.tolist() for part in given["stats"]] == [[3, 3], [3, 3]]


def test_experts_may_not_differ_in_their_intermediate_size() -> None:
    def other(e: int) -> ExpertWeights:
        if e != 1:
            return weights(e)
        return e4m3(
            torch.zeros(512, HIDDEN, **U8),
            torch.ones(4, HIDDEN // 128),
            torch.zeros(HIDDEN, 256, **U8),
            torch.ones(HIDDEN // 128, 2),
        )

    with pytest.raises(ArgumentError, match=re.escape("weights(1)")):
        call(changed("weights", other))


@pytest.mark.parametrize("clamp", [-1.0, float("nan")])
def test_a_bad_clamp_never_reaches_the_layer(clamp: float) -> None:
    with pytest.raises(RecipeError, match="clamp"):
        call(changed("recipe", Recipe(clamp=clamp)))


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_the_good_problem_is_accepted() -> None:
    result = call(arguments())
    assert [tuple(y.shape) for y in result.y] == [(3, HIDDEN), (1, HIDDEN)]
    assert ArgumentError.__mro__[1] is ValueError


def test_the_edges_are_accepted() -> None:
    given = arguments()
    given["topk_idx"][0][0] = torch.tensor([-1, EXPERTS - 1])
    given["topk_idx"][1][0] = 2  # a duplicate
    given["topk_weights"][0][:] = torch.nan
    call(given)
    wide = arguments()
    wide["topk_idx"] = [t[:, :1].repeat(1, 32) for t in wide["topk_idx"]]
    wide["topk_weights"] = [torch.ones(t, 32) for t in TOKENS]
    call(wide)
    call(changed("x", tuple(arguments()["x"])))


@pytest.mark.parametrize(
    ("experts", "with_stats", "expected"), [(None, True, 4), (None, False, 4), (8, False, 8), (4, True, 4)]
)
def test_number_of_experts(experts: int | None, with_stats: bool, expected: int) -> None:
    """Given, or read from stats, or the least multiple of R that holds the largest index."""
    made = arguments()
    made["topk_idx"][0].clamp_(max=2)
    made["topk_idx"][1].fill_(2)
    names = ("recipe", "x", "x_sf", "topk_idx", "topk_weights")
    problem = check(*(made[name] for name in names), experts, made["stats"] if with_stats else None)
    assert (problem.experts, problem.experts_per_rank) == (expected, expected // 2)
    assert (problem.ranks, problem.hidden, problem.topk, problem.tokens) == (2, HIDDEN, TOPK, TOKENS)


def test_all_masked_has_one_expert_a_rank() -> None:
    made = arguments()
    idx = [torch.full_like(t, -1) for t in made["topk_idx"]]
    problem = check(made["recipe"], made["x"], made["x_sf"], idx, made["topk_weights"], None, None)
    assert problem.experts == 2


SOURCES = {
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "meta": lambda t: t.to("meta"),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "sparse": lambda t: t.to_sparse(),
    "subclass": lambda t: t.as_subclass(type("Subclassed", (Tensor,), {})),
    "lines": lambda t: "two\nlines",
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("argument", ["x", "x_sf", "topk_idx", "topk_weights", "stats"])
def test_what_holds_no_values_is_refused_in_one_line(argument: str, source: str) -> None:
    given = arguments()[argument]
    for wrong in ([SOURCES[source](given[0]), *given[1:]], SOURCES[source](given[0])):
        with pytest.raises(ArgumentError) as error:
            call(changed(argument, wrong))
        assert str(error.value).isprintable()
        assert str(error.value).startswith(argument)


def test_weights_without_values_are_refused_and_parameters_are_taken() -> None:
    good = arguments()["weights"]

    def scales(change: Callable[[Tensor], Any]) -> Callable[[int], Any]:
        return lambda e: good(e)._replace(l1=good(e).l1._replace(scales=change(good(e).l1.scales)))

    wanted = call(arguments())
    found = call(changed("weights", scales(torch.nn.Parameter)))
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found.y, wanted.y, strict=True))
    for change in SOURCES.values():
        with pytest.raises(ArgumentError, match=r"^weights\(\d\) l1\.scales is .*; it must be .*$"):
            call(changed("weights", scales(change)))
