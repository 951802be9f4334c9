"""The file that pins cubins, so that what was gated without a GPU is, byte for byte, what runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaproof.toolchain import build, files
from megaproof.toolchain.build import Built
from megaproof.toolchain.errors import BuildError


@dataclass(frozen=True)
class Pins:
    """A JSON file with, for each program, its cubin's sha256 and the code digest of each kernel, and the compiler.

    Measured results name the code digests. renew: the command that writes the file anew, which messages name.
    """

    path: Path
    renew: str

    def code(self) -> dict[str, dict[str, str]]:
        """Program -> kernel -> code digest, as they are pinned; needs no compiler."""
        return {name: pin["code"] for name, pin in self._content()["targets"].items()}

    def check(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Program -> `Built.pin`. Raises BuildError naming those that differ from the pins, and what to do."""
        pins = self._content()
        _check_version(pins["nvrtc"])
        names = sorted(pins["targets"].keys() | found.keys())
        if others := [name for name in names if pins["targets"].get(name) != found.get(name)]:
            renew = f"after a change of the sources, renew them: {self.renew}"
            raise BuildError(f"cubins of {', '.join(others)} are not those of {self.path.name}; {renew}")

    def write(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Pins programs, as `check` takes them. Raises BuildError unless the compiler is `build.NVRTC_VERSION`."""
        _check_version(build.NVRTC_VERSION)
        content = {"nvrtc": build.NVRTC_VERSION, "targets": dict(found)}
        files.replace(self.path, (json.dumps(content, indent=2) + "\n").encode())

    def holds(self, built: Built) -> bool:
        """Whether a cubin and its code digests, and so what ptxas reports of it, are pinned, whatever it is called."""
        try:
            return built.pin() in self._content()["targets"].values()
        except (OSError, ValueError, KeyError):  # no pins, or a cubin that is none
            return False

    def _content(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))


FILES: list[Pins] = []
"""The files of pins that count: whoever has one adds it."""


def is_pinned(built: Built) -> bool:
    """Whether a file of pins holds a cubin."""
    return any(pins.holds(built) for pins in FILES)


def _check_version(pinned: str) -> None:
    if (version := build.nvrtc_version()) != pinned:
        raise BuildError(
            f"NVRTC is {version} and the pinned cubins are of {pinned}: another compiler gives other cubins, "
            f"which were not gated; install nvidia-cuda-nvrtc=={pinned}"
        )
