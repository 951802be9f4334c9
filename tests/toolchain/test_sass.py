"""What is read from the SASS of a cubin."""

from __future__ import annotations

import pytest

from megaproof.tests.support.texts import PLAIN, ROLES, STACK, require_nvdisasm, with_includes
from megaproof.toolchain import build, sass
from megaproof.toolchain.errors import BuildError


@pytest.fixture(autouse=True)
def _nvdisasm(request: pytest.FixtureRequest) -> None:
    if request.node.name != "test_parse":
        require_nvdisasm()


def test_registers_by_role() -> None:
    text = with_includes(ROLES)
    built = build.build(text, defines={"LOW": 40, "HIGH": 232}, cache=False)
    figures = sass.disassemble(built.cubin)["roles"]
    assert figures.registers_by_role(("producer", "math")) == {"producer": 40, "math": 232}
    plain = sass.disassemble(build.build(PLAIN, cache=False).cubin)["plain"]
    assert plain.registers_by_role(("producer", "math")) == {}


def test_local_memory_is_seen() -> None:
    found = sass.disassemble(build.build(STACK, cache=False).cubin)["stack"]
    assert found.local > 64
    assert sass.disassemble(build.build(PLAIN, cache=False).cubin) == {"plain": sass.Figures(0, 0, (), ())}


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
    built = build.build(with_includes(text), defines={"CHOSEN": chosen}, cache=False)
    assert sass.disassemble(built.cubin)["copies"].by_lane == loops


def test_no_cubin_is_an_error() -> None:
    with pytest.raises(BuildError, match="nvdisasm: "):
        sass.disassemble(b"\x7fELF but not one")


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
    with pytest.raises(BuildError, match="SASS of k cannot be read"):
        sass.parse(text.split("k:")[0])
