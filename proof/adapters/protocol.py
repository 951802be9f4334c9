"""What a kernel has to be for the suite to prove it: one small protocol.

A factory takes nothing and returns an `Adapter`. The suite asks `claims`, then prepares and launches one adapter
several times, with batches of several sizes, and compares everything that it shows with the reference, bit for bit.
Shapes are written with R ranks, T_r tokens of rank r, K slots of a token, n active slots of all ranks together, hidden
size H, intermediate size I, E_loc experts of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, device

if TYPE_CHECKING:
    from megaproof.cases.cases import Case
    from megaproof.cases.inputs import Inputs
    from megaproof.quant.recipe import Recipe

World = Literal["virtual", "gloo", "processes"]
WORLDS: tuple[World, ...] = ("virtual", "gloo", "processes")
"""How ranks run: all in one process or launch; one process each over gloo; one process and one GPU each."""
METHODS = ("claims", "prepare", "launch", "stages", "y", "stats", "close")
"""What every adapter has, besides its `name`."""


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
    world: World = "virtual"
    whole: bool = True
    """Whether the inputs are all of the case's, so that its seed is enough to make them again elsewhere."""


class Adapter(Protocol):
    """A kernel, as the suite sees it.

    Two attributes are optional. `worlds` is a tuple of WORLDS in which the adapter runs; without it, virtual alone.
    `fill(byte: int) -> None` sets every byte of every buffer that a launch has to write, y first of all, so that the
    suite sees what was never written; without it, the suite says that buffers were not filled.
    """

    name: str
    """What reports call the kernel."""

    def claims(self, recipe: Recipe) -> str | None:
        """Says whether the kernel computes a recipe.

        Args:
            recipe: every field of the arithmetic; see quant/recipe.py.

        Returns:
            None if it does. Otherwise the reason why not, which the skip shows.
        """
        ...

    def prepare(self, prepared: Prepared) -> None:
        """Takes a problem, and sets the statistics to 0.

        The suite calls it several times on one adapter, with other inputs and other numbers of tokens; buffers that
        are large enough are used again, with whatever earlier launches have left in them.

        Args:
            prepared: the case, its inputs and the device that they are on.

        Raises:
            EnvironmentMissing: what the kernel needs is not here, such as a GPU.
            ValueError: the adapter does not run in `prepared.world`.
        """
        ...

    def launch(self) -> None:
        """Computes the layer once, and adds to the statistics of earlier launches since `prepare`.

        Raises:
            Exception: whatever the kernel has to say; the proof fails with it.
        """
        ...

    def stages(self) -> dict[str, Tensor]:
        """Shows intermediate results of the last launch.

        Returns:
            Stage name -> tensor, of any of `reference.stages.SHOWN`, and of no other. Each has the dtype and the width
            of the reference's trace, and n rows: one for each active slot, in (source rank, token, slot) order;
            `canonical.py` helps. Stages that the kernel can't show are left out.

        Raises:
            AssertionError: rows that were routed are not where they have to be.
        """
        ...

    def y(self) -> list[Tensor]:
        """Returns the output of the last launch: bfloat16 [T_r, H], by rank."""
        ...

    def stats(self) -> list[Tensor]:
        """Returns how many rows each expert has received since `prepare`: int32 [E_loc], by rank."""
        ...

    def close(self) -> None:
        """Gives back what the adapter holds; the suite calls nothing afterwards."""
        ...
