"""The wheel: what it holds, that it runs alone in an empty home, and that beside a checkout there is one origin."""

from __future__ import annotations

import email
import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megaproof import __version__
from megaproof.tests.support import wheel
from megaproof.tests.support.house import PRODUCT, ROOT, files
from megaproof.tests.support.patience import PATIENCE_S

CASE = "dsv4_flash-r8-t1x1x1x1x1x1x1x0"
"""A full-size case of the gate that computes little: seven tokens for a few experts."""

ORIGINS = """
import importlib.util, json, pathlib, sys
import megaproof
names = ["kernel.api", "quant.recipe", "toolchain.build", "golden.store", "proof.gate", "bench.files", "cases.cases"]
places = {name: importlib.util.find_spec(f"megaproof.{name}").origin for name in names}
data = {name: str(megaproof.HOME / name) for name in ("golden/manifest.json", "kernel/moe_sm90.cu", "quant/twin.cu")}
print(json.dumps(places | {"megaproof": str(megaproof.HOME / "x")} | data))
assert all(map(pathlib.Path.exists, map(pathlib.Path, data.values())))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.install(built, tmp_path_factory.mktemp("site") / "packages")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def run(home: Path, paths: list[Path], *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """This interpreter with only these import paths, in an empty home unless another folder is given."""
    command = [sys.executable, *arguments]
    variables = wheel.environment(home, *paths)
    return subprocess.run(command, cwd=cwd or home, env=variables, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_wheel_holds_the_product_and_nothing_else(built: Path) -> None:
    inside = zipfile.ZipFile(built).namelist()
    rows = [path.relative_to(ROOT) for path in files() if path.relative_to(ROOT).parts[0] in PRODUCT]
    expected = {str(path if path.parts[0] == "megaproof" else "megaproof" / path) for path in rows}
    found = {name for name in inside if not name.split("/")[0].endswith(".dist-info")}
    assert expected - found == set(), "setup.py leaves files out"
    assert found - expected == set(), "setup.py takes in more than is tracked"


def test_version_and_requirements_have_one_place_each(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        stated = email.message_from_bytes(archive.read(name))
        assert not [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert stated["Version"] == __version__
    needed: set[str] = set()
    for file in ("requirements.txt", "requirements-suite.txt"):
        lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
        needed |= {Requirement(line).name for line in lines if line}
    assert {Requirement(line).name for line in stated.get_all("Requires-Dist")} == needed
    assert not {"version", "dependencies"} & tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].keys()


@pytest.mark.slow
def test_alone_the_kernel_compiles_to_the_pinned_code(site: Path, home: Path) -> None:
    """In an empty home, so with an empty cache; `build` is the command that compares with the pins."""
    done = run(home, [site], "-P", "-m", "megaproof.kernel", "build", "moe", "--json")
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: no disassembler here
    report = json.loads(done.stdout)
    assert report["failed"] == {}
    pins = json.loads((ROOT / "kernel" / "programs" / "cubins.json").read_text())
    assert {row["sha256"] for row in report["configurations"]} <= set(_values(pins))


def _values(tree: object) -> Iterator[object]:
    """Every leaf of a JSON value."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _values(value) if isinstance(value, dict | list) else [value]


@pytest.mark.slow
def test_alone_the_gate_runs(site: Path, home: Path) -> None:
    """The command of the documents, of one case."""
    gate = ["pytest", "-p", "megaproof.proof.plugin", "--pyargs", "megaproof.proof.gate", "--ranks", "8"]
    done = run(home, [site], "-P", "-m", *gate, "-k", CASE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "7 passed" in done.stdout
    assert "0 differ" in done.stdout
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("checkout", []),  # in the checkout, with the wheel on the path: Python looks in the current folder first
        ("wheel", ["-P"]),
        ("wheel", []),  # elsewhere, the wheel before the checkout on the path
    ],
)
def test_beside_each_other_one_is_used_alone(site: Path, home: Path, first: str, options: list[str]) -> None:
    in_checkout = first == "checkout" or bool(options)
    paths = [site] if in_checkout else [site, ROOT]
    done = run(home, paths, *options, "-c", ORIGINS, cwd=ROOT if in_checkout else home)
    assert done.returncode == 0, done.stderr
    expected = ROOT if first == "checkout" else site / "megaproof"
    assert [place for place in json.loads(done.stdout).values() if not Path(place).is_relative_to(expected)] == []


def test_the_checkout_before_the_wheel_is_used_alone(site: Path, home: Path) -> None:
    done = run(home, [ROOT, site], "-P", "-c", ORIGINS)
    assert done.returncode == 0, done.stderr
    assert [p for p in json.loads(done.stdout).values() if not Path(p).is_relative_to(ROOT)] == []


def test_a_bare_folder_of_another_copy_is_refused(site: Path, home: Path) -> None:
    done = run(home, [site, ROOT], "-P", "-m", "kernel", "build")
    assert done.returncode == 2
    assert done.stderr == f"kernel is in {ROOT}, but megaproof is in {site}/megaproof: use python -m megaproof.kernel\n"
