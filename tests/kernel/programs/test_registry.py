"""Every program of the project: that it passes the gate, is the pinned one, and is what its Python side says."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from megaproof.kernel import __main__ as cli
from megaproof.kernel.host.params import Params
from megaproof.kernel.host.sizes import THREADS, shared_bytes
from megaproof.kernel.programs import PINS, PROGRAMS, probe
from megaproof.kernel.programs.moe import moe, phases
from megaproof.tests.support.texts import require_nvdisasm
from megaproof.toolchain import code
from megaproof.toolchain.errors import BuildError
from megaproof.toolchain.launch import require_device


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_pass(name: str) -> None:
    require_nvdisasm()
    program = PROGRAMS[name]
    rows, faults = cli.examine(program, program.compile())
    assert not faults
    for row in rows:
        assert bool(row["qgmma"]) == row["entry"].startswith(program.gemm)
        if program.roles:
            assert row["threads_by_role"] == {"producer": 128, "math": 256}
            by_role = row["registers_by_role"]
            assert 128 * by_role["producer"] + 256 * by_role["math"] <= row["registers"] * THREADS <= 65536


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_reads_data_that_its_kernels_share(name: str) -> None:
    """So the constants of namespaces, which lie there in the order of their names, are no part of their digests."""
    built = PROGRAMS[name].compile()
    assert not any(code.shared_banks(text) for text in code.texts(built.cubin))


def test_probes_compile_and_pass_the_gate() -> None:
    built = probe.PROGRAM.compile()
    assert set(built.report.entries) == set(probe.PROGRAM.entries)
    assert built.cubin.startswith(b"\x7fELF")
    widest = built.report.entries["wgmma_ss_n256"]
    assert 128 < widest.registers <= 255, "128 accumulators a thread live in registers"


def test_names_are_those_of_the_granularity() -> None:
    assert [moe(64).name, moe(128).name, phases(64).name, phases(128).name] == [
        "moe",
        "moe_g128",
        "phases",
        "phases_g128",
    ]
    assert PROGRAMS["moe"] is moe() is moe(64) is not moe(128)
    assert PROGRAMS["phases"] is phases()


def test_another_size_of_shared_memory_does_not_compile() -> None:
    """The host's number is sizeof(SharedStorage), or there is no cubin."""
    for other in ({"SHARED_BYTES": shared_bytes() + 128}, {"PARAMS_BYTES": ctypes.sizeof(Params) - 8}):
        with pytest.raises(BuildError, match="static assertion failed"):
            moe().with_defines(**other).compile(cache=False)


def pins() -> dict[str, dict[str, Any]]:
    return {name: program.compile().pin() for name, program in PROGRAMS.items()}


def test_cubins_are_the_pinned_ones() -> None:
    """And the code digest of each entry, which a result names."""
    found = pins()
    PINS.check(found)
    assert PINS.code() == {name: pin["code"] for name, pin in found.items()}


@pytest.mark.gpu
def test_the_dsv4_flash_gate_runs_the_pinned_cubins() -> None:
    """The GPU machine's NVRTC gives, byte for byte, what was gated without a GPU. The name is for `-k dsv4_flash`."""
    require_device()
    PINS.check(pins())
