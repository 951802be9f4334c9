"""The house: the promised rooms exist, the two wings pair up, equations and code name each other, files are clean."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megaproof import __version__
from megaproof.tests.support.house import ROOT, ROWS, TAG, files, modules, tags, text

PROMISED = {
    ".": "README.md LICENSE NOTICE CHANGELOG.md CONTRIBUTING.md pyproject.toml constraints.txt "
    "requirements.txt requirements-suite.txt Makefile setup.py conftest.py .ci/run .ci/python "
    ".github/workflows/gate.yml",
    "megaproof": "__init__.py",
    "toolchain": "build.py launch.py",
    "quant": "recipe.py formats.py scale.py cast.py atoms.py philox.py tables.py twin.py",
    "reference": "equations.md layer.py dispatch.py gemm.py swiglu.py scatter.py combine.py stats.py "
    "oracle/__init__.py",
    "kernel": "api.py moe_sm90.cu ptx.cuh",
    "golden": "__main__.py capture.py manifest.json silicon/manifest.json",
    "cases": "cases.py inputs/__init__.py",
    "proof": "gate.py plugin.py",
    "bench": "__main__.py",
}
NO_ROOM = {"ptx", "params", "storage"}
"""Headers of the kernel that are not a room: every line of PTX, the Params POD, shared memory."""
MOST_LINES = 300
LONGER = {
    "golden/capture.py": 305,
    "golden/store.py": 304,
    "proof/faults/hostile.py": 302,
    "quant/twin_cpu.py": 372,
    "tests/bench/test_sweep.py": 388,
    "tests/kernel/host/test_checks.py": 309,
    "tests/proof/test_processes.py": 334,
    "tests/proof/test_supervisor.py": 304,
    "tests/quant/test_twin.py": 329,
    "tests/reference/test_arguments.py": 321,
}
"""Modules above MOST_LINES, and how many lines each may have."""
HOME = re.compile(r"(?<![\w.~])/(?:home|Users)/\w+|(?<![\w./])/roo[t]/\w*")


@pytest.mark.parametrize("name", [f"{folder}/{name}" for folder in PROMISED for name in PROMISED[folder].split()])
def test_a_promised_file_exists(name: str) -> None:
    assert (ROOT / name).is_file(), f"{name} is part of the house"
    assert (ROOT / name).stat().st_size > 0, f"{name} is empty"


def test_every_folder_of_modules_is_a_package() -> None:
    """Without __init__.py any installed package of the same common name would win."""
    folders = {path.parent for path in files() if path.suffix == ".py" and path.parent != ROOT}
    assert {ROOT / name for name in ROWS} <= folders
    missing = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file())
    assert missing == []


def test_a_room_of_the_kernel_has_its_room_in_the_reference() -> None:
    """Each kernel/<room>.cuh that holds an equation is predicted by reference/<room>.py."""
    headers = sorted((ROOT / "kernel").glob("*.cuh"))
    assert headers
    for header in headers:
        if header.stem not in NO_ROOM and TAG.search(header.read_text(encoding="utf-8")):
            room = ROOT / "reference" / f"{header.stem}.py"
            assert room.is_file(), f"kernel/{header.name} has no room in the reference"
            assert tags([header]) <= tags([room]), f"kernel/{header.name} and {room.name} name different equations"


def test_equations_and_reference_name_each_other() -> None:
    page = ROOT / "reference" / "equations.md"
    assert page.is_file(), "reference/equations.md is missing"
    stated, used = tags([page]), tags(sorted((ROOT / "reference").rglob("*.py")))
    assert {str(n) for n in range(1, 10)} <= stated, "the page states equations (1) to (9), each tagged Eq. (n)"
    assert used - stated == set(), "tags in reference/*.py that the page does not state"
    assert stated - used == set(), "equations that no line of reference/*.py carries"


def test_the_oracle_imports_nothing_of_ours() -> None:
    """reference/oracle is an independent opinion: no model, no atoms, no formats; itself alone."""
    sources = sorted((ROOT / "reference" / "oracle").glob("*.py"))
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{'.' * node.level}{node.module or ''}"]
            ours = [
                name
                for name in names
                if name.split(".")[0] in ROWS and not name.startswith("megaproof.reference.oracle")
            ]
            ours += [name for name in names if name.startswith("..")]
            assert ours == [], f"{source.relative_to(ROOT)} imports {ours}"


def test_no_file_names_a_home_folder() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files()
        for number, line in enumerate((text(path) or "").splitlines(), 1)
        if (match := HOME.search(line))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/ho" + "me/someone/x", True),
        ("see /Use" + "rs/someone", True),
        ("'/ro" + "ot/x'", True),
        ("a/ho" + "me/x", False),
        ("https://example.org/ro" + "ot/x", False),
    ],
)
def test_a_home_folder_is_recognised(line: str, found: bool) -> None:
    assert bool(HOME.search(line)) is found


def test_data_are_never_pickles() -> None:
    """Data are safetensors and JSON: no format that runs code when it is read, and no call that reads one.

    Compiled functions are no data: numba has them in no other form, and the cache that keeps them is its owner's alone.
    """
    bad = [
        path.name for path in files() if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".joblib"}
    ]
    assert bad == []
    calls = re.compile(r"\b(?:torch\.load|np\.load|pickle\.loads?)\(")
    sources = [path for path in files() if path.suffix == ".py" and path != Path(__file__)]
    found = [str(path.relative_to(ROOT)) for path in sources if calls.search(path.read_text(encoding="utf-8"))]
    assert found == ["quant/numba_cache.py"]


def test_text_files_end_with_a_newline() -> None:
    for path in files():
        content = text(path)
        if content:
            assert content.endswith("\n"), f"{path.relative_to(ROOT)} lacks its last newline"
            assert "\r" not in content, f"{path.relative_to(ROOT)} has carriage returns"


def test_the_version_has_a_changelog_entry() -> None:
    release = __version__.partition(".dev")[0]  # a version in the making has the entry of the release that it becomes
    assert re.search(
        rf"^## \[?{re.escape(release)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_a_module_is_short_enough_to_be_read_at_once() -> None:
    """A longer one holds two thoughts. An exception may only become shorter, and leaves the list when it is short."""
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in modules(*ROWS)}
    assert {name: count for name, count in lines.items() if count > LONGER.get(name, MOST_LINES)} == {}
    assert [name for name in LONGER if lines.get(name, 0) <= MOST_LINES] == []


def test_links_between_documents_lead_somewhere() -> None:
    for path in files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"
