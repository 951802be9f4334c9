"""The cache of compiled twins: an edit of anything that enters it is seen; without a cache they are compiled."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

import torch

from megaproof.quant import numba_cache, twin, twin_cpu
from megaproof.toolchain import cache
from megaproof.toolchain.child import ROOT

PROGRAM = """
import torch
from megaproof.quant import twin, twin_cpu
module = twin.arith("cpu")
lut = torch.arange(256, dtype=torch.uint8)
print(module is twin_cpu, twin.describe("cpu"), module.codes(5, 6, 64, lut).tolist(), sep="|")
"""
EDITS = {
    "philox": ("philox.py", "MULTIPLIERS = (0xD2511F53,", "MULTIPLIERS = (0xD2511F51,"),
    "lanes": ("lanes.py", "_splat(_I64, 32, BLOCKS)", "_splat(_I64, 31, BLOCKS)"),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources."""
    for name in ("megaproof", "quant", "toolchain"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder: Path, home: str) -> str:
    """What PROGRAM prints in a fork of this process, which has numba imported, with the sources of `folder`."""
    out = folder / "out"
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the threads of this process are not the fork's
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            for name in [name for name in sys.modules if name.split(".")[0] == "megaproof"]:
                del sys.modules[name]
            sys.path.insert(0, str(folder))
            sys.dont_write_bytecode = True
            os.environ["XDG_CACHE_HOME"] = home
            exec(PROGRAM, {})
            sys.stdout.flush()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return out.read_text()


def edit(path: Path, old: str, new: str) -> None:
    """Puts `new` in place of `old`; size and time of the file stay, which is all that numba looks at."""
    text, times = path.read_text(), path.stat()
    assert len(old) == len(new)
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_with_caches_kept_is_seen(copy: Path, name: str) -> None:
    home = copy / "home"
    home.mkdir(mode=0o700)
    first = run(copy, str(home))
    assert list((home / "megaproof" / "numba").glob("*.sha256")), "there is a cache"
    file, old, new = EDITS[name]
    edit(copy / "quant" / file, old, new)
    edited = run(copy, str(home))
    assert edited != first
    edit(copy / "quant" / file, new, old)
    assert run(copy, str(home)) == first


def test_without_a_usable_cache_the_twin_is_compiled_in_memory(copy: Path) -> None:
    """Not replaced by the readable atoms, which take forty times as long."""
    (copy / "file").write_text("no folder")
    found = run(copy, str(copy / "file"))
    assert found.startswith("True|numba ")
    assert not (copy / "quant" / "__pycache__").exists()


def test_what_is_no_machine_code_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.Cache, "read", lambda self, name: b"no pickle")
    of = twin_cpu._rcp._cache
    assert of.load_overload("a signature", twin_cpu._rcp.targetctx) is None


def test_a_constant_that_is_changed_in_this_process_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a planted fault would stay in the cache, for processes without it."""
    before = numba_cache.loaded()
    monkeypatch.setattr("megaproof.quant.atoms.LOG2_E", 0x3FB8AA3C)
    assert numba_cache.loaded() != before


def test_every_module_that_the_twin_compiles_enters_the_key() -> None:
    for name in ("twin_cpu", "lanes"):
        text = (Path(twin_cpu.__file__).parent / f"{name}.py").read_text()
        found = re.findall(r"from megaproof\.quant(?:\.(\w+))? import ([\w, ]+)", text)
        used = {one.strip() for module, names in found for one in ([module] if module else names.split(","))}
        assert used - {"host_state", "numba_cache", "tables"} <= set(numba_cache.ENTER)


def test_no_cache_of_numbas_own_is_used() -> None:
    names = [name for name, value in vars(twin_cpu).items() if hasattr(value, "py_func")]
    assert len(names) > 20
    assert all(isinstance(getattr(twin_cpu, name)._cache, numba_cache.FunctionCache) for name in names)
    assert twin.arith("cpu") is twin_cpu
