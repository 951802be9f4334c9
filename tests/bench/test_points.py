"""What the benchmark's options ask for, and how each mistake is refused: option, value and rule. No GPU."""

from __future__ import annotations

import shlex
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaproof.bench import command, peers
from megaproof.bench.measure import points, profiling, sweep
from megaproof.bench.measure.points import Options, UsageError
from megaproof.bench.model.roofline import RANKS
from megaproof.kernel.host import sizes
from megaproof.quant.shapes import SHAPES, Shape
from megaproof.tests.support import command_line
from megaproof.toolchain.errors import EnvironmentMissing

FLASH = {"dsv4_flash": SHAPES["dsv4_flash"]}
CUSTOM = ("--hidden", "512", "--intermediate", "256", "--experts", "16", "--topk", "4")
invoke = partial(command_line.bench, "sweep")


def test_defaults_are_powers_of_two_and_the_peers() -> None:
    for name in points.PRESETS:
        tokens = points.default_tokens(name, SHAPES[name])
        assert {1 << n for n in range(14)} <= set(tokens)
        assert {int(t) for t in peers.PEERS["h200"]["us"][name]["pr323"]} <= set(tokens)
        assert tokens == sorted(set(tokens))
    assert 648 in points.default_tokens("dsv4_pro", SHAPES["dsv4_pro"])


def test_both_sides_of_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """112 rows an expert, 32 of them, 6 slots a token: 597 tokens are 111.9 rows, 598 are 112.1."""
    monkeypatch.setattr(sizes, "THRESHOLDS", (112,), raising=False)
    assert {597, 598} <= set(points.default_tokens("dsv4_flash", SHAPES["dsv4_flash"]))


@pytest.mark.parametrize("preset", points.PRESETS)
def test_both_sides_of_every_change_of_the_schedule(preset: str) -> None:
    """Every T while blocks are few, then some: where two differ, a change that is measured stands between them."""
    shape, tokens = SHAPES[preset], set(points.default_tokens(preset, SHAPES[preset]))
    looked = [*range(1, 65), *range(128, 2049, 128), points.CAPACITY]
    seen = {t: points.schedule(shape, t) for t in {*looked, *points.turns(shape)}}
    assert set(points.turns(shape)) <= tokens
    changes = [(a, b) for a, b in pairwise(sorted(seen)) if seen[a] != seen[b]]
    assert all(b == a + 1 and {a, b} <= tokens for a, b in changes)
    assert {states[1:3] for states in seen.values()} == {(False, False), (True, False), (True, True)}
    assert {states[3] for states in seen.values()} == {False, True}
    assert {states[4] for states in seen.values()} == ({True} if preset == "dsv4_pro" else {False, True})


@given(
    st.integers(1, 64), st.integers(1, 32), st.lists(st.floats(0.01, 500).map(lambda rows: round(rows, 2)), min_size=1)
)
def test_sides_are_next_to_each_other(experts: int, topk: int, thresholds: list[float]) -> None:
    shape = Shape("any", 128, 128, RANKS * experts, min(topk, experts))
    found = points.sides(shape, thresholds)
    for rows in thresholds:
        at = [t for t in found if t * shape.topk / experts >= rows]
        below = [t for t in found if t * shape.topk / experts < rows]
        assert at, "the first T at the threshold"
        assert min(at) - max(below, default=0) <= 1 or min(at) == 1


@given(st.lists(st.integers(1, 10**6), min_size=1, unique=True))
def test_tokens_round_trip(tokens: list[int]) -> None:
    assert points.parse_tokens(",".join(map(str, tokens))) == tuple(tokens)


def test_clamps() -> None:
    assert [points.parse_clamp(text) for text in ("10", "0", "0.5", "none", "None")] == [10.0, 0.0, 0.5, None, None]


def test_regimes() -> None:
    assert points.regimes(False, False) == points.regimes(True, False) == ("flush",)
    assert points.regimes(False, True) == ("sustained",)
    assert points.regimes(True, True) == ("flush", "sustained")


def test_all_four_presets_by_default() -> None:
    chosen = points.shapes(None, dict.fromkeys(points.SIZES))
    assert list(chosen) == list(points.PRESETS) == ["dsv4_flash", "dsv4_pro", "mimo_pro", "glm"]


def test_a_shape_of_ones_own() -> None:
    chosen = points.shapes(None, {"hidden": 512, "intermediate": 256, "experts": 16, "topk": 4})
    (shape,) = chosen.values()
    assert list(chosen) == [shape.name] == ["h512-i256-e16-k4"]
    assert shape.experts_per_rank(RANKS) == 16


def test_capacity() -> None:
    assert Options(FLASH, (8,)).capacity_of("dsv4_flash") == 8192
    assert Options(FLASH, (9000,)).capacity_of("dsv4_flash") == 9000
    small = Options(FLASH, capacity=64)
    assert small.capacity_of("dsv4_flash") == max(small.points["dsv4_flash"]) == 64
    with pytest.raises(UsageError, match="--tokens 65 must be at most --capacity 64"):
        Options(FLASH, (8, 65), capacity=64)


@pytest.mark.parametrize(
    "given_options",
    [
        ("--preset", "glm", "--tokens", "8,9", "--sustained", "--clamp", "none", "--precise", "--events"),
        (*CUSTOM, "--capacity", "64", "--baseline", "--check-output-diff", "--no-yardsticks", "--l2-flush"),
        ("--preset", "glm", "--granularity", "128"),
    ],
    ids=["preset", "custom", "granularity"],
)
def test_a_result_names_the_command_that_makes_it(
    given_options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Options] = []

    def measure(options: Options, *_: object) -> dict:
        seen.append(options)
        raise EnvironmentMissing("enough")

    monkeypatch.setattr(command, "measure", measure)
    invoke(*given_options)
    line = shlex.split(seen[0].command())
    assert line[:4] == ["python", "-m", "bench", "sweep"]
    assert set(given_options) <= set(line)
    invoke(*line[4:])
    assert seen[0] == seen[1]


def test_help_names_every_option() -> None:
    status, text = invoke("--help")
    assert status == 0
    options = "preset hidden intermediate experts topk tokens capacity routing clamp fast-math precise granularity"
    options += " l2-flush sustained repeats seed profiler yardsticks baseline check-output-diff json plot trace"
    options += " compare fail-slower ncu"
    assert [name for name in options.split() if f"--{name}" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "--tokens '0' must be positive whole numbers"),
        (("--tokens", "1,x"), "--tokens '1,x' must be"),
        (("--preset", "smoke"), "--preset smoke: name one of dsv4_flash"),
        (("--routing", "zipf"), "--routing zipf: name one of folded, distinct"),
        (("--clamp", "-1"), "--clamp '-1' must be a finite number from 0 up, or none"),
        (("--clamp", "nan"), "--clamp 'nan' must be"),
        (("--clamp", "inf"), "--clamp 'inf' must be"),
        (("--granularity", "32"), "--granularity 32 must be 64 or 128"),
        (("--hidden", "512"), "--hidden 512 needs --intermediate, --experts, --topk beside it"),
        ((*CUSTOM, "--preset", "glm"), "--preset glm must be alone"),
        ((*CUSTOM, "--hidden", "100"), "--hidden 100 must be a positive multiple of 128"),
        ((*CUSTOM, "--intermediate", "0"), "--intermediate 0 must be a positive multiple of 128"),
        ((*CUSTOM, "--experts", "513"), "--experts 513 must be in [1, 512]"),
        ((*CUSTOM, "--topk", "17"), "--topk 17 must be in [1, 16]"),
        (("--tokens", "9", "--capacity", "8"), "--tokens 9 must be at most --capacity 8"),
        (("--fail-slower", "3"), "--fail-slower 3 needs --compare"),
        (("new.json",), "new.json needs --compare A.json before it"),
        (("--plot", "a.pdf"), "--plot a.pdf must end in .png or .svg"),
        (("--plot", "nowhere/a.png"), "--plot nowhere/a.png must lie in a folder that exists"),
        (("--trace", "a.txt"), "--trace a.txt must end in .json"),
        (("--trace", "nowhere/a.json"), "--trace nowhere/a.json must lie in a folder that exists"),
        (("--compare", "a.json", "b.json", "--trace", "t.json"), "--trace t.json can't go with two results"),
        (("--compare", "a.json", "b.json", "--json", "c.json"), "--json c.json can't go with two results"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json must lie in a folder that exists"),
        (("--json", "/dev/null"), "--json /dev/null must be a file; - is stdout"),
        (("--compare", "nowhere.json"), "--compare nowhere.json must be a result of this command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    command_line.assert_usage(invoke(*arguments), message)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> None:
        raise EnvironmentMissing("no GPU here")

    monkeypatch.setattr(sweep, "require_device", no_gpu)
    assert invoke("--tokens", "8") == (3, "environment: no GPU here\n")


def test_the_ncu_recipe_needs_no_gpu() -> None:
    status, text = invoke("--ncu", "--preset", "dsv4_pro", "--tokens", "32,64", "--precise")
    assert status == 0
    for part in ("--clock-control none", "regex:moe_", "--section SpeedOfLight", "dram__bytes_read.sum"):
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("ncu --target"))
    ours = "python -m bench sweep --preset dsv4_pro --tokens 32 --routing folded --l2-flush --clamp 10 --precise"
    assert f" {ours} --repeats 2 --seed 0 --events --no-yardsticks" in line
    assert profiling.ncu_recipe(Options(FLASH)).splitlines()[1].count("--section") == len(profiling.SECTIONS)
