"""What goes wrong between a source and its launch, in one sentence each."""

from __future__ import annotations


class EnvironmentMissing(RuntimeError):
    """A package, driver or device that is not there; one sentence saying what is needed (exit status 3)."""


class BuildError(RuntimeError):
    """A source that does not compile, or a cubin that does not pass the gate."""


class LaunchError(RuntimeError):
    """A call of the CUDA driver that failed, with its name and code."""
