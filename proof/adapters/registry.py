"""Finds the kernel that `--kernel module:factory` names."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megaproof import moved
from megaproof.proof.adapters import taken
from megaproof.proof.adapters.protocol import METHODS, Adapter, AdapterError

DEFAULT = "megaproof.proof.adapters:default"
"""Our kernel where there is a GPU for it, else the reference as ranks."""


def default() -> Adapter:
    """Our own kernel on an SM90 GPU; without one the reference itself, by ranks that see only their own tensors."""
    from megaproof.proof.adapters import megaproof, reference
    from megaproof.toolchain.errors import EnvironmentMissing
    from megaproof.toolchain.launch import require_device

    try:
        require_device()
    except EnvironmentMissing:
        return reference.make()
    return megaproof.make()


def load(spec: str) -> Callable[[], Adapter]:
    """The factory that 'module:factory' names; this runs the module's code. Raises `AdapterError`."""
    module_name, colon, factory_name = spec.partition(":")
    if not (module_name and colon and factory_name):
        raise AdapterError(f"--kernel {spec!r} is not of the form module:factory, such as {DEFAULT}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if line := moved.of_kernel(spec):
            raise AdapterError(line) from error
        raise AdapterError(f"--kernel {spec!r}: module {module_name} can't be imported: {error}") from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        raise AdapterError(f"--kernel {spec!r}: module {module_name} has no {factory_name}")
    if not callable(factory):
        raise AdapterError(f"--kernel {spec!r}: {factory_name} is a {type(factory).__name__}, not a function")
    return factory


def make(spec: str) -> Adapter:
    """An adapter from the factory that 'module:factory' names. Raises `AdapterError` naming a method that it lacks."""
    adapter = taken.asked(load(spec))
    missing = [name for name in METHODS if not callable(getattr(adapter, name, None))]
    missing += taken.attributes(adapter)
    if missing:
        raise AdapterError(f"--kernel {spec!r} returned a {type(adapter).__name__} without {', '.join(missing)}")
    return adapter
