"""The floor of a chip, measured or by model, and how the kernel's tiles fill it. No GPU."""

from __future__ import annotations

import json
from functools import partial

import pytest

from megaproof import HOME
from megaproof.bench.measure.points import PRESETS
from megaproof.bench.model import floor
from megaproof.bench.model.roofline import Load
from megaproof.kernel.host.buffer import BufferSize
from megaproof.quant.shapes import SHAPES
from megaproof.reference import scheduler
from megaproof.tests.support import command_line

invoke = partial(command_line.bench, "floor")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("routing", ["folded", "distinct"])
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_tasks_are_those_of_the_scheduler(preset: str, routing: str, tokens: int) -> None:
    shape = SHAPES[preset]
    counts = floor.routed(shape, tokens, routing, 0)
    assert sum(counts) == tokens * shape.topk
    plan = scheduler.make_plan([counts], shape.hidden, 78)
    all_tasks = scheduler.all_tasks(plan, shape.hidden, shape.intermediate)
    found = floor.tasks(counts, shape.hidden, shape.intermediate, 78)
    assert (found.l1, found.l2) == (
        sum(not task.is_gemm2 for task in all_tasks),
        sum(task.is_gemm2 for task in all_tasks),
    )
    assert found.l2_width == plan.gemm2_tile_n


@pytest.mark.parametrize("l1, l2, waves, last", [(78, 78, 2, 1.0), (78, 79, 3, 1 / 78), (1, 0, 1, 1 / 78)])
def test_waves(l1: int, l2: int, waves: int, last: float) -> None:
    found = floor.Tasks(l1, l2, 78, 256)
    assert (found.waves, found.per_sm) == (waves, (l1 + l2) / 78)
    assert found.last_wave == pytest.approx(last)


def test_registers_are_those_of_the_source() -> None:
    source = (HOME / "kernel" / "registers.cuh").read_text()
    assert f"kMath = {floor.REGISTERS['math']}, kOthers = {floor.REGISTERS['producer']};" in source


def test_the_command_prints_a_table() -> None:
    status, output = invoke("--tokens", "8,8192")
    assert status == 0
    first, head, *lines, last = output.splitlines()
    assert first.startswith("H20, 78 SMs, by model, not measured; tile 128 x 256 x 128, 4 stages, registers 56/224")
    assert len(lines) == 2 * len(PRESETS)
    assert {len(line) for line in lines} == {len(head)}
    assert last.startswith("symmetric memory of a rank of 8, capacity 8192, beside one with room for the whole pool: ")
    assert all(f"{preset} " in last for preset in PRESETS)


def test_the_command_as_json() -> None:
    status, output = invoke("--chip", "H20", "--preset", "dsv4_flash", "--tokens", "1,8192", "--json", "-")
    assert status == 0
    result = json.loads(output)
    assert (result["chip"]["sms"], result["basis"]) == (78, "by model, not measured")
    small, large = result["rows"]
    assert (small["bound"], large["bound"]) == ("read", "multiply")
    assert small["bytes"] == Load(4096, 2048, 1, 6, 6).bytes
    assert (small["l1_tasks"], small["l2_tasks"], small["l2_width"]) == (6 * 16, 6 * 32, 128)
    assert large["l2_width"] == 256
    assert large["tflops"] == pytest.approx(296 * 1275 / 1979)
    assert small["hbm_gb_s"] == pytest.approx(small["bytes"] / small["read_us"] / 1e3)
    for row in result["rows"]:
        assert row["floor_us"] == max(row["read_us"], row["multiply_us"])
        assert row["tasks_per_sm"] == pytest.approx((row["l1_tasks"] + row["l2_tasks"]) / 78)


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_is_that_of_the_buffer(preset: str) -> None:
    """At least three times less than with memory for every row that may come."""
    shape, found = SHAPES[preset], floor.memory(SHAPES[preset])
    dimensions = shape.experts, shape.topk, shape.hidden, shape.intermediate
    for ring, size in ((None, "bytes"), (1 << 30, "whole_pool_bytes")):
        assert found[size] == BufferSize(8, *dimensions, capacity=8192, ring=ring).offsets()[1]
    assert found["whole_pool_bytes"] >= 3 * found["bytes"]
    status, output = invoke("--preset", preset, "--json", "-")
    assert (status, json.loads(output)["memory"]) == (0, [found])


def test_the_h200_is_measured() -> None:
    status, output = invoke("--chip", "H200", "--preset", "glm", "--tokens", "64")
    assert status == 0
    assert output.startswith("H200, 132 SMs, rates as measured; ")


@pytest.mark.parametrize(
    "option, value", [("--chip", "B200"), ("--preset", "none"), ("--tokens", "0"), ("--routing", "x")]
)
def test_mistakes_are_refused(option: str, value: str) -> None:
    status, output = invoke(option, value)
    assert status == 2
    assert option in output
    assert value in output
