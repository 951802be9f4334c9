"""The line that ends every failure: what to type, in the folder that pytest was started in, to see it again."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

import megaproof
from megaproof import HOME
from megaproof.proof.options import DEFAULT_KERNEL
from megaproof.proof.selection import case_of

PACKAGE = Path(megaproof.__file__).resolve().parent


def python(root: Path) -> str:
    """The shortest name by which a shell in `root` finds the running interpreter."""
    executable = Path(sys.executable)
    if root == HOME and executable.is_relative_to(HOME):
        return str(executable.relative_to(HOME))
    return next((name for name in ("python", "python3") if shutil.which(name) == sys.executable), sys.executable)


def line(item: pytest.Item | pytest.Collector) -> str:
    """The command that runs this test, or collects this file, as it was run."""
    option, case, root = item.config.option, case_of(item), item.config.rootpath
    installed = _installed(item)
    if installed:
        command = f"{shlex.quote(python(root))} -m pytest -p megaproof.proof.plugin --pyargs {shlex.quote(installed)}"
    else:
        command = f"{shlex.quote(python(root))} -m pytest {shlex.quote(item.nodeid)}"
        if item.config.invocation_params.dir != root:
            command = f"cd {shlex.quote(str(root))} && {command}"
    if case:
        command += f" --ranks {case.ranks} --seed {option.seed}"
        command += f" --recipe {option.recipe}" if option.recipe else ""
        command += f" --world {option.world}" if option.world != "virtual" else ""
        command += f" --kernel {shlex.quote(option.kernel)}" if option.kernel != DEFAULT_KERNEL else ""
    if option.require_gpu:
        command += " --require-gpu"
    return command


def _installed(item: pytest.Item | pytest.Collector) -> str | None:
    """What --pyargs takes for a test of the installed package, which no path in a user's folder leads to."""
    if HOME != PACKAGE or not item.path.is_relative_to(PACKAGE):
        return None
    module = ".".join(("megaproof", *item.path.relative_to(PACKAGE).with_suffix("").parts))
    return module + "".join(f"::{name}" for name in item.nodeid.split("::")[1:])
