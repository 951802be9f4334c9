"""Weights that remember what their experts made: a row that an expert has seen is not computed again.

A row's result depends on its bytes, its routing weight and its expert alone, which other tests prove without this.
Where the same batch goes through the same experts several times, as a proof's launches do, only what happens between
the experts is new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from megaproof.reference.operands import ExpertWeights, Weights

Compute = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""(l1_acts uint8 [m, H], l1_acts_sf float32 [m, H/128], weight float32 [m]) -> tensors of m rows each, by name."""


class Remembering:
    """Weights, and the rows of their experts so far. Rows are known by all of their bytes: there is no digest to
    collide."""

    def __init__(self, fresh: Weights) -> None:
        self.fresh = fresh
        """The same weights, which remember nothing."""
        self._rows: dict[Hashable, dict[str, Tensor]] = {}

    def __call__(self, e: int) -> ExpertWeights:
        """The matrices of expert e, made anew each time."""
        return self.fresh(e)

    def once(
        self, of: Hashable, compute: Compute, l1_acts: Tensor, l1_acts_sf: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """What `compute` makes of m >= 1 rows, which is called with those alone that are new.

        of: what else the result depends on: the expert, the recipe, the atoms. Safe from several threads as long as no
        two of them ask for the same expert at once; otherwise a row may be computed twice, to the same bits.
        """
        columns = (l1_acts, l1_acts_sf, weight.unsqueeze(1))
        data = torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1).cpu().numpy()
        keys = [(of, row.tobytes()) for row in data]
        new = {key: i for i, key in enumerate(keys) if key not in self._rows}
        if new:
            places = torch.tensor(list(new.values()), device=l1_acts.device)
            made = compute(l1_acts[places], l1_acts_sf[places], weight[places])
            self._rows.update({key: {name: made[name][i] for name in made} for i, key in enumerate(new)})
        rows = [self._rows[key] for key in keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
