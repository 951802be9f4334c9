"""What a fault in the kernel's sources is: an edit of one place, so that the kernel itself has no switch for it.

`source_values` lists the faults that compute something else or write too far, `source_order` those that come too early
or wait in vain.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaproof.cases.cases import SMOKE, Case
from megaproof.quant.recipe import Recipe
from megaproof.quant.shapes import Shape
from megaproof.toolchain.errors import BuildError

PUBLIC, OURS = "the public history of this kernel family", "made up for this kernel"
"""Where a fault comes from."""
ANY_STAGE = "l1_acts|l2_acts|slots|y|written"
"""A pattern of `Source.check`, where the interleaving decides which stage shows the fault first."""


def replaced(text: str, old: str, new: str) -> str:
    """`text` with `new` in the one place that reads `old`. Raises BuildError unless there is exactly one."""
    if text.count(old) != 1:
        raise BuildError(f"{text.count(old)} places read {old!r}; a fault needs one")
    return text.replace(old, new)


def narrow(experts: int, tokens: tuple[int, ...], topk: int = 2, **recipe: object) -> Case:
    """H = I = 128: one K block a tile, where roles hand over most often."""
    shape = Shape("narrow", hidden=128, intermediate=128, experts=experts, topk=topk)
    return Case(shape, tokens, recipe=Recipe(**recipe))


@dataclass(frozen=True)
class Source:
    """What is changed in the sources, where it has to show, and the layer that shows it."""

    id: str
    room: str
    """The file of kernel/ that it is in, without its ending."""
    origin: str
    """PUBLIC or OURS."""
    old: str
    """The text in its one place; `new` stands there instead."""
    new: str
    check: str
    """A pattern of how the conviction begins: `Convicted.check`, what the emulator or the adapter says, or 'behind'
    and the field whose guard is written."""
    case: Case = SMOKE[1]
    ring: int | None = None
    """Pool blocks that have a place at a time; None: all."""
    seeds: tuple[int, ...] = (0,)
    """Of the interleavings that are tried, until one shows it."""
    also: tuple[str, str] | None = None
    """Another place that has to change with it."""
    timeout_steps: int = 1_000_000
    """Of a role that waits in vain; below the emulator's limit, so that it says so."""

    def change(self, text: str) -> str:
        """The sources with the fault. Raises BuildError where its place is not there."""
        for old, new in filter(None, ((self.old, self.new), self.also)):
            text = replaced(text, old, new)
        return text
