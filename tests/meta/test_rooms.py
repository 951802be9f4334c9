"""The two wings: every room stands in both, with the same equations and the same shared names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megaproof.kernel.host import sizes
from megaproof.reference import layout, scheduler
from megaproof.tests.support.house import ROOT, tags

ROOMS = ("layout", "scheduler", "dispatch", "gemm", "swiglu", "scatter", "combine", "barrier", "stats")
SHARED = {
    "layout": {"ring_row", "slot_row", "recv_count", "recv_list"},
    "scheduler": {
        *("Plan", "num_blocks_of", "make_plan", "expert_of", "num_rows_in_block"),
        *(
            "gemm2_tile_n",
            "evicts_weights_first",
            "Task",
            "num_gemm1_half_tiles",
            "num_gemm2_half_tiles",
            "task_of",
            "next_task_idx",
        ),
    },
    "dispatch": {"pull"},
    "swiglu": {"activate"},
    "scatter": {"to_slot"},
    "combine": {"combine"},
    "barrier": {"spin", "sync_ranks", "sync_ctas"},
    "stats": {"accumulate"},
}
"""Names that mean the same in both wings."""


def wings(room: str) -> tuple[Path, Path]:
    return ROOT / "reference" / f"{room}.py", ROOT / "kernel" / f"{room}.cuh"


def defined_in_python(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def defined_in_cuda(source: str) -> set[str]:
    """Device functions and structs; a call is neither."""
    code = re.sub(r"//.*", "", source)
    functions = re.findall(r"__device__[^;{}()]*?[\s*&](\w+)\(", code)
    return {*functions, *re.findall(r"\bstruct (\w+) \{", code)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stands_in_both_wings(room: str) -> None:
    for path in wings(room):
        assert path.is_file(), f"{path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("room", ROOMS)
def test_both_wings_of_a_room_name_the_same_equations(room: str) -> None:
    reference, kernel = (tags([path]) for path in wings(room))
    assert reference == kernel


@pytest.mark.parametrize("room", SHARED)
def test_shared_names_are_defined_in_both_wings(room: str) -> None:
    reference, kernel = wings(room)
    assert SHARED[room] - defined_in_python(reference) == set()
    assert SHARED[room] - defined_in_cuda(kernel.read_text(encoding="utf-8")) == set()


def test_both_wings_have_the_same_tile_and_groups() -> None:
    kernel = sizes.BLOCK_M, sizes.BLOCK_N, sizes.HALF_N, sizes.WAVE_BLOCKS
    assert kernel == (layout.BLOCK_M, scheduler.BLOCK_N, scheduler.HALF_N, scheduler.WAVE_BLOCKS)


def test_peers_are_reached_through_layout_alone() -> None:
    """Where the ranks' memory is, is one file's business: no other source indexes the buffers of the parameters."""
    sources = [*(ROOT / "kernel").glob("*.cuh"), *(ROOT / "kernel").glob("*.cu")]
    reaching = {
        path.name for path in sources if re.search(r"\bbuffer_ptr\[(?!kMaxRanks\])", path.read_text(encoding="utf-8"))
    }
    assert reaching == {"layout.cuh"}


def test_a_call_is_no_definition() -> None:
    source = "// meet(r)\n__device__ __forceinline__ u32* rows(int a) { return spin(a); }\nstruct Plan { u32 n; };"
    assert defined_in_cuda(source) == {"rows", "Plan"}
