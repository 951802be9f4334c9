"""The build with clocks: that it is not the one that ships, how its rows are read, what its table adds up to."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch

from megaproof import HOME
from megaproof.bench.measure import phases
from megaproof.kernel import api
from megaproof.kernel.host.sizes import GRANULARITIES
from megaproof.kernel.programs import moe
from megaproof.quant.shapes import SHAPES
from megaproof.tests.support import command_line
from megaproof.tests.support.fake_call import SMS, call, installed
from megaproof.toolchain import sass
from megaproof.toolchain.errors import BuildError, EnvironmentMissing

BLOCKS = 2


invoke = partial(command_line.bench, "phases")


def clock_reads(cubin: bytes) -> int:
    """Instructions that read the SM's clock."""
    try:
        program, _ = sass.disassembler()
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\bSR_CLOCK", text))


def fake(step: int = 1) -> torch.Tensor:
    """A status tensor whose phases took step, 2 step, ... cycles, in the order of rows; `last` is -1."""
    size = len(phases.NAMES) + 1
    rows = torch.full((BLOCKS * len(phases.ROLES), size), -1, dtype=torch.int64)
    rows[:, :-1] = torch.arange(1, rows[:, :-1].numel() + 1).view(len(rows), size - 1) * step
    head = torch.tensor([9] * phases.STATUS_WORDS, dtype=torch.int32)
    return torch.cat((head, rows.flatten().view(torch.int32)))


def test_the_build_has_the_kernels_and_clocks() -> None:
    marked, shipped = moe.phases().compile(), moe.moe().compile()
    assert set(moe.ENTRIES) <= marked.report.entries.keys()
    assert marked.sha256 != shipped.sha256
    assert not marked.report.messages  # WGMMA is not serialised: the same main loop
    assert clock_reads(marked.cubin) > 0


def test_what_ships_reads_no_clock() -> None:
    assert clock_reads(moe.moe().compile().cubin) == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_the_marks_are_added(granularity: int) -> None:
    """Everything else is as the kernel that ships asks for it, but that nothing judges it."""
    plain, marked = moe.moe(granularity), moe.phases(granularity)
    assert marked.defines == {**plain.defines, "PHASES": 1}
    assert plain.gated
    assert replace(marked, name=plain.name, defines=plain.defines, gated=True) == plain


def test_marked_launches_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens inside: behind it the buffer launches what ships, and its plans are made anew."""
    library = installed(monkeypatch)
    monkeypatch.setattr(phases, "require_device", lambda index: api.require_device(index))
    arguments = call(2)
    buffer, shipped = arguments["sym_buffer"], arguments["sym_buffer"].program
    api.fp8_mega_moe(**arguments)
    with contextlib.suppress(RuntimeError), phases.marking(buffer) as blocks:
        assert (blocks, buffer.program, buffer.plans) == (SMS, moe.phases, {})
        assert buffer.status.numel() == phases.status_words(SMS)
        raise RuntimeError("inside")
    assert (buffer.program, buffer.plans) == (shipped, {})
    api.fp8_mega_moe(**arguments)
    assert len(library.launches) == 2


def test_names_come_from_the_source() -> None:
    assert phases.NAMES[:2] == ("prologue", "wait")
    assert {"l1", "l1 epilogue", "l2", "l2 epilogue", "meet", "combine", "operands", "load"} < set(phases.NAMES)
    assert phases.__doc__ is not None
    assert all(name in phases.__doc__ for name in phases.NAMES)


def test_rows_lie_behind_the_status() -> None:
    fields = re.search(r"struct Status \{\s*u32 ([^;]*);\s*\}", (HOME / "kernel" / "params.cuh").read_text())
    assert fields
    assert len(fields[1].split(",")) == phases.STATUS_WORDS
    assert phases.STATUS_WORDS % 2 == 0, "rows of u64 are aligned"


def test_rows_are_read() -> None:
    status = fake()
    assert status.numel() == phases.status_words(BLOCKS)
    found = phases.cycles(status, BLOCKS)
    count = BLOCKS * len(phases.ROLES) * len(phases.NAMES)
    assert torch.equal(found, torch.arange(1, count + 1).view(BLOCKS, len(phases.ROLES), -1))


def test_rows_hold_64_bits() -> None:
    assert int(phases.cycles(fake(1 << 33), BLOCKS)[1, 2, -1]) == 60 << 33


def test_the_table_by_hand() -> None:
    """Block 0: math 0 waits 30 cycles, multiplies 60; block 1: 50 and 50. The producer: 10 + 20."""
    own = torch.zeros(BLOCKS, len(phases.ROLES), len(phases.NAMES), dtype=torch.int64)
    wait, load, l1 = (phases.NAMES.index(name) for name in ("wait", "load", "l1"))
    own[:, 1, wait], own[:, 1, l1] = torch.tensor([30, 50]), torch.tensor([60, 50])
    own[:, 0, load], own[:, 0, wait] = 10, 20
    found = phases.table([own, 2 * own], [50.0, 50.0])
    assert found.us == 50
    assert found.clock_mhz == 3  # 100 cycles and 200 in 50 us: the middle of 2 and 4 MHz
    assert found.roles == {
        "producer": {"load": phases.Figure(15, 15, 15)},
        "math 0": {"wait": phases.Figure(20, 15, 25), "l1": phases.Figure(27.5, 25, 30)},
        "math 1": {},
    }
    shown = phases.text({"preset": "any", "T": 8, "routing": "folded", **found.as_dict()})
    assert re.search(r"^  wait +- +20\.0 +15\.0 +25\.0 +-$", shown, re.MULTILINE)
    assert re.search(r"^  sum +15\.0 +47\.5 +0\.0$", shown, re.MULTILINE)
    json.dumps(found.as_dict())


def test_no_marks_are_noticed() -> None:
    nothing = torch.zeros(BLOCKS, len(phases.ROLES), len(phases.NAMES), dtype=torch.int64)
    with pytest.raises(BuildError, match="no phase took a cycle"):
        phases.table([nothing], [1.0])


@pytest.mark.parametrize("option, value", [("--preset", "none"), ("--tokens", "0"), ("--routing", "x")])
def test_mistakes_are_refused(option: str, value: str) -> None:
    status, output = invoke(option, value)
    assert status == 2
    assert option in output
    assert value in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    status, output = invoke("--tokens", "8")
    assert status == 3
    assert "environment: no CUDA device" in output


@pytest.mark.gpu
def test_phases_sum_to_the_kernel() -> None:
    """The cycles of the longest row are the kernel's time at a clock that the chip has; the other roles end with it."""
    (row,) = phases.run({"dsv4_flash": SHAPES["dsv4_flash"]}, (64,), "folded", 3, 0)
    print(phases.text(row))
    assert 900 < row["clock_mhz"] < 2100
    for role in phases.ROLES:
        total = sum(figure["mean"] for figure in row["roles"][role].values())
        assert 0.9 * row["us"] < total < 1.001 * row["us"]
    for role in ("math 0", "math 1"):
        assert {"prologue", "wait", "l1", "l1 epilogue", "l2", "l2 epilogue", "meet", "combine"} <= row["roles"][
            role
        ].keys()
    assert {"prologue", "load", "meet", "combine"} <= row["roles"]["producer"].keys()
    json.dumps(row)
