"""How the suite reaches a kernel, ours or another: one small protocol, `--kernel module:factory`.

The factory takes nothing and returns an `Adapter`. The suite asks `claims`, then prepares and launches one adapter
several times, with batches of several sizes, and compares everything that it shows with the reference, bit for bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, device

from megaproof import moved

if TYPE_CHECKING:
    from megaproof.cases.cases import Case
    from megaproof.cases.inputs import Inputs
    from megaproof.quant.recipe import Recipe

DEFAULT = "megaproof.proof.adapters:default"
"""Our kernel where there is a GPU for it, else the reference as ranks."""
WORLDS = ("virtual", "gloo", "processes")
"""How ranks run: all in one process or launch; one process each over gloo; one process and one GPU each."""
METHODS = ("claims", "prepare", "launch", "stages", "y", "stats", "close")


class AdapterError(ValueError):
    """A `--kernel` that can't be loaded, or whose factory returns something that is no adapter; names what is wrong."""


@dataclass(frozen=True)
class Prepared:
    """One problem for an adapter."""

    case: Case
    """Shape, ranks, recipe. The tokens of each rank are those of `inputs`: a second batch may have fewer."""
    inputs: Inputs
    """Tensors by rank, on `device`, and weights(e), as the arguments of `reference.layer.moe_layer`; not to be
    written."""
    device: device
    world: str = "virtual"
    """One of WORLDS."""
    whole: bool = True
    """Whether the inputs are all of the case's, so that its seed is enough to make them again elsewhere."""


class Adapter(Protocol):
    """A kernel, as the suite sees it.

    Optional: `worlds`, a tuple of WORLDS in which it runs (default: virtual alone); `fill(byte: int) -> None`, which
    fills every buffer that a launch has to write, y first of all, so that the suite sees what was never written.
    """

    name: str

    def claims(self, recipe: Recipe) -> str | None:
        """None: it computes this recipe. Else the reason why not, which the skip shows."""
        ...

    def prepare(self, prepared: Prepared) -> None:
        """Takes a problem, and sets the statistics to 0. Called again on the same adapter, it reuses its buffers."""
        ...

    def launch(self) -> None:
        """Computes the layer once; statistics are added to those of earlier launches since `prepare`."""
        ...

    def stages(self) -> dict[str, Tensor]:
        """Those of `reference.stages.SHOWN` that it can show, from the last launch, each as its row in `STAGES`
        says (dtype, columns); rows in (rank, token, slot) order of the active slots."""
        ...

    def y(self) -> list[Tensor]:
        """bfloat16 [T_r, H] by rank, of the last launch."""
        ...

    def stats(self) -> list[Tensor]:
        """int32 [E_loc] by rank."""
        ...

    def close(self) -> None:
        """Gives back what it holds; nothing is called afterwards."""
        ...


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
    adapter = load(spec)()
    missing = [name for name in METHODS if not callable(getattr(adapter, name, None))]
    missing += [] if isinstance(getattr(adapter, "name", None), str) else ["name (a str)"]
    if missing:
        raise AdapterError(f"--kernel {spec!r} returned a {type(adapter).__name__} without {', '.join(missing)}")
    return adapter
