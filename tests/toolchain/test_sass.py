"""The part of the compile gate that reads SASS: what it finds in cubins, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from megaproof.kernel import __main__ as cli
from megaproof.kernel.host.sizes import SHARED_LIMIT, THREADS
from megaproof.tests.toolchain.test_build import PLAIN, STACK
from megaproof.toolchain import build, sass

CLEAN = sass.Figures(qgmma=8, local=0, lowered=(40,), raised=(232,))
ENTRY = build.Entry(registers=168, stack=0, spill_stores=0, spill_loads=0, shared=0)
ROLES = """
#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(384, 1) roles(float* p) {
    if (threadIdx.x < 128) {
        ptx::fewer_registers<LOW>();
        p[0] = 1.0f;
    } else {
        ptx::more_registers<HIGH>();
        p[threadIdx.x] = 2.0f;
    }
}
"""


@pytest.fixture
def nvdisasm() -> None:
    """Must be there, but for a machine with a GPU: cubins are gated before they come to it."""
    try:
        sass.disassembler()
    except build.EnvironmentMissing as error:
        if torch.cuda.is_available():
            pytest.skip(str(error))
        raise


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("name", cli.TARGETS)
def test_targets_pass(name: str) -> None:
    rows, faults = cli.examine(name, cli.TARGETS[name].compile())
    assert not faults
    for row in rows:
        assert bool(row["qgmma"]) == row["entry"].startswith(cli.TARGETS[name].gemm)
        if cli.TARGETS[name].roles:
            assert row["threads_by_role"] == {"producer": 128, "math": 256}
            by_role = row["registers_by_role"]
            assert 128 * by_role["producer"] + 256 * by_role["math"] <= row["registers"] * THREADS <= 65536


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize(("low", "high", "message"), [(40, 232, None), (48, 232, "would hang")])
def test_registers_by_role(low: int, high: int, message: str | None) -> None:
    """48 and 232 are 65,536 in sum, and still more than the 168 x 384 that the block is launched with."""
    built = build.build_text(ROLES, defines={"LOW": low, "HIGH": high}, cache=False)
    figures = sass.disassemble(built.cubin)["roles"]
    assert figures.registers_by_role() == {"producer": low, "math": high}
    found = sass.faults("roles", built.report.entries["roles"], figures, False, True, 0)
    assert [message in fault for fault in found] == ([True] if message else [])


@pytest.mark.usefixtures("nvdisasm")
def test_local_memory_is_seen() -> None:
    found = sass.disassemble(build.build_text(STACK, cache=False).cubin)["stack"]
    assert found.local > 64
    assert sass.disassemble(build.build_text(PLAIN, cache=False).cubin) == {"plain": sass.Figures(0, 0, (), ())}


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize(("chosen", "loops"), [("threadIdx.x == 0", 2), ("ptx::elect_one()", 0)])
def test_copies_that_go_through_the_lanes_are_seen(chosen: str, loops: int) -> None:
    text = """
#include "ptx.cuh"
extern "C" __global__ void copies(const u8* from, u32 bytes) {
    extern __shared__ __align__(128) u8 to[];
    __shared__ u64 arrived;
    if (CHOSEN) {
        ptx::bulk_load(to, from, bytes, &arrived);
        ptx::bulk_load(to + bytes, from + bytes, bytes, &arrived);
    }
}
"""
    built = build.build_text(text, defines={"CHOSEN": chosen}, cache=False)
    assert sass.disassemble(built.cubin)["copies"].by_lane == loops


@pytest.mark.usefixtures("nvdisasm")
def test_no_cubin_is_an_error() -> None:
    with pytest.raises(build.BuildError, match="nvdisasm: "):
        sass.disassemble(b"\x7fELF but not one")


@pytest.mark.parametrize(
    ("changes", "gemm", "roles", "shared", "message"),
    [
        ({"qgmma": 0}, True, True, 0, "k: 0 QGMMA instructions, and some are expected"),
        ({}, False, True, 0, "k: 8 QGMMA instructions, and none is expected"),
        ({"local": 1}, True, True, 0, "k: 1 instructions on local memory"),
        ({"raised": ()}, True, True, 0, r"setmaxnreg to \[40\]: two values expected"),
        ({"raised": (224, 232)}, True, True, 0, "two values expected"),
        ({}, True, False, 0, r"setmaxnreg to \[40, 232\]: none expected"),
        ({"lowered": (48,)}, True, True, 0, r"128 x 48 \+ 256 x 232 = 65536 registers; .* 64512"),
        ({"by_lane": 7}, True, True, 0, "k: 7 loops through the lanes of a warp"),
        ({}, True, True, SHARED_LIMIT + 1, "232449 bytes of dynamic shared memory and 0 of static, 232448 at most"),
    ],
)
def test_faults(changes: dict, gemm: bool, roles: bool, shared: int, message: str) -> None:
    assert not sass.faults("k", ENTRY, CLEAN, True, True, SHARED_LIMIT)
    figures = sass.Figures(**(vars(CLEAN) | changes))
    (fault,) = sass.faults("k", ENTRY, figures, gemm, roles, shared)
    with pytest.raises(build.BuildError, match=message):
        raise build.BuildError(fault)


def test_roles_may_set_registers_back_to_those_of_the_launch() -> None:
    back = sass.Figures(qgmma=8, local=0, lowered=(40, 168), raised=(168, 232))
    assert not sass.faults("k", ENTRY, back, True, True, 0)
    assert back.registers_by_role() == CLEAN.registers_by_role()
    for other in (sass.Figures(8, 0, (40, 160), (160, 232)), sass.Figures(8, 0, (168,), (168,))):
        (fault,) = sass.faults("k", ENTRY, other, True, True, 0)
        assert "two values expected" in fault


def test_shared_memory_of_both_kinds() -> None:
    """Static memory is declared by the target, and the two together fit a block."""
    static = dataclasses.replace(ENTRY, shared=1024)
    assert not sass.faults("k", static, CLEAN, True, True, SHARED_LIMIT - 1024, 1024)
    (fault,) = sass.faults("k", static, CLEAN, True, True, SHARED_LIMIT - 1023, 1024)
    assert f"1024 of static, {SHARED_LIMIT} at most" in fault
    (fault,) = sass.faults("k", static, CLEAN, True, True, 0, 0)
    assert "1024 bytes of static shared memory, 0 expected" in fault


def test_parse() -> None:
    text = """
	.section	.text.k,"ax",@progbits
k:
        /*0000*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0010*/              @!P0 USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0020*/              @UP1 QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR24], R24 ;
        /*0030*/               @P0 STL.64 [R1+0x8], R2 ;
        /*0040*/                   LDL R2, [R1] ;
        /*0050*/                   BRA `(.L_x_1) ;
        /*0060*/               @P0 BRA.U.ANY `(.L_x_1) ;
"""
    assert sass.parse(text) == {"k": sass.Figures(1, 2, (40,), (232,), 1)}
    with pytest.raises(build.BuildError, match="SASS of k cannot be read"):
        sass.parse(text.split("k:")[0])


def test_missing_disassembler_is_said_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise build.EnvironmentMissing("nvdisasm missing: install it")

    monkeypatch.setattr(sass, "disassembler", missing)
    run = CliRunner().invoke(cli.app, ["build", "twin", "--json"])
    assert run.exit_code == 3, "what was not checked is not passed"
    report = json.loads(run.stdout)
    assert report["sass"].startswith("not checked: nvdisasm missing")
    assert {row["qgmma"] for row in report["configurations"]} == {None}
    run = CliRunner().invoke(cli.app, ["build", "--all", "--pin"])
    assert run.exit_code == 3
    assert "only what passed the whole gate is pinned" in run.stderr
