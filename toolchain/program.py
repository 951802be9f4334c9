"""A program for the GPU: what is compiled, what the gate expects of it, and the same program, changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megaproof.toolchain import build, gate, pins
from megaproof.toolchain.build import Built
from megaproof.toolchain.launch import Library


@dataclass(frozen=True)
class Program:
    """One cubin. A program never changes: `with_defines` and `edited` give others beside it."""

    name: str
    """What `kernel build`, the pins and the results call it."""
    sources: tuple[Path, ...]
    """Absolute paths; the files are compiled as one text, in this order, includes in their places."""
    entries: tuple[str, ...]
    """Kernels that must be in it; more may be."""
    defines: Mapping[str, int | str] = field(default_factory=dict, hash=False)
    """Macros."""
    shared: int | None = None
    """Bytes of dynamic shared memory that its kernels are launched with; None: the call decides. The sources assert
    that it is sizeof of their storage."""
    static: int | None = None
    """Bytes of static shared memory of each kernel; None: whatever the compiler says."""
    gemm: tuple[str, ...] = ()
    """How the names of those kernels begin that multiply on the tensor core, and must; all others must not."""
    roles: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Threads of each role of a block, where warpgroups share out registers (setmaxnreg): the first role gives some
    away, the second one takes them. Empty: no kernel does."""
    gated: bool = True
    """Whether the gate judges it. What is measured and never shipped may spill."""
    edit: Callable[[str], str] | None = None
    """Changes the text before it is compiled; raises where it does not find its place."""

    def text(self, without: Iterable[Path] = ()) -> str:
        """What the compiler gets: sources joined, but for the files `without`, then edited. Raises BuildError."""
        text = build.joined(self.sources, without)
        return text if self.edit is None else self.edit(text)

    def compile(self, cache: bool = True) -> Built:
        """The cubin, gated by ptxas' report; needs NVRTC but no GPU. cache: whether one made before will do.

        Of what another process made only a pinned cubin will do: a cache never stands in for the gate.

        Raises BuildError, EnvironmentMissing without NVRTC.
        """
        built = build.build(self.text(), self.entries, defines=self.defines, cache=cache, takes=pins.is_pinned)
        if self.gated:
            gate.check_report(built)
        return built

    def library(self) -> Library:
        """The cubin, compiled and loaded at the first call; every device can use it. Raises as `compile` does, and
        EnvironmentMissing without an SM90 GPU, LaunchError."""
        return self._library

    def with_defines(self, **defines: int | str) -> Program:
        """The same program with these macros, which replace those of the same name."""
        return replace(self, defines={**self.defines, **defines})

    def edited(self, edit: Callable[[str], str]) -> Program:
        """The same program with a change of its text, made after those that it has already."""
        before = self.edit
        return replace(self, edit=edit if before is None else lambda text: edit(before(text)))

    @cached_property
    def _library(self) -> Library:
        return Library(self.compile().cubin)
