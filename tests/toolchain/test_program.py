"""A program, and the same program changed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megaproof.tests.support.texts import PLAIN, STACK
from megaproof.toolchain.errors import BuildError
from megaproof.toolchain.program import Program


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Two sources; the first one includes a third file."""
    (tmp_path / "head.cuh").write_text("#pragma once\n#define THREE 3.0f\n")
    (tmp_path / "one.cu").write_text('#include "head.cuh"\n' + PLAIN.replace("3.0f", "THREE") + "\n")
    (tmp_path / "two.cu").write_text('#include "head.cuh"\nextern "C" __global__ void two(int* p) { *p = VALUE; }\n')
    sources = tmp_path / "one.cu", tmp_path / "two.cu"
    return Program("a program", sources, ("plain", "two"), defines={"VALUE": 2})


def doubled(text: str) -> str:
    return text.replace("* THREE", "* 2.0f * THREE")


def test_the_text_has_every_file_once_and_names_it(program: Program) -> None:
    text = program.text()
    assert text.count("#define THREE") == 1
    assert [line for line in text.splitlines() if line.startswith("#line 1 ")] == [
        '#line 1 "one.cu"',
        '#line 1 "head.cuh"',
        '#line 1 "two.cu"',
    ]
    head = program.sources[0].with_name("head.cuh")
    assert "#define THREE" not in program.text(without=[head])


def test_it_compiles_with_its_macros_and_kernels(program: Program) -> None:
    built = program.compile(cache=False)
    assert set(built.report.entries) == {"plain", "two"}
    other = program.with_defines(VALUE=3)
    assert (program.defines, other.defines) == ({"VALUE": 2}, {"VALUE": 3})
    assert other.compile(cache=False).cubin != built.cubin
    with pytest.raises(BuildError, match="kernels absent are not in the cubin"):
        Program("another", program.sources, ("absent",), program.defines).compile(cache=False)


def test_an_edit_changes_the_text_alone(program: Program) -> None:
    edited = program.edited(str.upper)
    assert edited.text() == program.text().upper()
    assert program.edit is None
    assert edited.edited(str.lower).text() == program.text().lower(), "one edit follows the other"
    assert program.edited(doubled).compile(cache=False).code("plain") != program.compile(cache=False).code("plain")
    assert program.edited(doubled).compile(cache=False).code("two") == program.compile(cache=False).code("two")


def test_an_edit_that_fails_is_heard(program: Program) -> None:
    def absent(text: str) -> str:
        raise BuildError("the place is not there")

    with pytest.raises(BuildError, match="the place is not there"):
        program.edited(absent).compile()


def test_the_gate_judges_it_unless_it_is_not_gated(tmp_path: Path) -> None:
    (tmp_path / "stack.cu").write_text(STACK)
    program = Program("stack", (tmp_path / "stack.cu",), ("stack",))
    with pytest.raises(BuildError, match="256 bytes of stack"):
        program.compile(cache=False)
    with pytest.raises(BuildError, match="256 bytes of stack"):
        program.edited(str).compile(cache=False)
    free = Program("stack", program.sources, ("stack",), gated=False).compile(cache=False)
    assert free.report.entries["stack"].stack == 256


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"source absent\.cu is missing"):
        Program("absent", (tmp_path / "absent.cu",), ()).compile()


def test_programs_are_values(program: Program) -> None:
    """They can be keys, and travel to other processes."""
    same = Program("a program", program.sources, program.entries, {"VALUE": 2})
    assert same == program
    assert hash(same) == hash(program)
    assert program.with_defines(VALUE=3) != program
    edited = program.edited(doubled)
    assert edited != program
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(Program.text, edited).result() == edited.text()
