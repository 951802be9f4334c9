"""A wheel of this very checkout, uncommitted edits included, built and installed into a folder without an index."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from megaproof.tests.support.house import ROOT, files

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def build(folder: Path) -> Path:
    """The wheel, built in a copy of the checkout below `folder`, which keeps neither."""
    source, target = folder / "source", folder / "wheel"
    for path in files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    target.mkdir()
    # What pip calls after it has set up a place for the build, which would need an index for setuptools.
    command = [sys.executable, "-c", BUILD, str(target)]
    run = subprocess.run(command, cwd=source, env=environment(folder), capture_output=True, text=True, timeout=120)
    if run.returncode:
        raise RuntimeError(f"no wheel: {run.stderr[-2000:]}")
    shutil.rmtree(source)
    (wheel,) = target.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The folder for PYTHONPATH that the wheel is installed in: by pip, or by hand where there is no pip."""
    if importlib.util.find_spec("pip"):
        options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel)]
        subprocess.run(command, env=environment(folder.parent), capture_output=True, check=True, timeout=120)
    else:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def environment(home: Path, *paths: Path) -> dict[str, str]:
    """An environment with this home and these import paths, no GPU, and nothing of ours or pytest's."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
