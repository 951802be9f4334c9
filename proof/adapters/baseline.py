"""The unfused baseline with exact GEMMs, behind the suite's protocol: `--kernel proof.adapters.baseline:make`.

What it proves are the baseline's own steps, dispatch to combine; its GEMMs are the reference's compiled twin.
"""

from __future__ import annotations

from torch import Tensor

from megaproof.kernel.baseline import Baseline, Result, claims
from megaproof.proof.adapters import Prepared
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.errors import EnvironmentMissing
from megaproof.toolchain.launch import require_device


class BaselineAdapter:
    """See `megaproof.proof.adapters.Adapter`."""

    name = "unfused baseline, exact GEMMs"

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._baseline: Baseline | None = None
        self._result: Result | None = None
        self._stats: list[Tensor] | None = None

    def claims(self, recipe: Recipe) -> str | None:
        """See `megaproof.kernel.baseline.claims`; nothing is claimed without a GPU."""
        try:
            require_device()
        except EnvironmentMissing as error:
            return str(error)
        return claims(recipe)

    def prepare(self, prepared: Prepared) -> None:
        """Raises `RecipeError` naming the field that it can't compute."""
        case = prepared.case
        self._prepared, self._result, self._stats = prepared, None, None
        weights = prepared.inputs.weights
        sizes = (case.shape.experts, case.shape.hidden, case.shape.intermediate)
        self._baseline = Baseline(case.recipe, weights, *sizes, prepared.device, gemm="exact")

    def launch(self) -> None:
        """One layer."""
        if self._prepared is None or self._baseline is None:
            raise RuntimeError("launch() needs a prepared problem: call prepare() first")
        made = self._prepared.inputs
        arguments = (made.x, made.x_sf, made.topk_idx, made.topk_weights)
        self._result = self._baseline(*arguments, stats=self._stats)
        self._stats = self._result.stats

    def stages(self) -> dict[str, Tensor]:
        """All five."""
        return self._last().stages()

    def y(self) -> list[Tensor]:
        """bfloat16 [T_r, H] by rank."""
        return self._last().y

    def stats(self) -> list[Tensor]:
        """int32 [E_loc] by rank."""
        return self._last().stats

    def close(self) -> None:
        """Lets go of tensors and weights."""
        self._prepared = self._baseline = self._result = self._stats = None

    def _last(self) -> Result:
        if self._result is None:
            raise RuntimeError("there is no result: call launch() first")
        return self._result


def make() -> BaselineAdapter:
    """Raises `EnvironmentMissing` on import where triton is not installed."""
    return BaselineAdapter()
