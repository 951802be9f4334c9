"""The reference as an adapter: the layer as its ranks compute it, each with its own tensors and what others send."""

from __future__ import annotations

from torch import Tensor

from megaproof.proof.adapters import Prepared
from megaproof.proof.worlds.gloo import run_processes
from megaproof.quant.recipe import Recipe
from megaproof.reference.layer import LayerResult
from megaproof.reference.ranks import run_ranks
from megaproof.reference.stages import SHOWN


class ReferenceAdapter:
    """All ranks in this process, or with world 'gloo' one process each."""

    name = "reference as ranks"
    worlds = ("virtual", "gloo")

    def __init__(self) -> None:
        self.prepared: Prepared | None = None
        self.result: LayerResult | None = None
        self.counts: list[Tensor] | None = None

    def claims(self, recipe: Recipe) -> str | None:
        """Every recipe that can be built is one that the reference computes."""
        return None

    def prepare(self, prepared: Prepared) -> None:
        """Raises ValueError for a world in which the reference can't run."""
        if prepared.world == "processes":
            raise ValueError("the reference runs in world virtual or gloo; 'processes' is for a kernel")
        if prepared.world == "gloo" and not prepared.whole:
            raise ValueError("processes make their inputs from the case's seed, so they run whole cases only")
        self.prepared, self.result, self.counts = prepared, None, None

    def launch(self) -> None:
        """Computes everything again: nothing of an earlier launch but the statistics is used."""
        if self.prepared is None:
            raise RuntimeError("launch comes after prepare")
        case = self.prepared.case
        if self.prepared.world == "gloo":
            self.result = run_processes(case)
            before = self.counts or [counts.new_zeros(counts.shape) for counts in self.result.stats]
            self.counts = [old + new for old, new in zip(before, self.result.stats, strict=True)]
            return
        made = self.prepared.inputs.arguments()
        self.result = run_ranks(case.recipe, *made, self.counts, trace=True, experts=case.shape.experts)
        self.counts = self.result.stats

    def stages(self) -> dict[str, Tensor]:
        """All of them."""
        trace = self._launched().trace or {}
        return {name: trace[name] for name in SHOWN}

    def y(self) -> list[Tensor]:
        """By rank."""
        return self._launched().y

    def stats(self) -> list[Tensor]:
        """By rank, over all launches since `prepare`."""
        if self.counts is None:
            raise RuntimeError("statistics come after launch")
        return self.counts

    def close(self) -> None:
        """Nothing is held."""
        self.prepared = self.result = self.counts = None

    def _launched(self) -> LayerResult:
        if self.result is None:
            raise RuntimeError("results come after launch")
        return self.result


def make() -> ReferenceAdapter:
    """The factory of `--kernel megaproof.proof.adapters.reference:make`."""
    return ReferenceAdapter()
