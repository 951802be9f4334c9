"""What decides the result of a run, in words: options, versions, device, arithmetic, silicon goldens."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from typing import Any

import pytest

from megaproof.proof.options import first_line

PACKAGES = ("torch", "numpy", "numba", "cuda-core", "nvidia-cuda-nvrtc")
"""Packages on which a bit, or the code of a kernel, may depend."""
LAUNCHED = ("moe", "moe_g128", "twin")
"""Programs that a run on a GPU launches to compare them, or to compare with."""


@functools.cache
def no_gpu() -> str | None:
    """Why no test can run on a GPU here, on one line, or None if there is an SM90 GPU with a fitting driver."""
    from megaproof.toolchain.errors import EnvironmentMissing
    from megaproof.toolchain.launch import require_device

    try:
        require_device()
    except EnvironmentMissing as error:
        return f"needs a GPU: {first_line(error)}"
    return None


def options(config: pytest.Config) -> dict[str, Any]:
    """The options of the suite as JSON values."""
    option = config.option
    return {
        "ranks": sorted(option.ranks) if option.ranks else None,
        "seed": option.seed,
        "recipe": option.recipe,
        "world": option.world,
        "kernel": option.kernel,
        "require_gpu": option.require_gpu,
    }


def versions() -> dict[str, str]:
    """Of Python and of PACKAGES; 'absent' for one that is not installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def describe() -> dict[str, str]:
    """Device, arithmetic and silicon goldens, a phrase each. It imports torch.

    A header never stops a run: what can't be found out is 'unknown', and the tests say the same with a traceback.
    """
    found = {}
    for name, phrase in (("device", _device), ("arithmetic", _arithmetic), ("silicon", _silicon), ("cubins", _cubins)):
        try:
            found[name] = phrase()
        except Exception as error:
            found[name] = f"{name}: unknown ({first_line(error)})"
    return found


def lines(chosen: dict[str, Any], versions: dict[str, str], described: dict[str, str]) -> list[str]:
    """The header, from what `options`, `versions` and `describe` return."""
    ranks = ",".join(map(str, chosen["ranks"])) if chosen["ranks"] else "all"
    recipe = f"recipe {chosen['recipe'] or 'of each case'}, world {chosen['world']}, kernel {chosen['kernel']}"
    required = "yes" if chosen["require_gpu"] else "no"
    return [
        f"ranks {ranks}, seed {chosen['seed']}, {recipe}, require-gpu {required}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        *described.values(),
    ]


def _device() -> str:
    if reason := no_gpu():
        return f"device cpu ({reason})"
    from megaproof.toolchain.launch import require_device

    device = require_device()
    return f"device {device.name}, chip {device.chip}, {device.sms} SMs, driver {device.driver}"


def _arithmetic() -> str:
    from megaproof.quant import twin

    return "arithmetic " + "; ".join(map(twin.describe, ["cpu"] if no_gpu() else ["cpu", "cuda"]))


def unpinned() -> list[str]:
    """Names of the programs that a run may launch and whose cubins are not pinned: an edit, or another compiler.

    It compiles those that are not cached. Raises EnvironmentMissing without NVRTC, BuildError.
    """
    from megaproof.kernel.programs import PROGRAMS
    from megaproof.toolchain.pins import is_pinned

    return [name for name in LAUNCHED if not is_pinned(PROGRAMS[name].compile())]


def _cubins() -> str:
    if no_gpu():
        return "cubins: none is launched without a GPU"
    names = unpinned()
    return f"cubins: NOT PINNED: {', '.join(names)}" if names else "cubins: pinned"


def _silicon() -> str:
    from megaproof.quant.tables import DEFAULT_CHIP, chips

    measured, chip = chips(), DEFAULT_CHIP
    if not no_gpu():
        from megaproof.toolchain.launch import require_device

        chip = require_device().chip
    if chip in measured:
        return f"silicon goldens of {chip}: measured"
    known = ", ".join(measured) or "none"
    return f"silicon goldens of {chip}: unmeasured (measured: {known}); `python -m golden capture` measures this chip"
