"""Figures of README and docs that the repository can check by itself: cases, goldens, captures, vectors, builds."""

from __future__ import annotations

import math
import re

import pytest

from megaproof.bench.measure.points import PRESETS
from megaproof.bench.model import floor
from megaproof.cases.cases import CASES
from megaproof.golden import silicon, store
from megaproof.kernel.__main__ import examine
from megaproof.kernel.programs import PROGRAMS
from megaproof.quant.recipe import RECIPES
from megaproof.quant.shapes import SHAPES
from megaproof.tests.support import warm
from megaproof.tests.support.runs import ROOT, environment
from megaproof.toolchain import sass
from megaproof.toolchain.errors import EnvironmentMissing

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [line for page in PAGES for line in page.read_text().splitlines()]
TEXT = " ".join(" ".join(SHOWN).split())
"""README and pages as one line: where a sentence breaks does not matter."""
FLASH = [case for case in CASES if case.shape.name == "dsv4_flash" and case.ranks == 8]


def test_counts_of_cases() -> None:
    on_cpu = sum(case.tier == "cpu" for case in FLASH)
    assert f"all {len(FLASH)} dsv4_flash cases at 8 ranks" in TEXT
    with_cases = [
        str(path) for path in ROOT.glob("tests/**/test_*.py") if re.search(r"\bcase: |\bgate\b", path.read_text())
    ]
    options = ["--collect-only", "-q", "-k", "dsv4_flash", "--ranks", "8"]
    listed = warm.pytest_main(ROOT, [*options, *with_cases], environment()).stdout
    (line,) = re.findall(r"^megaproof: \d+ cases, .*$", listed, re.MULTILINE)
    assert line in SHOWN, "what the header of the gate says"
    assert f" {on_cpu} of tier cpu" in line
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"{len(store.read_manifest())} cases of the layer" in changes
    assert f"eleven full-size cases on a CPU, {len(FLASH)} on a GPU" in changes
    assert on_cpu == 11


@pytest.mark.parametrize("chip", ["H100", "H200"])
def test_counts_of_the_captures(chip: str) -> None:
    entry = silicon.entry(chip)
    wgmma, fma = ([run["outputs"] for run in entry[kind].values()] for kind in ("wgmma", "fma"))
    assert f"wgmma e4m3, {len(wgmma)} families | {wgmma[0]:,} a family, {sum(wgmma):,} in all | 0 |" in TEXT
    assert f"fma, {len(fma)} families | {fma[0]:,} a family, {sum(fma):,} in all | 0 |" in TEXT
    assert {run["outputs"] for run in entry["sweeps"].values()} == {1 << 32}
    assert TEXT.count(f"{1 << 32:,} (all inputs") == len(entry["sweeps"])
    committed = sum(vector.bits.numel() for vector in silicon.vectors(chip))
    assert f"{committed:,} of its outputs are committed" in TEXT


@pytest.mark.parametrize("target, granularity", [("moe", 64), ("moe_g128", 128)])
def test_configurations(target: str, granularity: int) -> None:
    try:
        sass.disassembler()
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    rows, faults = examine(PROGRAMS[target], PROGRAMS[target].compile())
    assert not faults
    for row in rows:
        roles = ", ".join(str(count) for count in row["registers_by_role"].values())
        spills = row["spill_stores"] + row["spill_loads"]
        cells = f"{granularity} | {row['registers']} ({roles}) | {spills}, {row['stack']} | "
        cells += f"{row['shared_dynamic']:,} + {row['shared']:,} | {row['qgmma']}"
        assert f"| `moe_fast`, `moe_precise` | {cells} |" in TEXT


def test_symmetric_memory() -> None:
    rows = [floor.memory(SHAPES[name]) for name in PRESETS]
    for row in rows:
        assert re.search(rf"{row['preset']}\s+{row['bytes'] / 2**20:,.0f} MiB", TEXT), row
    times = min(row["whole_pool_bytes"] / row["bytes"] for row in rows)
    assert f"at least {math.floor(10 * times) / 10} times less" in TEXT


def test_presets_and_recipes_are_all_named() -> None:
    for names in (SHAPES, RECIPES):
        assert re.search(r":\s+" + r",\s+".join(names) + r"\.", TEXT)
