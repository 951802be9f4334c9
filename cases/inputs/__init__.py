"""Tensors of a case, from one counter-based generator: the same bytes on every machine and device.

Weights come per expert, on demand. A family decides values (`FAMILIES`, and the module of each), a routing decides who
gets them (`ROUTINGS`). Scales differ in every block, whatever the family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaproof.cases.cases import Case
from megaproof.cases.inputs.adversarial import make_adversarial
from megaproof.cases.inputs.draws import MASK, TOPK, Drawn, stream
from megaproof.cases.inputs.families import make_gaussian, make_heavy_tail, make_mixed
from megaproof.cases.inputs.lattice import make_lattice
from megaproof.cases.inputs.position import make_position
from megaproof.quant import philox
from megaproof.quant.host_state import guarded
from megaproof.reference.layout import owner
from megaproof.reference.operands import Weights


@dataclass(frozen=True)
class Inputs:
    """Arguments of `moe_layer`; lists by rank."""

    x: list[Tensor]
    x_sf: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]
    weights: Weights

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Weights]:
        """In the order that `moe_layer` takes them."""
        return self.x, self.x_sf, self.topk_idx, self.topk_weights, self.weights

    @guarded
    def sha256(self) -> str:
        """Digest of everything but the weights (they follow from seed and expert)."""
        digest = hashlib.sha256()
        for tensors in (self.x, self.x_sf, self.topk_idx, self.topk_weights):
            for tensor in tensors:
                digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


# --- routing ----------------------------------------------------------------------------------------------------------


def _uniform(case: Case, key: Tensor) -> Tensor:
    return key


def _zipf(case: Case, key: Tensor) -> Tensor:
    """Expert of popularity place j wins a race in which its key counts j + 1 times."""
    e = torch.arange(case.shape.experts)
    return key * ((e * 101 + case.seed) % case.shape.experts + 1)


def _one_hot(case: Case, key: Tensor) -> Tensor:
    """One expert is in every token's slots."""
    key[:, case.seed % case.shape.experts] = -1
    return key


def _one_rank(case: Case, key: Tensor) -> Tensor:
    """Every slot goes to the experts of one rank."""
    local = case.shape.experts_per_rank(case.ranks)
    key[:, owner(torch.arange(case.shape.experts), local) != case.ranks // 2] += 1 << 40
    return key


def _few_experts(case: Case, key: Tensor) -> Tensor:
    """All but twice top-k experts are empty."""
    used = torch.arange(case.shape.experts) % (case.shape.experts // (2 * case.shape.topk)) == 1
    key[:, ~used] += 1 << 40
    return key


ROUTINGS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "one_hot": _one_hot,
    "one_rank": _one_rank,
    "few_experts": _few_experts,
}


@guarded
def route(case: Case, rank: int) -> Tensor:
    """int64 [T_r, K]: distinct experts a token, the smallest keys; masked slots are -1."""
    tokens, experts, topk = case.tokens[rank], case.shape.experts, case.shape.topk
    key = philox.words(case.seed, stream(TOPK, rank), tokens * experts).reshape(tokens, experts)
    idx = torch.argsort(ROUTINGS[case.routing](case, key), dim=1, stable=True)[:, :topk].contiguous()
    mask = philox.words(case.seed, stream(MASK, rank), tokens * topk).reshape(tokens, topk) % 100 < case.masked
    return torch.where(mask, -1, idx)


# --- the case ---------------------------------------------------------------------------------------------------------


@guarded
def make(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's arguments on a device. Deterministic in the case alone."""
    device = torch.device(device)
    topk_idx = [route(case, rank) for rank in range(case.ranks)]
    x, x_sf, topk_weights, weights = FAMILIES[case.family](case, topk_idx, device)
    return Inputs(x, x_sf, [idx.to(device) for idx in topk_idx], topk_weights, guarded(weights))


def _make_lattice(case: Case, topk_idx: list[Tensor], device: torch.device) -> Drawn:
    shape = case.shape
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.topk)
    return make_lattice(*sizes, list(case.tokens), topk_idx, case.seed, device)


FAMILIES: dict[str, Callable[[Case, list[Tensor], torch.device], Drawn]] = {
    "mixed": make_mixed,
    "lattice": _make_lattice,
    "gaussian": make_gaussian,
    "heavy_tail": make_heavy_tail,
    "adversarial": make_adversarial,
    "position": make_position,
}
