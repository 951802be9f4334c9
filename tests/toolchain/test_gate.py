"""The gate, without a GPU: what must pass, and what must be caught, in ptxas' report and in SASS."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megaproof.tests.support.texts import PLAIN, ROLES, SERIALISED, SPILL, STACK, require_nvdisasm, with_includes
from megaproof.toolchain import build, gate, sass
from megaproof.toolchain.errors import BuildError
from megaproof.toolchain.gate import SHARED_LIMIT
from megaproof.toolchain.program import Program

THREADS = {"producer": 128, "math": 256}
CLEAN = sass.Figures(qgmma=8, local=0, lowered=(40,), raised=(232,))
ENTRY = build.Entry(registers=168, stack=0, spill_stores=0, spill_loads=0, shared=0)


def expected(gemm: bool = True, roles: bool = True, shared: int = 0, static: int | None = None) -> Program:
    """A program of which the gate expects this."""
    names, threads = ("k",) if gemm else (), THREADS if roles else {}
    return Program("made up", (), ("k",), shared=shared, static=static, gemm=names, roles=threads)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (STACK, "256 bytes of stack"),
        (SPILL, "of spill loads"),
        (SERIALISED, "C75"),
        ("__device__ int nothing;", "no kernel"),
    ],
    ids=["stack", "spill", "serialised", "empty"],
)
def test_gate_catches(source: str, message: str) -> None:
    built = build.build(with_includes(source), cache=False)
    with pytest.raises(BuildError, match=message):
        gate.check_report(built)


def test_gate_passes_what_is_clean() -> None:
    gate.check_report(build.build(PLAIN, ["plain"], cache=False))


@pytest.mark.parametrize(("low", "high", "message"), [(40, 232, None), (48, 232, "would hang")])
def test_roles_that_ask_for_more_than_a_block_has(low: int, high: int, message: str | None) -> None:
    """48 and 232 are 65,536 in sum, and still more than the 168 x 384 that the block is launched with."""
    require_nvdisasm()
    built = build.build(with_includes(ROLES), defines={"LOW": low, "HIGH": high}, cache=False)
    figures = sass.disassemble(built.cubin)["roles"]
    found = gate.sass_faults(expected(gemm=False), "roles", built.report.entries["roles"], figures)
    assert [message in fault for fault in found] == ([True] if message else [])


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
    assert not gate.sass_faults(expected(shared=SHARED_LIMIT), "k", ENTRY, CLEAN)
    figures = sass.Figures(**(vars(CLEAN) | changes))
    (fault,) = gate.sass_faults(expected(gemm, roles, shared), "k", ENTRY, figures)
    assert re.search(message, fault)
    with pytest.raises(BuildError, match=f"compile gate: .*{message}"):
        gate.refuse([fault])


def test_roles_may_set_registers_back_to_those_of_the_launch() -> None:
    back = sass.Figures(qgmma=8, local=0, lowered=(40, 168), raised=(168, 232))
    assert not gate.sass_faults(expected(), "k", ENTRY, back)
    assert back.registers_by_role(THREADS) == CLEAN.registers_by_role(THREADS)
    for other in (sass.Figures(8, 0, (40, 160), (160, 232)), sass.Figures(8, 0, (168,), (168,))):
        (fault,) = gate.sass_faults(expected(), "k", ENTRY, other)
        assert "two values expected" in fault


def test_shared_memory_of_both_kinds() -> None:
    """Static memory is declared by the program, and the two together fit a block."""
    static = dataclasses.replace(ENTRY, shared=1024)
    assert not gate.sass_faults(expected(shared=SHARED_LIMIT - 1024, static=1024), "k", static, CLEAN)
    (fault,) = gate.sass_faults(expected(shared=SHARED_LIMIT - 1023, static=1024), "k", static, CLEAN)
    assert f"1024 of static, {SHARED_LIMIT} at most" in fault
    (fault,) = gate.sass_faults(expected(static=0), "k", static, CLEAN)
    assert "1024 bytes of static shared memory, 0 expected" in fault
